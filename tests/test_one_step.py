"""docs/one-step.md is recomputed from its own tables: every number must follow from the ones before it."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from games import form_links
from prompts import tell_links

PAGE = (Path(__file__).parent.parent / "docs" / "one-step.md").read_text()
M, N = 8, 4


def tables():
    """The rows of each table, as dicts by column."""
    found = []
    for block in PAGE.split("\n\n"):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in block.split("\n")
            if line[:1] == "|"
        ]
        if lines:
            found.append([dict(zip(lines[0], row, strict=True)) for row in lines[2:]])
    return found


REPLIES, REWARDS, ADVANTAGES, MOVED = tables()
EXPERTS = np.array(
    [json.loads(row) for row in re.findall(r"agent \d: (\[[\d, ]+\])", PAGE.replace("\n", " "))]
)
SEAT = int(re.search(r"Agent (\d) of 4 reads", PAGE)[1]) - 1


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def test_rewards_follow_from_the_decisions():
    assert EXPERTS.shape == (N, N) and len(REPLIES) == len(REWARDS) == M
    others = [j for j in range(N) if j != SEAT]
    scores = []
    for reply in REPLIES:
        graph = EXPERTS.copy()
        graph[SEAT] = json.loads(reply["Decision"])
        scores.append(1 - (form_links(graph) != form_links(EXPERTS)).sum() / (N * (N - 1)))
    for reply, row, s in zip(REPLIES, REWARDS, scores, strict=True):
        own, expert = np.array(json.loads(reply["Decision"]))[others], EXPERTS[SEAT][others]
        graph = EXPERTS.copy()
        graph[SEAT] = json.loads(reply["Decision"])
        assert row["links of G_i"] == tell_links(form_links(graph))
        total = own.sum() + expert.sum()
        f1 = 2 * (own & expert).sum() / total if total else 1.0
        r_S = 0.5 + f1 + (own == expert).mean()
        expected = {"F1": f1, "accuracy": (own == expert).mean(), "r^S": r_S, "s": s}
        expected |= {"local": 0.5 * (s == max(scores)), "global": 0.5}
        expected["R^G"] = s + expected["local"] + 0.5
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=6e-5)
    assert len(set(scores)) > 1, "a page whose replies all score the same explains nothing"


def test_advantages_follow_from_the_rewards():
    for level, name in (("r^S", "A^S"), ("R^G", "A^G")):
        r = column(REWARDS, level)
        assert column(ADVANTAGES, level).tolist() == r.tolist()
        assert column(ADVANTAGES, name) == pytest.approx((r - r.mean()) / (r.std() + 1e-4), abs=3e-4)
        assert f"{r.mean():.4f}" in PAGE and f"{r.std():.4f}" in PAGE
    A = 0.8 * column(ADVANTAGES, "A^S") + 0.2 * column(ADVANTAGES, "A^G")
    assert column(ADVANTAGES, "A") == pytest.approx(A, abs=1.1e-4)
    tokens = column(REPLIES, "tokens")
    assert column(ADVANTAGES, "weight") == pytest.approx(1 / (M * tokens), abs=1e-6)
    assert abs(A.mean()) < 1e-3, "so the loss of the first pass is 0"


def test_the_objective_follows_from_the_advantages():
    assert column(MOVED, "A").tolist() == column(ADVANTAGES, "A").tolist()
    J = column(MOVED, "clipped") - 0.04 * column(MOVED, "k3")
    assert column(MOVED, "J_i") == pytest.approx(J, abs=1.1e-5)
    loss = float(re.search(r"minus the mean of the J_i: (-?[\d.]+)\.\n", PAGE)[1])
    assert loss == pytest.approx(-column(MOVED, "J_i").mean(), abs=1.1e-5) and loss < 0
    for row in MOVED:
        A, before, after = (float(row[name]) for name in ("A", "log pi before", "after"))
        if abs(A) > 0.5:
            assert math.copysign(1, after - before) == math.copysign(1, A), "J pushes a reply where A points"
        assert float(row["k3"]) >= 0
        assert float(row["clipped"]) <= A * float(row["rho"]) + 2e-5, (
            "min(rho A, clip(rho) A) is never above rho A"
        )
