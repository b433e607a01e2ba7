"""The bridge to TRL: two real steps of the real GRPOTrainer on the tiny model, compared with our own step."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from whole_runs import ROOT, fake_parse, flags, sft_flags

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-bench.txt")

from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import eval as evaluation  # noqa: E402
import tompo  # noqa: E402
import train_sft  # noqa: E402
from bridges import trl_tompo  # noqa: E402
from models import adapters  # noqa: E402
from models.load import load_policy  # noqa: E402
from play.dataset import make_prompts, trained_seats  # noqa: E402
from play.expert_games import label_decision  # noqa: E402
from policy import Policy  # noqa: E402
from prompts import format_reply  # noqa: E402
from rewards import Memory, Sample, expert_rewards  # noqa: E402
from tools import merge  # noqa: E402
from variants import objective

M = 4
BRIDGE = dict(games=4, agents=3, noise=0.3, seat="all", seed=3, rank=4, lora_alpha=8, steps=2, prompts=[3, 2])
BRIDGE |= dict(m=M, lr=5e-3, beta=0.02, micro_batch=1, max_new_tokens=14)


@pytest.fixture(scope="module")
def merged(model_dir, tmp_path_factory):
    """A model that train_sft.py has trained for a step, with its adapter merged."""
    folder = tmp_path_factory.mktemp("bridge")
    train_sft.main(sft_flags(model_dir, folder / "sft", sft_steps=1))
    merge.main([str(folder / "sft" / "adapter"), "--out", str(folder / "merged"), "--model", model_dir])
    return str(folder / "merged")


def prompts_of(settings, policy):
    records = settings.data.load(settings.games, settings.players)
    trained = trained_seats(records, settings.data.seat, settings.run.seed)
    return make_prompts(policy, records, trained, settings.rft.counts, settings.players.style)


class Recorder(TrainerCallback):
    """What TRL has used in each step."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.inputs = trainer, [], []
        self.start = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        prepare = trainer._prepare_inputs

        def prepared(*args):
            self.inputs.append({name: v.clone() for name, v in prepare(*args).items() if torch.is_tensor(v)})
            return self.inputs[-1]

        trainer._prepare_inputs = prepared

    def on_step_end(self, args, state, control, **kwargs):
        logs = self.trainer._logs
        step = {name: list(logs[name]) for name in ("prompt", "advantages")}
        self.steps.append(step | {name: list(values) for name, values in logs["rewards"].items()})


