"""Rewards by hand.

The group of most tests: N = 4, the agent in seat 0, the experts propose the triangle of seats 0, 1, 2, and seat 3
offers seat 0 a link that is not returned.
"""

import itertools

import numpy as np
import pytest

from prompts import Decision
from rewards import Memory, Target, accuracy, compliance, effort_score, f1, graph_score, group_rewards, sample_level

P = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
TARGET = Target("G", 0, 3.0, proposals_NN=P)


def row(*entries):
    return Decision("G", np.array(entries))


def effort(x):
    return Decision("E", x)


SAME, LESS, MORE, NONE = row(0, 1, 1, 0), row(0, 1, 0, 0), row(0, 1, 1, 1), row(0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# sample level


@pytest.mark.parametrize(
    "mine, expert, expected_f1, expected_accuracy",
    [
        ([0, 1, 1, 0], [0, 1, 1, 0], 1, 1),
        ([0, 1, 0, 0], [0, 1, 1, 0], 2 / 3, 2 / 3),  # TP 1, FP 0, FN 1
        ([0, 1, 1, 1], [0, 1, 1, 0], 4 / 5, 2 / 3),  # TP 2, FP 1
        ([0, 0, 0, 1], [0, 1, 1, 0], 0, 0),
        ([0, 0, 0, 0], [0, 1, 1, 0], 0, 1 / 3),  # one row empty
        ([0, 1, 1, 0], [0, 0, 0, 0], 0, 1 / 3),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1, 1),  # both
    ],
)
def test_f1_and_accuracy(mine, expert, expected_f1, expected_accuracy):
    assert f1(np.array(mine), np.array(expert), 0) == pytest.approx(expected_f1)
    assert accuracy(np.array(mine), np.array(expert), 0) == pytest.approx(expected_accuracy)


def test_f1_is_the_harmonic_mean_of_precision_and_recall_over_the_others():
    compared = 0
    for seat in range(4):
        others = [j for j in range(4) if j != seat]
        for bits in itertools.product((0, 1), repeat=6):
            mine, expert = np.zeros((2, 4), int)
            mine[others], expert[others] = bits[:3], bits[3:]
            hits = sum(mine[j] == expert[j] for j in others)
            assert accuracy(mine, expert, seat) == pytest.approx(hits / 3)
            tp = sum(mine[j] == expert[j] == 1 for j in others)
            if tp:
                precision, recall = tp / mine.sum(), tp / expert.sum()
                assert f1(mine, expert, seat) == pytest.approx(2 * precision * recall / (precision + recall))
            else:
                assert f1(mine, expert, seat) == (not mine.any() and not expert.any())
            compared += 1
    assert compared == 256


def test_the_own_entry_does_not_count():
    a, b = np.array([0, 1, 1]), np.array([0, 1, 0])
    assert accuracy(a, b, 2) == 1 and f1(a, b, 2) == 1
    assert accuracy(a, b, 0) == 0.5


@pytest.mark.parametrize(
    "x, expert, cap, score",
    [
        (2.0, 2.0, 5.0, 2.0),
        (1.0, 2.0, 5.0, 1.0),  # half the expert's effort away
        (3.0, 2.0, 5.0, 1.0),
        (1.5, 2.0, 5.0, 1.5),
        (0.0, 2.0, 5.0, 0.0),  # as far as the effort itself
        (4.0, 2.0, 5.0, 0.0),
        (5.0, 2.0, 5.0, 0.0),  # farther: not negative
        (0.0, 0.0, 10.0, 2.0),  # expert 0: 5 % of the cap is the scale
        (0.25, 0.0, 10.0, 1.0),
        (0.5, 0.0, 10.0, 0.0),
        (0.1, 0.1, 10.0, 2.0),
        (0.35, 0.1, 10.0, 1.0),  # 0.1 is below 5 % of the cap: the scale is 0.5
        (10.0, 10.0, 10.0, 2.0),
    ],
)
def test_effort_score(x, expert, cap, score):
    assert effort_score(x, expert, cap) == pytest.approx(score)
    assert sample_level(effort(x), Target("E", 0, cap, effort=expert)) == pytest.approx(score)


def test_compliance_and_sample_level():
    assert compliance(SAME) == 0.5 and compliance(NONE) == 0.5 and compliance(None) == -0.5
    assert sample_level(SAME, TARGET) == 2
    assert sample_level(LESS, TARGET) == pytest.approx(4 / 3)
    assert sample_level(NONE, TARGET) == pytest.approx(1 / 3)
    assert sample_level(None, TARGET) == 0


# ---------------------------------------------------------------------------------------------------------------------
# graph level


@pytest.mark.parametrize("decision, s", [(SAME, 1), (LESS, 5 / 6), (MORE, 5 / 6), (NONE, 2 / 3), (None, 0)])
def test_graph_score_by_hand(decision, s):
    """LESS loses link 0-2: 2 of 12 entries. MORE gains 0-3, which seat 3 had offered. NONE loses two links."""
    assert graph_score(decision, TARGET) == pytest.approx(s)


def test_an_unrequited_choice_costs_accuracy_but_not_the_graph():
    proposals = P.copy()
    proposals[3, 0] = 0
    target = Target("G", 0, 3.0, proposals_NN=proposals)
    assert graph_score(MORE, target) == 1 and sample_level(MORE, target) == pytest.approx(4 / 5 + 2 / 3)


