"""From expert games to prompts, batches, and the rewards and advantages of a group by hand."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

import eval as evaluation
import experts
import train_rft
import train_sft
from world.draws import Family
from policy import Rollout, load_policy
from prompts import Decision, PromptStyle
from rewards import Memory, graph_score
from run.files import InputError

ALL_SEATS = argparse.Namespace(all_seats=True, seat=0, graph_prompts=1, effort_prompts=1)


def prompt_of(model_dir, kind, expert, seat=0):
    records = experts.simulate_many(1, expert, 0, PromptStyle(), (3, 3), noise=0.0)
    prompts = train_rft.make_prompts(load_policy(model_dir), records, ALL_SEATS)
    return next(p for p in prompts if p.record.kind == kind and p.record.seat == seat)


def test_only_the_decisions_of_the_policys_seat_are_trained_unless_all_seats_are_asked_for(model_dir):
    """3 games of 3 agents, 1 round: 6 decisions of one seat, 18 of all; every prompt still knows all seats' labels."""
    records, policy = experts.simulate_many(3, "second-best", 0, PromptStyle(), (3, 3)), load_policy(model_dir)
    one = argparse.Namespace(all_seats=False, seat=2, graph_prompts=1, effort_prompts=1)
    assert [r.seat for r in train_sft.in_trained_seats(one, records)] == [2] * 6
    assert len(train_sft.in_trained_seats(ALL_SEATS, records)) == 18
    prompts = train_rft.make_prompts(policy, records, one)
    assert [p.record.seat for p in prompts] == [2] * 6
    assert all(p.target.actions.shape == (3, 3) for p in prompts if p.record.kind == "G")


@pytest.mark.parametrize(("graph", "effort"), [(3, 3), (3, 1), (1, 2), (4, 0), (0, 2)])
def test_a_batch_has_the_asked_decisions_of_as_few_conversations_as_possible(model_dir, graph, effort):
    """6 conversations of 2 rounds. An epoch draws each once, every decision has its turn."""
    records, policy = experts.simulate_many(2, "second-best", 0, PromptStyle(), (3, 3), families=(Family("bcz", "GE", 2),)), load_policy(model_dir)
    prompts = train_rft.make_prompts(policy, records, ALL_SEATS)
    drawn, seen = [], set()
    for step in range(60):
        batch = train_rft.next_batch(prompts, graph, effort, step, 1)
        kinds = [p.record.kind for p in batch]
        assert (kinds.count("G"), kinds.count("E")) == (graph, effort)
        of_batch = [(p.record.game, p.record.seat) for p in batch]
        drawn += dict.fromkeys(of_batch)
        seen |= {(p.record.game, p.record.seat, p.record.stage) for p in batch}
        if graph == effort == 3 and step % 2:  # two steps are an epoch
            assert len(set(drawn[-6:])) == 6
    # (a batch that spans the end of an epoch may draw a conversation twice)
    assert len(drawn) == 60 * max(graph, effort) or (graph == 4 and 200 < len(drawn) < 240)
    assert len(seen) == (24 if graph and effort else 12)


def test_data_without_a_kind_of_decision_is_refused_if_it_is_asked_for(model_dir):
    records = [r for r in experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3)) if r.kind == "G"]
    policy = load_policy(model_dir)
    with pytest.raises(InputError, match="effort-prompts 0"):
        train_rft.make_prompts(policy, records, ALL_SEATS)
    no_effort = argparse.Namespace(all_seats=True, seat=0, graph_prompts=1, effort_prompts=0)
    assert len(train_rft.make_prompts(policy, records, no_effort)) == 3


def rollouts_of(texts):
    return [Rollout([1], [2], [0.0], text, True) for text in texts]


def reward_arguments(**changes):
    parser = argparse.ArgumentParser()
    experts.add_data_arguments(parser)
    train_rft.add_rft_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | {"seed": 0} | changes)


