"""Diagnosis of a run: looks in its logs for the ways in which such training is known to fail.

    python -m tools.diagnose runs/tompo

The paper (arXiv 2509.21134) reports policies that break the format, that play well for themselves while the
group does badly (high U2, low U3), and that keep changing their links. Here Belief lines were seen to decay
to words of the prompt, since no reward depends on them. Group-relative training is known to fail in other
ways too: groups without variance, collapse to one answer, a KL that runs away, a ratio that is clipped. The
logs of a run of train_rft.py are read, and its eval.json if there is one.

To look for another failure, write a function Run -> Judgement and put it into FINDINGS. "Late" is the last
quarter of the steps, "early" the first. The limits are a [choice]: they say when to look closer.
"""

import argparse
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import world  # noqa: F401  (it registers the kinds of decisions)
from games import KINDS
from prompts import last_line, read_list
from run.errors import InputError, one_line, reports_errors
from run.files import read_json, read_lines

LEVELS = ("ok", "watch", "bad")
FEW_COMPLIANT = 0.80  # a U1 below this is bad, and other measures then say little

Judgement = tuple[int, str, str]  # an index of LEVELS, the numbers that show it, advice for levels above 0


@dataclass(frozen=True)
class Run:
    """metrics, samples: the lines of these logs; results: those of eval.json, the trained policy first, {}
    before the evaluation."""

    metrics: list[dict]
    samples: list[dict]
    results: dict[str, dict]
    config: dict

    def values(self, key: str) -> list[float]:
        """Of the steps that have a value: a step in which all groups were idle has none for its update."""
        return [row[key] for row in self.metrics if row[key] is not None]

    def late(self, key: str) -> float:
        return fmean(late(self.values(key)))

    def late_compliant(self) -> list[dict]:
        """The compliant samples of the late steps."""
        steps = late(sorted({s["step"] for s in self.samples}))
        return [s for s in self.samples if s["step"] in steps and s["broken"] is None]

    def trend(self, key: str, digits: int = 2) -> str:
        values = self.values(key)
        return f"{fmean(values[: len(late(values))]):.{digits}f} early, {self.late(key):.{digits}f} late"


