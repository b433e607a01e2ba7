"""Diagnosis of a run: the ways in which such training is known to fail, looked for in its logs and named.

    python diagnose.py runs/tompo

The paper (arXiv 2509.21134) reports policies that break the format, that play well for themselves while the group does
badly (high U2, low U3), and that keep changing their links. To these come the known ends of group-relative training:
groups without variance, collapse to one answer, a KL that runs away, a ratio that is clipped. Read are metrics.jsonl and
samples.jsonl of a run of train_rft.py, and eval.json where there is one; nothing is played and no model is needed.

Each finding has a level by the constants below, [choice]: they say when to look closer, not what is true. "Late" is the
last quarter of the steps, "early" the first; of runs under 8 steps all trends are noise.
"""

import argparse
import json
import re
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from prompts import parse_reply
from run.files import InputError, read_json, reports_errors

# (watch, bad). A share, unless said otherwise.
U1_BELOW = (0.95, 0.80)  # late compliance of the sampled replies
U2_AT_LEAST = 0.80  # "plays well for itself": below it, a low U3 is no social dilemma but bad play
U3_BELOW = (0.95, 0.85)  # U3 as a share of what the others' expert reaches in the same seat
CHANGED_ABOVE = (0.30, 0.60)  # of the times an instance is met again, or of repeated link stages
ENOUGH_TO_JUDGE = 8  # occasions to change; below it nothing is said
IDLE_GROUPS_ABOVE = (0.50, 0.80)  # late share of groups whose replies all got the same reward
COLLAPSE_ABOVE = (
    0.15,
    0.30,
)  # by how much one answer is more common than in the expert's answers to the same prompts
KL_ABOVE = (0.10, 0.50)  # nats per token, late mean
KL_SPIKE = 4  # largest step / late mean, where the largest is itself above the watch level
CLIPPED_ABOVE = (0.10, 0.30)  # late share of tokens where the clip is active
RATIO_ERROR = (
    0.05  # |rho - 1| with one inner epoch, where it should be rounding alone; in bf16 that reaches 0.4, so
)
MISMATCH = 1e-3  # there it is the KL per token between what was sampled and what is scored

LEVELS = ("ok", "watch", "bad")


@dataclass(frozen=True)
class Finding:
    """level: of LEVELS; numbers: what shows it; advice: one sentence, what to do ("" where nothing is wrong)."""

    name: str
    level: str
    numbers: str
    advice: str = ""


def above(value: float, limits: tuple[float, float]) -> str:
    return LEVELS[(value > limits[0]) + (value > limits[1])]


def below(value: float, limits: tuple[float, float]) -> str:
    return LEVELS[(value < limits[0]) + (value < limits[1])]


