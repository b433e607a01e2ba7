"""The statistics, tables and figures of a study (tools/study.py), from its results file alone.

Decided before the runs: the unit is the training seed. A seed's value is the mean over the held-out grid; two
arms are compared by the differences of the seeds that both have (same games, same experts' draws, same SFT
stage where their flags allow it). Intervals are 95 % t intervals over seeds; p is the exact sign-flip test of
the mean difference, two-sided (with 8 seeds at least 2/256), and Holm's correction is over the arms of a
family. Primary: ToMPO minus GRPO in U1 x U3, U3, U2 and row. Every unit of the results file is reported.
"""

import itertools
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from play.metrics import mean_interval, tell_interval
from prompts import last_line
from run.files import InputError, read_lines, write_atomic
from tools.page.learned import best_cut

SHOWN = ("U1", "s", "row", "U2", "U3", "U1 x U3", "belief")
COMPARED = ("row", "U2", "U3", "U1 x U3", "speed")
REFERENCE = {"seats": "seat 0", "SFT alone": None}  # else the family's own tompo, or tompo; None: nothing
ADDED = ("s", "row", "U2", "belief")


# -------------------- statistics


def sign_flip(differences: list[float]) -> float:
    """The two-sided p-value of the mean: the share of all sign patterns that reach it. 1 for no seeds."""
    x = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
    return float((np.abs(signs @ x) >= abs(x.sum()) - 1e-12).mean())


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for all of them (Holm 1979)."""
    order, adjusted, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def graph_groups(samples: list[dict]) -> list[list[dict]]:
    """The groups of replies to graph decisions, in the order of training."""
    place = ("step", "game", "stage", "seat")
    graph = [s for s in samples if s["kind"] == "G"]
    return [list(g) for _, g in itertools.groupby(graph, key=lambda s: [s[key] for key in place])]


def a_dozen(samples: list[dict]) -> list[dict]:
    """Twelve graph groups, evenly spread over the run: the expert's row and every different row that was
    chosen ("" where it cannot be read) with how often, A^S, A^G and A."""
    groups, found = graph_groups(samples), []
    for i in sorted({round(i) for i in np.linspace(0, len(groups) - 1, min(12, len(groups)))}):
        rows = [row_of(s["reply"]) if s["compliance"] > 0 else "" for s in groups[i]]
        values = {
            row: [round(s[k], 2) for k in ("A_S", "A_G", "advantage")] for row, s in zip(rows, groups[i])
        }
        chosen = [[row, rows.count(row), *values[row]] for row in sorted(values, key=lambda r: -values[r][2])]
        found.append(
            {"step": groups[i][0]["step"], "expert": row_of(groups[i][0]["expert"]), "chosen": chosen}
        )
    return found


def row_of(reply: str) -> str:
    return "".join(map(str, json.loads(last_line(reply, "Decision:"))))


def levels_of(samples: list[dict]) -> dict[str, float] | None:
    """How far the two levels of advantage differ in the graph groups of a run, from its samples.jsonl: the
    shares of groups in which A^S, A^G and the memory bonus (of compliant replies) say nothing; in groups in
    which both speak, the correlation of A^S and A^G and the share of replies where their signs differ."""
    groups = graph_groups(samples)
    if not groups:
        return None
    A_S, A_G = ([[s[name] for s in g] for g in groups] for name in ("A_S", "A_G"))
    both = [i for i in range(len(groups)) if any(A_S[i]) and any(A_G[i])]
    x, y = (np.array([a for i in both for a in A[i]]) for A in (A_S, A_G))
    bonuses = [{s["global"] for s in g if s["compliance"] > 0} for g in groups]
    share = {
        "A_S idle": np.mean([not any(a) for a in A_S]),
        "A_G idle": np.mean([not any(a) for a in A_G]),
        "memory the same": np.mean([len(bonus) <= 1 for bonus in bonuses]),
        "correlation": np.corrcoef(x, y)[0, 1] if len(both) else math.nan,
        "signs differ": np.mean(x * y < 0) if len(both) else math.nan,
    }
    return {name: None if math.isnan(value) else round(float(value), 4) for name, value in share.items()}


def quarters(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    """The compliant graph replies of the first and of the last quarter of the steps."""
    steps = max((s["step"] for s in samples), default=0) + 1
    compliant = [s for s in samples if s["kind"] == "G" and s["compliance"] > 0]
    first, last = (lambda s: s["step"] < steps / 4), (lambda s: s["step"] >= steps * 3 / 4)
    return list(filter(first, compliant)), list(filter(last, compliant))


def rounded_mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def belief_followed(samples: list[dict]) -> list[float | None]:
    """The share of compliant graph replies that choose whom their Belief line expects to be chosen by, in the
    first and in the last quarter of the steps; None without Belief lines."""

    def followed(s):
        return last_line(s["reply"], "Belief:") == last_line(s["reply"], "Decision:")

    having = [[s for s in of if last_line(s["reply"], "Belief:")] for of in quarters(samples)]
    return [rounded_mean([followed(s) for s in of]) for of in having]


def links_chosen(samples: list[dict]) -> list[float | None]:
    """The share of possible links that compliant graph replies choose, in the first and in the last quarter
    of the steps, and that the expert chooses in the place of the latter."""

    def share(s, who):
        row = row_of(s[who])
        return row.count("1") / (len(row) - 1)

    first, last = quarters(samples)
    asked = (first, "reply"), (last, "reply"), (last, "expert")
    return [rounded_mean([share(s, who) for s in of]) for of, who in asked]


def threshold_rule(samples: list[dict], worth: dict[tuple, list[float]]) -> list[float] | None:
    """(t, share): the best rule of the kind "link iff the worked number is at least t" for what compliant
    graph replies chose, and the share of their choices that it explains. worth: the worked numbers in the
    prompt of each (game, stage, seat). None where prompts have none."""
    pairs = []
    for s in samples:
        numbers = worth.get((s["game"], s["stage"], s["seat"]))
        if s["kind"] == "G" and s["compliance"] > 0 and numbers:
            row = json.loads(last_line(s["reply"], "Decision:"))
            pairs += [(numbers[j], row[j]) for j in range(len(row)) if j != s["seat"]]
    if not pairs:
        return None
    x, chosen = np.array(pairs).T
    ends, best, share = best_cut(x, chosen)
    return [round(float([*ends, ends[-1] + 0.01][best]), 2), round(share, 4)]


def worked_numbers(records: list) -> dict[tuple, list[float]]:
    """What the prompts of graph decisions say that each link earns, by (game, stage, seat)."""
    found = {}
    for r in records:
        told = re.findall(r"\[([\d., -]+)\] c", r.prompt[-1]["content"]) if r.kind == "G" else None
        if told:
            found[r.game, r.stage, r.seat] = [float(number) for number in told[-1].split(",")]
    return found


def seed_values(line: dict) -> dict[str, float]:
    """A unit's value of every metric. speed: the mean of the probe's row over RFT, SFT's end included."""
    found = {}
    for metric, of_games in line["values"].items():
        known = [v for v in of_games if v is not None]
        if known:
            found[metric] = float(np.mean(known))
    if "U3" in found:
        found["U1 x U3"] = found["U1"] * found["U3"]
    if line.get("probe"):
        steps, row = ([entry[key] for entry in line["probe"]] for key in ("step", "row"))
        if len(steps) > 1:
            found["speed"] = float(np.trapezoid(row, steps) / (steps[-1] - steps[0]))
    return found


