"""A lenient reading of replies, for a baseline in evaluation that tells formatting from strategy. Nothing in
training calls it.
"""

import re

import numpy as np

from prompts import NUMBER, Decision, parse_reply, read_belief


def repair_reply(reply: str, kind: str, seat: int, N: int, cap: float) -> Decision | None:
    """The compliant decision that is nearest to a reply; None where no decision can be read.

    What is read is the line that follows the last `Decision:`, wherever that stands; without one, for `G` the
    last list in brackets, for `E` all but Belief lines. `G`: the numbers in it, in their order and each to
    the nearer of 0 and 1, cut or padded with 0 to N entries, own position 0; none of them being 0 or 1, it is
    no row. `E`: the first finite number, clipped to [0, cap]."""
    compliant = parse_reply(reply, kind, seat, N, cap)
    if compliant:
        return compliant
    graph, (_, label, text) = kind == "G", reply.rpartition("Decision:")
    if label:
        text = text.strip().partition("\n")[0]
    else:
        text = re.sub("(?m)^ *Belief:.*$", "", reply)
        if graph:
            text = (re.findall(r"\[[^\[\]]*\]", text) or [""])[-1]
    found = [float(v) for v in re.findall(rf"(?<![\w.]){NUMBER}(?!\w|\.\d)", text, re.ASCII)]
    belief_N = read_belief(reply, kind, seat, N)
    if graph:
        if not any(v in (0, 1) for v in found):
            return None
        row_N = np.zeros(N, int)
        row_N[: len(found[:N])] = [v >= 0.5 for v in found[:N]]
        row_N[seat] = 0
        return Decision("G", row_N, belief_N)
    finite = [v for v in found if np.isfinite(v)]
    return Decision("E", min(max(finite[0], 0.0), float(cap)) + 0.0, belief_N) if finite else None
