"""The two training scripts from flags to files: what a whole run leaves, and what it owes to its seed and flags."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from models import adapters as adapter_files
from tools import diagnose
import experts
import train_rft
import train_sft
from policy import load_policy, put_adapter
from whole_runs import RFT_ONLY, SHARED, Run, assert_same_run, flags, lines_of, rft_flags, run_rft, sft_flags, without_timings


# --- one whole run


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
    assert all(line["kl"] > 1e-6 and line["max_ratio_error"] < 1e-4 for line in rest)  # one inner step: rho stays 1


def test_sample_lines_hold_all_terms(full):
    samples = full.lines("samples.jsonl")
    assert len(samples) == 6 * 4 * 4
    where = {"step", "game", "stage", "kind", "seat", "reply", "expert"}
    for line in samples:
        terms = {"compliance", "sample", "r_S", "A_S", "A_G", "advantage"}
        terms |= {"s", "local", "global", "R_G"} if line["kind"] == "G" else set()
        assert where | terms <= set(line)
        assert all(math.isfinite(line[t]) for t in terms)
        assert line["r_S"] == line["compliance"] + line["sample"]
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


# --- diagnosis


@pytest.mark.parametrize(("steps", "told_after"), [(9, [8]), (16, [8]), (36, [9, 18, 27])])
def test_a_diagnosis_is_printed_during_training_and_at_the_end(
    model_dir, sft_adapter, tmp_path, monkeypatch, capsys, steps, told_after
):
    """After every quarter, but of at least 8 steps, of what the logs hold by then. After the last step it is that of the
    end alone, which knows the evaluation."""
    logged, real_summary, evaluate = [], diagnose.summary, train_rft.evaluate_run
    monkeypatch.setattr(train_rft, "evaluate_run", lambda *args: print("evaluation begins") or evaluate(*args))
    monkeypatch.setattr(diagnose, "summary", lambda run: logged.append(len(lines_of(run / "metrics.jsonl"))) or real_summary(run))
    changes = dict(graph_prompts=1, effort_prompts=1, m=2, max_new_tokens=3, save_every=99, eval_games=1, sft_adapter=sft_adapter)
    run_rft(rft_flags(model_dir, tmp_path / "run", steps=steps, **changes))
    during, after = capsys.readouterr().out.split("evaluation begins")
    assert during.count("diagnosis: ") == len(told_after) and after.count("diagnosis: ") == 1
    assert logged == [*told_after, steps]


# --- learning rates


def test_learning_rate_by_hand():
    def rate(step):
        return train_sft.learning_rate(step, 40, 2.0)  # a tenth of 40 steps is warm-up

    assert [rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(22) == pytest.approx(1.0) and rate(40) == pytest.approx(0.0)
    assert rate(13) == pytest.approx(1 + math.sqrt(0.5))
    assert train_sft.learning_rate(0, 10, 3.0) == 1.0  # never less than 3 steps of warm-up
    assert train_sft.learning_rate(2, 3, 1.0) == 1.0 and train_sft.learning_rate(3, 3, 1.0) == 1.0  # no division by 0


def test_the_logged_learning_rate_is_the_one_that_was_used(full):
    logged = [line["lr"] for line in full.lines("sft/metrics.jsonl") if "lr" in line]
    logged += [line["lr"] for line in full.lines("metrics.jsonl")]
    assert [[lr] for lr in logged] == full.rates
    schedule = [train_sft.learning_rate(i, 6, 1e-3) for i in range(6)]
    schedule += [train_sft.learning_rate(i, 6, 5e-3) for i in range(6)]
    assert logged == schedule and len(set(logged)) > 6 and min(logged) > 0


# --- the adapter


def test_the_final_adapter_on_the_plain_base_is_sft_and_rft_together(full, model_dir, sft_adapter):
    ids = [5, 60, 70, 1, 80, 33, 90, 120]

    def added(*adapters):
        model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
        with torch.no_grad():
            for state, scaling in adapters:
                for key in [k for k in state if k.endswith("lora_A.weight")]:
                    B = state[key.replace("lora_A", "lora_B")]
                    module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                    module.weight += scaling * B @ state[key]
            return model(torch.tensor([ids])).logits

    config = json.loads((full.folder / "adapter" / "adapter_config.json").read_text())
    both = load_file(full.folder / "adapter" / "adapter_model.safetensors")
    sft = load_file(Path(sft_adapter) / "adapter_model.safetensors"), 8 / 4
    last = load_file(full.folder / "checkpoints" / "step-000006" / "tensors.safetensors")
    rft = {k.removeprefix("adapter."): v for k, v in last.items() if k.startswith("adapter.")}, 8 / 4
    expected = added(sft, rft)
    assert (added((both, config["lora_alpha"] / config["r"])) - expected).abs().max() < 1e-4
    policy = load_policy(model_dir)
    put_adapter(policy, str(full.folder / "adapter"))
    with torch.no_grad():
        assert (policy.model(torch.tensor([ids])).logits - expected).abs().max() < 1e-4
    assert (added(sft) - expected).abs().max() > 1e-2 and (added(rft) - expected).abs().max() > 1e-2
    assert (added() - added(sft)).abs().max() > 1e-2


def test_the_same_adapter_is_the_same_file(full, tmp_path):
    """To the byte, so that two runs can be compared by a checksum."""
    state, config = adapter_files.read_adapter(full.folder / "adapter")
    files = set()
    for i in range(12):
        adapter_files.write_adapter(tmp_path / str(i), state, config)
        files.add((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1


# --- determinism


def test_two_whole_seeded_runs_are_the_same(full, model_dir, tmp_path):
    torch.manual_seed(12345)  # nothing may depend on the global random states
    np.random.seed(54321)
    run_rft(rft_flags(model_dir, tmp_path / "again"))
    assert_same_run(Run(tmp_path / "again", []), full)


def test_another_seed_is_another_run(full, model_dir, sft_adapter, tmp_path):
    run_rft(rft_flags(model_dir, tmp_path / "other", seed=4, sft_adapter=sft_adapter, max_steps=1, eval_games=1))
    replies = [line["reply"] for line in lines_of(tmp_path / "other" / "samples.jsonl")]
    assert replies != [line["reply"] for line in full.lines("samples.jsonl")][:16]


# --- GRPO, and its difference


def test_grpo_differs_in_the_graph_level_alone(full, model_dir, sft_adapter, tmp_path):
    run_rft(rft_flags(model_dir, tmp_path / "grpo", algo="grpo", sft_adapter=sft_adapter, max_steps=2, eval_games=1))
    assert [line["step"] for line in lines_of(tmp_path / "grpo" / "metrics.jsonl")] == [0, 1]
    assert "grpo" in json.loads((tmp_path / "grpo" / "eval.json").read_text())["results"]
    assert not (tmp_path / "grpo" / "sft").exists()  # the SFT adapter came from elsewhere
    grpo, tompo = (
        [line for line in lines if line["step"] == 0]
        for lines in (lines_of(tmp_path / "grpo" / "samples.jsonl"), full.lines("samples.jsonl"))
    )
    assert len(grpo) == len(tompo) == 16
    assert {line["kind"] for line in grpo} == {"G", "E"}
    for a, b in zip(grpo, tompo):
        assert {k: v for k, v in a.items() if k != "advantage"} == {k: v for k, v in b.items() if k != "advantage"}
        assert a["advantage"] == a["A_S"]
        if a["kind"] == "E":
            assert a["advantage"] == b["advantage"]
    assert any(a["advantage"] != b["advantage"] for a, b in zip(grpo, tompo))
    assert any(a["advantage"] != 0 for a in grpo if a["kind"] == "E")


def test_inner_epochs_take_that_many_steps_on_the_same_samples(full, model_dir, sft_adapter, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, args, kwargs: rates.append(o.param_groups[0]["lr"]))
    try:
        changes = dict(inner_epochs=3, sft_adapter=sft_adapter, max_steps=2, eval_games=1, temperature=0.7, beta=0.0)
        run_rft(rft_flags(model_dir, tmp_path / "inner", **changes))
    finally:
        hook.remove()
    metrics = lines_of(tmp_path / "inner" / "metrics.jsonl")
    assert rates == [line["lr"] for line in metrics for _ in range(3)]
    assert len(lines_of(tmp_path / "inner" / "samples.jsonl")) == 2 * 16
    assert all(line["max_ratio_error"] > 1e-3 and line["approx_kl"] > 0 for line in metrics)  # pi has left pi_old


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_another_temperature_is_in_the_ratio_too(model_dir, sft_adapter, tmp_path, temperature):
    changes = dict(temperature=temperature, sft_adapter=sft_adapter, max_steps=1, eval_games=1)
    run_rft(rft_flags(model_dir, tmp_path / "run", **changes))
    (line,) = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert line["kl"] == 0 and line["max_ratio_error"] < 1e-4


# --- SFT alone


def test_sft_runs_with_simulated_and_with_written_games(model_dir, tmp_path, capsys):
    train_sft.main(sft_flags(model_dir, tmp_path / "simulated", max_steps=2))
    data = tmp_path / "games.jsonl"
    same = ("games", "agents", "rounds", "noise", "seed", "expert", "information")
    experts.main(["--out", str(data), *flags({k: SHARED[k] for k in same})])
    train_sft.main(sft_flags(model_dir, tmp_path / "written", max_steps=2, data=data))
    simulated, written = Run(tmp_path / "simulated", []), Run(tmp_path / "written", [])
    assert [line["step"] for line in written.lines("metrics.jsonl") if "loss" in line] == [0, 1]
    assert without_timings(simulated.lines("metrics.jsonl")) == without_timings(written.lines("metrics.jsonl"))
    assert simulated.weights() == written.weights()
    tensors = load_file(tmp_path / "written" / "adapter" / "adapter_model.safetensors")
    assert any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)
    assert str(tmp_path / "written" / "adapter") in capsys.readouterr().out
    # other games would have been seen
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(line for line in lines if json.loads(line)["game"] != 0))
    train_sft.main(sft_flags(model_dir, tmp_path / "fewer", max_steps=2, data=tmp_path / "fewer.jsonl"))
    assert Run(tmp_path / "fewer", []).weights() != written.weights()