# -------------------- the report


def write(results: Path, folder: Path, planned: list[tuple[str, int]]) -> str:
    """Writes FOLDER/study.md, study-forest.png and study-curves.png. planned: arms and how many seeds they
    are to have. Returns what to print."""
    lines, place = read_lines(results), {name: i for i, (name, _) in enumerate(planned)}
    if not lines:
        raise InputError(f"{results} holds no results yet; run python -m tools.study first")
    lines.sort(key=lambda line: (place.get(line["arm"], len(place)), line["seed"]))
    arms: dict[str, dict[int, dict]] = defaultdict(dict)  # [arm][seed]: a line of the file
    for line in lines:
        arms[line["arm"]][line["seed"]] = line
    values = {name: {seed: seed_values(line) for seed, line in of.items()} for name, of in arms.items()}
    folder.mkdir(parents=True, exist_ok=True)
    families: dict[str, list[str]] = defaultdict(list)
    for name, of in arms.items():
        families[next(iter(of.values()))["family"]].append(name)
    text, compared = [__doc__.split("\n\n", 1)[1].strip(), "", about(lines)], {}
    for family, names in families.items():
        tompo = next((n for n in names if n.startswith("tompo")), "tompo")
        reference = REFERENCE.get(family, tompo)
        text += ["", f"## {family}", "", *table_of_means(names, values, arms)]
        differences = compare([n for n in names if reference and n != reference], reference, values)
        compared |= {name: (reference, of) for name, of in differences.items()}
        text += ["", *table_of_differences(differences, reference)] if differences else []
    text += ["", "## What RFT adds to its SFT stage", "", *table_of_added(values)]
    text += ["", "## The two levels", "", *table_of_levels(arms)]
    text += ["", "## Link iff the worked number is at least t", "", *table_of_rules(arms)]
    for name, of_seeds in arms.items():
        for line in of_seeds.values():
            if name.startswith("tompo") and line.get("groups"):
                text += ["", f"## A dozen groups of {name}, seed {line['seed']}", "", *table_of_groups(line)]
    text += ["", "## Not run yet", "", *missing(planned, arms)]
    write_atomic(folder / "study.md", ("\n".join(text) + "\n").encode())
    draw_forest(compared, folder / "study-forest.png")
    draw_curves(arms, folder / "study-curves.png")
    return "\n".join(text) + f"\n\nwritten: {folder}/study.md, study-forest.png, study-curves.png"


