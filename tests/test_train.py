"""The two training scripts from flags to files, on the tiny model.

Replies of a random model are garbage, so every reward would be the same and every advantage 0: RFT would do nothing,
and tests of it could not fail. So in whole runs the parser of train_rft.py alone is replaced by one that reads a
decision out of the reply's checksum (`fake_parse`): rewards vary, adapters move, and memory fills.
"""

import argparse
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import checkpoint
import eval as evaluation
import experts
from instances import Family
import lora
import train_rft
import train_sft
from policy import Rollout, load_policy, put_adapter
from reference import plain_logps, plain_model, take_gradients
from prompts import Decision, PromptStyle
from rewards import Memory
from runs import InputError

TIMINGS = ("tokens_per_s", "sample_s", "update_s")
DRIVER = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import test_train; test_train.driver()"

SHARED = dict(
    preset="small", device="cpu", dtype="float32", rounds=1, game=["bcz"], stages=["GE"], alpha=None, delta=None,
    endowment=None, factor=None, size_exponent=None, cost=None, expert="second-best", information="full", games=4,
    agents=3, noise=0.3, rank=4, lora_alpha=8, targets=lora.DEFAULT_TARGETS, train_on="both", sft_steps=6, sft_batch=3,
    sft_lr=1e-3, sft_held_out=1, seed=3, micro_batch=2, save_every=2, max_grad_norm=1.0,
)  # fmt: skip
RFT_ONLY = dict(
    algo="tompo", steps=6, graph_prompts=2, effort_prompts=2, m=4, lr=5e-3, inner_epochs=1, temperature=1.0, w_sample=0.8, w_graph=0.2,
    w_local=0.5, w_global=0.5, clip_eps=0.2, beta=0.02, aggregation="sequence", seat=0, eval_agents=3, eval_games=2,
    eval_temperature=1.0, max_new_tokens=14, eval_seed=0,
)  # fmt: skip


ALL_SEATS = argparse.Namespace(all_seats=True, seat=0, graph_prompts=1, effort_prompts=1)


def flags(values):
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return argv


def sft_flags(model, out, **changes):
    return ["--all-seats", *flags(SHARED | {"model": model, "out": out} | changes)]


def rft_flags(model, out, **changes):
    return ["--all-seats", *flags(SHARED | RFT_ONLY | {"model": model, "out": out} | changes)]


def fake_parse(text, kind, seat, N, cap):
    number = zlib.crc32(text.encode())
    if number % 5 == 0:
        return None
    if kind == "G":
        row_N = np.array([number >> (3 + i) & 1 for i in range(N)])
        row_N[seat] = 0
        return Decision("G", row_N)
    return Decision("E", cap * (number % 997) / 996)


def run_rft(argv, curves=False):
    """train_rft.py in this process, with the parser replaced and, for time's sake, without the picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rft, "parse_reply", fake_parse)
        if not curves:
            patch.setattr(train_rft, "plot_curves", lambda *args: None)
        train_rft.main(argv)


def driver():
    """train_rft.py in a process of its own, with the parser replaced."""
    train_rft.parse_reply = fake_parse
    train_rft.main(sys.argv[1:])


def start(argv):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_timings(lines):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@dataclass
class Run:
    folder: Path
    rates: list  # learning rates in the optimizer at the time of each of its steps

    def lines(self, name):
        return lines_of(self.folder / name)

    def weights(self, name="adapter"):
        """Every tensor's bytes, by name; the config beside them."""
        tensors = load_file(self.folder / name / "adapter_model.safetensors")
        config = json.loads((self.folder / name / "adapter_config.json").read_text())
        return {k: v.numpy().tobytes() for k, v in tensors.items()} | config


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return str(tiny_model_dir)


@pytest.fixture(scope="module")
def full(model_dir, tmp_path_factory):
    """One whole run: SFT, ToMPO, evaluation, curves."""
    folder, rates = tmp_path_factory.mktemp("runs") / "full", []
    hook = register_optimizer_step_pre_hook(lambda o, args, kwargs: rates.append([g["lr"] for g in o.param_groups]))
    try:
        run_rft(rft_flags(model_dir, folder), curves=True)
    finally:
        hook.remove()
    return Run(folder, rates)


