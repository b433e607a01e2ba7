"""From expert games to prompts, batches, and the advantages of a group by hand."""

import argparse
import copy

import numpy as np
import pytest
import torch

import experts
import train_rft
import train_sft
from models.load import load_policy
from play import expert_games, held_out
from play.players import play, policy_player
from policy import Rollout
from prompts import PromptStyle, parse_reply
from rewards import Memory, graph_score
from run import checkpoint, dataset, training
from run.files import InputError
from run.rft_flags import add_rft_arguments
from world.draws import Family

TWO_ROUNDS = (Family("bcz", "GE", 2),)


def arguments(*more, **changes):
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, "runs")
    add_rft_arguments(parser)
    held_out.add_eval_arguments(parser, seat=False)
    args = parser.parse_args(more)
    return argparse.Namespace(**vars(args) | dict(seat="all") | changes)


def simulated(games, expert="second-best", **changes):
    return dataset.simulate_many(games, expert, 0, PromptStyle(), (3, 3), **changes)


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(model_dir)


# --- prompts and batches


@pytest.mark.parametrize("seat", ["all", 2])
def test_the_decisions_of_the_trained_seats_become_prompts_by_conversation(policy, seat):
    """Every prompt knows what the experts of all seats do, whoever is trained."""
    records = simulated(3, families=TWO_ROUNDS, noise=0.6)
    conversations = train_rft.make_prompts(policy, records, arguments(seat=seat))
    assert len(conversations) == (9 if seat == "all" else 3)
    for of_one in conversations:
        assert len({(p.record.game, p.record.seat) for p in of_one}) == 1
        assert [p.record.stage for p in of_one] == [0, 1, 2, 3]
    prompts = [p for of_one in conversations for p in of_one]
    expected = [r for r in records if seat in ("all", r.seat)]
    assert sorted(map(id, expected)) == sorted(id(p.record) for p in prompts)
    for p in prompts:
        assert p.ids == policy.encode_prompt(p.record.prompt)
        of_target = p.target.kind, p.target.seat, len(p.target.state.history)
        assert of_target == (p.record.kind, p.record.seat, p.record.stage)
        label = expert_games.label_decision(p.record).action
        assert p.target.actions.shape[0] == 3 and np.all(p.target.actions[p.record.seat] == label)


@pytest.mark.parametrize(("graph", "effort"), [(3, 3), (3, 1), (1, 2), (4, 0), (0, 2)])
def test_a_batch_has_the_asked_decisions_of_as_few_conversations_as_possible(policy, graph, effort):
    """6 conversations of 2 rounds. An epoch draws each once, every decision has its turn."""
    conversations = train_rft.make_prompts(policy, simulated(2, families=TWO_ROUNDS), arguments())
    drawn, seen = [], set()
    for step in range(60):
        batch = train_rft.next_batch(conversations, (graph, effort), step, 1)
        kinds = [p.record.kind for p in batch]
        assert (kinds.count("G"), kinds.count("E")) == (graph, effort)
        drawn += dict.fromkeys((p.record.game, p.record.seat) for p in batch)
        seen |= {(p.record.game, p.record.seat, p.record.stage) for p in batch}
        if graph == effort == 3 and step % 2:  # two steps are an epoch
            assert len(set(drawn[-6:])) == 6
    # (a batch that spans the end of an epoch may draw a conversation twice)
    assert len(drawn) == 60 * max(graph, effort) or (graph == 4 and 200 < len(drawn) < 240)
    assert len(seen) == (24 if graph and effort else 12)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 7), (4, 4), (1, 2)])
def test_shuffled_goes_through_everything_once_an_epoch(count, size):
    def indices(seed):
        steps = range(3 * count)  # that is 3 * size epochs
        return [i for step in steps for i in checkpoint.shuffled(count, size, step, seed, 2)]

    epochs = [indices(0)[k : k + count] for k in range(0, 3 * count * size, count)]
    assert len(epochs) == 3 * size and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count != 7 or (len({tuple(epoch) for epoch in epochs}) > 1 and indices(0) != indices(1))


def test_seeded_generators_differ_in_every_number():
    def draw(*numbers):
        return tuple(torch.rand(4, generator=checkpoint.seeded(*numbers)).tolist())

    keys = [(s, p, t) for s in range(3) for p in range(3) for t in range(3)]
    assert len({draw(*k) for k in keys}) == len(keys) and draw(1, 2, 3) == draw(1, 2, 3)


