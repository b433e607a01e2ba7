"""Diagnosis of a run: the ways in which such training is known to fail, looked for in its logs and named.

    python -m tools.diagnose runs/tompo

The paper (arXiv 2509.21134) reports policies that break the format, that play well for themselves while the
group does badly (high U2, low U3), and that keep changing their links. To these come the known ends of
group-relative training: groups without variance, collapse to one answer, a KL that runs away, a ratio that is
clipped. Read are the logs of a run of train_rft.py, and its eval.json where there is one.

To look for another failure, write a function Run -> Finding and put it into FINDINGS. "Late" is the last
quarter of the steps, "early" the first. The limits are a [choice]: they say when to look, not what is true.
"""

import argparse
import json
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import world  # noqa: F401  (it registers the games that eval.json names)
from games import game_from_json
from prompts import last_line, parse_reply
from run.files import InputError, one_line, read_json, reports_errors

LEVELS = ("ok", "watch", "bad")
# (watch, bad). A share, unless said otherwise.
U1_BELOW = (0.95, 0.80)  # late compliance of the sampled replies
U2_AT_LEAST = 0.80  # "plays well for itself": below it, a low U3 is no social dilemma but bad play
U3_BELOW = (0.95, 0.85)  # U3 as a share of what the others' expert reaches in the same seat
CHANGED_ABOVE = (0.30, 0.60)  # of the times an instance is met again, or of repeated link stages
ENOUGH_TO_JUDGE = 8  # such times; below it nothing is said
IDLE_GROUPS_ABOVE = (0.50, 0.80)  # late share of groups whose replies all got the same reward
COLLAPSE_ABOVE = (0.15, 0.30)  # by how much one answer is more common than the expert's most common one
KL_ABOVE = (0.10, 0.50)  # nats per token, late mean
KL_SPIKE = 4  # largest step / late mean, where the largest is itself above the watch level
CLIPPED_ABOVE = (0.10, 0.30)  # late share of tokens where the clip is active
RATIO_ERROR = 0.05  # |rho - 1| with one inner epoch, where it is rounding. In bf16 that reaches 0.4, so there
MISMATCH = 1e-3  # the KL per token between the law that was sampled and the one that is scored is judged


@dataclass(frozen=True)
class Finding:
    name: str
    level: int  # of LEVELS
    numbers: str  # what shows it
    advice: str = ""  # a sentence, for where something is wrong


@dataclass(frozen=True)
class Run:
    metrics: list[dict]  # lines of metrics.jsonl
    samples: list[dict]  # lines of samples.jsonl
    results: dict[str, dict]  # eval.json's, the trained policy first; {} before the evaluation
    config: dict

    def values(self, key: str) -> list[float]:
        """Of the steps that have one: where all groups were idle, nothing of the update was measured."""
        return [row[key] for row in self.metrics if row[key] is not None]

    def late(self, key: str) -> float:
        return fmean(late(self.values(key)))

    def trend(self, key: str, digits: int = 2) -> str:
        values = self.values(key)
        return f"{fmean(values[: len(late(values))]):.{digits}f} early, {self.late(key):.{digits}f} late"

    def largest(self, key: str) -> float:
        return max(self.values(key))


