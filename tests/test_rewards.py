"""Rewards by hand.

The group of most tests: N = 4, the agent in seat 0, the experts propose the triangle of seats 0, 1, 2, and
seat 3 offers seat 0 a link that is not returned.
"""

import itertools

import numpy as np
import pytest
from tables import effort, group_of, row

import rewards
from decisions import EFFORTS, LINKS
from games import Decision, State, complete_graph, empty_graph
from rewards import Memory, Target, accuracy, belief_accuracy, f1, graph_likeness, likeness
from variants.game import welfare
from world.bcz import BCZ
from world.draws import Family, draw_game
from world.pgg import PGG

P = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])


def target(seat, actions, cap=3.0):
    """What experts do in a game of as many agents; proposals, or efforts on nobody's links."""
    actions = np.array(actions)
    state = State(BCZ((1.0,) * len(actions), 0.1, 0.1, cap))
    return Target(state if actions.ndim == 2 else state.step(empty_graph(len(actions))), seat, actions)


TARGET = target(0, P)


SAME, LESS, MORE, NONE = row(0, 1, 1, 0), row(0, 1, 0, 0), row(0, 1, 1, 1), row(0, 0, 0, 0)


def rewards_of(decisions, target, best=0.0, **options):
    """All terms of a group of replies with these decisions. best: in memory, of this instance."""
    group, memory = group_of(decisions), Memory({target.game.key: best})
    rewards.expert_rewards([target], [group], memory, **options)
    assert memory.best == {target.game.key: best}
    return [o.rewards for o in group]


@pytest.mark.parametrize("seat", range(4))
def test_f1_is_the_harmonic_mean_of_precision_and_recall_over_the_others(seat):
    others = [j for j in range(4) if j != seat]
    for bits in itertools.product((0, 1), repeat=6):
        mine, expert = np.zeros((2, 4), int)
        mine[others], expert[others] = bits[:3], bits[3:]
        assert accuracy(mine, expert, seat) == pytest.approx(sum(mine[j] == expert[j] for j in others) / 3)
        tp = sum(mine[j] == expert[j] == 1 for j in others)
        if tp:
            precision, recall = tp / mine.sum(), tp / expert.sum()
            assert f1(mine, expert, seat) == pytest.approx(2 * precision * recall / (precision + recall))
        else:
            assert f1(mine, expert, seat) == (not mine.any() and not expert.any())
    a, b = np.array([0, 1, 1]), np.array([0, 1, 0])  # the own entry does not count
    assert accuracy(a, b, 2) == 1 and f1(a, b, 2) == 1 and accuracy(a, b, 0) == 0.5


EFFORT_SCORES = [  # expert's effort, cap, {own: score}; 5 % of the cap is the scale of smaller efforts
    (2.0, 5.0, {2.0: 2, 1.0: 1, 3.0: 1, 1.5: 1.5, 0.0: 0, 4.0: 0, 5.0: 0}),  # farther off: not negative
    (0.0, 10.0, {0.0: 2, 0.25: 1, 0.5: 0}),
    (0.1, 10.0, {0.1: 2, 0.35: 1}),
    (10.0, 10.0, {10.0: 2}),
]


@pytest.mark.parametrize("expert, cap, scores", EFFORT_SCORES)
def test_effort_score(expert, cap, scores):
    for x, score in scores.items():
        assert rewards.effort_score(x, expert, cap) == pytest.approx(score)
        assert likeness(effort(x), target(0, [expert, 1.0], cap)) == pytest.approx(score)


def test_graph_score_by_a_loop():
    rng = np.random.default_rng(0)
    for N in (2, 3, 4, 5, 8) * 20:
        proposals = rng.integers(0, 2, (N, N)) * complete_graph(N)
        seat, mine = int(rng.integers(N)), rng.integers(0, 2, N)
        mine[seat] = 0
        before, differ = proposals.copy(), 0
        for i, j in itertools.product(range(N), repeat=2):
            ours_ij = mine[j] if i == seat else proposals[i, j]
            ours_ji = mine[i] if j == seat else proposals[j, i]
            differ += (ours_ij and ours_ji) != (proposals[i, j] and proposals[j, i])
        score = graph_likeness(Decision(LINKS, mine), target(seat, proposals))
        assert score == pytest.approx(1 - differ / (N * (N - 1)))
        assert 0 <= score <= 1 and (proposals == before).all()


