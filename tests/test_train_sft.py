"""train_sft.py: what it trains on, its learning rate, and what it refuses."""

import math

import huggingface_hub
import pytest
import torch
from tiny import changed_copy, make_tiny_model
from whole_runs import SHARED, Run, flags, rft_flags, sft_flags, without_timings

import train_rft
import train_sft
from models.load import load_policy
from play import probe
from tools import expert_games


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    """About held-out games, to save time."""
    monkeypatch.setattr(train_sft, "HELD_OUT_GAMES", 2)
    monkeypatch.setattr(probe, "GAMES", 1)


def test_sft_runs_with_simulated_and_with_written_games(model_dir, tmp_path, capsys):
    train_sft.main(sft_flags(model_dir, tmp_path / "simulated", sft_steps=2))
    data = tmp_path / "games.jsonl"
    same = ("games", "agents", "rounds", "noise", "seed", "expert", "information")
    expert_games.main(["--out", str(data), *flags({k: SHARED[k] for k in same})])
    train_sft.main(sft_flags(model_dir, tmp_path / "written", games=data, sft_steps=2))
    simulated, written = Run(tmp_path / "simulated"), Run(tmp_path / "written")
    assert [line["step"] for line in written.lines("metrics.jsonl") if "loss" in line] == [0, 1]
    lines = [without_timings(run.lines("metrics.jsonl")) for run in (simulated, written)]
    assert lines[0] == lines[1] and simulated.weights() == written.weights()
    assert any(v.abs().max() > 0 for k, v in written.tensors().items() if "lora_B" in k)
    assert str(tmp_path / "written" / "adapter") in capsys.readouterr().out


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(model_dir, "float32", "cpu", "plain")


@pytest.fixture
def records_of(monkeypatch, model_dir, tmp_path):
    """records_of(**changes) -> the records of the held-out games, and those that SFT trains on."""
    real = train_sft.make_conversations

    def run(**changes):
        seen = []
        monkeypatch.setattr(
            train_sft, "make_conversations", lambda *args: seen.append(args[1]) or real(*args)
        )
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        train_sft.main(sft_flags(model_dir, out, sft_steps=1, **changes))
        held_out, trained = seen
        return held_out, trained

    return run


def test_the_reply_loss_is_of_all_seats():
    """Conversations are listed game by game, and seat by seat within."""
    for N, games in ((4, 12), (2, 3), (6, 12)):
        chosen = train_sft.spread(list(range(N * games)), games)
        assert len(chosen) == games and {k % N for k in chosen} == set(range(N))
    assert train_sft.spread([1, 2, 3], 3) == [1, 2, 3] and train_sft.spread([7], 2) == [7]


@pytest.mark.parametrize("seat", ["all", 1])
def test_sft_trains_and_is_tested_on_its_seat_alone_unless_all_are_asked_for(records_of, seat):
    seats = {0, 1, 2} if seat == "all" else {1}
    for records, games in zip(records_of(seat=seat, games=2), (train_sft.HELD_OUT_GAMES, 2), strict=True):
        assert {r.seat for r in records} == seats and len(records) == games * 2 * len(seats)  # 2 stages


def test_label_noise_is_in_the_labels_of_links_that_sft_trains_on_alone(records_of):
    """Not in the held-out games, and not in the prompts, which contain what was played."""
    (held_out, clean), (test, noisy) = (records_of(games=6, label_noise=noise) for noise in (0.0, 1.0))
    assert test == held_out and [r.prompt for r in noisy] == [r.prompt for r in clean]
    changed = {r.kind for r, other in zip(clean, noisy, strict=True) if r.label != other.label}
    assert changed == {"G"}


LABELS = ["Belief: [0, 1, 0]\nDecision: [0, 1, 1]", "Decision: 1.50"]