@pytest.fixture(scope="module")
def sft_adapter(full):
    return str(full.folder / "sft" / "adapter")


def policy_with_adapter(model_dir, seed=1, size=0.05):
    policy = load_policy(model_dir)
    lora.inject(policy.model, lora.LoRAConfig(4, 8.0, lora.DEFAULT_TARGETS, policy.name), checkpoint.seeded(seed))
    with torch.no_grad():
        for k, layer in enumerate(lora.lora_layers(policy.model).values()):
            layer.B.copy_(size * torch.randn(layer.B.shape, generator=checkpoint.seeded(seed, k)))
    return policy


def assert_close_gradients(actual, expected, tolerance=1e-4):
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-5
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * largest


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
    state, config = lora.read_adapter(full.folder / "adapter")
    files = set()
    for i in range(12):
        lora.write_adapter(tmp_path / str(i), state, config)
        files.add((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1


# --- determinism


def assert_same_run(run, full):
    """All but timings, and how much was compared."""
    assert run.weights() == full.weights() and run.weights("sft/adapter") == full.weights("sft/adapter")
    compared = 0
    for name, count in (("metrics.jsonl", 6), ("samples.jsonl", 96), ("sft/metrics.jsonl", 8)):
        a, b = without_timings(run.lines(name)), without_timings(full.lines(name))
        assert len(a) == len(b) == count
        assert a == b
        compared += len(a)
    assert compared == 110
    results = [json.loads((r.folder / "eval.json").read_text())["results"] for r in (run, full)]
    assert results[0] == results[1] and sum(len(r["instances"]) for r in results[0].values()) == 10


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


def sft_gradient(monkeypatch, model_dir, out, **changes):
    """The gradient of SFT's first step, before clipping, and the loss that was logged for it."""
    found = []

    def spy(optimizer, lr, max_grad_norm):
        found.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    monkeypatch.setattr(train_sft, "optimizer_step", spy)
    changes = dict(games=2, sft_batch=6, noise=0.5, max_steps=1) | changes  # a batch is all six conversations
    train_sft.main(sft_flags(model_dir, out, **changes))
    return found[0], lines_of(Path(out) / "metrics.jsonl")[1]["loss"]


@pytest.mark.parametrize("train_on", ["both", "effort", "graph"])
def test_sft_gradient_for_every_micro_batch_and_by_plain_passes(monkeypatch, model_dir, tmp_path, train_on):
    real = train_sft.new_adapter

    def with_values(policy, args, purpose):  # B = 0 would leave no gradient in A
        config = real(policy, args, purpose)
        with torch.no_grad():
            for k, layer in enumerate(lora.lora_layers(policy.model).values()):
                layer.B.copy_(0.05 * torch.randn(layer.B.shape, generator=checkpoint.seeded(7, k)))
        kept.append(policy)
        return config

    kept = []
    monkeypatch.setattr(train_sft, "new_adapter", with_values)
    runs = [
        sft_gradient(monkeypatch, model_dir, tmp_path / str(size), micro_batch=size, train_on=train_on, rounds=2)
        for size in (1, 2, 6)
    ]
    policy = kept[0]
    style = PromptStyle("full", *(experts_default(name) for name in ("belief", "hints")))
    records = experts.simulate_many(2, "second-best", 3, style, (3, 3), families=(Family("bcz", "GE", 2),), noise=0.5)
    kinds = {"both": "GE", "effort": "E", "graph": "G"}[train_on]
    scored = [r for r in records if r.kind in kinds]
    assert sum(r.label != r.reply for r in scored) >= 2  # branches
    lengths = {len(policy.encode_reply(r.label)) for r in scored}
    assert len(lengths) > 1 or train_on != "both"  # ragged
    model = plain_model(model_dir, policy)
    pairs = [(policy.encode_prompt(r.prompt), policy.encode_reply(r.label)) for r in scored]
    loss = -torch.cat([plain_logps(model, *pair) for pair in pairs]).mean()
    policy.model.zero_grad(set_to_none=True)
    loss.backward()
    expected = take_gradients(policy)
    for gradient, logged in runs:
        assert_close_gradients(gradient, expected)
        assert logged == pytest.approx(loss.item(), rel=1e-4)


def experts_default(name):
    parser = argparse.ArgumentParser()
    experts.add_style_arguments(parser)
    return getattr(parser.parse_args([]), name)


# --- the gradient of RFT


REPLIES = [
    ([5, 60, 70], [[80, 81, 2], [90], [100, 101, 102, 103, 104]], (1.2, -0.4, -0.8)),
    ([9, 9, 200, 1, 30, 31, 77], [[120, 2], [121, 122, 123], [124]], (0.5, 0.7, -1.2)),
    ([40], [[50, 51, 52, 53, 54, 55], [2], [56, 57, 58, 2]], (-0.3, 1.1, -0.8)),
    ([41, 42], [[50, 2], [51, 2], [52, 2]], (0.0, 0.0, 0.0)),
    ([43, 44, 45, 46], [[60], [61, 62, 63, 64, 65, 66, 67, 2], [68, 2]], (2.0, -1.0, -1.0)),
]


def hand_made_groups(model_dir, policy, temperature, spread):
    """Ragged groups whose old log-probabilities are off by up to `spread`, so that some tokens are clipped."""
    generator, groups = checkpoint.seeded(5), []
    with torch.no_grad():
        model = plain_model(model_dir, policy)
        for prompt, replies, advantages in REPLIES:
            group = []
            for reply, advantage in zip(replies, advantages):
                old = plain_logps(model, prompt, reply, temperature)
                old = old + spread * (2 * torch.rand(len(reply), generator=generator) - 1)
                group.append(Rollout(prompt, reply, old.tolist(), "", reply[-1] == 2, {}, advantage))
            groups.append(group)
    return groups


def objective_by_plain_passes(model_dir, policy, groups, args):
    """J written out rollout by rollout: per token, min(rho A, clip(rho) A) - beta k3."""
    model, reference = plain_model(model_dir, policy), plain_model(model_dir)
    rollouts = [o for group in groups for o in group]
    tokens, total, clipped = sum(len(o.reply_ids) for o in rollouts), 0.0, 0
    for o in rollouts:
        logp = plain_logps(model, o.prompt_ids, o.reply_ids, args.temperature)
        with torch.no_grad():
            ref = plain_logps(reference, o.prompt_ids, o.reply_ids, args.temperature)
        for t in range(len(o.reply_ids)):
            rho = (logp[t] - o.sampled_logps[t]).exp()
            A, low, high = o.advantage, 1 - args.clip_eps, 1 + args.clip_eps
            outside = (A > 0 and rho > high) or (A < 0 and rho < low)
            clipped += outside
            term = (high if A > 0 else low) * A if outside else rho * A
            term = term - args.beta * ((ref[t] - logp[t]).exp() - (ref[t] - logp[t]) - 1)
            weight = {
                "sequence": 1 / (len(rollouts) * len(o.reply_ids)),
                "token": 1 / tokens,
                "constant": 1 / (len(rollouts) * args.max_new_tokens),
            }[args.aggregation]
            total = total + weight * term
    return -total, clipped, tokens


@pytest.mark.parametrize(
    ("aggregation", "temperature", "beta"),
    [("sequence", 1.0, 0.1), ("token", 0.7, 0.1), ("constant", 1.0, 0.0)],
)
def test_update_adds_the_same_gradient_for_every_micro_batch(model_dir, aggregation, temperature, beta):
    policy = policy_with_adapter(model_dir)
    groups = hand_made_groups(model_dir, policy, temperature, 0.5)
    args = argparse.Namespace(
        max_new_tokens=9, aggregation=aggregation, temperature=temperature, beta=beta, clip_eps=0.2, clip_eps_high=None, micro_batch=1
    )
    before = [(list(o.prompt_ids), list(o.reply_ids), list(o.sampled_logps)) for g in groups for o in g]
    expected_loss, clipped, tokens = objective_by_plain_passes(model_dir, policy, groups, args)
    expected_loss.backward()
    expected = take_gradients(policy)
    assert 5 < clipped < tokens - 5
    for size in (1, 2, 5):
        args.micro_batch = size
        loss, sums = train_rft.update(args, policy, groups, range(len(groups)), args.beta)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
        assert_close_gradients(take_gradients(policy), expected)
        assert (sums.clipped, sums.tokens) == (clipped, tokens)
        assert (sums.kl > 0) == (beta > 0)
    assert before == [(o.prompt_ids, o.reply_ids, o.sampled_logps) for g in groups for o in g]


def test_first_update_has_loss_zero_and_the_gradient_of_reinforce(model_dir):
    policy = policy_with_adapter(model_dir)
    groups = hand_made_groups(model_dir, policy, 1.0, 0.0)
    args = argparse.Namespace(
        max_new_tokens=9, aggregation="sequence", temperature=1.0, beta=0.0, clip_eps=0.2, clip_eps_high=None, micro_batch=2
    )
    loss, sums = train_rft.update(args, policy, groups, range(len(groups)), args.beta)
    actual = take_gradients(policy)
    assert abs(loss) < 1e-5 and sums.max_ratio_error < 1e-4 and sums.clipped == 0
    model = plain_model(model_dir, policy)
    reinforce = sum(
        o.advantage * plain_logps(model, o.prompt_ids, o.reply_ids).mean() for group in groups for o in group
    )
    (-reinforce / 15).backward()
    assert_close_gradients(actual, take_gradients(policy))


# --- rewards of a group, by hand


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


# --- stop and resume


def wait_for_lines(process, path, count):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    raise AssertionError("the run wrote too few lines in time")


def interrupt(model_dir, folder, log, count, with_signal):
    process = start(rft_flags(model_dir, folder))
    try:
        wait_for_lines(process, folder / log, count)
        process.send_signal(with_signal)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


@pytest.mark.parametrize(
    ("log", "count", "with_signal", "steps"),
    [
        ("sft/metrics.jsonl", 2, signal.SIGINT, 6),  # in SFT: its log begins with the held-out losses
        ("metrics.jsonl", 2, signal.SIGINT, 6),
        ("metrics.jsonl", 3, signal.SIGKILL, 6),
    ],
    ids=["ctrl-c-in-sft", "ctrl-c-in-rft", "kill-in-rft"],
)
def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(full, model_dir, tmp_path, log, count, with_signal, steps):
    folder = tmp_path / "run"
    code, output = interrupt(model_dir, folder, log, count, with_signal)
    done = [line for line in lines_of(folder / log) if "lr" in line] if with_signal == signal.SIGINT else []
    assert len(done) < steps and not (folder / "adapter").exists(), "the run was over before the signal came"
    if with_signal == signal.SIGINT:
        assert code == 130
        assert f"--resume {folder}" in output and "Traceback" not in output
        where = folder / Path(log).parent / "checkpoints"
        assert checkpoint.latest_checkpoint(where).name == f"step-{len(done):06d}"
    else:
        assert code == -signal.SIGKILL
        # what a kill within a write would leave: none of it may be taken for whole
        for number in (4, 99):
            half = folder / "checkpoints" / f"step-{number:06d}.tmp"
            half.mkdir(exist_ok=True)
            (half / "tensors.safetensors").write_bytes(b"half")
        for name in ("metrics.jsonl", "samples.jsonl"):
            with open(folder / name, "a") as f:
                f.write('{"step": 5, "rew')
    config = (folder / "config.json").read_bytes()
    # every setting is that of config.json, whatever else is given
    run_rft(["--resume", str(folder), "--seed", "99", "--m", "2", "--lr", "1", "--steps", "1", "--algo", "grpo"])
    assert (folder / "config.json").read_bytes() == config
    assert_same_run(Run(folder, []), full)
    assert (folder / "timing.json").exists()


def test_resuming_a_finished_run_changes_nothing_of_it(full, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(full.folder, folder)
    run_rft(["--resume", str(folder)])
    assert_same_run(Run(folder, []), full)


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    for name in ("step-000002", "step-000004.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / "step-000002").rmdir()
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.latest_checkpoint(tmp_path / "missing") is None


def test_checkpoints_keep_the_newest_and_give_back_all(tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in (1, 2, 3, 10):
        sum((p**2).sum() for p in parameters).backward()
        optimizer.step()
        adapter = {f"p{i}": p for i, p in enumerate(parameters)}
        checkpoint.save_checkpoint(tmp_path, step, adapter, optimizer, {"memory": {"a": 1 / 3}}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    fresh = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters], lr=0.1)
    step, adapter, extra = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(tmp_path), fresh)
    assert step == 10 and extra == {"memory": {"a": 1 / 3}}
    assert all(torch.equal(adapter[f"p{i}"], p) for i, p in enumerate(parameters))
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() == {0, 1}
    for i in old:
        assert old[i].keys() == new[i].keys() and all(torch.equal(old[i][k], new[i][k]) for k in old[i])


def test_a_damaged_checkpoint_is_an_input_error(full, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(full.folder, folder)
    tensors = checkpoint.latest_checkpoint(folder / "checkpoints") / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "step-000006" in refused(capsys, train_rft.main, ["--resume", str(folder)])


# --- what is refused


def refused(capsys, main, argv, code=2):
    """The run ends with that exit status and exactly one `error:` line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and re.match(r"([\w.]+: )?error: ", errors[0])  # argparse names the script first
    return errors[0]


def test_a_folder_that_holds_something_is_refused_and_unchanged(full, model_dir, sft_adapter, tmp_path, capsys):
    before = tree(full.folder)
    argv = rft_flags(model_dir, full.folder, sft_adapter=sft_adapter)
    assert str(full.folder) in refused(capsys, train_rft.main, argv)
    refused(capsys, train_sft.main, sft_flags(model_dir, full.folder))
    assert tree(full.folder) == before and len(before) > 10
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for out in ("used", "file"):
        refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / out))
    assert tree(tmp_path) == {"used/notes.txt": b"mine", "file": b"mine too"}


def test_an_empty_folder_is_taken(model_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    train_sft.main(sft_flags(model_dir, tmp_path / "empty", max_steps=1))
    assert (tmp_path / "empty" / "adapter" / "adapter_model.safetensors").exists()


def test_resume_of_what_is_no_run_is_refused(full, model_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"script": "train_sft.py"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = tree(tmp_path)
    for name in ("empty", "missing", "broken", "list", "other"):
        assert name in refused(capsys, train_rft.main, ["--resume", str(tmp_path / name)])
    refused(capsys, train_sft.main, ["--resume", str(full.folder)])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["0", "-1"])
def test_temperature_zero_is_refused(model_dir, tmp_path, capsys, value):
    argv = rft_flags(model_dir, tmp_path / "run", temperature=value)
    assert "--temperature" in refused(capsys, train_rft.main, argv)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    for name in ("no-one/no-such-model", "no//such:model"):
        assert name in refused(capsys, train_sft.main, sft_flags(name, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_folder_that_is_missing_or_incomplete_is_refused(model_dir, tmp_path, capsys):
    incomplete = tmp_path / "no-weights"
    shutil.copytree(model_dir, incomplete)
    (incomplete / "model.safetensors").unlink()
    for main, arguments in ((train_sft.main, sft_flags), (train_rft.main, rft_flags)):
        for name in (incomplete, tmp_path / "missing"):
            assert str(name) in refused(capsys, main, arguments(name, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_adapters_that_do_not_fit_are_refused(model_dir, sft_adapter, tmp_path, capsys):
    from tiny import make_tiny_model

    def changed(name, edit):
        shutil.copytree(sft_adapter, tmp_path / name)
        edit(tmp_path / name)
        return tmp_path / name

    def rank(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))

    def cut(folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])

    bad = [changed("rank", rank), changed("corrupt", cut), tmp_path / "missing"]
    bad += [changed("no-config", lambda f: (f / "adapter_config.json").unlink())]
    bad += [changed("no-weights", lambda f: (f / "adapter_model.safetensors").unlink())]
    for adapter in bad:
        assert str(adapter) in refused(
            capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", sft_adapter=adapter)
        )
    other = make_tiny_model(tmp_path / "other", seed=1)  # the same shapes, other weights
    refused(capsys, train_rft.main, rft_flags(other, tmp_path / "run", sft_adapter=sft_adapter))
    assert not (tmp_path / "run").exists()


def test_invalid_data_is_refused_with_its_line(model_dir, tmp_path, capsys):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    data = tmp_path / "data.jsonl"

    def with_line_2(text):
        experts.write_records(data, records)
        lines = data.read_text().splitlines()
        data.write_text("\n".join([lines[0], text if text is not None else lines[1], *lines[2:]]) + "\n")
        return sft_flags(model_dir, tmp_path / "run", data=data)

    good = json.loads(json.dumps(records[1].__dict__))
    wrong = [
        "{",
        "[]",
        "null",
        json.dumps({k: v for k, v in good.items() if k != "label"}),
        json.dumps(good | {"label": "whatever"}),
        json.dumps(good | {"kind": "X"}),
        json.dumps(good | {"seat": 3}),
        json.dumps(good | {"prompt": "text"}),
        json.dumps(good | {"instance": {}}),
        json.dumps(good | {"more": 1}),
    ]
    for text in wrong:
        message = refused(capsys, train_sft.main, with_line_2(text))
        assert "line 2" in message and str(data) in message, text
    data.write_text("")
    refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", data=data))
    refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", data=tmp_path / "missing.jsonl"))
    assert not (tmp_path / "run").exists()


def test_data_that_lacks_a_seat_is_refused_in_rft(model_dir, sft_adapter, tmp_path, capsys):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    experts.write_records(tmp_path / "data.jsonl", [r for r in records if (r.seat, r.kind) != (1, "E")])
    changes = dict(data=tmp_path / "data.jsonl", sft_adapter=sft_adapter)
    assert "seat" in refused(capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", **changes))


def test_a_prompt_longer_than_the_context_is_refused(model_dir, sft_adapter, tmp_path, capsys):
    folder = tmp_path / "short"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "64" in refused(capsys, train_sft.main, sft_flags(folder, tmp_path / "sft"))
    assert "64" in refused(capsys, train_rft.main, rft_flags(folder, tmp_path / "rft", sft_adapter=sft_adapter))


def test_lora_targets_that_name_nothing_are_refused(model_dir, tmp_path, capsys):
    assert "no_proj" in refused(capsys, train_sft.main, sft_flags(model_dir, tmp_path / "run", targets=["no_proj"]))


@pytest.mark.parametrize(
    "changes", [{"expert": "nobody"}, {"seat": 3}, {"eval_agents": 2}, {"expert": "noisy:nash:2"}], ids=str
)
def test_wrong_values_are_refused_before_anything_is_made(model_dir, tmp_path, capsys, changes):
    refused(capsys, train_rft.main, rft_flags(model_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_put_adapter_names_the_folder(model_dir, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        put_adapter(load_policy(model_dir), str(tmp_path / "nowhere"))


def test_records_are_not_changed_by_what_is_made_of_them(model_dir):
    records = experts.simulate_many(1, "second-best", 0, PromptStyle(), (3, 3))
    copies = [replace(r, prompt=[dict(m) for m in r.prompt]) for r in records]
    policy = load_policy(model_dir)
    train_sft.conversations(policy, records, "both")
    train_rft.make_prompts(policy, records, ALL_SEATS)
    assert records == copies
