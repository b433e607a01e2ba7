"""The statistics and tables of a study (tools/study.py), computed from its results file alone.

These rules were fixed before the runs. The unit is the training seed, and the value of a seed is the mean
over the held-out grid. Two arms are compared by the differences of the seeds that both have: the same games,
the same draws of the experts, and the same SFT stage where their flags allow it. Intervals are 95 % t
intervals over seeds, those of means cut off at what is possible. p is the exact two-sided sign-flip test of
the mean difference (at least 2/256 with 8 seeds), and Holm's correction is over the arms of a family. The
primary comparison is ToMPO minus GRPO in U1 x U3, U3, U2 and row. Every unit of the results file is reported.
(The first 224 units, "eval_seed": 0 in the file, were evaluated with the same random numbers in all seeds, so
their intervals are too narrow: docs/results.md, limits. Later ones have those of their seed. The default's
eight seeds were run both ways, the earlier ones as "same numbers", and what is compared with the default is
compared, seed by seed, with the one that was evaluated likewise. In the first 224, U2 in PGG is left out: it
counted links at Nash efforts, at which nobody gives and no link is worth anything.)
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from play.intervals import UNKNOWN, mean_interval
from play.report import possible, tell_interval
from prompts import last_line, read_list
from rewards import Target
from run.errors import InputError
from run.files import read_lines, write_atomic
from tools.page.learned import best_threshold, choices_of
from tools.study_figures import draw_curves, draw_forest, draw_stakes
from world.draws import spread

SHOWN = ("U1", "s", "row", "U2", "U3", "U1 x U3", "belief")
COMPARED = ("row", "U2", "U3", "U1 x U3", "speed")
LOG, LATER = "log(U1 x U3)", "U2 of links after round 1"
# By family; else its own tompo, or tompo. None: nothing.
REFERENCE = {"seats": "seat 0", "SFT alone": None, "inner epochs": "5 steps, 4 epochs"}
SAME = "tompo, same numbers"  # the default, evaluated as the first 224 units: see above
ADDED = ("s", "row", "U2", "belief")
LEVELS = ("A_S idle", "A_G idle", "memory the same", "correlation", "signs differ")
UPDATES = ("clip_fraction", "approx_kl", "max_ratio_error", "kl")
COMMON = ("efforts, first quarter", "efforts, last quarter")
REPLIES = "belief followed, first quarter", "last quarter", "links chosen, first quarter", "last", "expert"
RULES = {"expert": "the expert", "sft": "SFT (first step)", "final": "last quarter of RFT"}
PLACE = itemgetter("game", "stage", "seat")  # of a line of samples.jsonl
NOTE = "In brackets 95 % t intervals; p by sign flips, after Holm in round brackets."
Rows = Iterator[list[str]]
Values = dict[str, dict[str, np.ndarray]]  # [arm][metric]: by seed, nan where it is not known

# -------------------- what is measured in the samples.jsonl of a run


def graph_groups(samples: list[dict]) -> list[list[dict]]:
    """The groups of replies to graph decisions, in the order of training."""
    graph = [s for s in samples if s["kind"] == "G"]
    return [list(g) for _, g in itertools.groupby(graph, key=itemgetter("step", "game", "stage", "seat"))]


def outer_quarters(samples: list[dict]) -> list[list[dict]]:
    """Those of the first and of the last quarter of the steps."""
    steps = max((s["step"] for s in samples), default=0) + 1
    return [[s for s in samples if s["step"] < steps / 4], [s for s in samples if s["step"] >= steps * 3 / 4]]


def row_of(reply: str) -> str:
    """The row of a compliant graph reply, such as 0110."""
    return "".join(map(str, json.loads(last_line(reply, "Decision:"))))


def mean(values: Iterable) -> float | None:
    return mean_interval(values)["mean"]


def a_dozen(samples: list[dict]) -> list[dict]:
    """Twelve graph groups, evenly spread over the run: the expert's row, and every different row that was
    chosen ("" where it cannot be read) with its count, A^S, A^G and A."""
    dozen = []
    for group in spread(graph_groups(samples), 12):
        rows = [row_of(s["reply"]) if s["compliance"] > 0 else "" for s in group]
        values = dict(zip(rows, map(itemgetter("A_S", "A_G", "advantage"), group), strict=True))
        chosen = [[row, rows.count(row), *values[row]] for row in sorted(values, key=lambda r: -values[r][2])]
        first = group[0]
        dozen.append({"step": first["step"], "expert": row_of(first["expert"]), "chosen": chosen})
    return dozen


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
    return dict(zip(LEVELS, map(mean, values), strict=True)) if groups else None


def updates_of(metrics: list[dict]) -> dict[str, float | None]:
    """How far the updates of a run go, from its metrics.jsonl: means over the steps, but of |rho - 1| the
    largest. With several inner epochs they are those of each step's last pass over its samples."""
    means = {name: mean(step.get(name) for step in metrics) for name in UPDATES}
    errors = [step["max_ratio_error"] for step in metrics if step["max_ratio_error"] is not None]
    return means | {"max_ratio_error": max(errors, default=None)}


