"""The statistics, tables and figures of a study (tools/study.py), computed from its results file alone.

These rules were fixed before the runs. The unit is the training seed, and the value of a seed is the mean
over the held-out grid. Two arms are compared by the differences of the seeds that both have: the same games,
the same draws of the experts, and the same SFT stage where their flags allow it. Intervals are 95 % t
intervals over seeds. p is the exact two-sided sign-flip test of the mean difference (at least 2/256 with 8
seeds), and Holm's correction is over the arms of a family. The primary comparison is ToMPO minus GRPO in
U1 x U3, U3, U2 and row. Every unit of the results file is reported.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from play.metrics import mean_interval, tell_interval
from prompts import last_line
from rewards import Target
from run.errors import InputError
from run.files import read_lines, write_atomic
from tools.page.learned import best_threshold, training_choices

SHOWN = ("U1", "s", "row", "U2", "U3", "U1 x U3", "belief")
COMPARED = ("row", "U2", "U3", "U1 x U3", "speed")
REFERENCE = {"seats": "seat 0", "SFT alone": None}  # else the family's own tompo, or tompo; None: nothing
ADDED = ("s", "row", "U2", "belief")
LEVELS = ("A_S idle", "A_G idle", "memory the same", "correlation", "signs differ")
NOTE = "In brackets 95 % t intervals; p by sign flips, after Holm in round brackets."

# -------------------- what is measured in the samples.jsonl of a run


def graph_groups(samples: list[dict]) -> list[list[dict]]:
    """The groups of replies to graph decisions, in the order of training."""
    graph = [s for s in samples if s["kind"] == "G"]
    return [list(g) for _, g in itertools.groupby(graph, key=itemgetter("step", "game", "stage", "seat"))]


def row_of(reply: str) -> str:
    """The row of a compliant graph reply, such as 0110."""
    return "".join(map(str, json.loads(last_line(reply, "Decision:"))))


def a_dozen(samples: list[dict]) -> list[dict]:
    """Twelve graph groups, evenly spread over the run: the expert's row, and every different row that was
    chosen ("" where it cannot be read) with its count, A^S, A^G and A."""
    groups, dozen = graph_groups(samples), []
    for i in sorted({round(i) for i in np.linspace(0, len(groups) - 1, min(12, len(groups)))}):
        rows = [row_of(s["reply"]) if s["compliance"] > 0 else "" for s in groups[i]]
        values = [[round(s[key], 2) for key in ("A_S", "A_G", "advantage")] for s in groups[i]]
        values = dict(zip(rows, values, strict=True))
        chosen = [[row, rows.count(row), *values[row]] for row in sorted(values, key=lambda r: -values[r][2])]
        first = groups[i][0]
        dozen.append({"step": first["step"], "expert": row_of(first["expert"]), "chosen": chosen})
    return dozen


def rounded_mean(values: Iterable[float]) -> float | None:
    known = [float(value) for value in values if not math.isnan(value)]
    return round(float(np.mean(known)), 4) if known else None


def levels_of(samples: list[dict]) -> dict[str, float | None] | None:
    """How far the two levels of advantage differ in the graph groups of a run: the shares of groups in which
    A^S, A^G and the memory bonus (of compliant replies) are the same for all replies; and, in groups in which
    both levels differ, the correlation of A^S and A^G and the share of replies where their signs differ."""
    groups = graph_groups(samples)
    idle_S, idle_G = ([not any(s[name] for s in g) for g in groups] for name in ("A_S", "A_G"))
    both = [s for g, *idle in zip(groups, idle_S, idle_G, strict=True) if not any(idle) for s in g]
    x, y = (np.array([s[name] for s in both]) for name in ("A_S", "A_G"))
    same = [len({s["global"] for s in g if s["compliance"] > 0}) <= 1 for g in groups]
    values = idle_S, idle_G, same, [np.corrcoef(x, y)[0, 1]] if both else [], x * y < 0
    return dict(zip(LEVELS, map(rounded_mean, values), strict=True)) if groups else None


def graph_replies(samples: list[dict]) -> dict[str, list[float | None]]:
    """Two measures of the compliant graph replies in the first and in the last quarter of the steps. `belief
    followed`: the share that chooses exactly those by whom their Belief line expects to be chosen (None
    without Belief lines). `links chosen`: the share of the possible links; its third number is the expert's
    in the last quarter."""
    steps = max((s["step"] for s in samples), default=0) + 1
    compliant = [s for s in samples if s["kind"] == "G" and s["compliance"] > 0]
    first = [s for s in compliant if s["step"] < steps / 4]
    last = [s for s in compliant if s["step"] >= steps * 3 / 4]

    def followed(part):
        lines = [[last_line(s["reply"], label) for label in ("Belief:", "Decision:")] for s in part]
        return rounded_mean(belief == decision for belief, decision in lines if belief)

    def links(part, author="reply"):
        rows = [row_of(s[author]) for s in part]
        return rounded_mean(row.count("1") / (len(row) - 1) for row in rows)

    chosen = [links(first), links(last), links(last, "expert")]
    return {"belief followed": [followed(first), followed(last)], "links chosen": chosen}


def rules_of(samples: list[dict], targets: dict[tuple, Target]) -> dict[str, list[float] | None]:
    """(t, share): the best rule of the kind "link iff the worked number is at least t", and the share of the
    choices that it explains: of the expert, of the SFT policy, and of the last quarter of RFT."""
    steps = max((s["step"] for s in samples), default=0) + 1
    choices = {
        "expert": training_choices(samples, targets, "expert"),
        "sft": training_choices([s for s in samples if s["step"] == 0], targets),
        "final": training_choices([s for s in samples if s["step"] >= steps * 3 / 4], targets),
    }
    rules = {name: best_threshold(part) for name, part in choices.items()}
    return {name: rule and [round(rule["t"], 2), round(rule["agreed"], 4)] for name, rule in rules.items()}


# -------------------- statistics


def sign_flip(differences: list[float]) -> float:
    """The two-sided p-value of the mean: the share of all sign patterns that reach it. 1 for no seeds."""
    x = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
    return float((np.abs(signs @ x) >= abs(x.sum()) - 1e-12).mean())


def holm(p_values: list[float]) -> list[float]:
    """The p-values adjusted for testing all of them (Holm 1979)."""
    order, adjusted, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def seed_values(line: dict) -> dict[str, float]:
    """A unit's value of every metric. speed: the mean of the probe's row over RFT, from the end of SFT on."""
    known = {metric: [v for v in games if v is not None] for metric, games in line["values"].items()}
    values = {metric: float(np.mean(games)) for metric, games in known.items() if games}
    if "U3" in values:
        values["U1 x U3"] = values["U1"] * values["U3"]
    steps, row = ([entry[key] for entry in line.get("probe") or ()] for key in ("step", "row"))
    if len(steps) > 1:
        values["speed"] = float(np.trapezoid(row, steps) / (steps[-1] - steps[0]))
    return values


def paired(first: dict, second: dict, metric: str) -> list[tuple[float, float]]:
    """A metric of two arms in every seed that has it in both."""
    pairs = [(first[s].get(metric), second[s].get(metric)) for s in sorted(first.keys() & second.keys())]
    return [pair for pair in pairs if None not in pair]


def compare(names: list[str], reference: str, values: dict) -> dict[str, dict[str, dict]]:
    """{arm: {metric: mean and interval of the arm minus the reference over common seeds, p, Holm's p}}, for
    the arms that have seeds in common with the reference; under `ratio` that of U1 x U3. values: {arm: {seed:
    {metric: value}}}."""
    differences: dict[str, dict[str, dict]] = {}
    for name in names:
        if not values[name].keys() & values.get(reference, {}).keys():
            continue
        row = differences[name] = {}
        for metric in COMPARED:
            d = [a - b for a, b in paired(values[name], values[reference], metric)]
            if d:
                row[metric] = mean_interval(d) | {"p": sign_flip(d), "seeds": len(d)}
        pairs = paired(values[name], values[reference], "U1 x U3")
        logs = mean_interval([math.log(a / b) for a, b in pairs if a > 0 < b])
        ends = {end: logs[end] for end in ("mean", "low", "high")}
        row["ratio"] = {end: None if v is None else math.exp(v) for end, v in ends.items()}
    for metric in COMPARED:
        tests = [row[metric] for row in differences.values() if metric in row]
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["holm"] = p
    return differences


# -------------------- tables, in Markdown


cell = partial(tell_interval, digits=3)


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def table_of_means(names: list[str], values: dict, arms: dict) -> list[str]:
    rows = [["arm", "flags", "seeds", *SHOWN]]
    for name in names:
        line = next(iter(arms[name].values()))
        parts = ["SFT alone" if "sft" in line else "", f"`{line['flags']}`" if line["flags"] else ""]
        parts.append(f"SFT: `{line['sft_flags']}`" if "sft_flags" in line else "")
        flags = " ".join(filter(None, parts)) or "default"
        means = [mean_interval([v.get(metric) for v in values[name].values()]) for metric in SHOWN]
        rows.append([name, flags, str(len(values[name])), *map(cell, means)])
    return markdown(rows)


def table_of_differences(differences: dict, reference: str) -> list[str]:
    def test(d):
        return f"{cell(d, sign='+')}, p {d['p']:.3f} ({d['holm']:.3f})" if d else "-"

    rows = [[f"minus {reference}", *COMPARED, "U1 x U3, ratio"]]
    for name, row in differences.items():
        rows.append([name, *(test(row.get(metric)) for metric in COMPARED), cell(row["ratio"])])
    return [*markdown(rows), "", NOTE]


def table_of_added(values: dict) -> list[str]:
    """The arms whose SFT stage was measured too, over the seeds of both."""
    rows = [["arm", "seeds", *(f"{metric}: SFT, RFT, difference" for metric in ADDED)]]
    for name, after in values.items():
        before = values.get("sft" if name == "tompo" else f"{name}, SFT alone", {})
        row = [name, str(len(after.keys() & before.keys()))]
        for metric in ADDED:
            pairs = paired(before, after, metric)
            ends = [f"{np.mean(end):.3f}" for end in zip(*pairs, strict=True)] or ["-", "-"]
            row.append(f"{ends[0]}, {ends[1]}, {cell(mean_interval(b - a for a, b in pairs), sign='+')}")
        if after.keys() & before.keys():
            rows.append(row)
    return markdown(rows)


def table_of_levels(arms: dict) -> list[str]:
    labels = "belief followed, first quarter", "last quarter", "links chosen, first quarter", "last", "expert"
    rows = [["arm", *LEVELS, *labels]]
    for name, seeds in arms.items():
        measured = [
            [*(line["levels"][key] for key in LEVELS), *line["belief followed"], *line["links chosen"]]
            for line in seeds.values()
            if line.get("levels")
        ]
        if measured:
            rows.append([name, *(cell(mean_interval(values)) for values in zip(*measured, strict=True))])
    return markdown(rows)


def table_of_rules(arms: dict) -> list[str]:
    """The thresholds are listed seed by seed, since their mean says little."""
    parts = {"expert": "the expert", "sft": "SFT (first step)", "final": "last quarter of RFT"}
    rows = [["arm", *(f"{label}: threshold, share explained" for label in parts.values())]]
    for name, seeds in arms.items():
        runs = [line["rule"] for _, line in sorted(seeds.items()) if line.get("rule")]
        if runs:
            rules = [[run[part] for run in runs if run[part]] for part in parts]
            thresholds = [", ".join(f"{t:.2f}" for t, _ in part) for part in rules]
            shares = [cell(mean_interval([share for _, share in part])) for part in rules]
            rows.append([name, *(f"{t}; {share}" for t, share in zip(thresholds, shares, strict=True))])
    return markdown(rows)


def table_of_groups(groups: list[dict]) -> list[str]:
    rows = [["step", "the expert's row", "rows of the replies: times, A^S, A^G, A"]]
    for group in groups:
        chosen = [
            f"{row or 'not compliant'} ×{n}: {A_S:+.2f}, {A_G:+.2f}, {A:+.2f}"
            for row, n, A_S, A_G, A in group["chosen"]
        ]
        rows.append([str(group["step"]), group["expert"], "; ".join(chosen)])
    return markdown(rows)


# -------------------- the report


def write(results: Path, folder: Path, planned: list[tuple[str, int]]) -> str:
    """Writes FOLDER/study.md, study-forest.png and study-curves.png. planned: every arm with the number of
    seeds that it is to have. Returns what to print. Raises InputError if there are no results."""
    lines, place = read_lines(results), {name: i for i, (name, _) in enumerate(planned)}
    if not lines:
        raise InputError(f"{results} holds no results yet; run python -m tools.study first")
    lines.sort(key=lambda line: (place.get(line["arm"], len(place)), line["seed"]))
    arms: dict[str, dict[int, dict]] = defaultdict(dict)  # [arm][seed]: a line of the file
    families: dict[str, dict[str, None]] = defaultdict(dict)  # [family]: its arms, in order
    for line in lines:
        arms[line["arm"]][line["seed"]] = line
        families[line["family"]][line["arm"]] = None
    values = {name: {s: seed_values(line) for s, line in seeds.items()} for name, seeds in arms.items()}
    text, compared = [__doc__.split("\n\n", 1)[1].strip(), "", about(lines)], {}
    for family, names in families.items():
        text += ["", f"## {family}", "", *table_of_means(list(names), values, arms)]
        tompo = next((name for name in names if name.startswith("tompo")), "tompo")
        reference = REFERENCE.get(family, tompo)
        differences = compare([n for n in names if reference and n != reference], reference, values)
        compared |= {name: (reference, row) for name, row in differences.items()}
        text += ["", *table_of_differences(differences, reference)] if differences else []
    text += ["", "## What RFT adds to its SFT stage", "", *table_of_added(values)]
    text += ["", "## The two levels", "", *table_of_levels(arms)]
    text += ["", "## Link iff the worked number is at least t", "", *table_of_rules(arms)]
    for line in lines:
        if line["arm"].startswith("tompo") and line.get("groups"):
            title = f"## A dozen groups of {line['arm']}, seed {line['seed']}"
            text += ["", title, "", *table_of_groups(line["groups"])]
    lacking = [(name, seeds - len(arms.get(name, ()))) for name, seeds in planned]
    names = ", ".join(f"{name} ({seeds})" for name, seeds in lacking if seeds > 0)
    plan = f"Arms, and how many seeds they lack; `python -m tools.study` runs them: {names}."
    text += ["", "## Not run yet", "", plan if names else "Nothing: all arms have all their seeds."]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "study.md", ("\n".join(text) + "\n").encode())
    draw_forest(compared, folder / "study-forest.png")
    draw_curves(arms, folder / "study-curves.png")
    return "\n".join(text) + f"\n\nwritten: {folder}/study.md, study-forest.png, study-curves.png"


def about(lines: list[dict]) -> str:
    """Where the units were run, and with which versions."""
    machines, commits = (sorted({line[key] for line in lines}) for key in ("machine", "commit"))
    packages = {", ".join(f"{name} {number}" for name, number in line["packages"].items()) for line in lines}
    where = f"on {'; '.join(machines)}; {'; '.join(sorted(packages))}; commits {', '.join(commits)}"
    hours = sum(line["minutes"] for line in lines) / 60
    return f"{len(lines)} units, {hours:.1f} hours of single runs, {where}."


def draw(path: Path, height: float, metrics: tuple[str, ...], draw_axis) -> None:
    """A picture of three axes beside one another. draw_axis: (axis, metric) -> None."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), metrics, strict=True):
        draw_axis(axis, metric)
    figure.savefig(path, dpi=110)


def draw_forest(compared: dict, path: Path) -> None:
    """Every arm's difference to its reference. compared: {arm: (reference, a row of `compare`)}."""
    seeds = {name: max(d.get("seeds", 0) for d in row.values()) for name, (_, row) in compared.items()}
    labels = [f"{name} - {of}, {seeds[name]} seeds" for name, (of, _) in reversed(compared.items())]

    def draw_axis(axis, metric):
        for y, (_, row) in enumerate(reversed(compared.values())):
            if metric in row:
                axis.plot([row[metric]["low"], row[metric]["high"]], [y, y], "k-", linewidth=1)
                axis.plot(row[metric]["mean"], y, "ks", markersize=4)
        axis.axvline(0, color="C7", linewidth=1)
        axis.set(title=f"{metric}: difference", yticks=range(len(labels)), ylim=(-0.6, len(labels) - 0.4))
        axis.set_yticklabels(labels if metric == "row" else [], fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)

    draw(path, 1.2 + 0.26 * max(4, len(compared)), ("row", "U2", "U1 x U3"), draw_axis)


def draw_curves(arms: dict, path: Path) -> None:
    """The probe of ToMPO and GRPO during RFT, in the seeds that both have: the mean and a 95 % t interval as
    a band. The interval of two seeds would be as wide as the picture and is left out."""
    styles = {name: style for name, style in {"tompo": "C0-o", "grpo": "C1--o"}.items() if name in arms}
    seeds = set.intersection(*(set(arms[name]) for name in styles)) if styles else set()

    def draw_axis(axis, metric):
        for name, style in styles.items():
            values: dict[int, list[float]] = defaultdict(list)
            for entry in [e for seed in seeds for e in arms[name][seed].get("probe") or ()]:
                values[entry["step"]].append(entry[metric])
            steps = sorted(values)
            intervals = [mean_interval(values[step]) for step in steps]
            mean, low, high = ([i[end] for i in intervals] for end in ("mean", "low", "high"))
            axis.plot(steps, mean, style, label=f"{name}, {len(seeds)} seeds", markersize=3)
            if min((i["n"] for i in intervals), default=0) > 2:
                axis.fill_between(steps, low, high, color=style[:2], alpha=0.15, linewidth=0)
        axis.set(title=f"Probe, {metric}", xlabel="step of RFT")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()

    draw(path, 3.6, ("row", "U2", "belief"), draw_axis)
