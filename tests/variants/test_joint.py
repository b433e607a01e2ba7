"""Several seats of the policy in one graph, by hand and in a run."""

import numpy as np
import pytest
import whole_runs
from tables import group_of, row

from decisions import EFFORTS, LINKS
from games import State, form_links
from play.dataset import Prompt, next_batch
from prompts import read_reply
from rewards import WEIGHTS, Memory, Target, expert_rewards
from variants import joint
from world.bcz import BCZ

GAME = BCZ((1.0, 1.0, 1.0), 0.1, 0.1, 3.0)
EXPERTS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])  # 0 and 1, 1 and 2


def target(game, seat, stage=0):
    state = State(GAME) if stage == 0 else State(GAME).step(EXPERTS)
    return Target(state, seat, EXPERTS.copy() if stage == 0 else np.ones(3), game)


def group(*rows):
    return group_of([own and row(*own) for own in rows])


def scores(groups):
    return [[o.rewards.get("s") for o in group] for group in groups]


def test_graph_decisions_are_asked_in_all_seats_of_their_game():
    places = [(game, seat) for game in range(3) for seat in range(3)]
    chats = [[Prompt(None, [], target(*place, stage)) for stage in (0, 1)] for place in places]
    for prompt in sum(chats, []):  # what next_batch draws by
        assert prompt.target.kind is (EFFORTS if len(prompt.target.state.history) else LINKS)
    for step in range(6):
        batch = next_batch(chats, {"G": 2, "E": 1}, step, 0)
        whole = joint.next_batch(chats, {"G": 2, "E": 1}, step, 0)
        games = dict.fromkeys(p.target.game_index for p in batch if p.target.kind is LINKS)
        efforts = [p for p in batch if p.target.kind is EFFORTS]
        asked = [(p.target.game_index, p.target.seat) for p in whole[: len(whole) - 1]]
        assert asked == [(game, seat) for game in games for seat in range(3)]
        assert all(p.target.kind is LINKS for p in whole[:-1]) and whole[-1:] == efforts
        assert all(any(p is known for known in sum(chats, [])) for p in whole)


def test_the_i_th_replies_stand_in_one_graph():
    """Of three seats two are trained; agent 2 is an expert, who proposes to agent 1. s is 1 - Hamming / 6:
    both links are there; neither; 1 and 2 alone, in which agent 0 did not comply."""
    targets = [target(0, 0), target(0, 1), target(0, 1, stage=1), target(5, 2)]
    groups = [group([0, 1, 1], [0, 0, 1], None), group([1, 0, 1], [1, 0, 0], [1, 0, 1])]
    groups += [group(None, None, None), group([1, 1, 0], [0, 1, 0], [0, 0, 0])]
    joint.joint_rewards(targets, groups, Memory(), weights=WEIGHTS)
    expected = [[1, 1 / 3, 0], [1, 1 / 3, 2 / 3], [None] * 3, [1, 1, 2 / 3]]
    for got, hand in zip(scores(groups), expected, strict=True):
        assert got == [None if s is None else pytest.approx(s) for s in hand]
    assert all((t.actions == EXPERTS).all() for t in (targets[0], targets[1], targets[3]))
    assert [o.rewards["sample"] for o in groups[1]] == pytest.approx([2, 2 / 3 + 1 / 2, 2])
    # Among experts the same rows have other scores: agent 0 misses agent 1 in the second.
    expert_rewards(targets[:1], groups[:1], Memory())
    assert scores(groups[:1])[0] == pytest.approx([1, 2 / 3, 0])


def test_a_run_scores_whole_graphs(model_dir, sft_adapter, tmp_path):
    changes = dict(reward_from="joint", prompts=[2, 1], seat="all")
    _, samples = whole_runs.short_run(model_dir, sft_adapter, tmp_path / "run", **changes)
    graphs: dict = {}
    for s in samples:
        if s["kind"] == "G":
            graphs.setdefault((s["step"], s["game"]), {}).setdefault(s["seat"], []).append(s)
    assert graphs and all(sorted(of_seats) == [0, 1, 2] for of_seats in graphs.values())
    for of_seats in graphs.values():
        for replies in zip(*(of_seats[seat] for seat in range(3)), strict=True):
            read = [whole_runs.fake_parse(s["reply"], State(GAME), s["seat"]) for s in replies]
            P_NN = np.array([[0, 0, 0] if d is None else d.action for d in read])
            experts = [read_reply(s["expert"], LINKS, s["seat"], 3, 1.0)[0].action for s in replies]
            score = 1 - (form_links(P_NN) != form_links(np.array(experts))).sum() / 6
            for s, d in zip(replies, read, strict=True):
                assert s["s"] == pytest.approx(0 if d is None else score)