def graph_replies(samples: list[dict]) -> dict[str, list[float | None]]:
    """Two measures of the compliant graph replies in the first and in the last quarter of the steps. `belief
    followed`: the share that chooses exactly those by whom their Belief line expects to be chosen (None
    without Belief lines). `links chosen`: the share of the possible links; its third number is the expert's
    in the last quarter."""
    quarters = outer_quarters(samples)
    first, last = ([s for s in part if s["kind"] == "G" and s["compliance"] > 0] for part in quarters)

    def followed(part):
        lines = [[last_line(s["reply"], label) for label in ("Belief:", "Decision:")] for s in part]
        return mean(read_list(belief) == read_list(row) for belief, row in lines if belief)

    def links(part, author="reply"):
        rows = [row_of(s[author]) for s in part]
        return mean(row.count("1") / (len(row) - 1) for row in rows)

    chosen = [links(first), links(last), links(last, "expert")]
    return {"belief followed": [followed(first), followed(last)], "links chosen": chosen}


def efforts_of(samples: list[dict], asked: dict[tuple, tuple[Target, list]]) -> dict[str, float | None]:
    """Where the compliant effort replies stand in the first and in the last quarter of the steps: 0 where
    they are best for the agent itself, 1 where they are best for the welfare, as the others play (the sum of
    the distances from the former, over the sum of the distances between the two). asked: of read_prompts."""

    def place(part):
        moved = apart = 0.0
        for s in part:
            if s["kind"] == "E" and s["compliance"] > 0 and PLACE(s) in asked:
                target, _ = asked[PLACE(s)]
                links_NN, efforts_N = target.state.links, target.actions
                own = target.game.best_response(links_NN, efforts_N)[target.seat]
                moved += float(last_line(s["reply"], "Decision:")) - own
                apart += target.game.planner_response(links_NN, efforts_N)[target.seat] - own
        return moved / apart if apart > 1e-9 else None

    return dict(zip(COMMON, map(place, outer_quarters(samples)), strict=True))


def rules_of(samples: list[dict], asked: dict[tuple, tuple[Target, list]]) -> dict[str, list | None]:
    """(t, share): the best rule of the kind "link iff the worked number is at least t", and the share of the
    choices that it explains: of the expert, of the SFT policy, and of the last quarter of RFT. asked: of
    read_prompts."""

    def rule(part, author="reply"):
        decisions = [(asked[PLACE(s)][0], s[author]) for s in part if PLACE(s) in asked]
        best = best_threshold(choices_of((target.state, target.seat, text) for target, text in decisions))
        return best and [best["t"], best["agreed"]]

    sft, final = [s for s in samples if s["step"] == 0], outer_quarters(samples)[1]
    return {"expert": rule(samples, "expert"), "sft": rule(sft), "final": rule(final)}