def late(rows: list) -> list:
    return rows[-max(1, len(rows) // 4) :]


def judge(value: float, limits: tuple[float, float]) -> int:
    """The level by (watch, bad); where bad is the lower one, less is worse."""
    return sum(value < limit if limits[1] < limits[0] else value > limit for limit in limits)


def answer_of(reply: str) -> str:
    return last_line(reply, "Decision:")


# -------------------- findings


def compliance(run: Run) -> Finding:
    rules = Counter(f"{s['broken']} ({s['kind']})" for s in run.samples if s["broken"])
    text = f"U1 {run.trend('U1', 3)}; {rules.total()} of {len(run.samples)} replies broke a rule"
    text += "".join(f", {rule} {count}" for rule, count in rules.most_common(6))
    advice = "Train SFT longer (--sft-steps), or give cut-off replies more room (--max-new-tokens)."
    return Finding("replies that break the format", judge(run.late("U1"), U1_BELOW), text, advice)


def welfare(run: Run) -> Finding:
    name, (own, *others) = "good for itself, bad for all (high U2, low U3)", [*run.results, ""]
    experts = [n for n in others if n.startswith("expert:") and n != "expert:random"]
    if not experts:
        return Finding(name, 0, "not judged: there is no eval.json with a row of an expert to compare with")
    u1, u2, u3 = (run.results[own]["all rounds"][m]["mean"] for m in ("U1", "U2", "U3"))
    if u1 < U1_BELOW[1]:  # silence can have a high U2: where nobody links, nothing is at stake
        return Finding(name, 0, f"not judged: only {u1:.2f} of the evaluated replies are compliant")
    reach = run.results[experts[0]]["all rounds"]["U3"]["mean"]
    text = f"{own}: U2 {u2:.3f}, U3 {u3:.3f}, where the expert in its seat has U3 {reach:.3f}"
    advice = "The group is poor: raise --w-graph, or imitate a cooperative expert (--expert planner)."
    return Finding(name, judge(u3 / reach, U3_BELOW) if u2 >= U2_AT_LEAST and reach > 0 else 0, text, advice)


def changing_links(run: Run) -> Finding:
    """Do the most common links change between steps that meet an instance, or links between link stages of a
    round?"""
    votes: dict[tuple, dict[int, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for s in run.samples:
        if s["kind"] == "G" and s["broken"] is None:
            # The expert's reply stands for the state: a noisy history may call for another answer.
            state = s["game"], s["seat"], s["stage"], s["expert"]
            votes[state][s["step"]][answer_of(s["reply"])] += 1
    modes = [[of_step.most_common(1)[0][0] for _, of_step in sorted(v.items())] for v in votes.values()]
    pairs = [pair for m in modes for pair in zip(m, m[1:])], repeated_link_stages(run.results)
    (changed, again), (moved, repeated) = counts = [(sum(a != b for a, b in p), len(p)) for p in pairs]
    text = f"an instance was met again {again} times, the most common links had changed in {changed}; "
    text += f"repeated link stages of a round: {moved} of {repeated} changed the links"
    level = max(judge(n / of, CHANGED_ABOVE) if of >= ENOUGH_TO_JUDGE else 0 for n, of in counts)
    advice = "Lower --lr or raise --beta, and see in samples.jsonl whether the reward prefers any answer."
    return Finding("links that keep changing", level, text, advice)


def repeated_link_stages(results: dict[str, dict]) -> list[tuple[str, str]]:
    """What the policy decided in link stages that follow each other in a round, in the games of
    eval.json; compliant replies alone."""
    pairs = []
    for summary in list(results.values())[:1]:
        instances = [row["instance"] for row in summary["instances"]]
        for instance, replies in zip(instances, summary["replies"]):
            game = game_from_json(instance)
            stages, N = game.stages * game.rounds, game.N
            seats = len(replies) // len(stages)  # as many as the policy sat in; which ones is not logged
            for k in range(seats, len(replies)):
                stage, both = k // seats, (replies[k - seats], replies[k])
                repeats = stage % len(game.stages) and stages[stage - 1 : stage + 1] == "GG"
                if repeats and all(any(parse_reply(r, "G", own, N, 0) for own in range(N)) for r in both):
                    pairs.append((answer_of(both[0]), answer_of(both[1])))
    return pairs


def idle_groups(run: Run) -> Finding:
    name, level = "groups without variance", judge(run.late("zero_variance_groups"), IDLE_GROUPS_ABOVE)
    text = f"share of groups whose replies all got the same reward: {run.trend('zero_variance_groups')}"
    if run.late("U1") < U1_BELOW[1]:
        return Finding(name, level, text, "Replies fail alike: train SFT longer first (--sft-steps).")
    return Finding(
        name, level, text, "Stop, take more replies (--m), or harder games (--agents, --no-hints)."
    )


def collapse(run: Run) -> Finding:
    """How common the most common (compliant) answer is, against the expert's own to the same prompts."""
    steps = late(sorted({s["step"] for s in run.samples}))
    level, text = 0, f"distinct replies of a group / m: {run.trend('distinct_replies')}"
    for kind, name in (("G", "graph"), ("E", "effort")):
        given = [s for s in run.samples if s["step"] in steps and s["kind"] == kind and s["broken"] is None]
        if given:
            own, expert = (Counter(answer_of(s[who]) for s in given) for who in ("reply", "expert"))
            (common, count), (_, usual) = own.most_common(1)[0], expert.most_common(1)[0]
            text += f"; late {name} answers: {len(own)} different (expert: {len(expert)}), the most common, "
            text += f"{common[:40]}, {count / len(given):.2f} of all (expert: {usual / len(given):.2f})"
            level = max(level, judge((count - usual) / len(given), COLLAPSE_ABOVE))
    advice = "Lower --lr, raise --beta, and check whether giving this answer always earns a high reward."
    return Finding("one answer to everything", level, text, advice)


def divergence(run: Run) -> Finding:
    name = "KL from the SFT policy that runs away"
    if not run.values("kl"):
        return Finding(name, 0, "not measured: no KL term (--beta 0), or no step that trained on anything")
    last, most = run.late("kl"), run.largest("kl")
    spike = most > KL_ABOVE[0] and most > KL_SPIKE * last
    text = f"per token {run.trend('kl', 4)}, largest {most:.4f}"
    advice = "Raise --beta or lower --lr, and read late replies in samples.jsonl: odd text may be rewarded."
    return Finding(name, max(judge(last, KL_ABOVE), int(spike)), text, advice)


def clipping(run: Run) -> Finding:
    name = "clipped updates"
    if not run.values("max_ratio_error"):
        return Finding(name, 0, "not measured: no step trained on anything, since all groups were idle")
    error = run.largest("max_ratio_error")
    if run.config["inner_epochs"] == 1:
        apart = run.largest("approx_kl")
        wrong = apart > MISMATCH if run.config["dtype"] == "bfloat16" else error > RATIO_ERROR
        text = f"pi should be pi_old: largest KL of a step {apart:.1e}, largest |rho - 1| {error:.1e}"
        advice = "The law that is scored is not the law that was sampled: look at dtype and temperature."
        return Finding(name, 2 * wrong, text, advice)
    text = f"share of tokens clipped: {run.trend('clip_fraction', 3)}, largest |rho - 1| {error:.2f}"
    advice = "Lower --lr or --inner-epochs: updates go further than the samples can say."
    return Finding(name, judge(run.late("clip_fraction"), CLIPPED_ABOVE), text, advice)


FINDINGS = (compliance, welfare, changing_links, idle_groups, collapse, divergence, clipping)

# -------------------- a run


def read_lines(path: Path) -> list[dict]:
    """A last line without its end, cut by a kill, is dropped. Raises OSError and ValueError."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    if not rows:
        raise ValueError(f"{path.name} holds no steps")
    return rows


def diagnose(folder: str | Path) -> list[Finding]:
    """All findings about a run. Raises InputError for logs that cannot be read."""
    folder = Path(folder)
    evaluated = folder / "eval.json"
    try:
        results = read_json(evaluated)["results"] if evaluated.exists() else {}
        logs = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
        run = Run(*logs, results, read_json(folder / "config.json"))
        return [find(run) for find in FINDINGS]
    except (OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{folder} has no logs of a run of this version of train_rft.py ({what})") from None


def format_findings(findings: list[Finding], advice: bool = True) -> str:
    """Worst first."""
    lines = []
    for f in sorted(findings, key=lambda f: -f.level):
        lines.append(f"{LEVELS[f.level]:7}{f.name}")
        for text in [f.numbers] + [f"-> {f.advice}"] * (advice and f.level > 0):
            lines += textwrap.wrap(text, 118, initial_indent=" " * 7, subsequent_indent=" " * 7)
    return "\n".join(lines)


def summary(folder: str | Path) -> str:
    """What is not ok, for the end of a run; a line that says why, where nothing can be said."""
    try:
        findings = diagnose(folder)
    except Exception as e:  # whatever it is, it must not cost the user the end of a long run
        return f"no diagnosis: {one_line(e)}"
    found = [f for f in findings if f.level > 0]
    head = f"diagnosis: {len(found) or 'none'} of {len(findings)} known failures to look at"
    return f"{head} (python -m tools.diagnose {folder})\n{format_findings(found, advice=False)}".rstrip()


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Look for known failures of training in the logs of a run.")
    parser.add_argument("run", help="the folder of a run of train_rft.py")
    print(format_findings(diagnose(parser.parse_args(argv).run)))


if __name__ == "__main__":
    main()
