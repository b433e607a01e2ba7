"""train_rft.py from flags to files: what a whole run leaves, what it owes to its seed and flags, and every
mode that is not the default: other games, credits, rewards, aggregations, engines, chains of adapters."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM
from whole_runs import (
    GENTLE,
    RFT_ONLY,
    ROOT,
    SHARED,
    Run,
    assert_same_run,
    assert_same_up_to_rounding,
    lines_of,
    rft_flags,
    run_rft,
    short_run,
)

import eval as evaluation
import lora
import tompo
import train_rft
from models import adapters as adapter_files
from models.load import load_policy, put_adapter
from prompts import PromptStyle
from run import dataset, training
from tools import merge
from variants import credit

# -------------------- one whole run


def test_a_run_leaves_all_its_files(full):
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "eval.json", "curves.png", "timing.json"):
        assert (full.folder / name).stat().st_size > 0, name
    for name in ("adapter", "sft/adapter"):
        assert (full.folder / name / "adapter_config.json").exists() and full.weights(name)
    assert (full.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(full.folder.rglob("*.tmp"))
    timing = json.loads((full.folder / "timing.json").read_text())
    assert all(v > 0 for v in timing["seconds"].values()) and timing["peak_memory_gib"] > 0
    assert {"SFT", "RFT", "evaluation"} <= set(timing["seconds"])


def test_config_json_holds_the_parsed_arguments(full, model_dir):
    config = json.loads((full.folder / "config.json").read_text())
    asked = SHARED | RFT_ONLY | {"model": model_dir, "out": str(full.folder), "agents": [3, 3]}
    for name, value in asked.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value), name
    assert config["script"] == "train_rft.py"


def test_eval_json_has_a_row_for_every_policy(full):
    results = json.loads((full.folder / "eval.json").read_text())["results"]
    assert list(results) == ["tompo", "sft", "base", "expert:second-best", "expert:random"]
    assert results["expert:second-best"]["all rounds"]["U1"]["mean"] == 1
    assert len(results["tompo"]["instances"]) == 2
    # the three policies are three policies: the same uniforms, other replies
    assert results["tompo"]["replies"] != results["sft"]["replies"] != results["base"]["replies"]


def test_metrics_have_each_step_once(full):
    assert [line["step"] for line in full.lines("metrics.jsonl")] == list(range(6))
    sft = full.lines("sft/metrics.jsonl")
    assert [line["step"] for line in sft if "loss" in line] == list(range(6))
    assert [line["step"] for line in sft if "loss" not in line] == [0, 6]  # held-out, before and after


def test_the_run_did_something(full):
    """Everything below compares runs: two runs that do nothing are alike too."""
    metrics = full.lines("metrics.jsonl")
    assert all(line["grad_norm"] > 1e-3 for line in metrics)
    assert len({line["reward"] for line in metrics}) > 3 and any(0 < line["U1"] < 1 for line in metrics)
    assert {line["kind"] for line in full.lines("samples.jsonl")} == {"G", "E"}
    sft = full.lines("sft/metrics.jsonl")
    assert sft[-1]["held_out_loss_graph"] < sft[0]["held_out_loss_graph"]
    assert sft[-1]["held_out_loss_effort"] < sft[0]["held_out_loss_effort"]


def test_first_step_starts_from_pi_ref_with_ratio_one(full):
    first, *rest = full.lines("metrics.jsonl")
    assert first["kl"] == 0
    assert first["max_ratio_error"] < 1e-4 and first["clip_fraction"] == 0
    assert abs(first["loss"]) < 1e-5 and first["grad_norm"] > 1e-3
    assert all(line["kl"] > 1e-6 and line["max_ratio_error"] < 1e-4 for line in rest)  # one inner step


def test_sample_lines_hold_all_terms(full):
    samples = full.lines("samples.jsonl")
    assert len(samples) == 6 * 4 * 4
    where = {"step", "game", "stage", "kind", "seat", "reply", "expert", "broken"}
    for line in samples:
        terms = {"compliance", "sample", "r_S", "A_S", "A_G", "advantage"}
        terms |= {"s", "local", "global", "R_G"} if line["kind"] == "G" else set()
        assert where | terms <= set(line)
        assert all(math.isfinite(line[t]) for t in terms)
        assert line["r_S"] == line["compliance"] + line["sample"]
        assert (line["broken"] is None) == (line["compliance"] > 0)
        if line["kind"] == "G":
            assert line["R_G"] == pytest.approx(line["s"] + line["local"] + line["global"], abs=1e-12)
            assert line["advantage"] == pytest.approx(0.8 * line["A_S"] + 0.2 * line["A_G"], abs=1e-5)
        else:
            assert line["A_G"] == 0 and line["advantage"] == line["A_S"]


def test_memory_of_an_instance_is_updated_after_the_step(full):
    """Bonuses replayed from the log: the best s of the steps before, the same for all groups of a step."""
    samples, best, asked, met_again = full.lines("samples.jsonl"), {}, 0, 0
    for step in range(6):
        graph = [line for line in samples if line["step"] == step and line["kind"] == "G"]
        for line in graph:
            asked += 1
            met_again += line["game"] in best
            compliant = line["compliance"] > 0
            assert line["global"] == 0.5 * (compliant and line["s"] >= best.get(line["game"], 0.0))
            group = [o for o in graph if all(o[k] == line[k] for k in ("game", "stage", "seat"))]
            assert line["local"] == 0.5 * (compliant and line["s"] == max(o["s"] for o in group))
        for line in graph:
            best[line["game"]] = max(best.get(line["game"], 0.0), line["s"])
    assert asked > 20 and met_again > 8


def test_metrics_are_those_of_the_samples(full):
    samples = full.lines("samples.jsonl")
    for line in full.lines("metrics.jsonl"):
        of_step = [o for o in samples if o["step"] == line["step"]]
        groups = [of_step[i : i + 4] for i in range(0, 16, 4)]
        assert line["reward"] == pytest.approx(np.mean([o["r_S"] for o in of_step]))
        assert line["U1"] == np.mean([o["compliance"] > 0 for o in of_step])
        assert line["zero_variance_groups"] == np.mean([all(o["advantage"] == 0 for o in g) for g in groups])
        assert line["distinct_replies"] == np.mean([len({o["reply"] for o in g}) / 4 for g in groups])
        for kind, key in (("G", "reward_graph"), ("E", "reward_effort")):
            values = [o["r_S"] for o in of_step if o["kind"] == kind]
            assert line[key] == (pytest.approx(np.mean(values)) if values else None)


def test_the_logged_learning_rate_is_the_one_that_was_used(full):
    logged = [line["lr"] for line in full.lines("sft/metrics.jsonl") if "lr" in line]
    logged += [line["lr"] for line in full.lines("metrics.jsonl")]
    assert [[lr] for lr in logged] == full.rates
    schedule = [training.learning_rate(i, 6, 1e-3) for i in range(6)]
    schedule += [training.learning_rate(i, 6, 5e-3) for i in range(6)]
    assert logged == schedule and len(set(logged)) > 6 and min(logged) > 0


# -------------------- adapters, alone and in chains

IDS = torch.tensor([[5, 60, 70, 1, 80, 33, 90, 120]])


@torch.no_grad()
def logits_with(model_dir, *adapters):
    """Of the plain model with scaling B A of each (state, scaling) added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for state, scaling in adapters:
        for key in [k for k in state if k.endswith("lora_A.weight")]:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight += scaling * state[key.replace("lora_A", "lora_B")] @ state[key]
    return model(IDS).logits