@pytest.mark.parametrize("algo", ["tompo", "grpo"])
def test_rewards_and_advantages_of_a_graph_group_by_hand(model_dir, algo):
    """The experts link everybody: 3 links. The agent's row is (0, 1, 1)."""
    prompt = prompt_of(model_dir, "G", "always-link")
    group = rollouts_of(
        ["Decision: [0, 1, 1]", "Decision: [0, 1, 0]", "I choose everybody", "Belief: [0, 0, 0]\nDecision: [0, 0, 0]"]
    )
    args = reward_arguments(algo=algo, w_global=0.25)
    memory = Memory({prompt.game.key: 2 / 3})
    train_rft.rewards_and_advantages(args, [prompt], [group], memory, 0)
    # F1 1, 2/3, -, 0; accuracy 1, 1/2, -, 0; s: 0, 2, -, 4 of 6 entries of the graph differ
    r_S = np.array([2.5, 0.5 + 2 / 3 + 1 / 2, -0.5, 0.5])
    s = np.array([1, 2 / 3, 0, 1 / 3])
    R_G = s + 0.5 * np.array([1, 0, 0, 0]) + 0.25 * np.array([1, 1, 0, 0])
    A_S, A_G = ((x - x.mean()) / x.std() for x in (r_S, R_G))
    A = A_S if algo == "grpo" else 0.8 * A_S + 0.2 * A_G
    assert [o.rewards["r_S"] for o in group] == pytest.approx(r_S, abs=1e-6)
    assert [o.rewards["s"] for o in group] == pytest.approx(s, abs=1e-6)
    assert [o.rewards["R_G"] for o in group] == pytest.approx(R_G, abs=1e-6)
    assert [o.rewards["A_S"] for o in group] == pytest.approx(A_S, abs=1e-3)
    assert [o.rewards["A_G"] for o in group] == pytest.approx(A_G, abs=1e-3)
    assert [o.advantage for o in group] == pytest.approx(A, abs=1e-3)
    assert memory.best == {prompt.game.key: 2 / 3}  # updated after the step, not here


def test_the_weights_and_the_score_of_a_graph_group_are_those_of_the_flags(model_dir):
    """The group of above, its first row after a Belief line that is right about both others, its second after one that
    is right about one of them. Memory: the welfare of the second graph."""
    prompt = prompt_of(model_dir, "G", "always-link")
    group = rollouts_of(
        ["Belief: [0, 1, 1]\nDecision: [0, 1, 1]", "Belief: [0, 1, 0]\nDecision: [0, 1, 0]", "I choose everybody"]
        + ["Belief: [0, 0, 0]\nDecision: [0, 0, 0]"]
    )
    args = reward_arguments(w_sample=0.6, w_graph=0.7, w_local=0.3, w_belief=0.5, graph_score="welfare")
    rows = [[0, 1, 1], [0, 1, 0], None, [0, 0, 0]]
    s = np.array([graph_score(r and Decision("G", np.array(r)), prompt.target, "welfare") for r in rows])
    assert s[0] > s[1] > s[3] > s[2] == 0
    train_rft.rewards_and_advantages(args, [prompt], [group], Memory({prompt.game.key: s[1]}), 0)
    belief = np.array([1, 0.5, 0, 0])
    r_S = np.array([2.5, 0.5 + 2 / 3 + 1 / 2, -0.5, 0.5]) + 0.5 * belief
    local = np.array([0.3, 0, 0, 0])
    R_G = s + local + 0.5 * np.array([1, 1, 0, 0])
    A_S, A_G = ((x - x.mean()) / x.std() for x in (r_S, R_G))
    for key, values in {"belief": belief, "r_S": r_S, "s": s, "local": local, "R_G": R_G}.items():
        assert [o.rewards[key] for o in group] == pytest.approx(values, abs=1e-6), key
    assert [o.rewards["A_S"] for o in group] == pytest.approx(A_S, abs=1e-3)
    assert [o.rewards["A_G"] for o in group] == pytest.approx(A_G, abs=1e-3)
    assert [o.advantage for o in group] == pytest.approx(0.6 * A_S + 0.7 * A_G, abs=1e-3)


