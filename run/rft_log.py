"""What a step of RFT writes down: its line of metrics.jsonl, one line of samples.jsonl for every sampled
reply, and one of prompts.jsonl for every prompt that is met for the first time.
"""

from collections.abc import Iterator

import rewards
from play.hindsight import tell_history
from policy import Rollout
from prompts import broken_rule
from run.files import Stopwatch


def step_metrics(batch: list, groups: list[list[Rollout]], sums: dict[str, float]) -> dict:
    """What one step's samples look like. Every key is explained in docs/settings.md.

    batch: the prompts (train_rft.Prompt); groups: the rollouts of each; sums: of tompo.objective_loss over
    the step."""
    everything = [o for group in groups for o in group]
    graph = [o for prompt, group in zip(batch, groups) for o in group if prompt.target.kind == "G"]
    effort = [o for prompt, group in zip(batch, groups) for o in group if prompt.target.kind == "E"]

    def mean(rollouts, value):
        return sum(map(value, rollouts)) / len(rollouts) if rollouts else None

    optional = {name: mean(everything, lambda o, name=name: o.rewards[name]) for name in rewards.TERMS}
    return {
        "reward": mean(everything, lambda o: o.rewards["r_S"]),
        "reward_graph": mean(graph, lambda o: o.rewards["r_S"]),
        "reward_effort": mean(effort, lambda o: o.rewards["r_S"]),
        "s": mean(graph, lambda o: o.rewards["s"]),
        "R_G": mean(graph, lambda o: o.rewards["R_G"]),
        **optional,
        "U1": mean(everything, lambda o: o.rewards["compliance"] > 0),
        **diagnostics(sums),
        "zero_variance_groups": mean(groups, lambda g: all(o.advantage == 0 for o in g)),
        "distinct_replies": mean(groups, lambda g: len({o.text for o in g}) / len(g)),
        "reply_tokens": mean(everything, lambda o: len(o.reply_ids)),
        "entropy": -mean(everything, lambda o: sum(o.sampled_logps))
        / mean(everything, lambda o: len(o.reply_ids)),
    }


def sample_lines(step: int, batch: list, groups: list[list[Rollout]]) -> Iterator[dict]:
    """The reply, the expert's, every reward term, both advantages, and which rule a reply that is not
    compliant broke."""
    for prompt, group in zip(batch, groups):
        r = prompt.record
        for o in group:
            broken = None if o.decision else broken_rule(o.text, *prompt.target.place)
            where = {"step": step, "game": r.game, "stage": r.stage, "kind": r.kind, "seat": r.seat}
            yield (
                where
                | {"reply": o.text, "expert": r.label, "broken": broken}
                | o.rewards
                | {"advantage": o.advantage}
            )


def prompt_line(step: int, prompt) -> dict:
    """What the replies to a prompt have in common: the conversation as the model reads it, the instance, what
    all agents did before and what their experts do now (texts of play/hindsight.py)."""
    r, target = prompt.record, prompt.target
    *before, experts = tell_history((*target.state.history, target.actions))
    where = {"step": step, "game": r.game, "stage": r.stage, "kind": r.kind, "seat": r.seat}
    return where | {"instance": r.instance, "before": before, "experts": experts, "prompt": r.prompt}


class SampleLog:
    """samples.jsonl and prompts.jsonl. After a resume both lack the steps that will be done again, so a
    prompt whose first step was among them is written again."""

    def __init__(self, loop):
        self.samples, self.prompts = loop.open_log("samples"), loop.open_log("prompts")
        self.told = {(line.get("game"), line.get("stage"), line.get("seat")) for line in self.prompts.rows}

    def write(self, step: int, batch: list, groups: list[list[Rollout]]) -> None:
        for prompt in batch:
            place = prompt.record.game, prompt.record.stage, prompt.record.seat
            if place not in self.told:
                self.prompts.write(prompt_line(step, prompt))
                self.told.add(place)
        for line in sample_lines(step, batch, groups):
            self.samples.write(line)


def add_sums(parts: list[dict[str, float]]) -> dict[str, float]:
    """The sums of several passes, or of several processes, as those of one; {} where there were none."""
    parts = [part for part in parts if part]  # a process may have had none
    total = dict(parts[0]) if parts else {}
    for part in parts[1:]:
        for key, value in part.items():
            if value is not None:
                total[key] = max(total[key], value) if key == "max_ratio_error" else total[key] + value
    return total


def diagnostics(sums: dict[str, float]) -> dict[str, float | None]:
    """Per token: KL to pi_ref (None if it was not measured), how far this step has moved from pi_old, where
    it clips. Nothing was measured in a step that trained on no group."""
    if not sums:
        return dict.fromkeys(("kl", "approx_kl", "clip_fraction", "max_ratio_error"))
    per_token = {
        key: None if sums[key] is None else sums[key] / sums["tokens"] for key in ("kl", "approx_kl")
    }
    return per_token | {
        "clip_fraction": sums["clipped"] / sums["tokens"],
        "max_ratio_error": sums["max_ratio_error"],
    }


def timing(groups: list[list[Rollout]], clock: Stopwatch) -> dict:
    """Reply tokens per second of the whole step, and the seconds of its two halves."""
    tokens = sum(len(o.reply_ids) for group in groups for o in group)
    sample_s, update_s = clock.last["sample"], clock.last["update"]
    return {"tokens_per_s": tokens / (sample_s + update_s), "sample_s": sample_s, "update_s": update_s}


def live_line(line: dict) -> str:
    """For the progress bar. The policy loss is not shown: at step 0 it is 0, and rightly so."""
    shown = {"reward": "reward", "U1": "U1", "s": "s", "KL": "kl"}
    values = ", ".join(f"{name} {line[key]:.3f}" for name, key in shown.items() if line[key] is not None)
    return f"{values}, {line['tokens_per_s']:.0f} reply tok/s"
