"""The figures of a study: differences between its arms, the probe during RFT, own payoff and welfare."""

from collections.abc import Iterator
from pathlib import Path

from play.intervals import mean_interval


def picture(path: Path, height: float, metrics: tuple[str, ...]) -> Iterator[tuple]:
    """Three axes beside one another, to draw on, each with its metric; at the end, the picture is written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    yield from zip(figure.subplots(1, 3), metrics, strict=True)
    figure.savefig(path, dpi=110)


def draw_forest(compared: dict[str, dict[str, dict]], path: Path) -> None:
    """The reference of every family of arms minus each of its arms. compared: {reference: the rows of
    `compare`}. Arms of one or two seeds, whose intervals are wide, stand in the tables alone."""
    lines = []  # (label, row), from the top; the reference has no row
    for reference, rows in compared.items():
        seeds = {name: max(test["n"] for test in row.values()) for name, row in rows.items()}
        arms = [(f"{name}, {seeds[name]} seeds", row) for name, row in rows.items() if seeds[name] > 2]
        lines += [(f"{reference} minus", {}), *arms] if arms else []
    places = range(len(lines), 0, -1)
    for axis, metric in picture(path, 1.2 + 0.24 * max(4, len(lines)), ("row", "U2", "U1 x U3")):
        for y, (_, row) in zip(places, lines, strict=True):
            if metric in row:
                ends = [-row[metric][end] for end in ("high", "mean", "low")]
                axis.plot(ends, [y] * 3, "k-s", markevery=[1], markersize=4, linewidth=1)
        axis.axvline(0, color="C7", linewidth=1)
        axis.set(title=f"{metric}: difference", yticks=places, ylim=(0.4, len(lines) + 0.6))
        axis.set_yticklabels([label for label, _ in lines] if metric == "row" else [], fontsize=8)
        for name in axis.get_yticklabels():
            name.set_fontweight("bold" if name.get_text().endswith(" minus") else "normal")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)


def draw_curves(lines: list[dict], path: Path) -> None:
    """The probe of ToMPO and GRPO during RFT, in the seeds that both have: the mean and a 95 % t interval as
    a band. The interval of two seeds would be as wide as the picture and is left out."""
    styles = {"tompo": "C0-o", "grpo": "C1--o"}
    probes = {name: {s["seed"]: s.get("probe") or [] for s in lines if s["arm"] == name} for name in styles}
    probes = {name: by_seed for name, by_seed in probes.items() if by_seed}
    seeds = set.intersection(*map(set, probes.values())) if probes else set()
    for axis, metric in picture(path, 3.6, ("row", "U2", "belief")):
        for name, probe in probes.items():
            entries = [entry for seed in seeds for entry in probe[seed]]
            steps = sorted({entry["step"] for entry in entries})
            at = [mean_interval(e[metric] for e in entries if e["step"] == step) for step in steps]
            mean, low, high = ([interval[end] for interval in at] for end in ("mean", "low", "high"))
            axis.plot(steps, mean, styles[name], label=f"{name}, {len(seeds)} seeds", markersize=3)
            if len(seeds) > 2:
                axis.fill_between(steps, low, high, color=styles[name][:2], alpha=0.15, linewidth=0)
        axis.set(title=f"Probe, {metric}", xlabel="step of RFT")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()


STAKES = {"game's rewards": "BCZ, in self-play", "public good": "a public good, among those who give"}
WEIGHTS = {"sft": "SFT", "grpo": "1, 0 (GRPO)", "tompo": "0.8, 0.2 (ToMPO)", "weights 0.2 0.8": "0.2, 0.8"}


def draw_stakes(values: dict, path: Path) -> None:
    """U2 and U3 of policies that were trained on own payoff and welfare: a point for each pair of weights of
    A^S and A^G, with t intervals over seeds. values: of study_report.by_seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (word, title) in zip(figure.subplots(1, 2), STAKES.items(), strict=True):
        for color, (name, label) in enumerate(WEIGHTS.items()):
            U2, U3 = (mean_interval(values.get(f"{name}, {word}", {}).get(key, ())) for key in ("U2", "U3"))
            if U2["n"]:
                half = [own["mean"] - own["low"] if own["n"] > 1 else 0 for own in (U2, U3)]
                look = dict(fmt="o", color=f"C{color}", capsize=2, label=label)
                axis.errorbar(U2["mean"], U3["mean"], half[1], half[0], **look)
        axis.set(title=title, xlabel="U2, own payoff", ylabel="U3, welfare")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