# -------------------- statistics


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of the mean: the share of all sign patterns that reach it. 1 for no seeds."""
    x = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
    return float((np.abs(signs @ x) >= abs(x.sum()) - 1e-12).mean())


def holm(p_values: list[float]) -> list[float]:
    """The p-values adjusted for testing all of them (Holm 1979)."""
    order, weights = np.argsort(p_values), np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, weights * np.array(p_values)[order]))
    return adjusted.tolist()


def seed_values(line: dict) -> dict[str, float]:
    """All that is known of a unit, as one number each. speed: the mean of the probe's row over RFT, from the
    end of SFT on."""
    values = {metric: mean(games) for metric, games in line["values"].items()} | (line.get("levels") or {})
    values |= line.get("updates", {}) | line.get("efforts", {})
    values |= {"eval seed 0": "eval_seed" in line}
    replies = line.get("belief followed", []) + line.get("links chosen", [])
    values |= dict(zip(REPLIES, replies, strict=False))
    for who, rule in line.get("rule", {}).items():
        values |= dict(zip((f"{who}: t", f"{who}: share"), rule or (None, None), strict=True))
    values = {metric: value for metric, value in values.items() if value is not None}
    if "U3" in values:
        values["U1 x U3"] = values["U1"] * values["U3"]
        values[LOG] = math.log(values["U1 x U3"]) if values["U1 x U3"] > 0 else math.nan
    if by_round := line.get("U2 of links by round"):
        values[LATER] = mean(by_round[1:])
    steps, row = ([entry[key] for entry in line.get("probe") or ()] for key in ("step", "row"))
    if len(steps) > 1:
        values["speed"] = float(np.trapezoid(row, steps) / (steps[-1] - steps[0]))
    return values


def by_seed(lines: list[dict]) -> Values:
    """The arms in the order of their lines. An arm or a metric that is asked for and not there is all nan."""
    seeds = sorted({line["seed"] for line in lines})
    values = defaultdict(lambda: defaultdict(lambda: np.full(len(seeds), np.nan)))
    for line in lines:
        for metric, value in seed_values(line).items():
            values[line["arm"]][metric][seeds.index(line["seed"])] = value
    return values


def known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def compare(names: Iterable[str], reference: str, values: Values) -> dict[str, dict[str, dict]]:
    """{arm: {metric: mean and interval of the arm minus the reference over common seeds, p, Holm's p}}, for
    the arms that have seeds in common with the reference."""
    rows: dict[str, dict[str, dict]] = defaultdict(dict)
    for metric in (*COMPARED, LOG):
        for name in names:
            alike = values[reference][metric]
            if reference == "tompo":
                alike = np.where(values[name]["eval seed 0"] == 1, values[SAME][metric], alike)
            difference = known(values[name][metric] - alike)
            if name != reference and difference.size:
                rows[name][metric] = mean_interval(difference) | {"p": sign_flip(difference)}
        tests = [row[metric] for row in rows.values() if metric in row]
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["holm"] = p
    return rows


# -------------------- tables: the rows, the head first


def cell(values: Iterable[float | None], sign: str = "", metric: str = "") -> str:
    """Mean and interval of the values of some seeds, cut off at what the metric can be."""
    return tell_interval(possible(metric, mean_interval(values)), 3, sign)


def markdown(rows: Iterable[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def rows_of_means(lines: Iterable[dict], values: Values) -> Rows:
    """lines: the first of every arm."""
    yield ["arm", "flags", "seeds", *SHOWN]
    for line in lines:
        flags = ["SFT alone"] * ("sft" in line) + [f"`{line['flags']}`"] * bool(line["flags"])
        of_arm = values[line["arm"]]
        seeds = str(known(of_arm["U1"]).size)
        yield [line["arm"], " ".join(flags) or "default", seeds, *(cell(of_arm[m], metric=m) for m in SHOWN)]


def rows_of_differences(compared: dict, reference: str) -> Rows:
    yield [f"minus {reference}", *COMPARED, "U1 x U3, ratio"]
    for name, row in compared.items():
        tests = [row.get(metric) for metric in COMPARED]
        told = [t and f"{tell_interval(t, 3, '+')}, p {t['p']:.3f} ({t['holm']:.3f})" for t in tests]
        log, product = row.get(LOG, UNKNOWN), row.get("U1 x U3", UNKNOWN)
        log = UNKNOWN if log.get("n") != product.get("n") else log  # some seed has no logarithm
        ends = {end: log[end] for end in ("mean", "low", "high")}
        ratio = {end: None if log is None else math.exp(log) for end, log in ends.items()}
        yield [name, *(text or "-" for text in told), tell_interval(ratio, 3)]


def rows_of_added(values: Values) -> Rows:
    """The arms whose SFT stage was measured too, over the seeds of both."""
    yield ["arm", "seeds", *(f"{metric}: SFT, RFT, difference" for metric in ADDED)]
    for name, after in list(values.items()):
        before, told = values["sft" if name == "tompo" else f"{name}, SFT alone"], []
        for metric in ADDED:
            ends = np.array([before[metric], after[metric]])
            ends = ends[:, ~np.isnan(ends.sum(0))]
            pair = [f"{mean(end):.3f}" for end in ends] if ends.size else ["-", "-"]
            told.append(", ".join([*pair, cell(ends[1] - ends[0], "+")]))
        if seeds := known(before["U1"] + after["U1"]).size:
            yield [name, str(seeds), *told]


def rows_of(metrics: Sequence[str], values: Values) -> Rows:
    """The arms of which the first metric is known."""
    yield ["arm", *metrics]
    for name, of_arm in values.items():
        if known(of_arm[metrics[0]]).size:
            yield [name, *(cell(of_arm[metric]) for metric in metrics)]


def rows_of_rules(values: Values) -> Rows:
    """The thresholds are listed seed by seed, since their mean says little."""
    yield ["arm", *(f"{told}: threshold, share explained" for told in RULES.values())]
    for name, of_arm in values.items():
        thresholds = [", ".join(f"{t:.2f}" for t in known(of_arm[f"{who}: t"])) for who in RULES]
        shares = [cell(of_arm[f"{who}: share"]) for who in RULES]
        if any(thresholds):
            yield [name, *map("; ".join, zip(thresholds, shares, strict=True))]


def rows_of_rounds(lines: list[dict], values: Values) -> Rows:
    """U2 of links in each round of games of several, seed by seed; and the mean of the rounds after the
    first, alone and less that of the first arm."""
    arms = defaultdict(dict)
    for line in lines:
        if by_round := line.get("U2 of links by round"):
            arms[line["arm"]][line["seed"]] = ", ".join(f"{value:.2f}" for value in by_round)
    first, seeds = next(iter(arms)), sorted(set().union(*arms.values()))
    yield ["arm", *(f"seed {seed}" for seed in seeds), "later rounds", f"minus {first}"]
    for name, cells in arms.items():
        later, others = values[name][LATER], values[first][LATER]
        ends = [cell(later), cell(later - others, "+") if name != first else "-"]
        yield [name, *(cells.get(seed, "-") for seed in seeds), *ends]


def rows_of_groups(dozen: list[dict]) -> Rows:
    yield ["step", "the expert's row", "rows of the replies: times, A^S, A^G, A"]
    for group in dozen:
        told = [
            f"{row or 'not compliant'} ×{n}: {A_S:+.2f}, {A_G:+.2f}, {A:+.2f}"
            for row, n, A_S, A_G, A in group["chosen"]
        ]
        yield [str(group["step"]), group["expert"], "; ".join(told)]


# -------------------- the report


def write(results: Path, planned: dict[str, int]) -> str:
    """Writes study.md and three figures beside the results. planned: how many seeds every arm is to have.
    Returns what to print. Raises InputError if there are no results."""
    lines, folder, place = read_lines(results), results.parent, {name: i for i, name in enumerate(planned)}
    if not lines:
        raise InputError(f"{results} holds no results yet; run python -m tools.study first")
    lines.sort(key=lambda line: (place.get(line["arm"], len(place)), line["seed"]))
    families: dict[str, dict[str, dict]] = defaultdict(dict)  # [family][arm]: its first line
    for line in lines:
        families[line["family"]].setdefault(line["arm"], line)
    values, sections, compared = by_seed(lines), {}, {}
    for family, arms in families.items():
        sections[family] = markdown(rows_of_means(arms.values(), values))
        tompo = next((name for name in arms if name.startswith("tompo")), "tompo")
        reference = REFERENCE.get(family, tompo)
        if rows := compare(arms, reference, values):
            sections[family] += ["", *markdown(rows_of_differences(rows, reference)), "", NOTE]
        compared.setdefault(reference, {}).update(rows)
    sections["What RFT adds to its SFT stage"] = markdown(rows_of_added(values))
    sections["The two levels"] = markdown(rows_of((*LEVELS, *REPLIES), values))
    title = "How far the updates go, and the efforts from own payoff (0) to welfare (1)"
    sections[title] = markdown(rows_of((*UPDATES, *COMMON), values))
    sections["Link iff the worked number is at least t"] = markdown(rows_of_rules(values))
    if any("U2 of links by round" in line for line in lines):
        sections["U2 of links by round"] = markdown(rows_of_rounds(lines, values))
    for line in lines:
        if line["arm"].startswith("tompo") and line["arm"] != SAME and line.get("groups"):
            title = f"A dozen groups of {line['arm']}, seed {line['seed']}"
            sections[title] = markdown(rows_of_groups(line["groups"]))
    done = Counter(line["arm"] for line in lines)
    lacking = [f"{name} ({n - done[name]})" for name, n in planned.items() if n > done[name]]
    plan = "Arms, and how many seeds they lack; `python -m tools.study` runs them: "
    sections["Not run yet"] = [f"{plan}{', '.join(lacking) or 'none'}."]
    text = "\n".join([__doc__.split("\n\n", 1)[1].strip(), "", about(lines)])
    text += "".join(f"\n\n## {title}\n\n" + "\n".join(body) for title, body in sections.items())
    write_atomic(folder / "study.md", (text + "\n").encode())
    compared.pop(SAME, None)  # the default's first evaluation is in the tables
    draw_forest(compared, folder / "study-forest.png")
    draw_curves(lines, folder / "study-curves.png")
    draw_stakes(values, folder / "study-stakes.png")
    return f"{text}\n\nwritten: {folder}/study.md, study-forest.png, study-curves.png, study-stakes.png"


def about(lines: list[dict]) -> str:
    """Where the units were run, and with which versions."""
    machines, commits = (sorted({line[key] for line in lines}) for key in ("machine", "commit"))
    packages = {", ".join(f"{name} {number}" for name, number in line["packages"].items()) for line in lines}
    where = f"on {'; '.join(machines)}; {'; '.join(sorted(packages))}; commits {', '.join(commits)}"
    hours = sum(line["minutes"] for line in lines) / 60
    return f"{len(lines)} units, {hours:.1f} hours of single runs, {where}."
