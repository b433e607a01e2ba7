"""A lenient reading of replies, for a baseline in evaluation that separates formatting from strategy.
Training does not use it."""

import re

import numpy as np

from decisions import EFFORTS, LINKS
from games import Decision, State
from prompts import NUMBER, parse_reply, read_belief


def repair_reply(reply: str, state: State, seat: int) -> Decision | None:
    """The decision of a compliant reply, else the nearest compliant one that can be read in it, if any.

    What is read is the line that follows the last `Decision:`, wherever that stands; without one, for links
    the last list in brackets, for efforts all but Belief lines. Links: the numbers in it, in their order and
    each rounded to 0 or 1, cut or padded with 0 to N entries, own position 0; if none of them is 0 or 1, it
    is no row. Efforts: the first finite number, clipped to [0, cap]. Other kinds: nothing."""
    compliant = parse_reply(reply, state, seat)
    if compliant or state.kind not in (LINKS, EFFORTS):
        return compliant
    _, label, text = reply.rpartition("Decision:")
    if label:
        text = text.strip().partition("\n")[0]
    else:
        text = re.sub("(?m)^ *Belief:.*$", "", reply)
        if state.kind is LINKS:
            text = (re.findall(r"\[[^\[\]]*\]", text) or [""])[-1]
    numbers = [float(v) for v in re.findall(rf"(?<![\w.]){NUMBER}(?!\w|\.\d)", text, re.ASCII)]
    N = state.game.N
    if not any(v in (0, 1) if state.kind is LINKS else np.isfinite(v) for v in numbers):
        return None
    if state.kind is LINKS:
        action = np.array([v >= 0.5 for v in (numbers + [0.0] * N)[:N]], int)
        action[seat] = 0
    else:
        first = next(filter(np.isfinite, numbers))
        action = min(max(first, 0.0), float(state.game.caps[seat])) + 0.0
    return Decision(state.kind, action, read_belief(reply, state.kind, seat, N))
