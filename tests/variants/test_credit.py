"""Credits by hand, and against the game played out."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from games import State, complete_graph, form_links
from prompts import Decision
from rewards import Target, group_rewards
from variants.credit import discounted_return, made_consistent, return_credits, step_credits
from world.bcz import BCZ
from world.pgg import PGG

BOTH, ALL = complete_graph(2), np.array([10.0, 10.0])
PAIR = PGG((10.0, 10.0), 1.25, 0.5, 1.0)
TOGETHER = 12.5 * 2**0.5 - 1  # what each earns if they link and give all


def generous(state, seat, rng):
    """Links and gives all."""
    return Decision("G", BOTH[seat]) if state.kind == "G" else Decision("E", 10.0)


def effort(x):
    return Decision("E", x)


def test_discounted_return_by_hand():
    """Three rounds. What is given in no group is lost, so the first of them may earn 0."""
    start = State(PGG((10.0, 10.0), 1.25, 0.5, 1.0, "GE", 3))
    for gamma in (1.0, 0.5, 0.0):
        later = TOGETHER * (gamma + gamma**2)
        assert discounted_return(start, 0, BOTH, generous, gamma, 0) == pytest.approx(TOGETHER + later)
        assert discounted_return(start, 0, 0 * BOTH, generous, gamma, 0) == pytest.approx(later)
    second = start.step(BOTH).step(ALL).step(BOTH)  # the round before does not count any more
    keeps = 10 + TOGETHER - 12.5 * 2**0.5 / 2  # 10 kept, half of the pot of one
    paid = discounted_return(second, 0, np.array([0.0, 10.0]), generous, 0.5, 0)
    assert paid == pytest.approx(keeps + 0.5 * TOGETHER)


def test_credit_is_two_for_the_experts_decision_and_grows_with_the_return():
    t = Target(State(PAIR).step(BOTH), 0, ALL)
    decisions = [effort(10.0), effort(0.0), effort(5.0), None]
    paid, own, half, broken = return_credits(decisions, t, generous, 1.0, [0])
    assert paid == pytest.approx(2) and broken is None
    assert own == pytest.approx(2 * (10 - 1 + 12.5 * 2**0.5 / 2) / TOGETHER) and paid < half < own
    terms = group_rewards([effort(10.0), effort(0.0), None], t, credits=[paid, own, None])
    assert [x["r_S"] for x in terms] == pytest.approx([2.5, 0.5 + own, -0.5])


def test_a_graph_credit_is_the_value_of_the_state_that_it_leads_to():
    """The best row of own payoff at Nash efforts has the highest credit, whatever the expert's row says."""
    game = BCZ((1.0, 3.0, 1.0, 1.0), 0.08, 0.25, 9.0)

    def nash(state, seat, rng):
        return effort(float(game.nash_efforts(state.links)[seat]))

    t, values = Target(State(game), 0, complete_graph(4)), []
    rows = [Decision("G", np.array([0, *bits])) for bits in itertools.product((0, 1), repeat=3)]
    credits = return_credits(rows, t, nash, 1.0, [0])
    for row in rows:
        links_NN = form_links(np.vstack([row.action, t.actions[1:]]))
        values.append(game.payoffs(links_NN, game.nash_efforts(links_NN))[0])
    assert np.argsort(credits).tolist() == np.argsort(values).tolist()
    assert len(set(np.round(credits, 6))) > 3 and credits[-1] == pytest.approx(2)


def test_consistency_takes_the_distance_from_the_other_kinds_mean():
    credits = {("a", "G"): [2.0, 1.0, None], ("a", "E"): [1.0, 2.0, 3.0], ("b", "G"): [1.0, 2.0]}
    credits |= {("c", "E"): [None], ("d", "G"): [0.0, None], ("d", "E"): [1.0, 3.0, 0.0, 4.0]}
    assert made_consistent(credits, 0.0) == credits
    found = made_consistent(credits, 0.5)
    assert found[("a", "G")] == [2.0, 0.5, None]  # the efforts' mean is 2
    assert found[("a", "E")] == [0.75, 1.75, 2.25]  # the rows' mean is 1.5
    assert found[("b", "G")] == [1.0, 2.0] and found[("c", "E")] == [None]
    assert found[("d", "G")] == [-1.0, None]  # a credit of 0 is one like any other: the efforts' mean is 2
    assert found[("d", "E")] == [0.5, 1.5, 0.0, 2.0]  # the rows' mean is 0


def test_the_credits_of_a_step_come_back_to_their_rollouts():
    """Two conversations, of the first one prompt about links and two about efforts. With planners in the
    other seats who is linked earns TOGETHER, who links with nobody keeps 10, and who gives nothing takes half
    of the other's pot."""
    graph, efforts = Target(State(PAIR), 0, BOTH), Target(State(PAIR).step(BOTH), 0, ALL)
    batch = [
        SimpleNamespace(record=SimpleNamespace(game=game, seat=0, round=1), target=t)
        for game, t in ((0, graph), (0, efforts), (1, efforts), (0, efforts))
    ]
    rows = [Decision("G", BOTH[0]), Decision("G", 0 * BOTH[0]), None]
    answers = [rows, [effort(10.0), None], [effort(0.0)], [effort(0.0), effort(10.0)]]
    groups = [[SimpleNamespace(decision=d) for d in group] for group in answers]
    alone, takes = 2 * 10 / TOGETHER, 2 * (10 - 1 + 12.5 * 2**0.5 / 2) / TOGETHER
    of_rows, of_efforts = (2 + alone) / 2, (2 + takes + 2) / 3  # the means in conversation 0
    settings = dict(expert="planner", seed=0)
    for zeta in (0.0, 0.5):

        def less(credit, other):
            return credit - zeta * abs(credit - other)

        expected = [[less(2, of_efforts), less(alone, of_efforts), None], [less(2, of_rows), None]]
        expected += [[takes], [less(takes, of_rows), less(2, of_rows)]]  # game 1 has one kind of decision
        found = step_credits(SimpleNamespace(**settings, credit=[f"zeta={zeta}"]), batch, groups, 3)
        for group, values in zip(found, expected, strict=True):
            assert group == [None if v is None else pytest.approx(v) for v in values]
    assert step_credits(SimpleNamespace(credit=None), batch, groups, 3) == [None] * 4
