"""Rewards by hand.

The group of most tests: N = 4, the agent in seat 0, the experts propose the triangle of seats 0, 1, 2, and seat 3
offers seat 0 a link that is not returned.
"""

import itertools

import numpy as np
import pytest

from world.bcz import BCZ
from games import State, form_links
from world.draws import Family, draw_game
from world.pgg import PGG
from prompts import Decision
from rewards import (
    Memory,
    Target,
    accuracy,
    belief_accuracy,
    compliance,
    discounted_return,
    effort_score,
    f1,
    graph_score,
    group_rewards,
    made_consistent,
    return_credits,
    sample_level,
)

P = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


def target(seat, actions, cap=3.0):
    """What experts do in a game of as many agents; proposals or efforts."""
    actions = np.array(actions)
    return Target(BCZ((1.0,) * len(actions), 0.1, 0.1, cap), "G" if actions.ndim == 2 else "E", seat, actions)


TARGET = target(0, P)


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
    assert sample_level(effort(x), target(0, [expert, 1.0], cap)) == pytest.approx(score)


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
    t = target(0, proposals)
    assert graph_score(MORE, t) == 1 and sample_level(MORE, t) == pytest.approx(4 / 5 + 2 / 3)


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
            score = graph_score(Decision("G", mine), target(seat, proposals))
            assert score == pytest.approx(1 - differ / (N * (N - 1)))
            assert 0 <= score <= 1 and (proposals == kept).all()
            compared += 1
    assert compared == 100