def test_all_terms_of_a_group():
    """Memory 0.9: only the expert's own row reaches it, and it alone is the group's best. A reply that is not
    compliant gets only its penalty, whatever the memory is; efforts have no graph level."""
    keys = ("compliance", "sample", "belief", "r_S", "s", "local", "global", "R_G")
    expected = [
        (0.5, 2, 0, 2.5, 1, 0.5, 0.5, 2),
        (0.5, 4 / 3, 0, 11 / 6, 5 / 6, 0, 0, 5 / 6),
        (-0.5, 0, 0, -0.5, 0, 0, 0, 0),
        (0.5, 1 / 3, 0, 5 / 6, 2 / 3, 0, 0, 2 / 3),
    ]
    for terms, values in zip(rewards_of([SAME, LESS, None, NONE], TARGET, 0.9), expected, strict=True):
        assert tuple(terms) == keys and tuple(terms.values()) == pytest.approx(values)
    broken = dict(zip(keys, expected[2], strict=True))
    for group in ([None], [None] * 4, [None, NONE], [SAME, None]):
        for best in (0.0, 1.0):
            terms = rewards_of(group, TARGET, best)
            assert all((a == broken) == (d is None) for d, a in zip(group, terms, strict=True))
    efforts = rewards_of([effort(2.0), effort(1.0), None], target(0, [2.0, 1.0], 5.0))
    expected = [(0.5, 2, 0, 2.5), (0.5, 1, 0, 1.5), (-0.5, 0, 0, -0.5)]
    assert efforts == [dict(zip(keys, values, strict=False)) for values in expected]


LOW = graph_likeness(LESS, TARGET)
BONUSES = [  # group, memory, local bonuses, global bonuses
    ([LESS, MORE, NONE], LOW, [0.5, 0.5, 0], [0.5, 0.5, 0]),  # ties share, equal is enough
    ([LESS, NONE], 1.0, [0.5, 0], [0, 0]),
    ([LESS, NONE], 0.7, [0.5, 0], [0.5, 0]),
    ([LESS, NONE], 0.0, [0.5, 0], [0.5, 0.5]),
]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 3.0), (0, 0)])
@pytest.mark.parametrize("group, best, local, globally", BONUSES)
def test_the_two_bonuses_are_apart_and_have_their_weights(group, best, local, globally, weights):
    terms = rewards_of(group, TARGET, best, weights=dict(zip(("local", "global"), weights, strict=True)))
    assert [r["local"] for r in terms] == pytest.approx([2 * weights[0] * v for v in local])
    assert [r["global"] for r in terms] == pytest.approx([2 * weights[1] * v for v in globally])
    assert all(r["R_G"] == pytest.approx(r["s"] + r["local"] + r["global"]) for r in terms)


def test_a_compliant_reply_with_score_zero_is_still_the_best_of_its_group():
    """N = 2: refusing the only link gives s = 0, tied with the reply that is not compliant, but paid."""
    refused, broken = rewards_of([row(0, 0), None], target(0, [[0, 1], [1, 0]]))
    assert refused["s"] == 0 and refused["local"] == 0.5 and refused["R_G"] == 1
    assert broken["R_G"] == 0


def test_optional_terms_are_added_to_the_sample_level_only(monkeypatch):
    foresaw = Decision(LINKS, P[0], np.array([0, 1, 1, 1]))  # who chooses seat 0: 1, 2 and 3
    half = Decision(LINKS, P[0], np.array([0, 1, 0, 0]))
    assert belief_accuracy(foresaw, TARGET) == 1
    monkeypatch.setitem(rewards.TERMS, "links", lambda sample, t: float(sample.decision.action.sum()))
    group = [foresaw, half, MORE]
    plain = rewards_of(group, TARGET)
    paid = rewards_of(group, TARGET, weights=rewards.WEIGHTS | {"belief": 0.3, "links": 0.1})
    assert [x["belief"] for x in plain] == pytest.approx([1, 1 / 3, 0])
    assert [x["links"] for x in paid] == [2, 2, 3]
    for a, b in zip(plain, paid, strict=True):
        assert b["r_S"] == pytest.approx(a["r_S"] + 0.3 * a["belief"] + 0.1 * a["links"])
        assert b["R_G"] == a["R_G"]