def late(rows: list, early: bool = False) -> list:
    """The last (first) quarter of a list."""
    quarter = max(1, len(rows) // 4)
    return rows[:quarter] if early else rows[-quarter:]


def mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def finding(name: str, level: str, numbers: str, advice: str) -> Finding:
    return Finding(name, level, numbers, advice if level != "ok" else "")


# ---------------------------------------------------------------------------------------------------------------------
# replies


def agents_in(sample: dict) -> int:
    """N, from the expert's reply: graph, the length of its row; effort (a number), that of its belief, else 0."""
    lists = re.findall(r"\[([^\]]*)\]", sample["expert"])
    return len(lists[-1].split(",")) if lists else 0


def broken_rule(reply: str, kind: str, seat: int, N: int, cap: float = float("inf")) -> str | None:
    """The first rule of prompts.parse_reply that a reply breaks, None for a compliant one. Without the cap an effort
    above it passes."""
    if parse_reply(reply, kind, seat, N, cap) is not None:
        return None
    lines = [line.strip() for line in reply.split("\n") if line.strip().startswith("Decision:")]
    if not lines:
        return "no Decision line"
    text = lines[-1].removeprefix("Decision:").strip()
    if not text:
        return "nothing after Decision:"
    if kind == "E":
        return _broken_effort(text)
    match = re.search(r"\[[^\[\]]*\]", text)
    if match is None:
        return "no closed list in brackets"
    if match[0] != text:
        return "text around the list"
    entries = [entry.strip() for entry in text[1:-1].split(",")]
    if not all(re.fullmatch(r"[+-]?\d*\.?\d+", e, re.ASCII) for e in entries):
        return "an entry that is no number"
    if any(e not in ("0", "1") for e in entries):
        whole = all(re.fullmatch(r"\d+", e, re.ASCII) for e in entries)
        return (
            "a digit above 1" if whole and any(int(e) > 1 for e in entries) else "an entry that is not 0 or 1"
        )
    return "wrong length" if len(entries) != N else "own position not 0"


def _broken_effort(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        if text.startswith("["):
            return "a list instead of one number"
        return "text around the number" if re.search(r"\d", text) else "no number"
    if not abs(value) < float("inf"):
        return "not finite"
    plain = re.fullmatch(r"[+-]?[\d.]+(?:[eE][+-]?\d+)?", text, re.ASCII)  # float() reads 1_000 too
    return "number outside [0, cap]" if plain else "text around the number"


def rule_of(sample: dict) -> str | None:
    """The rule that a line of samples.jsonl breaks. Its cap is not logged: what is not compliant and breaks no other
    rule is above it."""
    if sample["compliance"] > 0:
        return None
    return (
        broken_rule(sample["reply"], sample["kind"], sample["seat"], agents_in(sample))
        or "number outside [0, cap]"
    )


def decision_text(reply: str) -> str:
    """What stands after the last Decision:, "" without one."""
    lines = [line.strip() for line in reply.split("\n") if line.strip().startswith("Decision:")]
    return lines[-1].removeprefix("Decision:").strip() if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# findings


def compliance(metrics: list[dict], samples: list[dict]) -> Finding:
    u1 = mean(late(metrics), "U1")
    rules = Counter((s["kind"], rule) for s in samples if (rule := rule_of(s)))
    names = {"G": "graph", "E": "effort"}
    text = f"U1 {mean(late(metrics, early=True), 'U1'):.3f} early, {u1:.3f} late; "
    text += f"{sum(rules.values())} of {len(samples)} replies broke a rule"
    text += "".join(f", {rule} ({names[kind]}) {count}" for (kind, rule), count in rules.most_common(6))
    return finding(
        "replies that break the format",
        below(u1, U1_BELOW),
        text,
        "Train SFT longer before RFT (--sft-steps), or give replies more room if lines are cut off (--max-new-tokens).",
    )


def welfare(results: dict[str, dict] | None) -> Finding:
    """High U2 and low U3: good for itself, bad for all."""
    name = "good for itself, bad for all (high U2, low U3)"
    if not results:
        return Finding(name, "ok", "not evaluated yet (no eval.json)")
    (policy, own), *rest = results.items()
    expert = next((s for n, s in rest if n.startswith("expert:") and n != "expert:random"), None)
    if expert is None:
        return Finding(name, "ok", "not judged: eval.json has no row of an expert to compare with")
    u1, u2, u3 = (own["all rounds"][m]["mean"] for m in ("U1", "U2", "U3"))
    if u1 < U1_BELOW[1]:  # silence can have a high U2: where nobody links, nothing is at stake
        return Finding(name, "ok", f"not judged: only {u1:.2f} of the evaluated replies are compliant")
    reach = expert["all rounds"]["U3"]["mean"]
    level = below(u3 / reach, U3_BELOW) if u2 >= U2_AT_LEAST and reach > 0 else "ok"
    text = f"{policy}: U2 {u2:.3f}, U3 {u3:.3f}, where the expert in its seat has U3 {reach:.3f}"
    advice = (
        "Its replies to the others are good and the group is poor: raise --w-graph, or imitate a cooperative expert "
        "(--expert planner)."
    )
    return finding(name, level, text, advice)


def changing_links(samples: list[dict], results: dict[str, dict] | None) -> Finding:
    """Does the most common decision change between the steps in which an instance is met, or from one link stage of a
    round to the next (in the quoted games of eval.json)?"""
    votes: dict[tuple, dict[int, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for s in samples:
        if s["kind"] == "G" and s["compliance"] > 0:
            # the expert's reply stands for the state: a noisy history may call for another answer
            votes[s["game"], s["seat"], s["stage"], s["expert"]][s["step"]][decision_text(s["reply"])] += 1
    again = changed = 0
    for of_steps in votes.values():
        modes = [votes_of.most_common(1)[0][0] for _, votes_of in sorted(of_steps.items())]
        again += len(modes) - 1
        changed += sum(a != b for a, b in zip(modes, modes[1:]))
    repeated, moved = _repeated_link_stages(results)
    text = f"an instance was met again {again} times, the most common links had changed in {changed}"
    if repeated:
        text += f"; repeated link stages of a round: {moved} of {repeated} changed the links"
    levels = [
        above(n / of, CHANGED_ABOVE)
        for n, of in ((changed, again), (moved, repeated))
        if of >= ENOUGH_TO_JUDGE
    ]
    level = max(levels, key=LEVELS.index, default="ok")
    if not levels:
        text += " (too few to judge)"
    advice = "Lower --lr or raise --beta, and look in samples.jsonl whether the reward prefers one of the answers at all."
    return finding("links that keep changing", level, text, advice)


def _repeated_link_stages(results: dict[str, dict] | None) -> tuple[int, int]:
    """(link stages that follow one in the same round, both compliant; those whose decision differs from it)."""
    repeated = moved = 0
    for summary in list(results.values())[:1] if results else ():
        games = [row["instance"] for row in summary["instances"] if "instance" in row]
        for game, replies in zip(games[:: max(1, len(games) // 10)], summary["replies"]):
            stages, N = game["stages"] * game["rounds"], len(game.get("alpha") or game["endowment"])
            seats = len(replies) // len(stages)
            for k in range(1, len(stages)):
                if stages[k - 1 : k + 1] != "GG" or k % len(game["stages"]) == 0:
                    continue
                for seat in range(seats):
                    pair = [replies[i * seats + seat] for i in (k - 1, k)]
                    if all(
                        any(broken_rule(reply, "G", own, N) is None for own in range(N)) for reply in pair
                    ):
                        a, b = map(decision_text, pair)
                        repeated, moved = repeated + 1, moved + (a != b)
    return repeated, moved


def idle_groups(metrics: list[dict]) -> Finding:
    first, last = (mean(late(metrics, early), "zero_variance_groups") for early in (True, False))
    text = f"share of groups whose replies all got the same reward: {first:.2f} early, {last:.2f} late"
    advice = (
        "Most sampling teaches nothing: stop here, take more replies per prompt (--m), or harder games (more agents, "
        "--no-hints)."
    )
    if mean(late(metrics), "U1") < U1_BELOW[1]:
        advice = "Replies fail alike, so there is nothing to prefer: train SFT longer first (--sft-steps)."
    return finding("groups without variance", above(last, IDLE_GROUPS_ABOVE), text, advice)


def collapse(metrics: list[dict], samples: list[dict]) -> Finding:
    """One (compliant) answer to everything, against how often the expert gives its own most common one there."""
    steps = sorted({s["step"] for s in samples})
    of_late = [s for s in samples if s["step"] in set(late(steps)) and s["compliance"] > 0]
    levels, texts = [], []
    for kind, name in (("G", "graph"), ("E", "effort")):
        of_kind = [s for s in of_late if s["kind"] == kind]
        own, expert = (Counter(decision_text(s[who]) for s in of_kind) for who in ("reply", "expert"))
        if not own:
            continue
        (answer, count), total = own.most_common(1)[0], sum(own.values())
        usual = expert.most_common(1)[0][1] / total
        levels.append(above(count / total - usual, COLLAPSE_ABOVE))
        texts.append(
            f"{name} {len(own)} different, the most common, {answer[:40] or 'none'}, {count / total:.2f} of all "
            f"(expert: {len(expert)} different, {usual:.2f})"
        )
    first, last = (mean(late(metrics, early), "distinct_replies") for early in (True, False))
    text = "late answers: " + "; ".join(
        [*texts, f"distinct replies of a group / m: {first:.2f} early, {last:.2f} late"]
    )
    advice = "One answer takes over: lower --lr, raise --beta, and check whether giving it always earns a high reward."
    return finding("one answer to everything", max(levels, key=LEVELS.index, default="ok"), text, advice)


def divergence(metrics: list[dict]) -> Finding:
    name = "KL from the SFT policy that runs away"
    values = [(row["kl"], row["step"]) for row in metrics if row.get("kl") is not None]
    if not values:
        return Finding(name, "ok", "not measured (--beta 0)")
    first, last = (mean(late(metrics, early), "kl") for early in (True, False))
    most, step = max(values)
    level = above(last, KL_ABOVE)
    spike = most > KL_ABOVE[0] and most > KL_SPIKE * last
    text = f"per token {first:.4f} early, {last:.4f} late, largest {most:.4f} (step {step})"
    advice = "Raise --beta or lower --lr, and read late replies in samples.jsonl: odd text may be what earns the reward."
    return finding(name, max(level, "watch" if spike else "ok", key=LEVELS.index), text, advice)


def clipping(metrics: list[dict], inner_epochs: int, dtype: str) -> Finding:
    name, fraction = "clipped updates", mean(late(metrics), "clip_fraction")
    error = max(
        (row["max_ratio_error"] for row in metrics if row.get("max_ratio_error") is not None), default=0.0
    )
    if inner_epochs == 1:
        apart = max((row["approx_kl"] for row in metrics if row.get("approx_kl") is not None), default=0.0)
        text = f"one inner epoch, so pi is pi_old: largest KL of a step between them {apart:.1e}, largest |rho - 1| {error:.1e}"
        level = "bad" if (apart > MISMATCH if dtype == "bfloat16" else error > RATIO_ERROR) else "ok"
        advice = "The law that is scored is not the law that was sampled: look at dtype and temperature."
        return finding(name, level, text, advice)
    text = f"share of tokens clipped: {fraction:.3f} late, largest |rho - 1| {error:.2f}"
    advice = "Lower --lr or --inner-epochs: updates go further than the samples can say."
    return finding(name, above(fraction, CLIPPED_ABOVE), text, advice)


# ---------------------------------------------------------------------------------------------------------------------
# a run


def read_lines(path: Path) -> list[dict]:
    """Raises InputError for a file that is missing, empty or not such a log. A last line cut by a kill is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}; give the folder of a run of train_rft.py") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON") from None
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise InputError(f"{path} holds no steps; give the folder of a run of train_rft.py")
    return rows


def diagnose(folder: str | Path) -> list[Finding]:
    """All findings about a run. Raises InputError."""
    folder = Path(folder)
    metrics, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    results = read_json(folder / "eval.json")["results"] if (folder / "eval.json").exists() else None
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    try:
        return [
            compliance(metrics, samples),
            welfare(results),
            changing_links(samples, results),
            idle_groups(metrics),
            collapse(metrics, samples),
            divergence(metrics),
            clipping(metrics, config.get("inner_epochs", 1), config.get("dtype", "float32")),
        ]
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{folder} is not a run of this version of train_rft.py ({type(e).__name__}: {e})"
        ) from None


def format_findings(findings: list[Finding], advice: bool = True) -> str:
    """Worst first."""

    def lines(f: Finding):
        yield f"{f.level:7}{f.name}"
        for text in (f.numbers, f"-> {f.advice}" if advice and f.advice else ""):
            yield from textwrap.wrap(text, 118, initial_indent=" " * 7, subsequent_indent=" " * 7)

    return "\n".join(
        line for f in sorted(findings, key=lambda f: -LEVELS.index(f.level)) for line in lines(f)
    )


def summary(folder: str | Path) -> str:
    """What is not ok, for the end of a run."""
    findings = diagnose(folder)
    found = [f for f in findings if f.level != "ok"]
    head = f"diagnosis: {len(found) or 'none'} of {len(findings)} known failures to look at (python diagnose.py {folder})"
    return "\n".join([head, format_findings(found, advice=False)]).rstrip()


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Look for the known failures of training in the logs of a run."
    )
    parser.add_argument("run", help="the folder of a run of train_rft.py")
    args = parser.parse_args(argv)
    print(format_findings(diagnose(args.run)))


if __name__ == "__main__":
    main()
