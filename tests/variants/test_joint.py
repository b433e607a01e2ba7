"""Several seats of the policy in one graph, by hand and in a run."""

from types import SimpleNamespace

import numpy as np
import pytest
from whole_runs import fake_parse, rft_flags, short_run

import train_rft
from games import State, form_links
from prompts import Decision, parse_reply
from rewards import Target, group_rewards
from variants import joint
from world.bcz import BCZ

GAME = BCZ((1.0, 1.0, 1.0), 0.1, 0.1, 3.0)
EXPERTS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])  # 0 and 1, 1 and 2
ON, OFF = SimpleNamespace(graph_score="joint"), SimpleNamespace(graph_score="hamming")


def prompt(game, seat, stage=0):
    state = State(GAME) if stage == 0 else State(GAME).step(EXPERTS)
    actions = EXPERTS if stage == 0 else np.ones(3)
    return SimpleNamespace(
        record=SimpleNamespace(game=game, seat=seat, stage=stage), target=Target(state, seat, actions)
    )


def group(*rows):
    decisions = [None if row is None else Decision("G", np.array(row)) for row in rows]
    return [SimpleNamespace(decision=d) for d in decisions]


def test_graph_decisions_are_asked_in_all_seats_of_their_game():
    conversations = [[prompt(game, seat), prompt(game, seat, 1)] for game in (0, 1, 2) for seat in (0, 1, 2)]
    (own, effort), (again, _), (other, _) = conversations[1], conversations[2], conversations[6]
    batch = [other, own, again, effort]  # two of one game, one of another, and an effort
    whole = joint.with_other_seats(ON, batch, conversations)
    asked = [(p.record.game, p.record.seat, p.target.kind) for p in whole]
    assert asked == [(game, seat, "G") for game in (2, 0) for seat in range(3)] + [(0, 1, "E")]
    assert all(any(p is known for known in sum(conversations, [])) for p in whole)
    assert joint.with_other_seats(OFF, batch, conversations) is batch


def test_the_i_th_replies_stand_in_one_graph():
    """Of three seats two are trained; agent 2 is an expert, who proposes to agent 1."""
    batch = [prompt(0, 0), prompt(0, 1), prompt(0, 1, stage=1), prompt(5, 2)]
    first, second = group([0, 1, 1], [0, 0, 1], None), group([1, 0, 1], [1, 0, 0], [1, 0, 1])
    groups = [first, second, group(None, None, None), group([1, 1, 0], [0, 1, 0], [0, 0, 0])]
    found = joint.proposals(ON, batch, groups)
    expected = [
        [[0, 1, 1], [1, 0, 1], [0, 1, 0]],
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        [[0, 0, 0], [1, 0, 1], [0, 1, 0]],
    ]
    assert np.array(found[0]).tolist() == np.array(found[1]).tolist() == expected and found[2] is None
    assert [P[0].tolist() for P in found[3]] == [[0, 1, 0]] * 3  # the experts' rows in another game
    assert EXPERTS.tolist() == batch[0].target.actions.tolist()  # and they are not written over
    assert joint.proposals(OFF, batch, groups) == [None] * 4

    # 1 - Hamming / 6: both links are there; neither; 1 and 2 alone, in which agent 0 did not comply
    decisions = [[o.decision for o in of] for of in (first, second)]
    of_0, of_1 = (
        group_rewards(of, p.target, proposals=proposals) for of, p, proposals in zip(decisions, batch, found)
    )
    assert [t["s"] for t in of_0] == pytest.approx([1, 1 / 3, 0])
    assert [t["s"] for t in of_1] == pytest.approx([1, 1 / 3, 2 / 3])
    # among experts the same rows have other scores: agent 0 misses agent 1 in the second
    alone = group_rewards(decisions[0], batch[0].target)
    assert [t["s"] for t in alone] == pytest.approx([1, 2 / 3, 0])


def test_always_link_is_no_longer_the_best_of_the_graph_level():
    """Among experts a proposal that nobody answers is free; where all seats make it, it is answered."""
    everybody = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    batch, groups = [prompt(0, seat) for seat in range(3)], [group(row) for row in everybody]
    for p, of, proposals in zip(batch, groups, joint.proposals(ON, batch, groups)):
        decisions = [o.decision for o in of]
        assert group_rewards(decisions, p.target)[0]["s"] == 1
        assert group_rewards(decisions, p.target, proposals=proposals)[0]["s"] == pytest.approx(2 / 3)


def test_a_run_scores_whole_graphs(model_dir, sft_adapter, tmp_path):
    changes = dict(graph_score="joint", prompts=[2, 1], seat="all")
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", **changes)
    graphs: dict = {}
    for s in samples:
        if s["kind"] == "G":
            graphs.setdefault((s["step"], s["game"]), {}).setdefault(s["seat"], []).append(s)
    assert graphs and all(sorted(of_seats) == [0, 1, 2] for of_seats in graphs.values())
    for of_seats in graphs.values():
        for replies in zip(*(of_seats[seat] for seat in range(3)), strict=True):
            read = [fake_parse(s["reply"], "G", s["seat"], 3, 1.0) for s in replies]
            P_NN = np.array([[0, 0, 0] if d is None else d.action for d in read])
            experts = np.array([parse_reply(s["expert"], "G", s["seat"], 3, 1.0).action for s in replies])
            score = 1 - (form_links(P_NN) != form_links(experts)).sum() / 6
            for s, d in zip(replies, read):
                assert s["s"] == pytest.approx(0 if d is None else score)


@pytest.mark.parametrize("given", [["--seat", "0"], ["--seat", "all", "--idle-groups", "redraw"]])
def test_it_needs_all_seats(refused, model_dir, tmp_path, given):
    argv = [*rft_flags(model_dir, tmp_path / "run", seat=None, idle_groups=None), *given]
    assert "--graph-score joint asks all seats" in refused(train_rft.main, [*argv, "--graph-score", "joint"])