def test_rewards_and_advantages_of_an_effort_group_by_hand(model_dir):
    prompt = prompt_of(model_dir, "E", "second-best")
    x = prompt.target.actions[0]
    assert x > 0.05 * prompt.target.cap
    group = rollouts_of([f"Decision: {x}", f"Decision: {x / 2}", "Decision: [0, 1, 1]"])
    args = reward_arguments()
    train_rft.rewards_and_advantages(args, [prompt], [group], Memory(), 0)
    r_S = np.array([2.5, 1.5, -0.5])
    assert [o.rewards["r_S"] for o in group] == pytest.approx(r_S, abs=1e-6)
    assert [o.advantage for o in group] == pytest.approx((r_S - r_S.mean()) / r_S.std(), abs=1e-3)
    assert all(o.rewards["A_G"] == 0 and "R_G" not in o.rewards for o in group)


def test_a_group_without_variance_gets_advantage_zero(model_dir):
    for kind in "GE":
        group = rollouts_of(["no idea", "none", "nothing"])
        args = reward_arguments()
        train_rft.rewards_and_advantages(args, [prompt_of(model_dir, kind, "second-best")], [group], Memory(), 0)
        assert [o.advantage for o in group] == [0, 0, 0]


def test_every_decision_becomes_a_prompt_with_the_labels_of_all_experts(model_dir):
    records = experts.simulate_many(3, "second-best", 1, PromptStyle(), (3, 4), families=(Family("bcz", "GE", 2),), noise=0.6)
    policy = load_policy(model_dir)
    prompts = train_rft.make_prompts(policy, records, ALL_SEATS)
    assert [p.record for p in prompts] == records
    assert sum(r.label != r.reply for r in records) > 10
    for p in prompts:
        assert p.ids == policy.encode_prompt(p.record.prompt)
        assert p.game.N == len(p.record.instance["alpha"])
        if p.record.kind == "G":
            of_stage = [r for r in records if (r.game, r.stage) == (p.record.game, p.record.stage)]
            rows = [json.loads(r.label.split("Decision: ")[1]) for r in sorted(of_stage, key=lambda r: r.seat)]
            assert p.target.actions.tolist() == rows
        else:
            assert p.target.actions[p.record.seat] == float(p.record.label.split("Decision: ")[1])


def test_evaluation_and_training_build_the_same_prompts():
    """The same game with the same replies: what the policy would read in evaluation is what it was trained on."""
    style = PromptStyle()
    game = Family("bcz", "GE", 2).make((1.0, 2.0, 3.0), 0.25, 1.0)
    records = experts.simulate(game, experts.make_expert("second-best"), np.random.default_rng(0), style)

    class Recorder:
        def __init__(self, seat):
            self.seen, self.answers = [], iter([r.label for r in records if r.seat == seat])

        def encode_prompt(self, chat):
            self.seen.append(chat)
            return [1]

        def sample(self, prompts, M, limit, temperature, generator, history, only):
            return [[Rollout([1], [2], [0.0], next(self.answers), True)]]

    compared = 0
    for seat in range(3):
        recorder = Recorder(seat)
        player = evaluation.policy_player(recorder, style, None, 0.0, 0)
        evaluation.play([game], player, seat, "second-best", 0)
        expected = [list(r.prompt) for r in records if r.seat == seat]
        assert recorder.seen == expected
        compared += len(expected)
    assert compared == 12


def test_records_are_not_changed_by_what_is_made_of_them(model_dir):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    copies = [replace(r, prompt=[dict(m) for m in r.prompt]) for r in records]
    policy = load_policy(model_dir)
    train_sft.conversations(policy, records, "both")
    train_rft.make_prompts(policy, records, ALL_SEATS)
    assert records == copies