def test_belief_accuracy_of_efforts_by_hand():
    """Others 2 and 1, believed 1.5 and 3: 1 - 0.25, and 0 since farther off than the effort itself; 5 % of
    the cap is the scale of smaller ones. Without a decision or a belief it is 0."""
    t = target(0, [1.0, 2.0, 1.0], 5.0)
    assert belief_accuracy(Decision(EFFORTS, 1.0, np.array([0, 1.5, 3.0])), t) == pytest.approx(0.75 / 2)
    near = Decision(EFFORTS, 1.0, np.array([0, 0.1, 1.0]))
    assert belief_accuracy(near, target(0, [1.0, 0.0, 1.0], 10.0)) == pytest.approx((0.8 + 1) / 2)
    assert belief_accuracy(effort(1.0), t) == belief_accuracy(None, t) == 0


def test_memory_is_updated_only_by_update_and_never_falls():
    """And all groups of a step see the same memory. The dictionary that is given is the one that changes."""
    best, other = {}, Target(State(BCZ((2.0, 1.0), 0.1, 0.1, 3.0)), 0, complete_graph(2))
    memory, targets = Memory(best), [TARGET, target(0, [1.0] * 4), other, TARGET]

    def step(*decisions):
        groups = [group_of([d]) for d in decisions]
        rewards.expert_rewards(targets, groups, memory)
        before = dict(best)
        memory.update(targets, groups)
        return before, [o.rewards.get("global") for (o,) in groups]

    assert step(NONE, effort(1.0), row(0, 0), LESS) == ({}, [0.5, None, 0.5, 0.5])
    assert best == {TARGET.game.key: LOW, other.game.key: 0}
    assert step(NONE, effort(1.0), row(0, 1), None)[1] == [0, None, 0.5, 0]
    assert best == {TARGET.game.key: LOW, other.game.key: 1}


@pytest.mark.parametrize("c, linked, alone", [(0.1, 1.0, 1 / (1.25**2 - 0.2)), (0.5, 0.5625, 1), (5.0, 0, 1)])
def test_welfare_score_by_hand(c, linked, alone):
    """N = 2, alpha 1, delta 0.2: a link gives x = 1.25 and W = 1.25^2 - 2c, 0 if that is negative; none 1."""
    t = Target(State(BCZ((1.0, 1.0), 0.2, c, 3.0)), 0, complete_graph(2))
    scores = [welfare(d, t) for d in (row(0, 1), row(0, 0), None)]
    assert scores == pytest.approx([linked, alone, 0])
    terms = rewards_of([row(0, 1), row(0, 0)], t, score=welfare)
    assert [x["s"] for x in terms] == scores[:2]
    assert [x["local"] for x in terms] == ([0.5, 0] if linked == 1 else [0, 0.5])
    assert welfare(effort(1.0), target(0, [1.0, 1.0])) is None


def test_welfare_score_of_public_goods_by_hand():
    """At planner efforts: two groups of three, each member gets 12.5 sqrt(3) and pays 6. Without agent 1 its
    group is a pair, whose members get 12.5 sqrt(2) and pay 3, and agent 1 keeps its 10. (At Nash efforts
    nobody would contribute, and the fewer links the better.)"""
    experts = np.kron(np.eye(2, dtype=int), complete_graph(3))
    t = Target(State(PGG((10.0,) * 6, 1.25, 0.5, 3.0)), 0, experts)
    three, pair = 3 * (12.5 * 3**0.5 - 6), 2 * (12.5 * 2**0.5 - 3)
    assert welfare(row(0, 1, 1, 0, 0, 0), t) == pytest.approx(1)
    assert welfare(row(0, 1, 1, 1, 1, 1), t) == pytest.approx(1)  # nobody answers
    assert welfare(row(0, 0, 0, 0, 0, 0), t) == pytest.approx((three + pair + 10) / (2 * three))
    assert welfare(None, t) == 0


def test_among_planners_the_planners_row_has_the_best_welfare_score():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(20):
        game = draw_game(rng, 5, family=Family("pgg"))
        proposals_NN = game.efficient_graph("planner")[0]
        for seat in range(5):
            t = Target(State(game), seat, proposals_NN)
            rows = (proposals_NN[seat], np.zeros(5, int), np.insert(rng.integers(0, 2, 4), seat, 0))
            own, nobody, any_row = (welfare(Decision(LINKS, r), t) for r in rows)
            assert own == 1 and max(nobody, any_row) <= 1  # exactly: bonuses go by comparisons
            if proposals_NN[seat].any():
                assert nobody < 1 - 1e-3
                compared += 1
    assert compared > 50