@pytest.fixture(scope="module")
def run(merged, tmp_path_factory):
    """main() for two steps. Replies of a random model are garbage: see whole_runs.py for `fake_parse`."""
    folder, seen = tmp_path_factory.mktemp("trl") / "run", {}

    def recorded(settings, make=trl_tompo.make_trainer):
        trainer, rewards = make(settings)
        seen.update(trainer=trainer, recorder=Recorder(trainer), settings=settings)
        trainer.add_callback(seen["recorder"])
        return trainer, rewards

    def before_step(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.setdefault("gradients", [p.grad.clone() for p in parameters])
        seen.setdefault("rates", []).append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(before_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_tompo, "parse_reply", fake_parse)
        patch.setattr(trl_tompo, "make_trainer", recorded)
        fields = ["--trl", "max_grad_norm=1e9", "gradient_checkpointing=false"]
        trl_tompo.main([*flags(BRIDGE | {"model": merged, "out": folder}), *fields])
    hook.remove()
    return seen | {"folder": folder}


def test_two_steps_leave_an_adapter_that_eval_reads(run, merged, tmp_path):
    state, config = adapters.read_adapter(run["folder"] / "adapter")
    assert (config.r, config.alpha, len(state)) == (4, 8, 2 * 2 * 7)
    assert all(tensor.norm() > 0 for tensor in state.values())  # B was 0 before the steps
    first, second = json.loads((run["folder"] / "trainer_state.json").read_text())["log_history"][:2]
    assert first["kl"] == 0 and second["kl"] > 1e-6 and 0 < first["U1"] < 1 and first["grad_norm"] > 1e-3
    policies = ["base", str(run["folder"] / "adapter")]
    asked = dict(model=merged, agents=3, eval_games=2, max_new_tokens=14, json=tmp_path / "eval.json")
    evaluation.main([*flags(asked), "--policy", *policies])
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert results[policies[0]]["replies"] != results[policies[1]]["replies"]


def test_no_generation_config_of_a_model_changes_what_is_sampled(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "model")
    config = {"min_p": 0.3, "no_repeat_ngram_size": 2, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    settings = trl_tompo.parse(flags(BRIDGE | {"model": folder, "out": tmp_path / "run"}))
    trainer, rewards = trl_tompo.make_trainer(settings)
    left = trainer.model.get_base_model().generation_config
    assert (left.min_p, left.no_repeat_ngram_size) == (None, None)
    assert trainer.eos_token_ids == list(rewards.end_ids) == [2, 7]


def test_a_step_has_the_prompts_of_ours(run, merged):
    policy, settings = load_policy(merged, engine="plain"), run["settings"]
    rft, pool = settings.rft, prompts_of(settings, policy)
    for step in range(2):
        batch = rft.next_batch(pool, rft.counts, step, settings.run.seed)
        prompts = run["recorder"].steps[step]["prompt"]
        assert prompts == [p.record.prompt for p in batch for _ in range(M)]
        assert run["trainer"]._tokenize_prompts(prompts)[0] == [p.ids for p in batch for _ in range(M)]
    assert run["rates"] == pytest.approx([train_sft.learning_rate(step, 2, 5e-3) for step in range(2)])


def ours_and_trls(step):
    """(whether it has a graph level, A by tompo.py, TRL's advantages) of every group of a recorded step."""
    r_S, R_G, theirs = (torch.tensor(step[name]).view(-1, M) for name in ("r_S", "R_G", "advantages"))
    graph = ~R_G.isnan().all(1)
    A_S, A_G = (torch.stack(list(map(tompo.group_normalise, r))) for r in (r_S, R_G.nan_to_num()))
    both = 0.8 * A_S + 0.2 * A_G
    return graph, torch.where(graph[:, None], both, A_S), theirs


def test_trls_advantages_are_ours_times_one_number_for_each_kind(run):
    """Within a group TRL's std has m - 1 in the denominator, ours m: c = sqrt((m-1) / m). Its weighted
    sum is then c A in graph decisions and 0.8 c A in efforts, has mean 0, and is divided by its std over the
    step."""
    c, live = (1 - 1 / M) ** 0.5, 0
    for step in run["recorder"].steps:
        graph, ours, theirs = ours_and_trls(step)
        assert graph.tolist().count(True) == 3 and len(graph) == 5
        summed = c * torch.where(graph, 1.0, 0.8)[:, None] * ours
        assert theirs.tolist() == [pytest.approx(g.tolist(), abs=2e-3) for g in summed / summed.std()]
        live += int((ours != 0).any(1).sum())
    assert live >= 8  # of 10 groups


def test_the_gradient_of_a_step_is_that_of_our_objective(run):
    """Of step 0 on TRL's own replies and advantages: aggregation, passes and clipping are ours. There pi is
    pi_ref, so that the KL has no gradient."""
    trainer, texts, advantages = run["trainer"], ([], []), []
    model = trainer.accelerator.unwrap_model(trainer.model).base_model.model
    for part in run["recorder"].inputs[:5]:
        for i, A in enumerate(part["advantages"].tolist()):
            texts[0].append(part["prompt_ids"][i][part["prompt_mask"][i] == 1].tolist())
            texts[1].append([part["completion_ids"][i][part["completion_mask"][i] == 1].tolist()])
            advantages.append(A)
    lengths = [len(reply) for (reply,) in texts[1]]
    assert len(lengths) == 5 * M and len(set(lengths)) > 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # back to where step 0 began: B = 0, and A as it was
        for p, value in zip(parameters, run["recorder"].start, strict=True):
            p.copy_(value)
    logp_T = torch.cat(Policy(model, trainer.processing_class, "", (2,), None).token_logps(*texts))
    weights = objective.AGGREGATIONS["sequence"](lengths, 14)
    A_T, w_T = (torch.tensor(v).repeat_interleave(torch.tensor(lengths)) for v in (advantages, weights))
    J_T = tompo.clipped((logp_T - logp_T.detach()).exp(), A_T, 0.8, 1.2)
    mine = torch.autograd.grad(-(w_T * J_T).sum(), parameters)
    assert torch.cat([g.flatten() for g in mine]).norm() > 1e-3
    for g, theirs in zip(mine, run["gradients"], strict=True):
        assert (g - theirs).abs().max() < 1e-5


@pytest.fixture
def judge(merged):
    """(Rewards with two graph prompts of one game, the policy, the prompts' style, an empty log)."""
    settings = trl_tompo.parse(flags(BRIDGE | {"model": merged, "games": 1, "m": 2}))
    policy = load_policy(merged, engine="plain")
    (first, *_), (second, *_), *_ = prompts_of(settings, policy)
    assert first.record.kind == second.record.kind == "G" and first.record.seat != second.record.seat
    rewards = trl_tompo.Rewards(settings.rft, policy, [first, second])
    return rewards, policy, settings.players.style, [label_decision(p.record) for p in (first, second)], {}


def ask(judge, replies):
    """(r^S, R^G) of two replies to the first prompt and two to the second."""
    rewards, policy, _, _, logged = judge
    given = dict(completion_ids=[policy.encode_reply(r) for r in replies], prompt_index=[0, 0, 1, 1])
    given |= dict(completions=None, log_metric=lambda name, value: logged.setdefault(name, []).append(value))
    return rewards.r_S(**given), rewards.R_G(**given)


def test_all_groups_of_a_step_see_the_memory_of_the_steps_before(judge):
    rewards, _, style, good, logged = judge
    row_N = 1 - good[1].action
    row_N[rewards.targets[1].seat] = 0
    poor = type(good[1])(good[1].kind, row_N)
    replies = [format_reply(d, style) for d in (good[0], good[0], poor, poor)]
    for best in (0.0, 1.0):  # in the second step the poor replies are below the best of the first
        groups = [[Sample(None, good[0]) for _ in range(2)], [Sample(None, poor) for _ in range(2)]]
        expert_rewards(rewards.targets, groups, Memory({rewards.targets[0].game.key: best}))
        expected = [o.rewards for group in groups for o in group]
        r_S, R_G = ask(judge, replies)
        assert r_S == [terms["r_S"] for terms in expected]
        assert R_G == [terms["R_G"] for terms in expected]
        assert expected[2]["global"] == (0.5 if best == 0 else 0)
    assert rewards.memory.best == {rewards.targets[0].game.key: 1.0}
    assert logged["U1"] == [1.0] * 8 and logged["reward_graph"] == r_S * 2
    assert logged["s"] == [terms["s"] for terms in expected] * 2


def test_a_special_token_within_a_reply_is_seen(judge):
    """TRL's own text of it lacks the token, and the reply would count as compliant."""
    good = format_reply(judge[3][0], judge[2])
    r_S, R_G = ask(judge, [good, good + "<|im_start|>", "", good])
    assert r_S[0] > 0.5 and r_S[1] == r_S[2] == -0.5 and R_G[1] == R_G[2] == 0


UNDER_TORCHRUN = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from whole_runs import fake_parse
from bridges import trl_tompo
trl_tompo.parse_reply = fake_parse
made = trl_tompo.make_trainer(trl_tompo.parse(sys.argv[1:]))
trl_tompo.make_trainer = lambda settings: made
trl_tompo.main(sys.argv[1:])
trainer, rewards = made
logs = {{name: list(values) for name, values in trainer._logs["rewards"].items()}}
logs |= dict(advantages=list(trainer._logs["advantages"]), memory=rewards.memory.best)
logs["weights"] = float(sum(p.abs().sum() for p in trainer.model.parameters() if p.requires_grad))
open(os.environ["FOUND"] + os.environ["RANK"], "w").write(json.dumps(logs))
"""


def test_two_processes_have_one_memory_and_one_step(merged, tmp_path, monkeypatch):
    script = tmp_path / "driver.py"
    script.write_text(UNDER_TORCHRUN)
    monkeypatch.setenv("FOUND", str(tmp_path / "found"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    asked = flags(BRIDGE | {"model": merged, "out": tmp_path / "run", "prompts": [4, 2], "steps": 1})
    done = subprocess.run([*command, str(script), *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(2))
    policy, settings = load_policy(merged, engine="plain"), trl_tompo.parse(asked)
    rft, pool = settings.rft, prompts_of(settings, policy)
    targets = [p.target for p in rft.next_batch(pool, rft.counts, 0, settings.run.seed)]
    parts = targets[:3], targets[3:]  # the first half is rank 0's
    halves = [{t.game.key for t in part if t.kind.letter == "G"} for part in parts]
    assert one["memory"] == other["memory"] and one["memory"].keys() == halves[0] | halves[1]
    assert halves[0] - halves[1] and halves[1] - halves[0]
    assert one["weights"] == other["weights"] and done.stdout.count("adapter: ") == 1
    one["R_G"] = [float("nan") if v is None else v for v in one["R_G"]]
    graph, ours, theirs = ours_and_trls(one)
    assert graph.tolist().count(True) == 4 and (ours != 0).any(1).sum() >= 5
    pairs = [(o, t) for o, t, has_graph in zip(ours, theirs, graph, strict=True) if has_graph and o.any()]
    ratio = torch.stack([t @ o / (o @ o) for o, t in pairs])
    assert ratio.max() - ratio.min() < 2e-3 * ratio.min()


def test_flags_that_the_bridge_cannot_follow_are_refused(refused, merged):
    wrong = {
        ("--sft-adapter", "x"): "merge it",
        ("--algo", "grpo"): "the bridge has no --algo",
        ("--reward-from", "credit"): "the bridge has no --reward-from",
        ("--prompts", "4", "1"): "cannot be shared evenly",
        ("--trl", "no_such_field=1"): "--trl",
    }
    for argv, message in wrong.items():
        assert message in refused(trl_tompo.main, ["--model", merged, *argv])


def test_trl_options_are_words_and_json(merged):
    fields = ["vllm_importance_sampling_mode=token_truncate", "gradient_checkpointing=false", "top_p=0.5"]
    config = trl_tompo.make_config(trl_tompo.parse(["--model", merged, "--trl", *fields]))
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.gradient_checkpointing is False and config.top_p == 0.5