def test_data_without_a_kind_of_decision_is_refused_if_it_is_asked_for(policy):
    records = [r for r in simulated(1) if r.kind == "G"]
    with pytest.raises(InputError, match="without E decisions; set their count in --prompts to 0"):
        train_rft.make_prompts(policy, records, arguments())
    assert len(train_rft.make_prompts(policy, records, arguments(prompts=(1, 0)))) == 3


def test_evaluation_and_training_build_the_same_prompts():
    """The same game with the same replies: evaluation asks what the policy was trained on."""
    game, style = Family("bcz", "GE", 2).make((1.0, 2.0, 3.0), 0.25, 1.0), PromptStyle()
    expert = experts.make_expert("second-best")
    records = expert_games.simulate([(0, game, np.random.default_rng(0))], expert, style)

    class Recorder:
        new_history = dict

        def __init__(self, seat):
            self.seen, self.answers = [], iter([r.label for r in records if r.seat == seat])

        def encode_prompt(self, chat):
            self.seen.append(chat)
            return [1]

        def sample(self, *_):
            return [[Rollout([1], [2], [0.0], next(self.answers), True)]]

    for seat in range(3):
        recorder = Recorder(seat)
        play([game], policy_player(recorder, style, None, 0.0, 0), seat, "second-best", 0)
        assert recorder.seen == [list(r.prompt) for r in records if r.seat == seat]
        assert len(recorder.seen) == 4


def test_records_are_not_changed_by_what_is_made_of_them(policy):
    records = simulated(1)
    copies = copy.deepcopy(records)
    train_sft.conversations(policy, records, "both")
    train_rft.make_prompts(policy, records, arguments())
    assert records == copies


# --- advantages of a group


FLAGS = dict(level_weights=(0.6, 0.7), graph_score="welfare", reward=["local=0.3", "belief=0.25"])


@pytest.mark.parametrize(
    "flags", [dict(algo="tompo"), dict(algo="grpo"), FLAGS], ids=["tompo", "grpo", "flags"]
)
def test_a_graph_group_by_hand(policy, flags):
    """The experts link everybody: 3 links. The agent's row is (0, 1, 1), as its belief of both others."""
    args = arguments(**flags)
    conversations = train_rft.make_prompts(policy, simulated(1, "always-link", noise=0.0), args)
    target = next(p for p in conversations[0] if p.target.kind == "G").target
    said = ["Belief: [0, 1, 1]\nDecision: [0, 1, 1]", "Belief: [0, 1, 0]\nDecision: [0, 1, 0]"]
    said += ["I choose everybody", "Belief: [0, 0, 0]\nDecision: [0, 0, 0]"]
    group = [Rollout([1], [2], [0.0], text, True, parse_reply(text, "G", 0, 3, 1.0)) for text in said]
    memory = Memory({target.game.key: 2 / 3})
    train_rft.judge(args, group, target, memory, None)
    assert memory.best == {target.game.key: 2 / 3}  # it is updated after the step, not here

    # F1 1, 2/3, -, 0; accuracy 1, 1/2, -, 0; s: 0, 2, -, 4 of 6 entries of the graph differ
    r_S = np.array([2.5, 0.5 + 2 / 3 + 1 / 2, -0.5, 0.5])
    s, local = np.array([1, 2 / 3, 0, 1 / 3]), 0.5
    if flags is FLAGS:
        r_S, local = r_S + 0.25 * np.array([1, 0.5, 0, 0]), 0.3
        s = np.array([graph_score(o.decision, target, "welfare") for o in group])
        assert s[0] > s[1] > s[3] > s[2] == 0
    R_G = s + local * np.array([1, 0, 0, 0]) + 0.5 * (s >= 2 / 3)
    A_S, A_G = ((x - x.mean()) / x.std() for x in (r_S, R_G))
    expected = dict(r_S=r_S, s=s, R_G=R_G, A_S=A_S, A_G=A_G)
    for name, values in expected.items():
        assert [o.rewards[name] for o in group] == pytest.approx(values, abs=1e-3), name
    w_sample, w_graph = (0.6, 0.7) if flags is FLAGS else (0.8, 0.2)
    A = A_S if flags == dict(algo="grpo") else w_sample * A_S + w_graph * A_G
    assert [o.advantage for o in group] == pytest.approx(A, abs=1e-3)
