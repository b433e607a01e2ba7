"""Credits by hand, and against the game played out."""

import itertools

import numpy as np
import pytest
from tables import effort, group_of, row

import rewards
from decisions import LINKS
from games import Decision, State, complete_graph, form_links
from play.cast import make_expert
from rewards import Memory, Target
from variants.credit import credit_rewards, discounted_return, return_credits
from world.bcz import BCZ
from world.pgg import PGG

BOTH, ALL = complete_graph(2), np.array([10.0, 10.0])
PAIR = PGG((10.0, 10.0), 1.25, 0.5, 1.0)
TOGETHER = 12.5 * 2**0.5 - 1  # what each earns if they link and give all
TAKES = 10 - 1 + 12.5 * 2**0.5 / 2  # what one earns who is linked, keeps all and gets half of the other's pot


def generous(state, seat, rng):
    """Links and gives all."""
    return Decision(LINKS, BOTH[seat]) if state.kind is LINKS else effort(10.0)


def test_discounted_return_by_hand():
    """Three rounds. What is given in no group is lost, so the first of them may earn 0."""
    start = State(PGG((10.0, 10.0), 1.25, 0.5, 1.0, "GE", 3))
    for gamma in (1.0, 0.5, 0.0):
        later = TOGETHER * (gamma + gamma**2)
        assert discounted_return(start, 0, BOTH, generous, gamma, 0) == pytest.approx(TOGETHER + later)
        assert discounted_return(start, 0, 0 * BOTH, generous, gamma, 0) == pytest.approx(later)
    second = start.step(BOTH).step(ALL).step(BOTH)  # the round before does not count any more
    paid = discounted_return(second, 0, np.array([0.0, 10.0]), generous, 0.5, 0)
    assert paid == pytest.approx(TAKES + 0.5 * TOGETHER)


def test_credit_is_two_for_the_experts_decision_and_grows_with_the_return():
    t = Target(State(PAIR).step(BOTH), 0, ALL)
    decisions = [effort(10.0), effort(0.0), effort(5.0), None]
    paid, own, half, broken = return_credits(decisions, t, generous, 1.0, 0)
    assert paid == pytest.approx(2) and broken is None
    assert own == pytest.approx(2 * TAKES / TOGETHER) and paid < half < own


def test_a_graph_credit_is_the_value_of_the_state_that_it_leads_to():
    """The best row of own payoff at Nash efforts has the highest credit, whatever the expert's row says."""
    game = BCZ((1.0, 3.0, 1.0, 1.0), 0.08, 0.25, 9.0)

    def nash(state, seat, rng):
        return effort(float(game.nash_efforts(state.links)[seat]))

    t, values = Target(State(game), 0, complete_graph(4)), []
    rows = [row(0, *bits) for bits in itertools.product((0, 1), repeat=3)]
    credits = return_credits(rows, t, nash, 1.0, 0)
    for own in rows:
        links_NN = form_links(np.vstack([own.action, t.actions[1:]]))
        values.append(game.payoffs(links_NN, game.nash_efforts(links_NN))[0])
    assert np.argsort(credits).tolist() == np.argsort(values).tolist()
    assert len(set(np.round(credits, 6))) > 3 and credits[-1] == pytest.approx(2)


def step(targets, decisions, zeta):
    """The terms of all replies of a step with these decisions, among planners."""
    groups = [group_of(group) for group in decisions]
    weights = rewards.WEIGHTS | {"gamma": 1.0, "zeta": zeta}
    credit_rewards(targets, groups, Memory(), weights=weights, expert=make_expert("planner"), seed=0)
    return [[o.rewards for o in group] for group in groups]


@pytest.mark.parametrize("zeta", [0.0, 0.5])
def test_the_sample_levels_of_a_step(zeta):
    """Two conversations, of the first one prompt about links and two about efforts, of the second only
    efforts. Among planners an agent that links earns TOGETHER, and one that does not keeps 10. With zeta a
    credit pays its distance from the mean of the other kind's."""
    graph, efforts = Target(State(PAIR), 0, BOTH, 5), Target(State(PAIR).step(BOTH), 0, ALL, 5)
    targets = [graph, efforts, Target(efforts.state, 0, ALL, 6), efforts]
    decisions = [[row(0, 1), row(0, 0), None], [effort(10.0), None]]
    decisions += [[effort(0.0)], [effort(0.0), effort(10.0)]]
    alone, takes = 2 * 10 / TOGETHER, 2 * TAKES / TOGETHER
    of_rows, of_efforts = (2 + alone) / 2, (2 + takes + 2) / 3  # the means in game 5
    expected = [[2 - zeta * (of_efforts - 2), alone - zeta * (of_efforts - alone), 0]]
    expected += [[2 - zeta * (2 - of_rows), 0], [takes]]
    expected += [[takes - zeta * (takes - of_rows), 2 - zeta * (2 - of_rows)]]
    groups = step(targets, decisions, zeta)
    for group, values in zip(groups, expected, strict=True):
        assert [terms["sample"] for terms in group] == pytest.approx(values)
        assert all(x["r_S"] == pytest.approx(x["compliance"] + x["sample"]) for x in group)
    assert [terms["s"] for terms in groups[0]] == [1, 0, 0] and "s" not in groups[1][0]


def test_a_credit_of_zero_counts_in_the_mean():
    """The effort that loses as much as the expert's earns has the credit 0, which is one like any other."""
    game, no_links = PGG((10.0, 10.0), 1.25, 0.5, 30.0), 0 * BOTH  # a link costs more than it earns
    targets = [Target(State(game), 0, no_links), Target(State(game).step(no_links), 0, np.zeros(2))]
    (links,), (keeps, gives) = step(targets, [[row(0, 0)], [effort(0.0), effort(10.0)]], 0.5)
    assert links["sample"] == pytest.approx(2 - 0.5)  # 1 from the mean of the efforts' credits, 2 and 0
    assert (keeps["sample"], gives["sample"]) == pytest.approx((2, 0 - 0.5 * 2))