@pytest.mark.parametrize("label, left_out", zip(LABELS, (["0", "1", "1"], ["1", "5", "0"]), strict=True))
def test_the_format_alone_leaves_out_the_digits_of_the_decision(policy, label, left_out):
    ids = policy.encode_reply(label)
    weights = train_sft.token_weights(policy, label, ids, format_only=True)
    texts = [policy.tokenizer.decode([token]).strip() for token in ids]
    assert [text for text, weight in zip(texts, weights, strict=True) if not weight] == left_out
    assert set(train_sft.token_weights(policy, label, ids, format_only=False)) == {1.0}


def test_the_loss_of_tokens_that_do_not_count_is_left_out(policy):
    """Of the held-out loss, and of the training loss, whose gradient is that of the other tokens."""
    ids = [policy.encode_reply(label) for label in LABELS]
    weights = [train_sft.token_weights(policy, label, i, True) for label, i in zip(LABELS, ids, strict=True)]
    chat = train_sft.Conversation([[5, 6, 7]] * 2, [[i] for i in ids], weights, ["graph", "effort"])
    losses = train_sft.reply_loss(policy, [chat])
    for logps, w, kind in zip(
        policy.token_logps(chat.prompts, chat.replies), weights, chat.kinds, strict=True
    ):
        counted = logps[torch.tensor(w) > 0]
        assert 0 < len(counted) < len(logps) and losses[kind] == pytest.approx(-counted.mean().item())


def test_a_run_on_the_format_alone_ends_elsewhere(model_dir, tmp_path):
    for name in ("both", "format"):
        train_sft.main(sft_flags(model_dir, tmp_path / name, train_on=name, sft_steps=2))
    assert Run(tmp_path / "both").weights() != Run(tmp_path / "format").weights()


def test_learning_rate_by_hand():
    def rate(step):
        return train_sft.learning_rate(step, 40, 2.0)  # a tenth of 40 steps is warm-up

    assert [rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(22) == pytest.approx(1.0) and rate(40) == pytest.approx(0.0)
    assert rate(13) == pytest.approx(1 + math.sqrt(0.5))
    assert train_sft.learning_rate(0, 10, 3.0) == 1.0  # never less than 3 steps of warm-up
    assert train_sft.learning_rate(2, 3, 1.0) == train_sft.learning_rate(3, 3, 1.0) == 1.0  # no division by 0


@pytest.fixture
def nothing(tmp_path):
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_unknown_or_incomplete_is_refused(model_dir, tmp_path, monkeypatch, nothing, refused):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    incomplete = changed_copy(model_dir, tmp_path / "no-weights")
    (incomplete / "model.safetensors").unlink()
    for name in (incomplete, tmp_path / "missing", "no-one/no-such-model", "no//such:model"):
        assert str(name) in refused(train_sft.main, sft_flags(name, nothing))
        assert str(name) in refused(train_rft.main, rft_flags(name, nothing))


def test_sft_adapters_that_do_not_fit_are_refused(model_dir, sft_adapter, tmp_path, nothing, refused):
    missing = tmp_path / "missing"
    for chain in (missing, f"{sft_adapter}+{missing}"):
        assert str(missing) in refused(train_rft.main, rft_flags(model_dir, nothing, sft_adapter=chain))
    other = make_tiny_model(tmp_path / "other", seed=1)  # the same shapes, other weights
    refused(train_rft.main, rft_flags(other, nothing, sft_adapter=sft_adapter))


def test_a_prompt_longer_than_the_context_is_refused(model_dir, sft_adapter, tmp_path, nothing, refused):
    folder = changed_copy(model_dir, tmp_path / "short", max_position_embeddings=64)
    assert "64" in refused(train_rft.main, rft_flags(folder, nothing, sft_adapter=sft_adapter))
    assert "64" in refused(train_sft.main, sft_flags(folder, tmp_path / "sft"))


def test_evaluation_that_may_outgrow_the_context_is_refused_before_training(model_dir, nothing, refused):
    """The prompts of training fit, and so does every first question of the evaluation."""
    argv = rft_flags(model_dir, nothing, max_new_tokens=800, steps=1)
    assert "reply tokens do not fit into" in refused(train_rft.main, argv)