def of_folder(folder):
    state, config = adapter_files.read_adapter(folder)
    return state, config.scaling


def of_last_checkpoint(folder):
    (last,) = sorted((folder / "checkpoints").iterdir())[-1:]
    tensors = load_file(last / "tensors.safetensors")
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    return adapter, RFT_SCALING


RFT_SCALING = SHARED["lora_alpha"] / SHARED["rank"]


def test_the_final_adapter_on_the_plain_base_is_sft_and_rft_together(full, model_dir, sft_adapter):
    sft, rft = of_folder(sft_adapter), of_last_checkpoint(full.folder)
    expected = logits_with(model_dir, sft, rft)
    assert (logits_with(model_dir, of_folder(full.folder / "adapter")) - expected).abs().max() < 1e-4
    policy = load_policy(model_dir)
    put_adapter(policy, str(full.folder / "adapter"))
    with torch.no_grad():
        assert (policy.model(IDS).logits - expected).abs().max() < 1e-4
    for fewer in ((), (sft,), (rft,)):
        assert (logits_with(model_dir, *fewer) - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def chain(model_dir, sft_adapter, tmp_path_factory):
    """FIRST+SECOND: the SFT adapter, and a random one made on top of it, of another rank and fewer layers."""
    policy, second = load_policy(model_dir), tmp_path_factory.mktemp("second")
    put_adapter(policy, sft_adapter)
    lora.merge(policy.model)
    config = lora.LoRAConfig(2, 6.0, ("q_proj", "down_proj"), policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(0), policy.layer)
    with torch.no_grad():
        for k, p in enumerate(lora.lora_parameters(policy.model)):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    adapter_files.save_adapter(policy.model, second, config)
    return f"{sft_adapter}+{second}"


def test_rft_on_a_chain_of_adapters_leaves_all_of_them_as_one(model_dir, chain, tmp_path):
    short_run(model_dir, chain, tmp_path / "run")
    before = [of_folder(folder) for folder in chain.split("+")]
    rft = of_last_checkpoint(tmp_path / "run")
    expected = logits_with(model_dir, *before, rft)
    assert (logits_with(model_dir, of_folder(tmp_path / "run" / "adapter")) - expected).abs().max() < 1e-4
    for fewer in (before, [before[0], rft], [before[1], rft]):
        assert (logits_with(model_dir, *fewer) - expected).abs().max() > 1e-3


def test_a_chain_of_adapters_is_evaluated_and_merged(model_dir, chain, sft_adapter, tmp_path):
    """eval.py's replies with A+B are those of the base into which tools.merge has put A+B."""
    merge.main([chain, "--model", model_dir, "--out", str(tmp_path / "merged")])
    expected = logits_with(model_dir, *(of_folder(folder) for folder in chain.split("+")))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    assert (merged - expected).abs().max() < 1e-4
    replies = {}
    for model, names in ((model_dir, ["base", sft_adapter, chain]), (tmp_path / "merged", ["base"])):
        path = tmp_path / f"{len(replies)}.json"
        argv = ["--model", str(model), "--device", "cpu", "--eval-games", "3", "--max-new-tokens", "8"]
        evaluation.main([*argv, "--eval-temperature", "0", "--policy", *names, "--json", str(path)])
        results = json.loads(path.read_text())["results"]
        replies |= {(model, name): results[name]["replies"] for name in names}
    of_chain = replies[model_dir, chain]
    assert of_chain == replies[tmp_path / "merged", "base"]
    assert of_chain != replies[model_dir, "base"] and of_chain != replies[model_dir, sft_adapter]


# -------------------- determinism and engines


def test_two_whole_seeded_runs_are_the_same(full, model_dir, tmp_path):
    torch.manual_seed(12345)  # nothing may depend on the global random states
    np.random.seed(54321)
    run_rft(rft_flags(model_dir, tmp_path / "again"))
    assert_same_run(Run(tmp_path / "again"), full)


def test_another_seed_is_another_run(full, model_dir, sft_adapter, tmp_path):
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "other", seed=4, max_steps=1)
    assert [line["reply"] for line in samples] != [line["reply"] for line in full.lines("samples.jsonl")][:16]


