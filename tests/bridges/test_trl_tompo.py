"""The bridge to TRL: two real steps of the real GRPOTrainer on the tiny model, held against our own step."""

import json
import runpy
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
import train_rft  # noqa: E402
import train_sft  # noqa: E402
from bridges import trl_tompo  # noqa: E402
from models import adapters  # noqa: E402
from models.load import load_policy  # noqa: E402
from play.expert_games import label_decision  # noqa: E402
from policy import Policy  # noqa: E402
from prompts import format_reply  # noqa: E402
from rewards import group_rewards  # noqa: E402
from run import dataset, training  # noqa: E402
from tools import merge  # noqa: E402

M = 4
DATA = dict(device="cpu", games=4, agents=3, noise=0.3, seat="all", seed=3, rank=4, lora_alpha=8)
BRIDGE = DATA | dict(steps=2, prompts=[3, 2], m=M, lr=5e-3, beta=0.02, micro_batch=1, max_new_tokens=14)


@pytest.fixture(scope="module")
def merged(model_dir, tmp_path_factory):
    """A model that train_sft.py has trained for a step, with its adapter merged."""
    folder = tmp_path_factory.mktemp("bridge")
    train_sft.main(sft_flags(model_dir, folder / "sft", sft_steps=1, probes=0))
    merge.main([str(folder / "sft" / "adapter"), "--out", str(folder / "merged"), "--model", model_dir])
    return str(folder / "merged")


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
    folder, found = tmp_path_factory.mktemp("trl") / "run", {}

    def recorded(args, make=trl_tompo.make_trainer):
        trainer, rewards = make(args)
        found.update(trainer=trainer, rewards=rewards, recorder=Recorder(trainer), args=args)
        trainer.add_callback(found["recorder"])
        return trainer, rewards

    def before_step(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found.setdefault("gradients", [p.grad.clone() for p in parameters])
        found.setdefault("rates", []).append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(before_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_tompo, "parse_reply", fake_parse)
        patch.setattr(trl_tompo, "make_trainer", recorded)
        told = ["--trl", "max_grad_norm=1e9", "gradient_checkpointing=false"]
        trl_tompo.main([*flags(BRIDGE | {"model": merged, "out": folder}), *told])
    hook.remove()
    return found | {"folder": folder}


def test_two_steps_leave_an_adapter_that_eval_reads(run, merged, tmp_path):
    state, config = adapters.read_adapter(run["folder"] / "adapter")
    assert (config.r, config.alpha, len(state)) == (4, 8, 2 * 2 * 7)
    assert all(tensor.norm() > 0 for tensor in state.values())  # B was 0 before the steps
    first, second = json.loads((run["folder"] / "trainer_state.json").read_text())["log_history"][:2]
    assert first["kl"] == 0 and second["kl"] > 1e-6 and 0 < first["U1"] < 1 and first["grad_norm"] > 1e-3
    policies = ["base", str(run["folder"] / "adapter")]
    asked = dict(model=merged, eval_agents=3, eval_games=2, max_new_tokens=14, json=tmp_path / "eval.json")
    evaluation.main([*flags(asked), "--device", "cpu", "--policy", *policies])
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert results[policies[0]]["replies"] != results[policies[1]]["replies"]


def test_a_step_has_the_prompts_of_ours(run, merged):
    policy, args = load_policy(merged, engine="plain"), run["args"]
    conversations = train_rft.make_prompts(policy, training.load_records(args), args)
    for step in range(2):
        batch = train_rft.next_batch(conversations, args.prompts, step, args.seed)
        prompts = run["recorder"].steps[step]["prompt"]
        assert prompts == [p.record.prompt for p in batch for _ in range(M)]
        assert run["trainer"]._tokenize_prompts(prompts)[0] == [p.ids for p in batch for _ in range(M)]
    assert run["rates"] == pytest.approx([training.learning_rate(step, 2, 5e-3) for step in range(2)])


def ours_and_trls(step, weights=(0.8, 0.2), m=M):
    """(kinds, A of tompo.py, TRL's advantages) of a recorded step, groups (P,) and (P, m)."""
    r_S, R_G, theirs = (torch.tensor(step[name]).view(-1, m) for name in ("r_S", "R_G", "advantages"))
    kinds = ["E" if group.isnan().all() else "G" for group in R_G]
    both = [(S, G if kind == "G" else None) for S, G, kind in zip(r_S, R_G, kinds)]
    ours = torch.stack([tompo.dual_level_advantages(S, G, weights=weights)[0] for S, G in both])
    return kinds, ours, theirs


def test_trls_advantages_are_ours_times_one_number_for_each_kind(run):
    """Within a group TRL's std has m - 1 in the denominator, ours m: c = sqrt((m-1) / m). Its weighted
    sum is then c A in graph decisions and 0.8 c A in efforts, has mean 0, and is divided by its std over the
    step."""
    c, live = (1 - 1 / M) ** 0.5, 0
    for step in run["recorder"].steps:
        kinds, ours, theirs = ours_and_trls(step)
        assert kinds.count("G") == 3 and kinds.count("E") == 2
        summed = c * torch.tensor([1.0 if kind == "G" else 0.8 for kind in kinds])[:, None] * ours
        assert theirs.tolist() == [pytest.approx(g.tolist(), abs=2e-3) for g in summed / summed.std()]
        live += int((ours != 0).any(1).sum())
    assert live >= 8  # of 10 groups


def test_the_gradient_of_a_step_is_that_of_our_objective(run):
    """Of step 0 on TRL's own replies and advantages: aggregation, passes and clipping are ours. There pi is
    pi_ref, so that the KL has no gradient."""
    trainer, inputs = run["trainer"], run["recorder"].inputs[:5]
    model = trainer.accelerator.unwrap_model(trainer.model).base_model.model
    policy, rows, advantages = Policy(model, trainer.processing_class, "", (2,)), [], []
    for part in inputs:
        for i, A in enumerate(part["advantages"].tolist()):
            prompt = part["prompt_ids"][i][part["prompt_mask"][i] == 1].tolist()
            reply = part["completion_ids"][i][part["completion_mask"][i] == 1].tolist()
            rows, advantages = rows + policy.pack([prompt], [[reply]]), advantages + [A]
    lengths = [len(row.targets) for row in rows]
    assert len(rows) == 5 * M and len(set(lengths)) > 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # back to where step 0 began: B = 0, and A as it was
        for p, value in zip(parameters, run["recorder"].start):
            p.copy_(value)
    logp_T = torch.cat(policy.token_logps(rows))
    weights = tompo.AGGREGATIONS["sequence"](lengths, 14)
    A_T, weight_T = (torch.tensor(v).repeat_interleave(torch.tensor(lengths)) for v in (advantages, weights))
    loss, _ = tompo.objective_loss(logp_T, logp_T.detach(), None, A_T, weight_T)
    mine = torch.autograd.grad(loss, parameters)
    assert torch.cat([g.flatten() for g in mine]).norm() > 1e-3
    for g, theirs in zip(mine, run["gradients"], strict=True):
        assert (g - theirs).abs().max() < 1e-5


def test_groups_without_variance_make_the_others_louder(run):
    """A third of the sum's variance is gone with a third of the groups: advantages rise by sqrt(3 / 2)."""
    trainer, group = run["trainer"], [2.5, 1.0, 0.5, 2.5]
    row, told = trainer.train_dataset[0], {}

    def advantages(r_S, R_G):
        flat = [sum(levels, []) for levels in (r_S, R_G)]
        trainer.reward_funcs = [lambda values=values, **_: values for values in flat]
        trainer.model.train()
        return trainer._generate_and_score_completions([row] * len(flat[0]))["advantages"].view(-1, M)

    before = trainer.reward_funcs
    try:
        told["live"] = advantages([group] * 3, [[None] * M] * 3)[0]
        told["idle"] = advantages([group, group, [2.5] * M], [[None] * M] * 3)
    finally:
        trainer.reward_funcs = before
    assert told["idle"][2].abs().max() < 1e-5
    n = 3 * M
    assert (told["idle"][0] / told["live"]).tolist() == pytest.approx([(3 / 2) ** 0.5] * M, rel=1e-3)
    expected = tompo.group_normalise(torch.tensor(group)) * ((n - 1) / n) ** 0.5  # c cancels, and so does 0.8
    assert told["live"].tolist() == pytest.approx(expected.tolist(), rel=1e-3)


# -------------------- the reward functions


@pytest.fixture
def judge(merged):
    """(Rewards with two graph prompts of one game, and how they are asked)."""
    args = trl_tompo.parse(flags(BRIDGE | {"model": merged, "games": 1, "m": 2}))
    policy = load_policy(merged, engine="plain")
    (first, *_), (second, *_), *_ = train_rft.make_prompts(policy, training.load_records(args), args)
    assert first.target.kind == second.target.kind == "G" and first.record.seat != second.record.seat
    return trl_tompo.Rewards(args, policy, [first, second]), policy, dataset.style_of(args), {}


def ask(judge, replies):
    """(r^S, R^G) of two replies to the first prompt and two to the second; the means that TRL would log."""
    rewards, policy, _, logged = judge
    told = dict(completion_ids=[policy.encode_reply(r) for r in replies], prompt_index=[0, 0, 1, 1])
    told |= dict(completions=None, log_metric=lambda name, value: logged.setdefault(name, []).append(value))
    return rewards.r_S(**told), rewards.R_G(**told)


def test_all_groups_of_a_step_see_the_memory_of_the_steps_before(judge):
    rewards, _, style, logged = judge
    targets = [p.target for p in rewards.prompts]
    good = [label_decision(p.record) for p in rewards.prompts]
    poor = [type(d)("G", 1 - d.action) for d in good]
    for d, target in zip(poor, targets):
        d.action[target.seat] = 0
    replies = [format_reply(d, style) for d in (good[0], good[0], poor[1], poor[1])]
    for best in (0.0, 1.0):  # in the second step the poor replies are below the best of the first
        expected = []
        for group, target in zip(((good[0], good[0]), (poor[1], poor[1])), targets):
            expected += group_rewards(list(group), target, memory_best=best)
        r_S, R_G = ask(judge, replies)
        assert r_S == [terms["r_S"] for terms in expected]
        assert R_G == [terms["R_G"] for terms in expected]
        assert [terms["global"] for terms in expected][2] == (0.5 if best == 0 else 0)
    assert rewards.memory.best == {targets[0].game.key: 1.0}
    assert logged["U1"] == [1.0] * 8 and logged["reward_graph"] == r_S * 2
    assert logged["s"] == [terms["s"] for terms in expected] * 2


def test_a_special_token_within_a_reply_is_seen(judge):
    """TRL's own text of it lacks the token, and the reply would count as compliant."""
    _, _, style, _ = judge
    good = format_reply(label_decision(judge[0].prompts[0].record), style)
    r_S, R_G = ask(judge, [good, good + "<|im_start|>", "", good])
    assert r_S[0] > 0.5 and r_S[1] == r_S[2] == -0.5 and R_G[1] == R_G[2] == 0


# -------------------- several processes, and errors

UNDER_TORCHRUN = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from whole_runs import fake_parse
from bridges import trl_tompo
trl_tompo.parse_reply = fake_parse
found = trl_tompo.make_trainer(trl_tompo.parse(sys.argv[1:]))
trl_tompo.make_trainer = lambda args: found
trl_tompo.main(sys.argv[1:])
trainer, rewards = found
logs = {{name: list(values) for name, values in trainer._logs["rewards"].items()}}
logs |= dict(advantages=list(trainer._logs["advantages"]), memory=rewards.memory.best)
logs["weights"] = float(sum(p.abs().sum() for p in trainer.model.parameters() if p.requires_grad))
open(os.environ["FOUND"] + os.environ["RANK"], "w").write(json.dumps(logs))
"""


def test_two_processes_have_one_memory_and_one_step(merged, tmp_path, monkeypatch):
    script, found = tmp_path / "driver.py", tmp_path / "found"
    script.write_text(UNDER_TORCHRUN)
    monkeypatch.setenv("FOUND", str(found))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    asked = BRIDGE | {"model": merged, "out": tmp_path / "run", "prompts": [4, 2], "steps": 1}
    done = subprocess.run([*command, str(script), *flags(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(2))
    policy, args = load_policy(merged, engine="plain"), trl_tompo.parse(flags(asked))
    conversations = train_rft.make_prompts(policy, training.load_records(args), args)
    batch = train_rft.next_batch(conversations, args.prompts, 0, args.seed)  # the first half is rank 0's
    halves = [{p.target.game.key for p in half if p.target.kind == "G"} for half in (batch[:3], batch[3:])]
    assert one["memory"] == other["memory"] and one["memory"].keys() == halves[0] | halves[1]
    assert halves[0] - halves[1] and halves[1] - halves[0]
    assert one["weights"] == other["weights"] and done.stdout.count("adapter: ") == 1
    kinds, ours, theirs = ours_and_trls(one | {"R_G": [float("nan") if v is None else v for v in one["R_G"]]})
    assert kinds.count("G") == 4 and (ours != 0).any(1).sum() >= 5
    ratio = torch.stack([t @ o / (o @ o) for o, t, k in zip(ours, theirs, kinds) if k == "G" and o.any()])
    assert ratio.max() - ratio.min() < 2e-3 * ratio.min()


def test_flags_that_the_bridge_cannot_follow_are_refused(refused, merged):
    main, model = trl_tompo.main, ["--model", merged, "--device", "cpu"]
    assert "merge it" in refused(main, [*model, "--sft-adapter", "x"])
    assert "the bridge has no --algo" in refused(main, [*model, "--algo", "grpo"])
    assert "cannot be shared evenly" in refused(main, [*model, "--prompts", "4", "1"])
    assert "--trl" in refused(main, [*model, "--trl", "no_such_field=1"])


def test_trl_options_are_words_and_json(merged):
    told = ["vllm_importance_sampling_mode=token_truncate", "gradient_checkpointing=false", "top_p=0.5"]
    config = trl_tompo.config_of(trl_tompo.parse(["--model", merged, "--device", "cpu", "--trl", *told]))
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.gradient_checkpointing is False and config.top_p == 0.5


def test_without_trl_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("bridges.trl_tompo")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("; pip install -r requirements-bench.txt")