def test_zero_proposals():
    """Nobody else chooses anybody: no row can form a link, so all rows have the same graph."""
    empty, full = group_rewards([row(0, 0, 0), row(1, 0, 1)], target(1, np.zeros((3, 3), int)))
    assert empty["s"] == full["s"] == 1 and empty["R_G"] == full["R_G"] == 2
    assert empty["r_S"] == 2.5 and full["r_S"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# groups


def test_all_terms_of_a_group():
    """Memory 0.9: only the expert's own row reaches it, and it alone is the group's best."""
    rewards = group_rewards([SAME, LESS, None, NONE], TARGET, memory_best=0.9)
    expected = [
        {"compliance": 0.5, "sample": 2, "belief": 0, "r_S": 2.5, "s": 1, "local": 0.5, "global": 0.5, "R_G": 2},
        {"compliance": 0.5, "sample": 4 / 3, "belief": 0, "r_S": 11 / 6, "s": 5 / 6, "local": 0, "global": 0, "R_G": 5 / 6},
        {"compliance": -0.5, "sample": 0, "belief": 0, "r_S": -0.5, "s": 0, "local": 0, "global": 0, "R_G": 0},
        {"compliance": 0.5, "sample": 1 / 3, "belief": 0, "r_S": 5 / 6, "s": 2 / 3, "local": 0, "global": 0, "R_G": 2 / 3},
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
                zero = {"sample": 0, "belief": 0, "s": 0, "local": 0, "global": 0, "R_G": 0}
                assert r == {"compliance": -0.5, "r_S": -0.5} | zero
            else:
                assert r["compliance"] == 0.5


def test_a_compliant_reply_with_score_zero_is_still_the_best_of_its_group():
    """N = 2: refusing the only link gives s = 0, tied with the reply that is not compliant, which gets nothing."""
    refused, broken = group_rewards([row(0, 0), None], target(0, [[0, 1], [1, 0]]))
    assert refused["s"] == 0 and refused["local"] == 0.5 and refused["R_G"] == 1
    assert broken["R_G"] == 0


def test_effort_groups_have_no_graph_level():
    rewards = group_rewards([effort(2.0), effort(1.0), None], target(0, [2.0, 1.0], 5.0))
    assert rewards == [
        {"compliance": 0.5, "sample": 2, "belief": 0, "r_S": 2.5},
        {"compliance": 0.5, "sample": 1, "belief": 0, "r_S": 1.5},
        {"compliance": -0.5, "sample": 0, "belief": 0, "r_S": -0.5},
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


# ---------------------------------------------------------------------------------------------------------------------
# other scores and credits


def constant_expert(links_NN, efforts_N):
    def play(state, seat, rng):
        return Decision("G", links_NN[seat]) if state.kind == "G" else Decision("E", float(efforts_N[seat]))

    return play


def test_welfare_score_by_hand():
    """N = 2, alpha 1, delta 0.2: a link gives x = 1.25 and W = 1.25^2 - 2c; none gives W = 1."""
    for c, linked in ((0.1, 1.0), (0.5, 0.5625)):
        t = Target(BCZ((1.0, 1.0), 0.2, c, 3.0), "G", 0, np.array([[0, 1], [1, 0]]))
        best = max(1.0, 1.25**2 - 2 * c)
        assert graph_score(row(0, 1), t, "welfare") == pytest.approx((1.25**2 - 2 * c) / best)
        assert graph_score(row(0, 0), t, "welfare") == pytest.approx(1 / best)
        assert graph_score(None, t, "welfare") == 0
        assert graph_score(row(0, 1), t, "welfare") == pytest.approx(linked)
    ruin = Target(BCZ((1.0, 1.0), 0.2, 5.0, 3.0), "G", 0, np.array([[0, 1], [1, 0]]))
    assert graph_score(row(0, 1), ruin, "welfare") == 0  # welfare is negative
    terms = group_rewards([row(0, 1), row(0, 0)], t, score="welfare")
    assert [x["s"] for x in terms] == pytest.approx([0.5625, 1]) and [x["local"] for x in terms] == [0, 0.5]


def test_welfare_score_of_public_goods_by_hand():
    """At planner efforts: two groups of three, each member gets 12.5 sqrt(3) and pays 6. Without agent 1 its group is a
    pair, whose members get 12.5 sqrt(2) and pay 3, and agent 1 keeps its 10. (At Nash efforts nobody would contribute,
    and the fewer links the better.)"""
    game = PGG((10.0,) * 6, 1.25, 0.5, 3.0)
    t = Target(game, "G", 0, np.kron(np.eye(2, dtype=int), 1 - np.eye(3, dtype=int)))
    three, pair = 3 * (12.5 * 3**0.5 - 6), 2 * (12.5 * 2**0.5 - 3)
    assert graph_score(row(0, 1, 1, 0, 0, 0), t, "welfare") == pytest.approx(1)
    assert graph_score(row(0, 1, 1, 1, 1, 1), t, "welfare") == pytest.approx(1)  # nobody answers
    assert graph_score(row(0, 0, 0, 0, 0, 0), t, "welfare") == pytest.approx((three + pair + 10) / (2 * three))
    assert graph_score(None, t, "welfare") == 0


def test_among_planners_the_planners_row_has_the_best_welfare_score():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(20):
        game = draw_game(rng, 5, family=Family("pgg"))
        proposals_NN = game.efficient_graph("planner")[0]
        for seat in range(5):
            t = Target(game, "G", seat, proposals_NN)
            own, nobody, any_row = (
                graph_score(Decision("G", r), t, "welfare")
                for r in (proposals_NN[seat], np.zeros(5, int), np.insert(rng.integers(0, 2, 4), seat, 0))
            )
            assert own == pytest.approx(1) and max(nobody, any_row) <= 1 + 1e-9
            if proposals_NN[seat].any():
                assert nobody < 1 - 1e-3
                compared += 1
    assert compared > 50


def test_belief_reward_is_added_to_the_sample_level_only():
    foresaw = Decision("G", P[0], np.array([0, 1, 1, 1]))  # who chooses seat 0: 1, 2 and 3
    half = Decision("G", P[0], np.array([0, 1, 0, 0]))
    assert belief_accuracy(foresaw, TARGET.game, 0, P) == 1
    plain, paid = group_rewards([foresaw, half, SAME], TARGET), group_rewards([foresaw, half, SAME], TARGET, w_belief=0.3)
    assert [x["belief"] for x in plain] == pytest.approx([1, 1 / 3, 0])
    for a, b, belief in zip(plain, paid, (1, 1 / 3, 0)):
        assert b["r_S"] == pytest.approx(a["r_S"] + 0.3 * belief) and b["R_G"] == a["R_G"]


def test_discounted_return_by_hand():
    """PGG, two agents, three rounds. Experts link and give all, which pays each 10 r sqrt(2) - c = 17.68 - 1."""
    game = PGG((10.0, 10.0), 1.25, 0.5, 1.0, "GE", 3)
    expert, both = constant_expert(np.array([[0, 1], [1, 0]]), np.array([10.0, 10.0])), np.array([[0, 1], [1, 0]])
    together = 12.5 * 2**0.5 - 1
    alone = 0.0  # what is given in no group is lost
    start = State(game)
    for gamma in (1.0, 0.5, 0.0):
        later = gamma + gamma**2
        assert discounted_return(start, 0, both, expert, gamma, 0) == pytest.approx(together * (1 + later))
        assert discounted_return(start, 0, 0 * both, expert, gamma, 0) == pytest.approx(alone + together * later)
    second = start.step(both).step(np.array([10.0, 10.0])).step(both)  # the round before does not count any more
    keeps = 10 + together - 12.5 * 2**0.5 / 2  # 10 kept, half of the pot of one
    assert discounted_return(second, 0, np.array([0.0, 10.0]), expert, 0.5, 0) == pytest.approx(keeps + 0.5 * together)


def test_credit_is_two_for_the_experts_decision_and_grows_with_the_return():
    game = PGG((10.0, 10.0), 1.25, 0.5, 1.0)
    both = np.array([[0, 1], [1, 0]])
    expert, state = constant_expert(both, np.array([10.0, 10.0])), State(game).step(both)
    t = Target(game, "E", 0, np.array([10.0, 10.0]))
    paid, own, half, broken = return_credits([effort(10.0), effort(0.0), effort(5.0), None], t, state, expert, 1.0, 0)
    together = 12.5 * 2**0.5 - 1
    assert paid == pytest.approx(2) and broken is None
    assert own == pytest.approx(2 * (10 - 1 + 12.5 * 2**0.5 / 2) / together) and paid < half < own
    terms = group_rewards([effort(10.0), effort(0.0), None], t, credits=[paid, own, None])
    assert [x["r_S"] for x in terms] == pytest.approx([2.5, 0.5 + own, -0.5])


def test_a_graph_credit_is_the_value_of_the_state_that_it_leads_to():
    """The best row of own payoff at Nash efforts has the highest credit, whatever the expert's row says."""
    game = BCZ((1.0, 3.0, 1.0, 1.0), 0.08, 0.25, 9.0)

    def nash(state, seat, rng):
        return Decision("E", float(game.nash_efforts(state.links)[seat]))

    t = Target(game, "G", 0, 1 - np.eye(4, dtype=int))
    rows = [row(0, a, b, c) for a, b, c in itertools.product((0, 1), repeat=3)]
    credits = return_credits(rows, t, State(game), nash, 1.0, 0)

    def value(r):
        proposals_NN = t.actions.copy()
        proposals_NN[0] = r.action
        links_NN = form_links(proposals_NN)
        return game.payoffs(links_NN, game.nash_efforts(links_NN))[0]

    values = [value(r) for r in rows]
    assert np.argsort(credits).tolist() == np.argsort(values).tolist() and len(set(np.round(credits, 6))) > 3
    assert credits[-1] == pytest.approx(2)


def test_consistency_takes_the_distance_from_the_other_kinds_mean():
    credits = {("a", "G"): [2.0, 1.0, None], ("a", "E"): [1.0, 2.0, 3.0], ("b", "G"): [1.0, 2.0], ("c", "E"): [None]}
    credits |= {("d", "G"): [0.0, None], ("d", "E"): [1.0, 3.0, 0.0, 4.0]}
    assert made_consistent(credits, 0.0) == credits
    found = made_consistent(credits, 0.5)
    assert found[("a", "G")] == [2.0, 0.5, None]  # the efforts' mean is 2
    assert found[("a", "E")] == [0.75, 1.75, 2.25]  # the rows' mean is 1.5
    assert found[("b", "G")] == [1.0, 2.0] and found[("c", "E")] == [None]
    assert found[("d", "G")] == [-1.0, None]  # a credit of 0 is one like any other: the efforts' mean is 2
    assert found[("d", "E")] == [0.5, 1.5, 0.0, 2.0]  # the rows' mean is 0
