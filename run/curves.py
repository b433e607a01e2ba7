"""curves.png: what SFT and RFT did.

The upper row is the probe (run/probe.py): the same held-out questions all along, over the time that training
has taken, with the levels of others dashed. The lower row is what the steps logged; a running mean of 5 is
full, the steps' own values, each of other prompts, are light.
"""

import io
from pathlib import Path

import numpy as np

from run.files import one_line, read_lines, write_atomic

DASHES = {"expert": (0, (6, 2)), "best constant answer": (0, (3, 2)), "random play": (0, (1, 2))}


def plot_curves(folder: Path) -> None:
    """Draws FOLDER/curves.png from the logs in FOLDER and FOLDER/sft, or says why not: a log that someone has
    edited must not cost the user the run."""
    try:
        write_atomic(folder / "curves.png", draw_curves(folder))
    except Exception as e:
        print(f"no {folder / 'curves.png'}: {one_line(e)}")


def draw_curves(folder: Path) -> bytes:
    """The picture, as PNG."""
    from matplotlib.figure import Figure  # needs no screen

    probe = read_lines(folder / "probe.jsonl")
    sft_rows, rows = read_lines(folder / "sft" / "metrics.jsonl"), read_lines(folder / "metrics.jsonl")
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    above, below = figure.subplots(2, 3)
    shown = (("row", "C0"),), (("U2", "C2"),), (("U1", "C3"), ("belief", "C4"), ("s", "C1"))
    titles = "row: agents treated as the expert does", "U2: efficiency of the decisions"
    for axis, keys, title in zip(above, shown, (*titles, "U1 compliance, belief, graph score s")):
        draw_probe(axis, probe, keys, levels=len(keys) == 1)
        axis.set(title=f"Probe, {title}", xlabel="minutes of training")
    draw(below[0], sft_rows, "loss", "SFT reply loss", "C0")
    if not sft_rows:  # a run from --sft-adapter
        below[0].text(0.5, 0.5, "not in this run", ha="center", transform=below[0].transAxes)
    draw(below[1], rows, "reward_graph", "graph decisions", "C0")
    draw(below[1], rows, "reward_effort", "effort decisions", "C1")
    draw(below[2], rows, "zero_variance_groups", "groups without variance", "C7")
    draw(below[2], rows, "entropy", "entropy per token", "C5")
    draw(below[2], rows, "kl", "KL(pi, pi_ref) per token", "C4")
    for axis, title in zip(below, ("SFT: loss", "RFT: reward r^S (at most 2.5)", "RFT: what is left")):
        axis.set(title=title, xlabel="step")
    for axis in (*above, *below):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            # (the names of the stages stand at the bottom of the upper row)
            place = dict(loc="lower right", bbox_to_anchor=(1, 0.07)) if axis in above else {}
            axis.legend(fontsize=8, **place)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    return picture.getvalue()


def draw(axis, rows: list[dict], key: str, label: str, colour: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not points:
        return
    x, y = np.array(points).T
    width = min(5, len(y))
    smooth = [y[max(0, i - width + 1) : i + 1].mean() for i in range(len(y))]
    axis.plot(x, y, colour, alpha=0.25)
    axis.plot(x, smooth, colour, label=f"{label}: {smooth[-1]:.2f} at the end")


def draw_probe(axis, probe: list[dict], keys, levels: bool) -> None:
    """The stages one after the other: SFT ends where RFT begins, in the same policy."""
    asked = [line for line in probe if "stage" in line]
    stages, start = list(dict.fromkeys(line["stage"] for line in asked)), 0.0
    for stage in stages:
        of_stage = [line for line in asked if line["stage"] == stage]
        for line in of_stage:
            line["minutes"] = start + line["seconds"] / 60
        end = of_stage[-1]["minutes"]
        axis.axvspan(start, end, color="C7", alpha=0.12 if stage == "SFT" else 0, linewidth=0)
        axis.text((start + end) / 2, 0.02, stage, ha="center", transform=axis.get_xaxis_transform())
        start = end
    for key, colour in keys:
        x, y = [line["minutes"] for line in asked], [line[key] for line in asked]
        if y:
            axis.plot(x, y, colour, marker="o", markersize=4, label=f"{key}: {y[-1]:.2f} at the end")
    known = next((line["levels"] for line in probe if "levels" in line), {}) if levels else {}
    for name, of_name in known.items():
        value = of_name.get(keys[0][0])
        if value is not None:
            axis.axhline(
                value, color="k", alpha=0.6, linewidth=1, linestyle=DASHES[name], label=f"{name}: {value:.2f}"
            )
    axis.set_ylim(-0.03, 1.03)