def test_both_engines_sample_the_same_replies_and_end_in_the_same_adapter(gentle, model_dir, tmp_path):
    run_rft(rft_flags(model_dir, tmp_path / "plain", lr=GENTLE, engine="plain"))
    plain = Run(tmp_path / "plain")
    assert_same_up_to_rounding(plain, gentle)
    assert plain.weights() != gentle.weights(), "one engine was compared with itself"


# -------------------- other algorithms, rewards and laws


def test_grpo_differs_in_the_graph_level_alone(full, model_dir, sft_adapter, tmp_path):
    _, grpo = short_run(model_dir, sft_adapter, tmp_path / "grpo", algo="grpo", max_steps=1)
    assert "grpo" in json.loads((tmp_path / "grpo" / "eval.json").read_text())["results"]
    assert not (tmp_path / "grpo" / "sft").exists()  # the SFT adapter came from elsewhere
    tompo_lines = full.lines("samples.jsonl")[:16]
    assert len(grpo) == 16 and {line["kind"] for line in grpo} == {"G", "E"}
    for a, b in zip(grpo, tompo_lines):
        assert a | {"advantage": 0} == b | {"advantage": 0} and a["advantage"] == a["A_S"]
        if a["kind"] == "E":
            assert a["advantage"] == b["advantage"]
    assert any(a["advantage"] != b["advantage"] for a, b in zip(grpo, tompo_lines))
    assert any(a["advantage"] != 0 for a in grpo if a["kind"] == "E")


