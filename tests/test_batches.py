"""From expert games to the prompts and batches of RFT."""

import copy

import numpy as np
import pytest

import train_sft
from experts import make_expert
from models.load import load_policy
from play import dataset, expert_games
from prompts import PromptStyle
from run.errors import InputError
from world.draws import Family

STYLE, TWO_ROUNDS = PromptStyle(), (Family("bcz", "GE", 2),)


def simulated(games, agents=(3, 3), **changes):
    return dataset.simulate_many(games, make_expert("second-best"), 0, STYLE, agents, **changes)


def prompts_of(policy, records, seat="all", graph=8, effort=2):
    trained = dataset.trained_seats(records, seat, 0)
    return dataset.make_prompts(policy, records, trained, {"G": graph, "E": effort}, STYLE)


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(model_dir)


def test_a_random_seat_is_one_for_each_game_and_belongs_to_the_seed():
    records = simulated(40, (4, 8))

    def seats(seed):
        trained = dataset.trained_seats(records, "random", seed)
        by_game = {r.game: {other.seat for other in trained if other.game == r.game} for r in trained}
        assert set(by_game) == set(range(40)) and all(len(own) == 1 for own in by_game.values())
        assert len(trained) == 80  # both decisions of the seat
        return [own.pop() for own in by_game.values()]

    assert seats(1) == seats(1) != seats(2) and set(seats(1)) >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("seat", ["all", 2])
def test_the_decisions_of_the_trained_seats_become_prompts_by_conversation(policy, seat):
    """Every prompt knows what the experts of all seats do, whoever is trained."""
    records = simulated(3, families=TWO_ROUNDS, noise=0.6)
    conversations = prompts_of(policy, records, seat)
    assert len(conversations) == (9 if seat == "all" else 3)
    for conversation in conversations:
        assert len({p.conversation for p in conversation}) == 1
        assert [p.record.stage for p in conversation] == [0, 1, 2, 3]
    prompts = sum(conversations, [])
    expected = [r for r in records if seat in ("all", r.seat)]
    assert sorted(map(id, expected)) == sorted(id(p.record) for p in prompts)
    for p in prompts:
        r, t = p.record, p.target
        assert p.ids == policy.encode_prompt(r.prompt)
        assert (t.kind.letter, t.seat, len(t.state.history)) == (r.kind, r.seat, r.stage)
        assert len(t.actions) == 3
        assert np.array_equal(t.actions[r.seat], expert_games.label_decision(r).action)


@pytest.mark.parametrize(("graph", "effort"), [(3, 3), (3, 1), (1, 2), (4, 0), (0, 2)])
def test_a_batch_has_the_asked_decisions_of_as_few_conversations_as_possible(policy, graph, effort):
    """6 conversations of 2 rounds. An epoch draws each once, every decision has its turn."""
    conversations = prompts_of(policy, simulated(2, families=TWO_ROUNDS))
    drawn, seen = [], set()
    for step in range(60):
        batch = dataset.next_batch(conversations, {"G": graph, "E": effort}, step, 1)
        kinds = [p.record.kind for p in batch]
        assert (kinds.count("G"), kinds.count("E")) == (graph, effort)
        drawn += dict.fromkeys(p.conversation for p in batch)
        seen |= {(*p.conversation, p.record.stage) for p in batch}
        if graph == effort == 3 and step % 2:  # two steps are an epoch
            assert len(set(drawn[-6:])) == 6
    # (a batch that spans the end of an epoch may draw a conversation twice)
    assert len(drawn) == 60 * max(graph, effort) or (graph == 4 and 200 < len(drawn) < 240)
    assert len(seen) == (24 if graph and effort else 12)


def test_data_without_a_kind_of_decision_is_refused_if_it_is_asked_for(policy):
    records = [r for r in simulated(1) if r.kind == "G"]
    with pytest.raises(InputError, match="without effort decisions; set their count in --prompts to 0"):
        prompts_of(policy, records)
    assert len(prompts_of(policy, records, effort=0)) == 3


def test_records_are_not_changed_by_what_is_made_of_them(policy):
    records = simulated(1)
    copies = copy.deepcopy(records)
    train_sft.conversations(policy, records, ("G", "E"))
    prompts_of(policy, records)
    assert records == copies
