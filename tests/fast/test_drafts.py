"""Drafts by hand. That they change no reply is tested in test_engine.py."""

from fast.drafts import Drafts

END = 2


def test_a_draft_is_what_has_followed_the_longest_known_context():
    drafts = Drafts([[5, 6, 7, 8, END]] * 3)
    assert drafts.draft([], 9, (END,)) == [5, 6, 7, 8]  # without the end
    assert drafts.draft([], 2, (END,)) == [5, 6]
    assert drafts.draft([9, 6, 7], 9, (END,)) == [8]  # 6 7 is known, 9 6 7 is not
    assert drafts.draft([9, 7], 9, (END,)) == []  # one token is no context
    assert drafts.draft([5, 6, 7, 8], 9, (END,)) == []
    drafts.learn([9, 6, 7, 4, 4, 4], start=3)
    drafts.learn([9, 6, 7, 4, 4, 4], start=3)
    assert drafts.draft([9, 6, 7], 2, (END,)) == [4, 4]  # the longer context counts, 9 6 7 -> 4
    assert drafts.draft([5, 6, 7], 9, (END,)) == [8]


def test_a_draft_ends_where_replies_part():
    drafts = Drafts([[5, 6, 1, 8], [5, 6, 1, 9], [5, 6, 3, 8], [5, 6, 4, 8]])
    assert drafts.draft([], 9, ()) == [5, 6]  # each sure to 4 / 4.1; the next token to 2 / 4.1
    assert drafts.draft([5, 6, 3], 9, ()) == [8]  # seen once: 1 / 1.1


def test_without_texts_to_begin_with_nothing_is_drafted():
    drafts = Drafts(None)
    drafts.learn([5, 6, 7] * 4)
    assert drafts.draft([5, 6], 9, ()) == []