def test_inner_epochs_take_that_many_steps_on_the_same_samples(model_dir, sft_adapter, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, args, kwargs: rates.append(o.param_groups[0]["lr"]))
    try:
        changes = dict(inner_epochs=3, temperature=0.7, beta=0.0)
        metrics, samples = short_run(model_dir, sft_adapter, tmp_path / "inner", **changes)
    finally:
        hook.remove()
    assert rates == [line["lr"] for line in metrics for _ in range(3)]
    assert len(samples) == 2 * 16 and all(line["kl"] is None for line in metrics)  # no reference, no KL
    assert all(
        line["max_ratio_error"] > 1e-3 and line["approx_kl"] > 0 for line in metrics
    )  # pi has left pi_old


def test_another_temperature_is_in_the_ratio_too(model_dir, sft_adapter, tmp_path):
    (line,), _ = short_run(model_dir, sft_adapter, tmp_path / "run", temperature=1.3, max_steps=1)
    assert line["kl"] == 0 and line["max_ratio_error"] < 1e-4


@pytest.mark.parametrize("max_new_tokens, limit", [(14, 14), (None, 20 + 7 * 4)])
def test_a_constant_denominator_is_the_longest_reply_allowed(
    model_dir, sft_adapter, tmp_path, monkeypatch, max_new_tokens, limit
):
    """In a step whose replies are shorter and, without --max-new-tokens, whose game is not the largest."""
    weights, games, real_sample, real_loss = [], [], train_rft.sample, tompo.objective_loss

    def cut(args, policy, batch, generator):
        groups = real_sample(args, policy, batch, generator)
        games.extend(prompt.target.game.N for prompt in batch)
        for o in (o for group in groups for o in group):
            o.reply_ids, o.sampled_logps = o.reply_ids[:5], o.sampled_logps[:5]
        return groups

    monkeypatch.setattr(train_rft, "sample", cut)
    noted = lambda *args, **how: weights.extend(how["weight_T"].tolist()) or real_loss(*args, **how)
    monkeypatch.setattr(tompo, "objective_loss", noted)
    changes = dict(
        objective=["aggregation=constant"], max_new_tokens=max_new_tokens, agents="3-4", prompts=[1, 0], m=2
    )
    changes |= dict(seed=0)  # its first game is a small one
    short_run(model_dir, sft_adapter, tmp_path / "run", max_steps=1, **changes)
    assert games == [3] and 2 <= len(weights) <= 2 * 5
    assert weights == pytest.approx([1 / (2 * limit)] * len(weights))


def test_credit_takes_the_place_of_the_sample_level(model_dir, sft_adapter, tmp_path, monkeypatch):
    """The logged sample level is the normalised return of the decision, with the rest played by experts."""
    asked, real = [], credit.return_credits
    noted = lambda *args: asked.append((args, real(*args))) or asked[-1][1]
    monkeypatch.setattr(credit, "return_credits", noted)
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", credit=["gamma=0.5"], rounds=2)
    assert [c or 0.0 for _, credits in asked for c in credits] == pytest.approx(
        [s["sample"] for s in samples]
    )
    (decisions, target, expert, gamma, _), credits = next(
        (args, credits) for args, credits in asked if len(args[1].state.history) == 1 and any(credits)
    )
    assert gamma == 0.5 and target.game.rounds == 2
    i = next(i for i, c in enumerate(credits) if c)

    def value(actions):
        after, rng = target.state.step(actions), np.random.default_rng(0)
        while not after.done:
            after = after.step(np.array([expert(after, j, rng).action for j in range(after.game.N)]))
        first, second = (pay[target.seat] for _, _, pay in after.round_results())
        return first + 0.5 * second

    mine = target.actions.copy()
    mine[target.seat] = decisions[i].action
    expected = 2 * (1 + (value(mine) - value(target.actions)) / abs(value(target.actions)))
    assert credits[i] == pytest.approx(max(0, expected))


