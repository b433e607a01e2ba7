"""train_rft.py from flags to files: what a whole run leaves, what depends on its seed and flags, and every
mode that is not the default: other games, credits, rewards, aggregations, engines, chains of adapters."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import whole_runs as runs
from reference import add_adapter
from safetensors.torch import load_file
from tables import normalised
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

import eval as evaluation
import lora
import settings
import train_rft
import train_sft
from fast.engine import FastPolicy
from games import game_from_json
from models import adapters as adapter_files
from models.load import load_policy, put_adapter
from play import dataset
from play.cast import make_expert
from play.expert_games import history_from_text
from play.records import write_records
from play.rft_log import LOGGED
from prompts import PromptStyle
from rewards import TERMS, Target, graph_likeness, likeness
from run.seeds import Stream
from settings import parse_training, training_parser
from tools import merge
from tools.page.groups import COLUMNS
from variants import credit


def test_a_run_leaves_all_its_files(full, model_dir):
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "eval.json", "curves.png", "timing.json"):
        assert (full.folder / name).stat().st_size > 0, name
    for name in ("adapter", "sft/adapter"):
        assert (full.folder / name / "adapter_config.json").exists() and full.weights(name)
    assert (full.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(full.folder.rglob("*.tmp"))
    timing = json.loads((full.folder / "timing.json").read_text())
    assert all(v > 0 for v in timing["seconds"].values()) and timing["peak_memory_gib"] > 0
    assert {"SFT", "RFT", "evaluation"} <= set(timing["seconds"])
    config = json.loads((full.folder / "config.json").read_text())
    asked = runs.SHARED | runs.RFT_ONLY | {"model": model_dir, "out": str(full.folder), "agents": [3, 3]}
    asked |= {"script": "train_rft.py", "targets": list(runs.SHARED["targets"])}
    assert {name: config[name] for name in asked} == asked
    assert config["versions"] == f"torch {torch.__version__}, transformers {transformers.__version__}"


def test_the_adapter_names_its_base_so_that_peft_finds_it(full, model_dir):
    peft, chat = pytest.importorskip("peft"), [{"role": "user", "content": "Round 1 links."}]
    policy = load_policy(model_dir)
    put_adapter(policy, full.folder / "adapter")
    ids = torch.tensor([policy.encode_prompt(chat)])
    other = peft.AutoPeftModelForCausalLM.from_pretrained(full.folder / "adapter")
    torch.testing.assert_close(other(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_base_is_named_by_its_whole_path_wherever_the_run_was_started(model_dir, monkeypatch):
    monkeypatch.chdir(Path(model_dir).parent)
    policy = load_policy(f"./{Path(model_dir).name}")
    config = train_sft.new_adapter(policy, settings.LoRA(rank=2), 0, Stream.SFT_ADAPTER)
    assert config.base_model == model_dir


def test_what_cannot_fit_into_memory_is_one_line_before_sft(model_dir, tmp_path, refused):
    line = refused(train_rft.main, runs.rft_flags(model_dir, tmp_path / "run", m=10**13))
    assert "out of memory in RFT (" in line and "a smaller --micro-batch, --m or --prompts" in line
    assert not (tmp_path / "run").exists()


def test_a_pass_of_rft_that_does_not_fit_is_one_line_before_sft(model_dir, tmp_path, refused, monkeypatch):
    """Its gradients fail here, as those of a GPU that is too small would."""
    asked, score = [], FastPolicy.token_logps

    def full(self, prompts, replies, temperature=1.0):
        if not torch.is_grad_enabled() or len(prompts[0]) < 5:  # when a model is loaded, or gets an adapter
            return score(self, prompts, replies, temperature)
        asked.append((len(prompts), {len(group) for group in replies}))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(FastPolicy, "token_logps", full)
    line = refused(train_rft.main, runs.rft_flags(model_dir, tmp_path / "run"))
    assert line.startswith("error: out of memory in RFT (CUDA out of memory.")
    assert asked == [(2, {4})] and not (tmp_path / "run").exists()


def test_the_pass_that_is_tried_leaves_no_trace(model_dir, tmp_path):
    """The model is its base again. (tests/run/test_resume.py compares whole runs with and without it.)"""
    argv = runs.rft_flags(model_dir, tmp_path / "run")
    given = parse_training(training_parser("", "", settings.RFT, settings.Evaluation), "train_rft.py", argv)
    plain, (policy, _, _) = load_policy(model_dir), train_rft.prepare(given)
    assert not lora.lora_layers(policy.model)
    weights = [dict(p.model.named_parameters()) for p in (plain, policy)]
    assert weights[0].keys() == weights[1].keys()
    for name, p in weights[0].items():
        assert torch.equal(p, weights[1][name]) and weights[1][name].grad is None


def test_samples_say_which_replies_were_cut_off(full):
    ended = [s["ended"] for s in full.lines("samples.jsonl")]
    assert set(ended) <= {True, False} and not all(ended)


def test_eval_json_has_a_row_for_every_policy(full):
    results = json.loads((full.folder / "eval.json").read_text())["results"]
    experts = ["expert:second-best", "expert:always-link", "expert:random"]
    assert list(results) == ["tompo", "sft", "base", *experts]
    assert results["expert:second-best"]["all rounds"]["U1"]["mean"] == 1
    assert len(results["tompo"]["instances"]) == 2
    # the three policies are three policies: the same uniforms, other replies
    assert results["tompo"]["replies"] != results["sft"]["replies"] != results["base"]["replies"]


def test_the_run_did_something(full):
    """In every step, once. Everything below compares runs: two runs that do nothing are alike too."""
    metrics, sft = full.lines("metrics.jsonl"), full.lines("sft/metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(6))
    assert [line["step"] for line in sft if "loss" in line] == list(range(6))
    assert [line["step"] for line in sft if "loss" not in line] == [0, 6]  # held-out, before and after
    assert all(line["grad_norm"] > 1e-3 for line in metrics)
    assert len({line["reward"] for line in metrics}) > 3 and any(0 < line["U1"] < 1 for line in metrics)
    assert {line["kind"] for line in full.lines("samples.jsonl")} == {"G", "E"}
    for name in ("held_out_loss_graph", "held_out_loss_effort"):
        assert sft[-1][name] < sft[0][name]


def test_first_step_starts_from_pi_ref_with_ratio_one(full):
    first, *rest = full.lines("metrics.jsonl")
    assert first["kl"] == 0
    assert first["max_ratio_error"] < 1e-4 and first["clip_fraction"] == 0
    assert abs(first["loss"]) < 1e-5 and first["grad_norm"] > 1e-3
    assert all(line["kl"] > 1e-6 and line["max_ratio_error"] < 1e-4 for line in rest)  # one inner step


def groups_of(lines):
    """The lines of samples.jsonl by group, of 4 replies each."""
    return [lines[i : i + 4] for i in range(0, len(lines), 4)]


def test_sample_lines_hold_all_terms(full):
    """Also what the rewards of this very reply are, where the experts do what prompts.jsonl says."""
    samples, targets = full.lines("samples.jsonl"), {}
    for p in full.lines("prompts.jsonl"):
        game = game_from_json(p["instance"])
        end = history_from_text(game, [*p["before"], p["experts"]])
        target = Target(end.before(p["stage"]), p["seat"], end.history[-1])
        targets[p["game"], p["stage"], p["seat"]] = target
    for line in samples:
        assert {"step", "reply", "expert"} <= set(line) and line["r_S"] == line["compliance"] + line["sample"]
        t = targets[line["game"], line["stage"], line["seat"]]
        decision = runs.fake_parse(line["reply"], t.state, t.seat)
        assert line["sample"] == pytest.approx(likeness(decision, t)) and line["kind"] == t.kind.letter
        assert (line["broken"] is None) == (line["compliance"] > 0) == (decision is not None)
        if line["kind"] == "G":
            assert line["s"] == pytest.approx(graph_likeness(decision, t))
            assert line["R_G"] == pytest.approx(line["s"] + line["local"] + line["global"], abs=1e-12)
            assert line["advantage"] == pytest.approx(0.8 * line["A_S"] + 0.2 * line["A_G"], abs=1e-5)
        else:
            assert line["A_G"] == 0 and line["advantage"] == line["A_S"]
    for group in groups_of(samples):
        for reward, advantage in (("r_S", "A_S"), ("R_G", "A_G")):
            if reward in group[0]:
                expected = normalised([line[reward] for line in group])
                assert [line[advantage] for line in group] == pytest.approx(expected, abs=1e-4)


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


def test_a_new_reward_term_cannot_take_a_name_of_the_logs_or_the_page(full):
    lines = full.lines("samples.jsonl") + full.lines("metrics.jsonl")
    names = set().union(*lines) | set(COLUMNS.split())
    assert {"r_S", "kl", "f1"} <= names and names - set(TERMS) <= LOGGED


def test_metrics_are_those_of_the_samples(full):
    samples = full.lines("samples.jsonl")
    for line in full.lines("metrics.jsonl"):
        lines = [o for o in samples if o["step"] == line["step"]]
        groups = groups_of(lines)
        assert line["reward"] == pytest.approx(np.mean([o["r_S"] for o in lines]))
        assert line["U1"] == np.mean([o["compliance"] > 0 for o in lines])
        assert line["zero_variance_groups"] == np.mean([all(o["advantage"] == 0 for o in g) for g in groups])
        assert line["distinct_replies"] == np.mean([len({o["reply"] for o in g}) / 4 for g in groups])
        for kind, key in (("G", "reward_graph"), ("E", "reward_effort")):
            values = [o["r_S"] for o in lines if o["kind"] == kind]
            assert line[key] == (pytest.approx(np.mean(values)) if values else None)


def test_the_logged_learning_rate_is_the_one_that_was_used(full):
    logged = [line["lr"] for line in full.lines("sft/metrics.jsonl") if "lr" in line]
    logged += [line["lr"] for line in full.lines("metrics.jsonl")]
    assert [[lr] for lr in logged] == full.rates
    schedule = [train_sft.learning_rate(i, 6, 1e-3) for i in range(6)]
    schedule += [train_sft.learning_rate(i, 6, 5e-3) for i in range(6)]
    assert logged == schedule and len(set(logged)) > 6 and min(logged) > 0


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


def saved_adapter(folder):
    state, config = adapter_files.read_adapter(folder)
    return state, config.scaling


def checkpoint_adapter(folder):
    tensors = load_file(runs.latest_checkpoint(folder) / "tensors.safetensors")
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
    return adapter, runs.SHARED["lora_alpha"] / runs.SHARED["rank"]


def test_the_final_adapter_on_the_plain_base_is_sft_and_rft_together(full, model_dir, sft_adapter):
    sft, rft = saved_adapter(sft_adapter), checkpoint_adapter(full.folder)
    expected = logits_with(model_dir, sft, rft)
    assert (logits_with(model_dir, saved_adapter(full.folder / "adapter")) - expected).abs().max() < 1e-4
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
    config = add_adapter(policy, size=0.3, r=2, targets=("q_proj", "down_proj"))
    adapter_files.save_adapter(policy.model, second, config)
    return f"{sft_adapter}+{second}"


def test_rft_on_a_chain_of_adapters_leaves_all_of_them_as_one(model_dir, chain, tmp_path):
    runs.short_run(model_dir, chain, tmp_path / "run")
    before = [saved_adapter(folder) for folder in chain.split("+")]
    rft = checkpoint_adapter(tmp_path / "run")
    expected = logits_with(model_dir, *before, rft)
    assert (logits_with(model_dir, saved_adapter(tmp_path / "run" / "adapter")) - expected).abs().max() < 1e-4
    for fewer in (before, [before[0], rft], [before[1], rft]):
        assert (logits_with(model_dir, *fewer) - expected).abs().max() > 1e-3


def test_a_chain_of_adapters_is_evaluated_and_merged(model_dir, chain, sft_adapter, tmp_path):
    """eval.py's replies with A+B are those of the base into which tools.merge has put A+B."""
    merge.main([chain, "--model", model_dir, "--out", str(tmp_path / "merged")])
    replies = {}
    for model, names in ((model_dir, ["base", sft_adapter, chain]), (tmp_path / "merged", ["base"])):
        path = tmp_path / f"{len(replies)}.json"
        argv = ["--model", str(model), "--eval-games", "3", "--max-new-tokens", "8"]
        evaluation.main([*argv, "--eval-temperature", "0", "--policy", *names, "--json", str(path)])
        results = json.loads(path.read_text())["results"]
        replies |= {(model, name): results[name]["replies"] for name in names}
    with_chain, merged = replies.pop((model_dir, chain)), replies.pop((tmp_path / "merged", "base"))
    assert with_chain == merged and with_chain not in replies.values() and len(replies) == 2