def late(rows: list) -> list:
    return rows[-max(1, len(rows) // 4) :]


def judge(value: float, watch: float, bad: float) -> int:
    """The level by two limits. If bad is the lower one, low values are bad, else high ones."""
    return sum(value < limit if bad < watch else value > limit for limit in (watch, bad))


# -------------------- known failures


def compliance(run: Run) -> Judgement:
    rules = Counter(f"{s['broken']} ({s['kind']})" for s in run.samples if s["broken"])
    text = f"U1 {run.trend('U1', 3)}; {rules.total()} of {len(run.samples)} replies broke a rule"
    text += "".join(f", {rule} {count}" for rule, count in rules.most_common(6))
    cut = sum(not s["ended"] for s in run.samples)
    text += f"; {cut} were cut off at the limit (--max-new-tokens)" * (cut > 0)
    advice = "Train SFT longer (--sft-steps), or give cut-off replies more room (--max-new-tokens)."
    return judge(run.late("U1"), 0.95, FEW_COMPLIANT), text, advice


def welfare(run: Run) -> Judgement:
    """U3 as a share of the most that an expert reaches in the same seat, if U2 is high."""
    experts = [n for n in run.results if n.startswith("expert:") and n != "expert:random"]
    if not experts:
        return 0, "not judged: there is no eval.json with a row of an expert to compare with", ""
    own = next(iter(run.results))
    u1, u2, u3 = (run.results[own]["all rounds"][m]["mean"] for m in ("U1", "U2", "U3"))
    if u1 < FEW_COMPLIANT:  # silence can have a high U2: where nobody links, nothing is at stake
        return 0, f"not judged: only {u1:.2f} of the evaluated replies are compliant", ""
    reach, best = max((run.results[name]["all rounds"]["U3"]["mean"], name) for name in experts)
    text = f"{own}: U2 {u2:.3f}, U3 {u3:.3f}, where {best} in its seat has U3 {reach:.3f}"
    advice = "The group is poor: raise --weights A_G, or imitate a cooperative expert (--expert planner)."
    # With a lower U2, a low U3 is bad play and no social dilemma.
    return judge(u3 / reach, 0.95, 0.85) if u2 >= 0.80 and reach > 0 else 0, text, advice


def beliefs(run: Run) -> Judgement:
    """How many of the compliant late replies have no Belief line that is a list of numbers?"""
    if not run.config["belief"]:
        return 0, "not judged: the run asks for no Belief line (--no-belief)", ""
    asked = [s["reply"] for s in run.late_compliant() if KINDS[s["kind"]].beliefs]
    lines = [last_line(reply, "Belief:") for reply in asked]
    unread = [line for line in lines if read_list(line) is None]
    text = f"{len(unread)} of {len(lines)} compliant late replies have no Belief line with a list of numbers"
    text += f", the most common: {Counter(unread).most_common(1)[0][0][:40]!r}" if unread else ""
    advice = "No reward depends on the Belief line by default: give --weights belief=0.5."
    return judge(len(unread) / max(1, len(lines)), 0.10, 0.30), text, advice


def changing_links(run: Run) -> Judgement:
    """Do the most common links change between steps that meet the same instance? Fewer than 8 such meetings
    are not judged."""
    votes: dict[tuple, dict[int, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for s in run.samples:
        if s["kind"] == "G" and s["broken"] is None:
            # The expert's reply stands for the state: a noisy history may call for another answer.
            state = s["game"], s["seat"], s["stage"], s["expert"]
            votes[state][s["step"]][last_line(s["reply"], "Decision:")] += 1
    modes = [[v.most_common(1)[0][0] for _, v in sorted(steps.items())] for steps in votes.values()]
    changes = [before != after for mode in modes for before, after in pairwise(mode)]
    text = f"an instance was met again {len(changes)} times, its most common links changed in {sum(changes)}"
    advice = "Lower --lr or raise --beta, and see in samples.jsonl whether the reward prefers any answer."
    return judge(fmean(changes), 0.30, 0.60) if len(changes) >= 8 else 0, text, advice


def idle_groups(run: Run) -> Judgement:
    text = f"share of groups whose replies all got the same reward: {run.trend('zero_variance_groups')}"
    advice = "Stop, take more replies (--m), or harder games (--agents, --no-hints)."
    if run.late("U1") < FEW_COMPLIANT:
        advice = "Replies fail alike: train SFT longer first (--sft-steps)."
    return judge(run.late("zero_variance_groups"), 0.50, 0.80), text, advice


def collapse(run: Run) -> Judgement:
    """By how much the most common (compliant) answer is more common than the expert's to the same prompts."""
    level, text = 0, f"distinct replies of a group / m: {run.trend('distinct_replies')}"
    compliant = run.late_compliant()
    for letter, kind in KINDS.items():
        part = [s for s in compliant if s["kind"] == letter]
        if part:
            answers = [[last_line(s[who], "Decision:") for who in ("reply", "expert")] for s in part]
            own, expert = map(Counter, zip(*answers, strict=True))
            (common, count), (_, usual) = own.most_common(1)[0], expert.most_common(1)[0]
            text += f"; late {kind.name} answers: {len(own)} different (expert: {len(expert)}), the most "
            text += f"common, {common[:40]}, {count / len(part):.2f} of all (expert: {usual / len(part):.2f})"
            level = max(level, judge((count - usual) / len(part), 0.15, 0.30))
    advice = "Lower --lr, raise --beta, and check whether giving this answer always earns a high reward."
    return level, text, advice


def divergence(run: Run) -> Judgement:
    """In nats per token: the late mean, and a largest step that is far above it."""
    if not run.values("kl"):
        return 0, "not measured: no KL term (--beta 0), or no step that trained on anything", ""
    last, most = run.late("kl"), max(run.values("kl"))
    text = f"per token {run.trend('kl', 4)}, largest {most:.4f}"
    advice = "Raise --beta or lower --lr, and read late replies in samples.jsonl: odd text may be rewarded."
    return max(judge(last, 0.10, 0.50), int(most > max(0.10, 4 * last))), text, advice


def clipping(run: Run) -> Judgement:
    """With one inner epoch only rounding moves the ratio. In bf16 its error reaches 0.75, so there the KL per
    token between the sampled and the scored distribution is judged instead."""
    if not run.values("max_ratio_error"):
        return 0, "not measured: no step trained on anything, since all groups were idle", ""
    error, apart = (max(run.values(key)) for key in ("max_ratio_error", "approx_kl"))
    if run.config["inner_epochs"] == 1:
        wrong = apart > 1e-3 if run.config["dtype"] == "bfloat16" else error > 0.05
        text = f"pi should be pi_old: largest KL of a step {apart:.1e}, largest |rho - 1| {error:.1e}"
        return 2 * wrong, text, "Another distribution is scored than was sampled: see --dtype, --temperature."
    text = f"share of tokens clipped: {run.trend('clip_fraction', 3)}, largest |rho - 1| {error:.2f}"
    advice = "Lower --lr or --inner-epochs: updates go further than the samples can justify."
    return judge(run.late("clip_fraction"), 0.10, 0.30), text, advice


FINDINGS = {
    "replies that break the format": compliance,
    "Belief lines that say nothing": beliefs,
    "good for itself, bad for all (high U2, low U3)": welfare,
    "links that keep changing": changing_links,
    "groups without variance": idle_groups,
    "one answer to everything": collapse,
    "KL from the SFT policy that runs away": divergence,
    "clipped updates": clipping,
}

# -------------------- a run


def diagnose(folder: str | Path) -> list[tuple[str, Judgement]]:
    """(name, judgement) of every known failure, the worst first. InputError: the logs cannot be read."""
    evaluation = Path(folder) / "eval.json"
    try:
        results = read_json(evaluation)["results"] if evaluation.exists() else {}
        metrics, samples = (read_lines(Path(folder) / f"{name}.jsonl") for name in ("metrics", "samples"))
        if not metrics or not samples:
            raise ValueError("there are no steps in metrics.jsonl or samples.jsonl")
        run = Run(metrics, samples, results, read_json(Path(folder) / "config.json"))
        findings = [(name, find(run)) for name, find in FINDINGS.items()]
        return sorted(findings, key=lambda finding: -finding[1][0])
    except (OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        what = f"{type(e).__name__}: {one_line(e)}"
        raise InputError(f"{folder} has no logs of a run of this version of train_rft.py ({what})") from None


def format_findings(findings: list[tuple[str, Judgement]], with_advice: bool = True) -> str:
    lines = []
    for name, (level, numbers, advice) in findings:
        lines.append(f"{LEVELS[level]:7}{name}")
        for text in [numbers, f"-> {advice}"] if with_advice and level else [numbers]:
            lines += textwrap.wrap(text, 118, initial_indent=" " * 7, subsequent_indent=" " * 7)
    return "\n".join(lines)


def summary(folder: str | Path) -> str:
    """What is not ok, for the end of a run; one line that says why, where nothing can be said."""
    try:
        findings = diagnose(folder)
    except Exception as e:  # whatever it is, it must not cost the user the end of a long run
        return f"no diagnosis: {one_line(e)}"
    worse = [finding for finding in findings if finding[1][0]]
    head = f"diagnosis: {len(worse) or 'none'} of {len(findings)} known failures to look at"
    return f"{head} (python -m tools.diagnose {folder})\n{format_findings(worse, False)}".rstrip()


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Look for known failures of training in the logs of a run.")
    parser.add_argument("run", help="the folder of a run of train_rft.py")
    print(format_findings(diagnose(parser.parse_args(argv).run)))


if __name__ == "__main__":
    main()