def test_zeta_pulls_both_credits_of_a_round_together(model_dir, sft_adapter, tmp_path):
    runs = [
        short_run(model_dir, sft_adapter, tmp_path / str(len(z)), credit=z, max_steps=1, games=6)[1]
        for z in ([], ["zeta=0.25"])
    ]
    pairs = [(a, b) for a, b in zip(*runs) if a["compliance"] > 0]
    assert [a["reply"] for a, _ in pairs] == [b["reply"] for _, b in pairs]  # the same samples
    credits = {}
    for a, _ in pairs:
        credits.setdefault((a["game"], a["seat"], a["kind"]), []).append(a["sample"])
    changed = 0
    for a, b in pairs:
        other = credits.get((a["game"], a["seat"], {"G": "E", "E": "G"}[a["kind"]]))
        distance = abs(a["sample"] - np.mean(other)) if other else 0
        assert b["sample"] == pytest.approx(a["sample"] - 0.25 * distance)
        changed += distance > 1e-6
    assert changed > 3


def test_rewards_of_welfare_belief_and_no_memory(model_dir, sft_adapter, tmp_path):
    changes = dict(graph_score="welfare", reward=["belief=0.5", "global=0"], clip_eps=[0.2, 0.3])
    _, samples = short_run(
        model_dir, sft_adapter, tmp_path / "run", objective=["aggregation=token"], **changes
    )
    ok = [s for s in samples if s["compliance"] > 0]
    assert ok and all(s["r_S"] == pytest.approx(0.5 + s["sample"] + 0.5 * s["belief"]) for s in ok)
    graph = [s for s in ok if s["kind"] == "G"]
    assert all(s["global"] == 0 for s in graph) and {s["local"] for s in graph} == {0, 0.5}
    assert len({round(s["s"], 6) for s in graph}) > 2


# -------------------- other games, seats and sizes


def test_the_papers_preset_runs_with_its_values(model_dir, tmp_path):
    """And flags that are given take their place."""
    folder = tmp_path / "run"
    argv = ["--preset", "paper", "--model", model_dir, "--device", "cpu", "--games", "5", "--max-steps", "1"]
    run_rft([*argv, "--eval-games", "2", "--max-new-tokens", "8", "--out", str(folder)])
    config = json.loads((folder / "config.json").read_text())
    paper = dict(
        rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, train_on="effort", lr=1e-5, agents=[4, 8]
    )
    paper |= dict(m=8, level_weights=[0.8, 0.2], seat=0, dtype="bfloat16", micro_batch=2, games=5)
    assert {key: config[key] for key in paper} == paper
    assert adapter_files.read_adapter(folder / "adapter")[1].r == 128  # SFT and RFT
    samples = lines_of(folder / "samples.jsonl")
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["seat"] for s in samples} == {0}
    assert (
        1e-4 < lines_of(folder / "metrics.jsonl")[0]["max_ratio_error"] < 1
    )  # bf16's rounding; fp32 has 1e-6


def test_several_games_and_stages_in_one_run(model_dir, sft_adapter, tmp_path):
    changes = dict(game=["bcz", "pgg"], stages=["GE", "GEE"], expert="planner", prompts=[4, 4], games=6)
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", eval_games=4, **changes)
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    for summary in results.values():
        assert list(summary["games"]) == ["BCZ-GE", "BCZ-GEE", "PGG-GE", "PGG-GEE"]
        played = [(row["instance"]["game"], row["instance"]["stages"]) for row in summary["instances"]]
        assert sorted(played) == [("bcz", "GE"), ("bcz", "GEE"), ("pgg", "GE"), ("pgg", "GEE")]
        means = [summary["games"][label]["U3"]["mean"] for label in summary["games"]]
        assert np.mean(means) == pytest.approx(summary["all rounds"]["U3"]["mean"])
    assert results["expert:planner"]["all rounds"]["U3"]["mean"] == pytest.approx(1, abs=1e-3)
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["stage"] for s in samples} == {0, 1, 2}