def test_another_seed_is_another_run(full, model_dir, sft_adapter, tmp_path):
    changes = dict(seed=4, steps=1, eval_games=0, temperature=1.3)
    (line,), samples = runs.short_run(model_dir, sft_adapter, tmp_path / "other", **changes)
    assert line["kl"] == 0 and line["max_ratio_error"] < 1e-4  # the temperature is in the ratio too
    assert [line["reply"] for line in samples] != [line["reply"] for line in full.lines("samples.jsonl")][:16]
    assert not (tmp_path / "other" / "eval.json").exists()


def test_both_engines_sample_the_same_replies_and_end_in_the_same_adapter(gentle, model_dir, tmp_path):
    runs.run_rft(runs.rft_flags(model_dir, tmp_path / "plain", lr=runs.GENTLE, engine="plain"))
    plain = runs.Run(tmp_path / "plain")
    runs.assert_same_up_to_rounding(plain, gentle)
    assert plain.weights() != gentle.weights(), "one engine was compared with itself"


def test_inner_epochs_take_that_many_steps_on_the_same_samples(model_dir, sft_adapter, tmp_path):
    rates = []
    hook = register_optimizer_step_pre_hook(lambda o, args, kwargs: rates.append(o.param_groups[0]["lr"]))
    try:
        changes = dict(inner_epochs=3, temperature=0.7, beta=0.0, algo="grpo", weights=["local=0.5"])
        metrics, samples = runs.short_run(model_dir, sft_adapter, tmp_path / "inner", **changes)
    finally:
        hook.remove()
    assert rates == [line["lr"] for line in metrics for _ in range(3)]
    assert len(samples) == 2 * 16 and all(line["kl"] is None for line in metrics)  # no reference, no KL
    assert all(line["max_ratio_error"] > 1e-3 for line in metrics)  # pi has left pi_old
    assert all(line["approx_kl"] > 0 for line in metrics)
    assert all(line["advantage"] == line["A_S"] for line in samples) and any(s.get("A_G") for s in samples)
    assert "grpo" in json.loads((tmp_path / "inner" / "eval.json").read_text())["results"]
    assert not (tmp_path / "inner" / "sft").exists()  # the SFT adapter came from elsewhere


