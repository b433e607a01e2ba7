"""What a step of RFT writes: its values for metrics.jsonl; for every sampled reply a line of samples.jsonl
(every reward term, both advantages, and which rule a reply that is not compliant broke); and for every
prompt that is asked for the first time a line of prompts.jsonl (the conversation as the model reads it and,
as text, what all agents did before and what their experts do now)."""

import torch
from torch import Tensor

from games import KINDS
from play.dataset import Prompt
from play.expert_games import history_to_text
from prompts import read_reply
from rewards import TERMS, Sample
from run import ranks
from run.stage import Stage
from tompo import k3

# Names that a new reward term must not take, because samples.jsonl or metrics.jsonl has them.
LOGGED = set(
    "compliance sample r_S s local global R_G A_S A_G step game stage kind seat reply expert broken ended"
    " advantage reward gamma zeta reward_graph reward_effort U1 kl approx_kl clip_fraction max_ratio_error"
    " zero_variance_groups distinct_replies reply_tokens entropy loss lr grad_norm tokens_per_s sample_s"
    " update_s seconds minutes text action expected f1 accuracy".split()
)


def step_metrics(prompts: list[Prompt], groups: list[list[Sample]], sums: dict[str, float | None]) -> dict:
    """The values of one step; docs/settings.md explains them. sums: of `diagnostics` over the step."""
    samples = [o for group in groups for o in group]
    tokens = sum(len(o.reply.ids) for o in samples)

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    def reward_of(kind):
        pairs = zip(prompts, groups, strict=True)
        return mean(o.rewards.get("r_S") for p, group in pairs if p.target.kind is kind for o in group)

    return {
        "reward": mean(o.rewards.get("r_S") for o in samples),
        **{f"reward_{kind.name}": reward_of(kind) for kind in KINDS.values()},
        **{name: mean(o.rewards.get(name) for o in samples) for name in ("s", "R_G", *TERMS)},
        "U1": mean(o.decision is not None for o in samples),
        **update_metrics(sums),
        "zero_variance_groups": mean(all(o.advantage == 0 for o in group) for group in groups),
        "distinct_replies": mean(len({o.reply.text for o in group}) / len(group) for group in groups),
        "reply_tokens": tokens / len(samples),
        "entropy": -mean(sum(o.reply.logps) for o in samples) / (tokens / len(samples)),
    }


class RFTLog:
    """samples.jsonl and prompts.jsonl. After a resume both lack the steps that will be done again, so a
    prompt whose first step was among them is written again."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.samples, self.prompts = stage.open_log("samples"), stage.open_log("prompts")
        self.written = {(row.get("game"), row.get("stage"), row.get("seat")) for row in self.prompts.rows}

    def end_step(self, step, prompts, groups, sums, *, lr: float, grad_norm: float, sample_s: float) -> None:
        """Writes the step to all logs and ends it. sums: of the passes of this process; sample_s: the
        seconds until all replies were there."""
        total, seconds = add_sums(ranks.exchange(add_sums(sums))), self.stage.elapsed
        tokens = sum(len(o.reply.ids) for group in groups for o in group)
        values = step_metrics(prompts, groups, total)
        values |= {"loss": total.get("loss", 0.0), "lr": lr, "grad_norm": grad_norm}
        values |= {"tokens_per_s": tokens / seconds, "sample_s": sample_s, "update_s": seconds - sample_s}
        self.write(step, prompts, groups)
        # For the progress bar. The policy loss is not shown: with one inner epoch it is 0, and that is right.
        shown = {"reward": "reward", "U1": "U1", "s": "s", "KL": "kl"}
        texts = [f"{name} {values[key]:.3f}" for name, key in shown.items() if values[key] is not None]
        self.stage.end_step(values, f"{', '.join(texts)}, {values['tokens_per_s']:.0f} reply tok/s")

    def write(self, step: int, prompts: list[Prompt], groups: list[list[Sample]]) -> None:
        for prompt, group in zip(prompts, groups, strict=True):
            r, t = prompt.record, prompt.target
            place = {"step": step, "game": r.game, "stage": r.stage, "kind": r.kind, "seat": r.seat}
            if (r.game, r.stage, r.seat) not in self.written:
                self.written.add((r.game, r.stage, r.seat))
                *before, experts = history_to_text(t.state.step(t.actions))
                texts = {"instance": r.instance, "before": before, "experts": experts, "prompt": r.prompt}
                self.prompts.write(place | texts)
            for o in group:
                broken = None if o.decision else read_reply(o.reply.text, t.kind, t.seat, t.game.N, t.cap)[1]
                texts = {"reply": o.reply.text, "expert": r.label, "broken": broken, "ended": o.reply.ended}
                self.samples.write(place | texts | o.rewards | {"advantage": o.advantage})


@torch.no_grad()
def diagnostics(
    logp_T: Tensor, old_T: Tensor, ref_T: Tensor | None, rho_T: Tensor, A_T: Tensor, low: float, high: float
) -> dict[str, float | None]:
    """Sums over the tokens of a pass, and one maximum, for the log. `kl` is k3 whatever estimator is
    trained, `clipped` that of PPO whatever loss."""
    return {
        "tokens": logp_T.numel(),
        "kl": None if ref_T is None else float(k3(logp_T, ref_T).sum()),
        "approx_kl": float(k3(old_T, logp_T).sum()),
        "clipped": int((rho_T.clamp(low, high) * A_T < rho_T * A_T).sum()),
        "max_ratio_error": float((rho_T - 1).abs().max()),
    }


def add_sums(parts: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The sums of several passes, or of several processes, as those of one; {} where there were none."""
    total: dict[str, float | None] = {}
    for part in parts:
        for key, value in part.items():
            known = [v for v in (total.get(key), value) if v is not None]
            add = max if key == "max_ratio_error" else sum
            total[key] = add(known) if known else None
    return total


def update_metrics(sums: dict[str, float | None]) -> dict[str, float | None]:
    """Per token: KL to pi_ref (None if it was not measured), how far this step has moved from pi_old, where
    it clips. All None in a step that trained on no group."""
    values = {}
    for key, name in {"kl": "kl", "approx_kl": "approx_kl", "clip_fraction": "clipped"}.items():
        values[key] = None if sums.get(name) is None else sums[name] / sums["tokens"]
    return values | {"max_ratio_error": sums.get("max_ratio_error")}