def about(lines: list[dict]) -> str:
    machines = sorted({line["machine"] for line in lines})
    commits, minutes = sorted({line["commit"] for line in lines}), sum(line["minutes"] for line in lines)
    packages = {", ".join(f"{name} {number}" for name, number in line["packages"].items()) for line in lines}
    where = f"on {'; '.join(machines)}; {'; '.join(sorted(packages))}; commits {', '.join(commits)}"
    return f"{len(lines)} units, {minutes / 60:.1f} hours of single runs, {where}."


def cell(interval: dict, sign: str = "") -> str:
    return tell_interval(interval, 3, sign)


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def table_of_means(names, values, arms) -> list[str]:
    rows = [["arm", "flags", "seeds", *SHOWN]]
    for name in names:
        line = next(iter(arms[name].values()))
        parts = ["SFT alone" if "sft" in line else "", f"`{line['flags']}`" if line["flags"] else ""]
        told = " ".join(filter(None, parts)) or "default"
        of_metric = [mean_interval([v.get(m) for v in values[name].values()]) for m in SHOWN]
        rows.append([name, told, str(len(values[name])), *map(cell, of_metric)])
    return markdown(rows)


def paired(first: dict, second: dict, metric: str) -> list[tuple[float, float]]:
    """A metric of two arms in every seed that has it in both."""
    pairs = [(first[s].get(metric), second[s].get(metric)) for s in sorted(first.keys() & second.keys())]
    return [pair for pair in pairs if None not in pair]


def compare(names, reference: str, values) -> dict[str, dict[str, dict]]:
    """[arm][metric]: mean and interval of the arm minus the reference over common seeds, p and Holm's p."""
    found: dict[str, dict[str, dict]] = {}
    for name in names:
        seeds = sorted(values[name].keys() & values.get(reference, {}).keys())
        for metric in COMPARED if seeds else ():
            d = [a - b for a, b in paired(values[name], values[reference], metric)]
            if d:
                found.setdefault(name, {})[metric] = mean_interval(d) | {"p": sign_flip(d), "seeds": len(d)}
        if seeds:
            both = [[values[arm][s].get("U1 x U3", 0) for arm in (name, reference)] for s in seeds]
            logs = mean_interval([math.log(a / b) for a, b in both if a > 0 < b])
            ends = {end: logs[end] for end in ("mean", "low", "high")}
            found[name]["ratio"] = {k: None if v is None else math.exp(v) for k, v in ends.items()}
    for metric in COMPARED:
        having = [name for name in found if metric in found[name]]
        for name, p in zip(having, holm([found[name][metric]["p"] for name in having])):
            found[name][metric]["holm"] = p
    return found


def table_of_differences(differences, reference: str) -> list[str]:
    rows = [[f"minus {reference}", *COMPARED, "U1 x U3, ratio"]]
    for name, of_metric in differences.items():
        row = [name]
        for metric in COMPARED:
            d = of_metric.get(metric)
            row.append(f"{cell(d, '+')}, p {d['p']:.3f} ({d['holm']:.3f})" if d else "-")
        rows.append([*row, cell(of_metric["ratio"])])
    return markdown(rows) + [
        "",
        "In brackets 95 % t intervals; p by sign flips, after Holm in round brackets.",
    ]


def table_of_added(values) -> list[str]:
    """The arms whose SFT stage was measured too, over the seeds of both."""
    rows = [["arm", "seeds", *(f"{metric}: SFT, RFT, difference" for metric in ADDED)]]
    for name, of in values.items():
        before = values.get("sft" if name == "tompo" else f"{name}, SFT alone", {})
        row = [name, str(len(of.keys() & before.keys()))]
        for metric in ADDED:
            pairs = paired(before, of, metric)
            ends = [f"{np.mean(end):.3f}" for end in zip(*pairs)] or ["-", "-"]
            difference = mean_interval([after - sft for sft, after in pairs])
            row.append(f"{ends[0]}, {ends[1]}, {cell(difference, '+')}")
        if of.keys() & before.keys():
            rows.append(row)
    return markdown(rows)


