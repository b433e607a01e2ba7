"""What is told of games that are over: summaries of many games with their metrics, and the printed tables."""

import math
from collections.abc import Callable
from dataclasses import replace

from games import State
from play.expert_games import history_to_text
from play.intervals import UNKNOWN, mean_interval, wilson_interval
from play.metrics import METRICS, Episode, compliant, per_instance
from run.errors import InputError, library_errors
from run.files import read_json

DETAILS = ("gap", "U2 | ok", "U3 | ok")  # are in eval.json, and not in printed tables
COMPARED = ("s", "row", "U2", "U3")  # those whose paired differences are printed
CONSTANTS = "always-link", "never-link"  # the experts that give the same answer everywhere
# What a metric can be, for the intervals that are shown; of others nothing is known.
LIMITS = dict.fromkeys(("U1", "s", "row", "U2", "belief", "U2 | ok"), (0.0, 1.0))
LIMITS |= dict.fromkeys(("U3", "U3 | ok", "U1 x U3"), (-math.inf, 1.0)) | {"gap": (0.0, math.inf)}


# -------------------- summaries


def summarise(episodes: list[Episode]) -> dict:
    """{"all rounds" | "round 1" | ...: {metric: mean and interval}, "games": {game and stages: the same},
    "instances": per instance; of every game the policy's "replies", its "seats" (who replies, in that order,
    in each stage), and all agents' "actions" by stage (as text); "repaired": how many replies}."""
    seats = len({t.seat for t in episodes[0].turns})

    def table(pairs):  # of games with their metrics
        names = dict.fromkeys(name for _, row in pairs for name in row)
        intervals = {name: mean_interval(row.get(name) for _, row in pairs) for name in names}
        # The decisions of several seats count as those of one, because they are not independent.
        replies = [compliant(t) for p, _ in pairs for t in p.turns]
        return intervals | {"U1": wilson_interval(sum(replies) / seats, len(replies) / seats)}

    def in_round(episode: Episode, r: int) -> Episode:
        turns = [t for t in episode.turns if t.state.round == r]
        return replace(episode, turns=turns, welfares=episode.welfares[r - 1 : r])

    rounds: dict[str, list[Episode]] = {}
    for p in episodes:
        for r in range(1, p.game.rounds + 1):
            rounds.setdefault(f"round {r}", []).append(in_round(p, r))
    pairs = [(p, per_instance(p)) for p in episodes]
    labels = dict.fromkeys(p.game.label for p in episodes)
    return {
        "all rounds": table(pairs),
        **{name: table([(p, per_instance(p)) for p in part]) for name, part in rounds.items()},
        "games": {label: table([pair for pair in pairs if pair[0].game.label == label]) for label in labels},
        "instances": [{"instance": p.game.to_json()} | row for p, row in pairs],
        "replies": [[t.reply for t in p.turns] for p in episodes],
        "seats": [sorted({t.seat for t in p.turns}) for p in episodes],
        "actions": [history_to_text(State(p.game, p.history)) for p in episodes],
        "repaired": sum(bool(t.played and not t.decision) for p in episodes for t in p.turns),
    }


def paired_difference(a: dict, b: dict, metric: str) -> dict:
    """a - b of two summaries over the same instances: mean and interval of the differences. A person may have
    played only the first instances."""
    instances = zip(a["instances"], b["instances"], strict=False)
    pairs = [(x.get(metric), y.get(metric)) for x, y in instances]
    return mean_interval(x - y for x, y in pairs if x is not None and y is not None)


# -------------------- tables


def tell_interval(v: dict, digits: int = 2, sign: str = "", short: bool = False) -> str:
    """`mean [low, high]`, or with `short` `mean ±half its width` if it is symmetric, as t intervals are, and
    ends of exactly 0 or 1 without decimals; "-" where nothing is known. digits: of the interval; sign: "+"
    for differences."""
    if v["low"] is None:
        return "-" if v["mean"] is None else f"{v['mean']:{sign}.3f}"
    mean, low, high = v["mean"], v["low"], v["high"]
    if short and abs(low + high - 2 * mean) < 1e-9:
        return f"{mean:{sign}.3f} ±{high - mean:.{digits}f}"
    ends = (f"{end:g}" if short and end in (0, 1) else f"{end:{sign}.{digits}f}" for end in (low, high))
    return f"{mean:{sign}.3f} [{', '.join(ends)}]"


