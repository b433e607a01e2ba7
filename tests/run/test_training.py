"""What SFT and RFT have in common: the learning rate, the trained seats, and flags that are paths."""

import argparse
import math

import pytest

from prompts import PromptStyle
from run import rft_flags, training
from run.dataset import simulate_many


def test_learning_rate_by_hand():
    def rate(step):
        return training.learning_rate(step, 40, 2.0)  # a tenth of 40 steps is warm-up

    assert [rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(22) == pytest.approx(1.0) and rate(40) == pytest.approx(0.0)
    assert rate(13) == pytest.approx(1 + math.sqrt(0.5))
    assert training.learning_rate(0, 10, 3.0) == 1.0  # never less than 3 steps of warm-up
    assert training.learning_rate(2, 3, 1.0) == training.learning_rate(3, 3, 1.0) == 1.0  # no division by 0


def test_a_random_seat_is_one_per_game_and_belongs_to_the_seed():
    records = simulate_many(40, "second-best", 0, PromptStyle(), (4, 8))

    def seats(seed):
        chosen = training.in_trained_seats(argparse.Namespace(seat="random", seed=seed), records)
        of_game = {r.game: {q.seat for q in chosen if q.game == r.game} for r in chosen}
        assert set(of_game) == set(range(40)) and all(len(s) == 1 for s in of_game.values())
        assert len(chosen) == 80  # both decisions of the seat
        return [s.pop() for s in of_game.values()]

    assert seats(1) == seats(1) != seats(2) and set(seats(1)) >= {0, 1, 2, 3, 4}


def test_a_run_can_be_resumed_from_another_working_directory(tmp_path, monkeypatch):
    """So config.json has whole paths, of every adapter of a chain. A folder with a + in its name is none."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, "out")
    rft_flags.add_rft_arguments(parser)
    (tmp_path / "one+two").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, whole in (("a+b", f"{tmp_path}/a+{tmp_path}/b"), ("one+two", f"{tmp_path}/one+two")):
        args = training.parse(parser, "train_rft.py", ["--sft-adapter", given, "--data", "games.jsonl"])
        assert (args.sft_adapter, args.data) == (whole, f"{tmp_path}/games.jsonl")
