"""curves.png: what SFT and RFT did. The steps' own values are light, a running mean of 5 is full."""

import json
from pathlib import Path

import numpy as np


def plot_curves(folder: Path) -> None:
    """Draws FOLDER/curves.png from the logs in FOLDER and FOLDER/sft."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def read(path):  # a damaged line is left out: a picture must not cost the user the end of a long run
        rows = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
        return rows

    def draw(axis, rows, key, label, colour):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if not points:
            return
        x, y = np.array(points).T
        width = min(5, len(y))
        smooth = [y[max(0, i - width + 1) : i + 1].mean() for i in range(len(y))]
        axis.plot(x, y, colour, alpha=0.25)
        axis.plot(x, smooth, colour, label=f"{label}: {smooth[-1]:.2f} at the end")
        axis.legend(fontsize=8)

    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    sft_rows, rows = read(folder / "sft" / "metrics.jsonl"), read(folder / "metrics.jsonl")
    draw(a, sft_rows, "loss", "SFT reply loss", "C0")
    draw(b, rows, "reward_graph", "graph decisions", "C0")
    draw(b, rows, "reward_effort", "effort decisions", "C1")
    draw(c, rows, "s", "graph score s", "C2")
    draw(d, rows, "U1", "compliance U1", "C3")
    draw(e, rows, "kl", "KL(pi, pi_ref) per token", "C4")
    draw(f, rows, "entropy", "entropy per token", "C5")
    draw(f, rows, "zero_variance_groups", "groups without variance", "C7")
    titles = ("SFT: loss", "RFT: reward r^S (at most 2.5)", "RFT: graph score s of sampled replies")
    titles += ("RFT: compliance of sampled replies", "RFT: distance from the SFT policy", "RFT: variety")
    for axis, title in zip((a, b, c, d, e, f), titles):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    c.set_ylim(top=1.02)
    d.set_ylim(top=1.02)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
