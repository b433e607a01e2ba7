"""The lenient reading of replies: what can be read in them, and what cannot."""

import numpy as np
import pytest

from play.repair import repair_reply
from prompts import parse_reply

ROWS = [
    ("Decision: [0, 1, 0, 1]", [0, 1, 0, 1]),  # compliant: as it is
    ("Decision: [0, 1, 0, 1].", [0, 1, 0, 1]),
    ("Decision: I choose [0, 1, 0, 1], because", [0, 1, 0, 1]),
    ("Decision: 0, 1, 0, 1", [0, 1, 0, 1]),
    ("Decision: [0 1 0 1]", [0, 1, 0, 1]),
    ("Decision: [1, 1, 0, 1]", [0, 1, 0, 1]),  # own position
    ("Decision: [0, 1, 1]", [0, 1, 1, 0]),
    ("Decision: [0, 1, 1, 1, 1, 0]", [0, 1, 1, 1]),
    ("Decision: [0, 2, 0, 1]", [0, 1, 0, 1]),
    ("Decision: [0, 1.54, 0.3, -1]", [0, 1, 0, 0]),
    ("Decision: [0, 1, 0, 1", [0, 1, 0, 1]),  # cut off
    ("Decision: [1]", [0, 0, 0, 0]),
    ("Decision: [0, 1, 1, 1]\nDecision: [0, 0, 0, 1] or so", [0, 0, 0, 1]),  # the last
    ("Belief: [0, 1, 1, 1] Decision: [0, 1, 0, 1]", [0, 1, 0, 1]),  # on one line
    ("Decision:\n[0, 1, 0, 1]\n[0, 0, 0, 0]", [0, 1, 0, 1]),
    ("I link: [0, 1, 0, 1]", [0, 1, 0, 1]),
    ("[0, 0, 0, 1] and then [0, 1, 0, 0]", [0, 1, 0, 0]),
    ("Belief: [0, 1, 1, 1]", None),  # a belief is no decision
    ("Belief: [0, 1, 1, 1]\nmine: [0, 1, 0, 0]", [0, 1, 0, 0]),
    *((reply, None) for reply in ("Decision: agents 2 and 3", "Decision: 0101", "Decision:", "nothing", "")),
]
EFFORTS = [
    *((f"Decision: {text}", 1.5) for text in ("1.5", "1.5 units", "about 1.5.", "[1.5, 2]")),
    *(
        ("Decision: 7", 5.0),
        ("Decision: -2", 0.0),
        ("Decision: 1e999, or 2", 2.0),
        ("My effort is 2.25", 2.25),
    ),
    *((reply, None) for reply in ("Decision: nan", "Decision: 1.5x", "none", "Belief: [0, 3, 3, 3]")),
    *(("Belief: [0, 3, 3, 3]\nI take 2", 2.0), ("Decision: 1\nDecision: 2!", 2.0)),
]


@pytest.mark.parametrize("reply, row", ROWS)
def test_rows_that_can_be_read(reply, row):
    decision = repair_reply(reply, "G", 0, 4, 5.0)
    if row is None:
        assert decision is None
    else:
        assert decision.action.tolist() == row and decision.action.dtype == np.zeros(1, int).dtype
        assert parse_reply(f"Decision: {row}", "G", 0, 4, 5.0) is not None


@pytest.mark.parametrize("reply, effort", EFFORTS)
def test_efforts_that_can_be_read(reply, effort):
    decision = repair_reply(reply, "E", 0, 4, 5.0)
    assert (decision and decision.action) == effort


def test_the_belief_is_kept():
    for kind, belief in (("G", [0, 1, 0, 1]), ("E", [0, 1.5, 2, 1])):
        decision = repair_reply(f"Belief: {belief}\nDecision: [0, 1, 0", kind, 0, 4, 5.0)
        assert decision.belief.tolist() == belief
        assert np.array_equal(decision.action, [0, 1, 0, 0] if kind == "G" else 0)
