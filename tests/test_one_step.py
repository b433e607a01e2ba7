"""docs/one-step.md is recomputed from its own tables: every number must follow from the ones before it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from games import form_links
from prompts import tell_links
from rewards import accuracy, f1

PAGE = (Path(__file__).parent.parent / "docs" / "one-step.md").read_text()
M, N = 8, 4


def tables():
    """The rows of each table, as dicts by column."""
    for block in PAGE.split("\n\n"):
        lines = [map(str.strip, line.strip("|").split("|")) for line in block.split("\n") if line[:1] == "|"]
        if lines:
            head, _, *rows = map(list, lines)
            yield [dict(zip(head, row, strict=True)) for row in rows]


REPLIES, REWARDS, ADVANTAGES, MOVED = tables()
PROPOSALS = re.findall(r"agent \d: (\[[\d, ]+\])", PAGE.replace("\n", " "))
EXPERTS = np.array([json.loads(row) for row in PROPOSALS])
SEAT = int(re.search(r"Agent (\d) of 4 reads", PAGE)[1]) - 1


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def test_rewards_follow_from_the_decisions():
    assert EXPERTS.shape == (N, N) and len(REPLIES) == len(REWARDS) == M
    scores = []
    for reply, row in zip(REPLIES, REWARDS, strict=True):
        own, graph = np.array(json.loads(reply["Decision"])), EXPERTS.copy()
        graph[SEAT] = own
        assert row["links of G_i"] == tell_links(form_links(graph))
        scores.append(1 - (form_links(graph) != form_links(EXPERTS)).sum() / (N * (N - 1)))
        both = f1(own, EXPERTS[SEAT], SEAT), accuracy(own, EXPERTS[SEAT], SEAT)
        expected = dict(zip(("F1", "accuracy"), both, strict=True)) | {
            "r^S": 0.5 + sum(both),
            "s": scores[-1],
        }
        expected |= {"global": 0.5, "R^G": scores[-1] + float(row["local"]) + 0.5}
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=6e-5)
    assert column(REWARDS, "local").tolist() == [0.5 * (s == max(scores)) for s in scores]
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
    A, rho = column(MOVED, "A"), column(MOVED, "rho")
    pushed = (column(MOVED, "after") - column(MOVED, "log pi before")) * A
    assert (pushed[abs(A) > 0.5] > 0).all(), "J pushes a reply where A points"
    assert (column(MOVED, "k3") >= 0).all()
    assert (column(MOVED, "clipped") <= A * rho + 2e-5).all(), "min(rho A, clip(rho) A) is never above rho A"