def test_the_reply_limit_is_that_of_the_largest_game(model_dir, sft_adapter, tmp_path, monkeypatch):
    """Which the constant denominator of Dr. GRPO is made of, too."""
    limits, changes = [], dict(agents="3-4", seed=0)
    monkeypatch.setattr(train_rft, "rft", lambda *args: limits.append(args[3]))
    for given in (14, None):
        with pytest.raises(SystemExit):  # no step was done
            runs.short_run(model_dir, sft_adapter, tmp_path / f"{given}", max_new_tokens=given, **changes)
    assert limits == [14, 20 + 7 * 4]


def test_credit_takes_the_place_of_the_sample_level(model_dir, sft_adapter, tmp_path, monkeypatch):
    asked, real = [], credit.return_credits

    def noted(*args):
        asked.append((args, real(*args)))
        return asked[-1][1]

    monkeypatch.setattr(credit, "return_credits", noted)
    changes = dict(reward_from="credit", weights=["gamma=0.5"], rounds=2)
    _, samples = runs.short_run(model_dir, sft_adapter, tmp_path / "run", **changes)
    credits = [c or 0.0 for _, group in asked for c in group]
    assert credits == pytest.approx([s["sample"] for s in samples]) and len({*credits}) > 3
    for (_, target, expert, gamma, seed), _ in asked:
        assert (expert.name, gamma, seed, target.game.rounds) == ("second-best", 0.5, 3, 2)