@pytest.mark.parametrize("seat", ["random", "all"])
def test_training_in_other_seats(model_dir, sft_adapter, tmp_path, seat):
    """Evaluation is in the same seat of each game, or in the first: 2 stages are 2 replies in every game."""
    changes = dict(seat=seat, games=6, eval_games=4)
    _, samples = short_run(model_dir, sft_adapter, tmp_path / "run", max_steps=3, **changes)
    assert len({s["seat"] for s in samples}) > 1
    of_games = len({(s["game"], s["seat"]) for s in samples}) == len({s["game"] for s in samples})
    assert of_games or seat == "all"
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    for name, summary in results.items():
        assert [len(of_game) for of_game in summary["replies"]] == [2, 2, 2, 2]
        experts_words = ["Decision: " in reply for of_game in summary["replies"] for reply in of_game]
        assert all(experts_words) if name.startswith("expert:") else not any(experts_words)
    replies = results["expert:second-best"]["replies"]
    in_first = [reply.split("Decision: [")[1][0] == "0" for reply, _ in replies]
    assert all(in_first) or seat == "random"  # the own position


# -------------------- groups without variance


def test_idle_groups_are_left_out_of_the_update(model_dir, sft_adapter, tmp_path, monkeypatch):
    """The gradient is then that of the others alone."""
    given, real = [], train_rft.gradient

    def noted(args, policy, groups, mine, limit):
        given.append([[o.advantage for o in group] for group in groups])
        return real(args, policy, groups, mine, limit)

    monkeypatch.setattr(train_rft, "gradient", noted)
    changes = dict(m=2, prompts=[4, 0], max_steps=3, games=12)
    for choice in ("keep", "skip"):
        _, samples = short_run(model_dir, sft_adapter, tmp_path / choice, idle_groups=choice, **changes)
        sampled = [[s["advantage"] for s in samples[i : i + 2]] for i in range(0, len(samples), 2)]
        live = [group for group in sampled if group != [0, 0]]
        assert len(sampled) == 12 and 0 < len(live) < 12
        assert sum(given, []) == (sampled if choice == "keep" else live)
        given.clear()


def test_redraw_asks_for_other_prompts_until_the_step_has_its_groups(model_dir, sft_adapter, tmp_path):
    changes = dict(idle_groups="redraw", m=2, prompts=[3, 1], games=12, max_steps=4)
    metrics, samples = short_run(model_dir, sft_adapter, tmp_path / "run", **changes)
    further = 0
    for step, line in enumerate(metrics):
        of_step = [s for s in samples if s["step"] == step]
        groups = [of_step[i : i + 2] for i in range(0, len(of_step), 2)]
        live = [[s["advantage"] for s in group] != [0, 0] for group in groups]
        assert line["zero_variance_groups"] == pytest.approx(1 - sum(live) / len(live))
        for kind, wanted in (("G", 3), ("E", 1)):
            of_kind = [alive for group, alive in zip(groups, live) if group[0]["kind"] == kind]
            lacking = wanted - sum(of_kind[:wanted])  # after the first draw
            assert wanted <= len(of_kind) <= 3 * wanted and sum(of_kind) <= wanted
            assert len(of_kind) == wanted if not lacking else len(of_kind) >= wanted + lacking
            assert sum(of_kind) == wanted or len(of_kind) >= wanted + 2 * (wanted - sum(of_kind))
            further += len(of_kind) - wanted
    assert further > 0


@pytest.mark.parametrize("choice", ["skip", "redraw"])
def test_a_step_without_any_variance_teaches_nothing(model_dir, tmp_path, choice):
    """No reply of the random model is compliant, so all rewards are the same."""
    folder = tmp_path / "run"
    changes = dict(idle_groups=choice, max_steps=2, eval_games=1, games=4, objective=["aggregation=token"])
    train_rft.main(rft_flags(model_dir, folder, **changes))
    for line in lines_of(folder / "metrics.jsonl"):
        assert line["zero_variance_groups"] == 1 and line["loss"] == 0 == line["grad_norm"]
        assert line["kl"] is None and line["max_ratio_error"] is None
    of_rft, of_sft = (adapter_files.read_adapter(folder / name)[0] for name in ("adapter", "sft/adapter"))
    for name, tensor in of_sft.items():
        both = of_rft[name]  # the ranks of SFT and RFT side by side; B of RFT is still 0
        if "lora_B" in name:
            assert both[:, tensor.shape[1] :].abs().max() == 0 < tensor.abs().max()


# -------------------- the end of a run


