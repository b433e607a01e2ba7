"""curves.png: the course of SFT and RFT.

The upper row is the probe (play/probe.py): answers to the same held-out questions over the time of training.
Level lines are those of the expert (wide and light), of the best constant answer (dashed) and of random play
(dotted). The lower row is the log of the steps, each of which has other prompts: light lines are their
values, full ones the running means of 5.
"""

import io
from pathlib import Path

import numpy as np

from run.errors import one_line
from run.files import read_lines, write_atomic

LEVELS = {  # two that are equal can both be seen
    "expert": dict(color="C8", linewidth=4, alpha=0.5),
    "best constant answer": dict(color="C6", linewidth=1.5, linestyle="--"),
    "random play": dict(color="k", linewidth=1, linestyle=":"),
}


def plot_curves(folder: Path) -> None:
    """Draws FOLDER/curves.png from the logs in FOLDER and FOLDER/sft, or prints why not: a log that someone
    has edited must not cost the user the run."""
    try:
        write_atomic(folder / "curves.png", draw_curves(folder))
    except Exception as e:
        print(f"no {folder / 'curves.png'}: {one_line(e)}")


def draw_curves(folder: Path) -> bytes:
    """The picture as PNG."""
    from matplotlib.figure import Figure  # it needs no screen

    probe = read_lines(folder / "probe.jsonl")
    sft, rft = read_lines(folder / "sft" / "metrics.jsonl"), read_lines(folder / "metrics.jsonl")
    sft = sft or [row for row in rft if "reward" not in row]  # a run of train_sft.py alone
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    above, below = figure.subplots(2, 3)
    draw_probe(above[0], probe, {"row": "C0"})
    draw_probe(above[1], probe, {"U2": "C2"})
    draw_probe(above[2], probe, {"U1": "C3", "belief": "C4", "s": "C1"})
    draw_steps(below[0], sft, "loss", "SFT reply loss", "C0")
    if not sft:  # a run from --sft-adapter
        below[0].text(0.5, 0.5, "not in this run", ha="center", transform=below[0].transAxes)
    draw_steps(below[1], rft, "reward_graph", "graph decisions", "C0")
    draw_steps(below[1], rft, "reward_effort", "effort decisions", "C1")
    draw_steps(below[2], rft, "zero_variance_groups", "groups without variance", "C7")
    draw_steps(below[2], rft, "entropy", "entropy per token", "C5")
    draw_steps(below[2], rft, "kl", "KL(pi, pi_ref) per token", "C4")
    titles = ["Probe, row: agents treated as the expert does", "Probe, U2: efficiency of the decisions"]
    titles += ["Probe, U1 compliance, belief, graph score s", "SFT: loss", "RFT: reward $r^S$"]
    for axis, title in zip(figure.axes, [*titles, "RFT: variance, entropy, KL"], strict=True):
        axis.set(title=title, xlabel="minutes of training" if axis in above else "step")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[1]:
            # at the bottom of the upper row stand the names of the stages
            place = dict(loc="lower right", bbox_to_anchor=(1, 0.07)) if axis in above else {}
            axis.legend(fontsize=8, **place)
    return png(figure)


def png(figure, dpi: int = 110) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def draw_steps(axis, rows: list[dict], key: str, label: str, colour: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        x, y = np.array(points).T
        means = [y[max(0, i - 4) : i + 1].mean() for i in range(len(y))]
        axis.plot(x, y, colour, alpha=0.25)
        axis.plot(x, means, colour, label=f"{label}: {means[-1]:.2f} at the end")


def draw_probe(axis, probe: list[dict], colours: dict[str, str]) -> None:
    """colours: of each metric; a single metric is drawn with the levels of others. The stages stand one after
    the other: RFT begins with the policy in which SFT ends."""
    lines, start, minutes = [line for line in probe if "stage" in line], 0.0, []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        minutes += [start + line["seconds"] / 60 for line in lines if line["stage"] == stage]
        axis.axvspan(start, minutes[-1], color="C7", alpha=0.12 if stage == "SFT" else 0, linewidth=0)
        middle = (start + minutes[-1]) / 2
        axis.text(middle, 0.02, stage, ha="center", transform=axis.get_xaxis_transform())
        start = minutes[-1]
    levels = next((line["levels"] for line in probe if "levels" in line), {}) if len(colours) == 1 else {}
    for metric, colour in colours.items():
        y = [line[metric] for line in lines]
        if y:
            label = f"{metric}: {y[-1]:.2f} at the end"
            axis.plot(minutes, y, colour, marker="o", markersize=4, label=label)
        for name, values in levels.items():
            if values.get(metric) is not None:
                axis.axhline(values[metric], label=f"{name}: {values[metric]:.2f}", zorder=1, **LEVELS[name])
    axis.set_ylim(-0.03, 1.03)
