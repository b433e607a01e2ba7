"""The lenient reading of replies: what can be read in them, and what cannot."""

import numpy as np
import pytest

from games import State, empty_graph
from play.repair import repair_reply
from prompts import parse_reply
from world.bcz import BCZ

GRAPH = State(BCZ((1.0,) * 4, 0.1, 0.05, 5.0))
EFFORT = GRAPH.step(empty_graph(4))
SAME = "[0, 1, 0, 1]|[0, 1, 0, 1].|I say [0, 1, 0, 1], as|0, 1, 0, 1|[0 1 0 1]|[0, 1, 0, 1|[1, 1, 0, 1]"
ROWS = [
    *((f"Decision: {text}", [0, 1, 0, 1]) for text in SAME.split("|")),  # also own position, and cut off
    ("Decision: [0, 1, 1]", [0, 1, 1, 0]),
    ("Decision: [0, 1, 1, 1, 1, 0]", [0, 1, 1, 1]),
    ("Decision: [0, 1.54, 0.3, -1]", [0, 1, 0, 0]),
    ("Decision: [1]", [0, 0, 0, 0]),
    ("Decision: [0, 1, 1, 1]\nDecision: [0, 0, 0, 1] or so", [0, 0, 0, 1]),  # the last
    ("Belief: [0, 1, 1, 1] Decision: [0, 1, 0, 1]", [0, 1, 0, 1]),  # on one line
    ("Decision:\n[0, 1, 0, 1]\n[0, 0, 0, 0]", [0, 1, 0, 1]),
    ("[0, 0, 0, 1] and then I link: [0, 1, 0, 0]", [0, 1, 0, 0]),
    ("Belief: [0, 1, 1, 1]", None),  # a belief is no decision
    ("Belief: [0, 1, 1, 1]\nmine: [0, 1, 0, 0]", [0, 1, 0, 0]),
    *((reply, None) for reply in ("Decision: agents 2 and 3", "Decision: 0101", "Decision:", "nothing", "")),
]
EFFORTS = [
    *((f"Decision: {text}", 1.5) for text in ("1.5", "1.5 units", "about 1.5.", "[1.5, 2]")),
    *(("Decision: 7", 5.0), ("Decision: -2", 0.0), ("Decision: 1e999, or 2", 2.0)),
    *(("My effort is 2.25", 2.25), ("Belief: [0, 3, 3, 3]\nI take 2", 2.0)),
    *((reply, None) for reply in ("Decision: nan", "Decision: 1.5x", "none", "Belief: [0, 3, 3, 3]")),
    ("Decision: 1\nDecision: 2!", 2.0),
]


@pytest.mark.parametrize("reply, row", ROWS)
def test_rows_that_can_be_read(reply, row):
    decision = repair_reply(reply, GRAPH, 0)
    if row is None:
        assert decision is None
    else:
        assert decision.action.tolist() == row and decision.action.dtype == np.zeros(1, int).dtype
        assert parse_reply(f"Decision: {row}", GRAPH, 0) is not None


@pytest.mark.parametrize("reply, effort", EFFORTS)
def test_efforts_that_can_be_read(reply, effort):
    decision = repair_reply(reply, EFFORT, 0)
    assert (decision and decision.action) == effort


def test_the_belief_is_kept():
    for state, belief, action in ((GRAPH, [0, 1, 0, 1], [0, 1, 0, 0]), (EFFORT, [0, 1.5, 2, 1], 0)):
        decision = repair_reply(f"Belief: {belief}\nDecision: [0, 1, 0", state, 0)
        assert decision.belief.tolist() == belief and np.array_equal(decision.action, action)