def table_of_rules(arms) -> list[str]:
    """Thresholds seed by seed, since their mean says little."""
    names = {"expert": "the expert", "sft": "SFT (first step)", "final": "last quarter of RFT"}
    rows = [["arm", *(f"{told}: threshold, share explained" for told in names.values())]]
    for name, of_seeds in arms.items():
        rules = [line["rule"] for _, line in sorted(of_seeds.items()) if line.get("rule")]
        row = []
        for key in names:
            known = [rule[key] for rule in rules if rule[key]]
            thresholds = ", ".join(f"{t:.2f}" for t, _ in known)
            row.append(f"{thresholds}; {cell(mean_interval([share for _, share in known]))}")
        if rules:
            rows.append([name, *row])
    return markdown(rows)


def table_of_groups(line: dict) -> list[str]:
    rows = [["step", "the expert's row", "rows of the replies: times, A^S, A^G, A"]]
    for group in line["groups"]:
        chosen = [
            f"{row or 'not compliant'} ×{n}: {A_S:+.2f}, {A_G:+.2f}, {A:+.2f}"
            for row, n, A_S, A_G, A in group["chosen"]
        ]
        rows.append([str(group["step"]), group["expert"], "; ".join(chosen)])
    return markdown(rows)


def missing(planned: list[tuple[str, int]], arms) -> list[str]:
    """What of the plan has no line yet, and the command that runs it."""
    left = [(name, seeds - len(arms.get(name, ()))) for name, seeds in planned]
    told = [f"{name} ({seeds})" for name, seeds in left if seeds > 0]
    if not told:
        return ["Nothing: all arms have all their seeds."]
    return [f"Arms, and how many seeds they lack; `python -m tools.study` runs them: {', '.join(told)}."]


def table_of_levels(arms) -> list[str]:
    keys = ["A_S idle", "A_G idle", "memory the same", "correlation", "signs differ"]
    told = "belief followed, first quarter", "last quarter", "links chosen, first quarter", "last", "expert"
    rows = [["arm", *keys, *told]]
    for name, of_seeds in arms.items():
        having = [line for line in of_seeds.values() if line.get("levels")]
        if having:
            levels = [[line["levels"][key] for line in having] for key in keys]
            replies = zip(*(line["belief followed"] + line["links chosen"] for line in having))
            rows.append([name, *(cell(mean_interval(of)) for of in (*levels, *replies))])
    return markdown(rows)


# -------------------- figures


def _figure(*shape, size):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape)


def draw_forest(compared: dict, path: Path) -> None:
    """Every arm's difference to its reference."""
    figure, axes = _figure(1, 3, size=(13, 1.2 + 0.26 * max(4, len(compared))))
    names = list(compared)[::-1]
    for axis, metric in zip(axes, ("row", "U2", "U1 x U3")):
        for y, name in enumerate(names):
            d = compared[name][1].get(metric)
            if d and d["low"] is not None:
                axis.plot([d["low"], d["high"]], [y, y], "k-", linewidth=1)
            if d:
                axis.plot(d["mean"], y, "ks", markersize=4)
        axis.axvline(0, color="C7", linewidth=1)
        axis.set(title=f"{metric}: difference", yticks=range(len(names)), ylim=(-0.6, len(names) - 0.4))
        seeds = {n: max(of.get("seeds", 0) for of in compared[n][1].values()) for n in names}
        told = [f"{n} - {compared[n][0]}, {seeds[n]} seeds" for n in names]
        axis.set_yticklabels(told if axis is axes[0] else [], fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_curves(arms: dict, path: Path, shown=("tompo", "grpo")) -> None:
    """The probe during RFT in the seeds that all of these arms have: mean, and a 95 % t interval as a
    band."""
    names = [name for name in shown if name in arms]
    seeds = set.intersection(*(set(arms[name]) for name in names)) if names else set()
    figure, axes = _figure(1, 3, size=(13, 3.6))
    for axis, metric in zip(axes, ("row", "U2", "belief")):
        for colour, name in enumerate(names):
            of_step: dict[int, list[float]] = defaultdict(list)
            for seed in seeds:
                for entry in arms[name][seed].get("probe") or ():
                    of_step[entry["step"]].append(entry[metric])
            steps = sorted(of_step)
            intervals = [mean_interval(of_step[step]) for step in steps]
            style = dict(color=f"C{colour}", linestyle=("-", "--")[colour % 2])
            axis.plot(
                steps,
                [i["mean"] for i in intervals],
                label=f"{name}, {len(seeds)} seeds",
                marker="o",
                markersize=3,
                **style,
            )
            if (
                min((i["n"] for i in intervals), default=0) > 2
            ):  # the interval of two seeds would be the whole picture
                low, high = ([i[end] for i in intervals] for end in ("low", "high"))
                axis.fill_between(steps, low, high, color=f"C{colour}", alpha=0.15, linewidth=0)
        axis.set(title=f"Probe, {metric}", xlabel="step of RFT")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