def test_the_papers_preset_runs(model_dir, tmp_path):
    """With its values (see test_settings.py) where no flag changes them."""
    folder = tmp_path / "run"
    argv = f"--preset paper --model {model_dir} --games 5 --sft-steps 1 --steps 1 --eval-games 2".split()
    runs.run_rft([*argv, "--max-new-tokens", "8", "--out", str(folder)])
    assert adapter_files.read_adapter(folder / "adapter")[1].r == 2 * 64  # SFT and RFT
    samples = runs.lines_of(folder / "samples.jsonl")
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["seat"] for s in samples} == {0}
    (line,) = runs.lines_of(folder / "metrics.jsonl")
    assert 1e-4 < line["max_ratio_error"] < 1  # the rounding of bf16; that of fp32 is 1e-6


def test_several_games_and_stages_in_one_run(model_dir, sft_adapter, tmp_path):
    changes = dict(game=["bcz", "pgg"], stages=["GE", "GEE"], expert="planner", prompts=[4, 4], games=6)
    _, samples = runs.short_run(model_dir, sft_adapter, tmp_path / "run", eval_games=4, **changes)
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    for summary in results.values():
        assert list(summary["games"]) == ["BCZ-GE", "BCZ-GEE", "PGG-GE", "PGG-GEE"]
        played = [(row["instance"]["game"], row["instance"]["stages"]) for row in summary["instances"]]
        assert sorted(played) == [("bcz", "GE"), ("bcz", "GEE"), ("pgg", "GE"), ("pgg", "GEE")]
        means = [summary["games"][label]["U3"]["mean"] for label in summary["games"]]
        assert np.mean(means) == pytest.approx(summary["all rounds"]["U3"]["mean"])
    assert results["expert:planner"]["all rounds"]["U3"]["mean"] == pytest.approx(1, abs=1e-3)
    assert {s["kind"] for s in samples} == {"G", "E"} and {s["stage"] for s in samples} == {0, 1, 2}


def test_what_rft_cannot_use_is_refused_before_sft(model_dir, tmp_path, refused):
    records = dataset.simulate_many(2, make_expert("second-best"), 0, PromptStyle(), (3, 3))
    cases = [
        (records[1:], {}, "lacks decisions of game 0, stage 0"),
        (records[:-3], {}, "without effort decisions"),
        (records, dict(max_new_tokens=9999), "9999 reply tokens do not fit"),
    ]
    for number, (some, changes, words) in enumerate(cases):
        data = tmp_path / f"{number}.jsonl"
        write_records(data, some)
        said = refused(train_rft.main, runs.rft_flags(model_dir, tmp_path / "run", games=data, **changes))
        assert words in said and not (tmp_path / "run").exists()


def test_the_scripts_load_where_there_are_no_posix_modules():
    """As on Windows."""
    posix = ("resource", "fcntl", "pwd", "grp", "termios")
    blocked = f"import sys; sys.modules |= dict.fromkeys({posix})"
    tools = ", ".join(f"tools.{path.stem}" for path in (runs.ROOT / "tools").glob("[a-z]*.py"))
    code = f"{blocked}; import train_rft, train_sft, eval, {tools}; from run.files import peak_memory_gib"
    code += "; assert peak_memory_gib() is None"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