@pytest.mark.parametrize("name", ["metrics", "samples"])
def test_a_damaged_log_costs_the_diagnosis_and_not_the_run(
    model_dir, sft_adapter, tmp_path, monkeypatch, capsys, name
):
    folder, real = tmp_path / "run", train_rft.held_out.evaluate_run

    def damaging(*args):
        with open(folder / f"{name}.jsonl", "r+") as log:
            text = log.read()
            log.seek(0)
            log.write("{half a line\n" + text)
        return real(*args)

    monkeypatch.setattr(train_rft.held_out, "evaluate_run", damaging)
    argv = rft_flags(model_dir, folder, sft_adapter=sft_adapter, max_steps=1, eval_games=1)
    run_rft(argv, curves=True)  # no exit status but 0
    said = capsys.readouterr().out
    assert said.count("diagnosis: ") == said.count(f"no diagnosis: {folder}") == 1
    assert f"adapter (SFT and tompo in one): {folder / 'adapter'}" in said
    for file in ("timing.json", "curves.png", "eval.json"):
        assert (folder / file).stat().st_size > 0


# -------------------- flags, and what is refused before anything is done


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(train_on="separate"), "train_sft.py"),
        (dict(fix=["delta=0.1"], game=["pgg"]), "--fix delta"),
        (dict(stages=["GX"]), "stages"),
        (dict(reward=["fame=1"]), "--reward fame"),
        (dict(reward=["belief"]), "--reward belief"),
        (dict(prompts=[0, 0]), "--prompts"),
        (dict(clip_eps=[0.1, 0.2, 0.3]), "--clip-eps"),
        (dict(credit=[], expert="openai:model"), "--credit"),
        (dict(credit=["theta=1"]), "--credit theta"),
        (dict(objective=["loss=none"]), "--objective loss=none"),
        (dict(temperature=0), "--temperature"),
        (dict(temperature=-1), "--temperature"),
        (dict(expert="nobody"), "nobody"),
        (dict(expert="noisy:nash:2"), "noisy:nash:2"),
        (dict(seat=3), "--seat 3"),
        (dict(eval_agents=2), "--eval-agents"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(model_dir, tmp_path, refused, changes, words):
    assert words in refused(train_rft.main, rft_flags(model_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_rft_cannot_use_is_refused_before_sft(model_dir, tmp_path, refused):
    records = dataset.simulate_many(2, "second-best", 0, PromptStyle(), (3, 3))
    cases = [
        (records[1:], {}, "lacks decisions of game 0, stage 0"),
        (records[:-3], {}, "without E decisions"),
    ]
    cases += [([replace(records[0], proposals=None), *records[1:]], {}, "game 0, stage 0: proposals must be")]
    cases += [(records, dict(max_new_tokens=9999), "9999 reply tokens do not fit")]
    for number, (kept, changes, words) in enumerate(cases):
        data = tmp_path / f"{number}.jsonl"
        dataset.write_records(data, kept)
        said = refused(train_rft.main, rft_flags(model_dir, tmp_path / "run", data=data, **changes))
        assert words in said and not (tmp_path / "run").exists()


def test_a_belief_reward_without_beliefs_is_refused(model_dir, tmp_path, refused):
    argv = [*rft_flags(model_dir, tmp_path / "run", reward=["belief=0.5"]), "--no-belief"]
    assert "--no-belief" in refused(train_rft.main, argv)


def test_there_are_few_flags_and_each_says_what_it_does(monkeypatch):
    parsers = []

    def seen(parser, script, argv):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(training, "parse", seen)
    with pytest.raises(SystemExit):
        train_rft.main([])
    own = [
        group for group in parsers[0]._action_groups if group.title not in ("positional arguments", "options")
    ]
    actions = [a for a in parsers[0]._actions if not isinstance(a, argparse._HelpAction)]
    assert len(actions) <= 55
    assert {id(a) for a in actions} == {id(a) for group in own for a in group._group_actions}
    assert all(group.description for group in own) and all(a.help for a in actions)


def test_the_scripts_load_where_there_are_no_posix_modules():
    """As on Windows."""
    blocked = (
        "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; import train_rft, train_sft, eval"
    )
    asked = blocked + "; from run.files import peak_memory_gib; assert peak_memory_gib() is None"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