def align(rows: list[list[str]]) -> str:
    """The rows as lines of up to 120 characters, in columns as wide as their longest text. A long first text,
    such as the folder of an adapter, stands in a line of its own."""
    first, *widths = (max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    first, lines = min(first, 32, max(20, 122 - sum(widths))), []
    for name, *cells in rows:
        start = name.ljust(first) if len(name) + 2 <= first else f"{name}\n{' ' * first}"
        cells = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append((start + "".join(cells)).rstrip())
    return "\n".join(lines)


def possible(metric: str, v: dict, difference: bool = False) -> dict:
    """The interval without what the metric, or a difference of two, cannot be: that of a few games would
    often be wider."""
    low, high = LIMITS.get(metric, (-math.inf, math.inf))
    low, high = (low - high, high - low) if difference else (low, high)
    return v if v["low"] is None else v | {"low": max(low, v["low"]), "high": min(high, v["high"])}


def format_table(tables: dict[str, dict], metrics=None, digits: int = 2, sign: str = "") -> str:
    """One line per policy: mean and interval of these metrics, or of all but DETAILS. tables: {policy:
    {metric: both}}; intervals are cut off at what is possible. sign: "+" for differences."""
    metrics = metrics or [name for name in METRICS if name not in DETAILS]
    rows = [["policy", *metrics]]
    for name, table in tables.items():
        values = [possible(m, table.get(m, UNKNOWN), bool(sign)) for m in metrics]
        rows.append([name, *(tell_interval(v, digits, sign, True) for v in values)])
    return align(rows)


def report_differences(first: str, others: list[str], difference: Callable[[str, str], dict]) -> str:
    """difference: (name of another, metric) -> mean and interval of first - other."""
    tables = {name: {m: difference(name, m) for m in COMPARED} for name in others}
    return f"\n\n{first} minus the others, paired by instance\n" + format_table(tables, COMPARED, 3, "+")


def report_rounds(names: list[str], rounds: int, value: Callable[[str, str], dict]) -> str:
    """Nothing for games of one round. value: (name of a policy, `round R`) -> mean and interval."""
    columns = [f"round {r}" for r in range(1, rounds + 1)]
    tables = {name: {r: value(name, r) for r in columns} for name in names}
    return f"\n\nU2 of links by round\n{format_table(tables, columns)}" if rounds > 1 else ""


def links_in_round(summary: dict, name: str) -> dict:
    return summary.get(name, {}).get("U2 graph", UNKNOWN)


def about_constant(results: dict[str, dict]) -> str:
    """What is to be known where a row links with everybody and proposals are free; else ""."""
    row = results.get("expert:always-link")
    if row is None or row["instances"][0]["instance"].get("fee"):
        return ""
    return (
        "always-link gives the same answer everywhere: in the paper's game an unanswered proposal is free.\n"
        "With the fee of docs/others.md no constant answer is good."
    )


def report(results: dict[str, dict]) -> str:
    """The tables that are printed, and the paired differences of the first row to every other."""
    first, *others = results
    text, parts = format_table({name: s["all rounds"] for name, s in results.items()}), {}
    rounds = results[first]["instances"][0]["instance"]["rounds"]
    if rounds > 1:
        parts["round 1"] = {name: s["round 1"] for name, s in results.items()}
    if len(results[first]["games"]) > 1:
        for label in results[first]["games"]:
            parts[label] = {name: s["games"][label] for name, s in results.items()}
    for label, tables in parts.items():
        text += f"\n\n{label} alone\n{format_table(tables)}"
    text += report_rounds(list(results), rounds, lambda name, r: links_in_round(results[name], r))
    text += report_differences(
        first, others, lambda name, m: paired_difference(results[first], results[name], m)
    )
    return f"{text}\n\n{about_constant(results)}".rstrip("\n")


def report_seeds(paths: list[str]) -> str:
    """The tables of several runs' eval.json that differ in their training seed: means over runs with 95 % t
    intervals over the runs' means, so they describe training and not one adapter. Metrics that are newer than
    a file may be missing in it. Raises InputError."""
    runs: list[dict] = []
    partners: list[list[str] | None] = []
    for path in paths:
        with library_errors(f"{path} is not an eval.json that train_rft.py or --json wrote"):
            written = read_json(path)
            runs.append(written["results"])
            partners.append(written.get("arguments", {}).get("partners"))
            for summary in runs[-1].values():
                summary["instances"][0]["instance"], summary["all rounds"]["U1"]["mean"]
    first, *rest = runs[0]
    for path, run, others in zip(paths, runs, partners, strict=True):
        games, expected = ([row["instance"] for row in r[next(iter(r))]["instances"]] for r in (run, runs[0]))
        if next(iter(run)) != first or games != expected or others != partners[0]:
            raise InputError(f"{path} and {paths[0]} are not runs of one kind on the same games")
    names = [first, *(name for name in rest if all(name in run for run in runs))]

    def mean(name, m):
        return mean_interval(run[name]["all rounds"].get(m, UNKNOWN)["mean"] for run in runs)

    def difference(name, m):
        return mean_interval(paired_difference(run[first], run[name], m)["mean"] for run in runs)

    text = f"{len(runs)} runs: means and 95 % t intervals over the means of the runs\n\n"
    text += format_table({name: {m: mean(name, m) for m in METRICS} for name in names})
    text += report_rounds(
        names,
        runs[0][first]["instances"][0]["instance"]["rounds"],
        lambda name, r: mean_interval(links_in_round(run[name], r)["mean"] for run in runs),
    )
    return text + report_differences(first, names[1:], difference)
