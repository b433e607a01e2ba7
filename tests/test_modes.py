"""Whole short runs in every mode that is not the default: other games, credits, rewards, penalties, two SFT adapters."""

import argparse
import json

import numpy as np
import pytest
from whole_runs import fake_parse, lines_of, rft_flags, run_rft, sft_flags

from models import adapters as adapter_files
import eval as evaluation
import experts
from play import players
import train_rft
import train_sft
from prompts import PromptStyle


def short_run(model_dir, sft_adapter, folder, *more, all_seats=True, **changes):
    changes = dict(sft_adapter=sft_adapter, max_steps=3, eval_games=4, games=6) | changes
    run_rft([flag for flag in rft_flags(model_dir, folder, **changes) if all_seats or flag != "--all-seats"] + [*more])
    metrics, samples = (lines_of(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    assert len(metrics) == 3 and samples
    return metrics, samples


def test_the_papers_preset_runs_with_its_values(model_dir, tmp_path):
    """And flags that are given take their place."""
    folder = tmp_path / "run"
    argv = ["--preset", "paper", "--model", model_dir, "--device", "cpu", "--games", "5", "--max-steps", "1"]
    run_rft([*argv, "--sft-held-out", "1", "--eval-games", "2", "--max-new-tokens", "8", "--out", str(folder)])
    config = json.loads((folder / "config.json").read_text())
    paper = dict(rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, train_on="effort", lr=1e-5, agents=[4, 8])
    paper |= dict(m=8, w_sample=0.8, w_graph=0.2, seat=0, dtype="bfloat16", micro_batch=2, games=5)
    assert {key: config[key] for key in paper} == paper
    assert adapter_files.read_adapter(folder / "adapter")[1].r == 128  # SFT and RFT
    samples = lines_of(folder / "samples.jsonl")
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["seat"] for s in samples} == {0}
    assert 1e-4 < lines_of(folder / "metrics.jsonl")[0]["max_ratio_error"] < 1  # bf16's rounding; fp32 has 1e-6


def test_several_games_and_stages_in_one_run(model_dir, sft_adapter, tmp_path):
    folder = tmp_path / "run"
    changes = dict(game=["bcz", "pgg"], stages=["GE", "GEE"], expert="planner", graph_prompts=4, effort_prompts=4)
    _, samples = short_run(model_dir, sft_adapter, folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    assert config["game"] == ["bcz", "pgg"] and config["stages"] == ["GE", "GEE"]
    results = json.loads((folder / "eval.json").read_text())["results"]
    for summary in results.values():
        assert list(summary["games"]) == ["BCZ-GE", "BCZ-GEE", "PGG-GE", "PGG-GEE"]
        played = [(row["instance"]["game"], row["instance"]["stages"]) for row in summary["instances"]]
        assert sorted(played) == [("bcz", "GE"), ("bcz", "GEE"), ("pgg", "GE"), ("pgg", "GEE")]
        means = [summary["games"][label]["U3"]["mean"] for label in summary["games"]]
        assert np.mean(means) == pytest.approx(summary["all rounds"]["U3"]["mean"])
    assert results["expert:planner"]["all rounds"]["U3"]["mean"] == pytest.approx(1, abs=1e-3)
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["stage"] for s in samples} == {0, 1, 2}


def test_credit_takes_the_place_of_the_sample_level(model_dir, sft_adapter, tmp_path, monkeypatch):
    """The logged sample level is the normalised return of the decision, with the rest of the game played by experts."""
    asked = []
    real = train_rft.return_credits
    monkeypatch.setattr(train_rft, "return_credits", lambda *args: asked.append((args, real(*args))) or asked[-1][1])
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", credit="return", gamma=0.5, rounds=2)
    logged = [s["sample"] for s in samples]
    assert [c or 0.0 for _, credits in asked for c in credits] == pytest.approx(logged)
    (decisions, target, state, expert, gamma, seed), credits = next(
        (args, credits) for args, credits in asked if len(args[2].history) == 1 and any(credits)
    )
    assert gamma == 0.5 and state.game.rounds == 2
    i = next(i for i, c in enumerate(credits) if c)

    def value(actions):
        after, rng = state.step(actions), np.random.default_rng(0)
        while not after.done:
            after = after.step(np.array([expert(after, j, rng).action for j in range(after.game.N)]))
        first, second = (pay[target.seat] for _, _, pay in after.round_results())
        return first + 0.5 * second

    mine = target.actions.copy()
    mine[target.seat] = decisions[i].action
    expected = 2 * (1 + (value(mine) - value(target.actions)) / abs(value(target.actions)))
    assert credits[i] == pytest.approx(max(0, expected))


def test_zeta_pulls_both_credits_of_a_round_together(model_dir, sft_adapter, tmp_path):
    runs = {}
    for zeta in (0.0, 0.25):
        folder = tmp_path / str(zeta)
        _, runs[zeta] = short_run(model_dir, sft_adapter, folder, credit="return", zeta=zeta, max_steps=3, rounds=1)
    first = [(a, b) for a, b in zip(runs[0.0], runs[0.25]) if a["step"] == 0]
    assert [a["reply"] for a, _ in first] == [b["reply"] for _, b in first]  # the same samples of the same adapter
    credits = {}
    for a, _ in first:
        if a["compliance"] > 0:
            credits.setdefault((a["game"], a["seat"], a["kind"]), []).append(a["sample"])
    changed = 0
    for a, b in first:
        if a["compliance"] > 0:
            other = credits.get((a["game"], a["seat"], {"G": "E", "E": "G"}[a["kind"]]))
            distance = abs(a["sample"] - np.mean(other)) if other else 0
            assert b["sample"] == pytest.approx(a["sample"] - 0.25 * distance)
            changed += distance > 1e-6
    assert changed > 3


def test_rewards_of_welfare_belief_and_no_memory(model_dir, sft_adapter, tmp_path):
    changes = dict(graph_score="welfare", w_belief=0.5, kl_target=0.001, clip_eps_high=0.3, aggregation="token")
    metrics, samples = short_run(model_dir, sft_adapter, tmp_path / "run", "--no-memory", **changes)
    ok = [s for s in samples if s["compliance"] > 0]
    assert ok and all(s["r_S"] == pytest.approx(s["compliance"] + s["sample"] + 0.5 * s["belief"]) for s in samples)
    assert all(s["global"] == 0 for s in samples if s["kind"] == "G") and any(s["local"] for s in ok if s["kind"] == "G")
    assert len({round(s["s"], 6) for s in ok if s["kind"] == "G"}) > 2
    betas = [m["beta"] for m in metrics]
    for m, now, following in zip(metrics, betas, betas[1:]):
        assert following == pytest.approx(train_rft.tompo.adapted_beta(now, m["kl"], 0.001))
    assert betas[0] == 0.02 and betas[1] == pytest.approx(0.02 * 0.98)  # KL is 0 at step 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(beta=0, kl_target=0.1), "--kl-target adapts"),
        (dict(kl_target=0), "--kl-target must be above 0"),
        (dict(train_on="separate"), "train_sft.py"),
        (dict(delta=0.1, game=["pgg"]), "--game bcz"),
        (dict(stages=["GX"]), "stages"),
    ],
)
def test_modes_that_make_no_sense_are_refused_before_anything_is_done(model_dir, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit) as error:
        train_rft.main(rft_flags(model_dir, tmp_path / "run", **changes))
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in said and said.count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_a_belief_reward_without_beliefs_is_refused(model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_rft.main([*rft_flags(model_dir, tmp_path / "run", w_belief=0.5), "--no-belief"])
    assert "--no-belief" in capsys.readouterr().err


# --- SFT with an adapter for each kind of decision


@pytest.fixture(scope="module")
def separate(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "separate"
    train_sft.main(sft_flags(model_dir, folder, train_on="separate", sft_lr=5e-3))
    return folder


def test_separate_adapters_are_those_of_two_runs(separate, model_dir, tmp_path):
    for kind in ("graph", "effort"):
        train_sft.main(sft_flags(model_dir, tmp_path / kind, train_on=kind, sft_lr=5e-3))
        alone = (tmp_path / kind / "adapter" / adapter_files.WEIGHTS_FILE).read_bytes()
        assert (separate / kind / "adapter" / adapter_files.WEIGHTS_FILE).read_bytes() == alone
    weights = [(separate / kind / "adapter" / adapter_files.WEIGHTS_FILE).read_bytes() for kind in ("graph", "effort")]
    assert weights[0] != weights[1] and not (separate / "adapter").exists()


def test_play_uses_the_adapter_of_each_kind_of_decision(separate, model_dir, capsys, tmp_path, monkeypatch):
    """Graph decisions are those of the graph adapter alone; effort decisions those of the effort adapter after them."""
    sampled = []
    monkeypatch.setattr(players, "parse_reply", fake_parse)
    real = players.adapter_on

    def noted(policy, state, config):
        sampled.append(next(iter(state.values())).flatten()[0].item())
        return real(policy, state, config)

    monkeypatch.setattr(players, "adapter_on", noted)
    argv = ["--model", model_dir, "--device", "cpu", "--eval-games", "3", "--eval-agents", "3", "--max-new-tokens", "8"]
    out = {}
    for name in ("", "graph/adapter", "effort/adapter"):
        path = tmp_path / f"{name.replace('/', '-')}.json"
        evaluation.main([*argv, "--policy", str(separate / name), "--stages", "GEE", "--json", str(path)])
        out[name] = json.loads(path.read_text())["results"][str(separate / name)]["replies"]
    graph, effort = sampled[3], sampled[6]
    assert sampled == [graph, effort, effort] + [graph] * 3 + [effort] * 3 and graph != effort
    both = out[""]
    assert [r[0] for r in both] == [r[0] for r in out["graph/adapter"]] != [r[0] for r in out["effort/adapter"]]
    assert [r[1:] for r in both] != [r[1:] for r in out["graph/adapter"]]


def test_a_random_seat_is_one_per_game_and_belongs_to_the_seed():
    records = experts.simulate_many(40, "second-best", 0, PromptStyle(), (4, 8))

    def seats(seed):
        chosen = train_sft.in_trained_seats(argparse.Namespace(all_seats=False, seat="random", seed=seed), records)
        of_game = {r.game: {q.seat for q in chosen if q.game == r.game} for r in chosen}
        assert set(of_game) == set(range(40)) and all(len(s) == 1 for s in of_game.values())
        assert len(chosen) == 80  # both decisions of the seat
        return [s.pop() for s in of_game.values()]

    assert seats(1) == seats(1) != seats(2) and set(seats(1)) >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("all_seats", [False, True])
def test_sft_trains_and_is_tested_on_its_seat_alone_unless_all_are_asked_for(model_dir, tmp_path, monkeypatch, all_seats):
    seen, real = [], train_sft.conversations
    monkeypatch.setattr(train_sft, "conversations", lambda *args: seen.append(args[1]) or real(*args))
    argv = sft_flags(model_dir, tmp_path / "run", seat=1, max_steps=1, games=2)
    train_sft.main([flag for flag in argv if all_seats or flag != "--all-seats"])
    trained, held_out = seen
    assert {r.seat for r in trained} == {r.seat for r in held_out} == ({0, 1, 2} if all_seats else {1})
    assert (len(trained), len(held_out)) == ((12, 6) if all_seats else (4, 2))  # 2 games and 1, of 2 stages


def test_training_in_a_random_seat(model_dir, sft_adapter, tmp_path):
    """And evaluation in self-play: 3 seats and 2 stages are 6 replies of the policy in every game."""
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", seat="random", eval_seat="all", all_seats=False)
    assert len({s["seat"] for s in samples}) > 1
    assert len({(s["game"], s["seat"]) for s in samples}) == len({s["game"] for s in samples})
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    for name, summary in results.items():
        assert len(summary["replies"]) == 4 and all(len(of_game) == 6 for of_game in summary["replies"])
        if name.startswith("expert:"):
            assert all("Decision: " in reply for of_game in summary["replies"] for reply in of_game)
        else:  # a random model: no expert's words in any seat
            assert not any("Decision: " in reply for of_game in summary["replies"] for reply in of_game)