def test_graph_score_by_a_loop():
    rng, compared = np.random.default_rng(0), 0
    for N in (2, 3, 4, 5, 8):
        for _ in range(20):
            proposals = rng.integers(0, 2, (N, N))
            np.fill_diagonal(proposals, 0)
            seat, mine = int(rng.integers(N)), rng.integers(0, 2, N)
            mine[seat] = 0
            kept, differ = proposals.copy(), 0
            for i in range(N):
                for j in range(N):
                    ours_ij = mine[j] if i == seat else proposals[i, j]
                    ours_ji = mine[i] if j == seat else proposals[j, i]
                    differ += (ours_ij and ours_ji) != (proposals[i, j] and proposals[j, i])
            score = graph_score(Decision("G", mine), Target("G", seat, 3.0, proposals_NN=proposals))
            assert score == pytest.approx(1 - differ / (N * (N - 1)))
            assert 0 <= score <= 1 and (proposals == kept).all()
            compared += 1
    assert compared == 100


def test_zero_proposals():
    """Nobody else chooses anybody: no row can form a link, so all rows have the same graph."""
    target = Target("G", 1, 3.0, proposals_NN=np.zeros((3, 3), int))
    empty, full = group_rewards([row(0, 0, 0), row(1, 0, 1)], target)
    assert empty["s"] == full["s"] == 1 and empty["R_G"] == full["R_G"] == 2
    assert empty["r_S"] == 2.5 and full["r_S"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# groups


def test_all_terms_of_a_group():
    """Memory 0.9: only the expert's own row reaches it, and it alone is the group's best."""
    rewards = group_rewards([SAME, LESS, None, NONE], TARGET, memory_best=0.9)
    expected = [
        {"compliance": 0.5, "sample": 2, "r_S": 2.5, "s": 1, "local": 0.5, "global": 0.5, "R_G": 2},
        {"compliance": 0.5, "sample": 4 / 3, "r_S": 11 / 6, "s": 5 / 6, "local": 0, "global": 0, "R_G": 5 / 6},
        {"compliance": -0.5, "sample": 0, "r_S": -0.5, "s": 0, "local": 0, "global": 0, "R_G": 0},
        {"compliance": 0.5, "sample": 1 / 3, "r_S": 5 / 6, "s": 2 / 3, "local": 0, "global": 0, "R_G": 2 / 3},
    ]
    assert [r.keys() for r in rewards] == [e.keys() for e in expected]
    for got, want in zip(rewards, expected):
        assert got == pytest.approx(want)


def test_ties_share_the_local_bonus_and_equal_memory_earns_the_global_one():
    rewards = group_rewards([LESS, MORE, NONE], TARGET, memory_best=graph_score(LESS, TARGET))
    assert [r["local"] for r in rewards] == [0.5, 0.5, 0]
    assert [r["global"] for r in rewards] == [0.5, 0.5, 0]


def test_the_two_bonuses_are_apart():
    local = group_rewards([LESS, NONE], TARGET, memory_best=1.0)
    assert [(r["local"], r["global"]) for r in local] == [(0.5, 0), (0, 0)]
    both = group_rewards([LESS, NONE], TARGET, memory_best=0.7)
    assert [(r["local"], r["global"]) for r in both] == [(0.5, 0.5), (0, 0)]
    empty_memory = group_rewards([LESS, NONE], TARGET)
    assert [(r["local"], r["global"]) for r in empty_memory] == [(0.5, 0.5), (0, 0.5)]


def test_the_weights_of_the_bonuses():
    (r,) = group_rewards([SAME], TARGET, memory_best=1.0, w_local=0.2, w_global=3.0)
    assert r["local"] == 0.2 and r["global"] == 3 and r["R_G"] == pytest.approx(4.2)
    (r,) = group_rewards([SAME], TARGET, w_local=0, w_global=0)
    assert r["R_G"] == r["s"] == 1


@pytest.mark.parametrize("memory", (0.0, 1.0))
def test_a_reply_that_is_not_compliant_gets_only_its_penalty(memory):
    for group in ([None], [None] * 4, [None, NONE], [SAME, None]):
        for decision, r in zip(group, group_rewards(group, TARGET, memory)):
            if decision is None:
                assert r == {"compliance": -0.5, "sample": 0, "r_S": -0.5, "s": 0, "local": 0, "global": 0, "R_G": 0}
            else:
                assert r["compliance"] == 0.5


def test_a_compliant_reply_with_score_zero_is_still_the_best_of_its_group():
    """N = 2: refusing the only link gives s = 0, tied with the reply that is not compliant, which gets nothing."""
    target = Target("G", 0, 3.0, proposals_NN=np.array([[0, 1], [1, 0]]))
    refused, broken = group_rewards([row(0, 0), None], target)
    assert refused["s"] == 0 and refused["local"] == 0.5 and refused["R_G"] == 1
    assert broken["R_G"] == 0


def test_effort_groups_have_no_graph_level():
    target = Target("E", 0, 5.0, effort=2.0)
    rewards = group_rewards([effort(2.0), effort(1.0), None], target)
    assert rewards == [
        {"compliance": 0.5, "sample": 2, "r_S": 2.5},
        {"compliance": 0.5, "sample": 1, "r_S": 1.5},
        {"compliance": -0.5, "sample": 0, "r_S": -0.5},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_memory_is_updated_only_by_update_and_never_falls():
    memory = Memory()
    assert memory.get("a") == 0
    group_rewards([SAME, LESS], TARGET, memory.get("a"))
    assert memory.get("a") == 0 and memory.best == {}
    memory.update("a", [0.2, 0.7, 0.0])
    assert memory.get("a") == 0.7 and memory.get("b") == 0
    memory.update("a", [0.1])
    assert memory.get("a") == 0.7
    memory.update("b", [0.0, 0.0])
    assert memory.get("b") == 0


def test_memory_does_not_share_its_dictionary():
    saved = {"a": 0.5}
    memory = Memory(saved)
    memory.update("a", [0.9])
    assert saved == {"a": 0.5} and Memory(memory.best).get("a") == 0.9
