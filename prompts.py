"""Decisions as text: what an agent is told, how it must answer, and the strict reading of its answer.

[choice] One game is one conversation per agent: the system message states the rules and the numbers the agent knows;
each stage adds a user message (what was seen since, and the question) and the agent's reply. The prompt of a decision
is the conversation so far. `messages` is the only place that builds prompts: fine-tuning, reinforcement and evaluation
all call it.

A reply is two lines, the first of which (the theory-of-mind channel) can be switched off:

    Belief: [1, 0, 1, 0]      graph: whom I expect to choose me     effort: the efforts I expect, own position 0
    Decision: [1, 0, 1, 0]    graph: whom I choose, own position 0  effort: one number
"""

import re
from dataclasses import dataclass

import numpy as np

from games import Observation, State, observe
from world.pgg import groups, returns

EFFORT_DIGITS = 2  # efforts are told, and by experts played, with two decimals


@dataclass(frozen=True)
class PromptStyle:
    """information: `full` (everyone's alpha is known) or `local` (only one's own); belief: ask for the Belief line;
    hints: worked numbers next to the question. BCZ: what a link would earn if all link and reply once to efforts alpha,
    and the best reply to efforts alpha; PGG: what the last member brings to each of a group of neighbours in riches, and
    what a unit returns. [choice]: a small model cannot multiply. These are one step of reasoning about the others, not
    the answer: "link where it earns at least its cost" is wrong about one in ten of the efficient graph's links."""

    information: str = "full"
    belief: bool = True
    hints: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# what the agent reads


def _numbers(values) -> str:
    return "[" + ", ".join(f"{v:.{EFFORT_DIGITS}f}" if v else "0" for v in values) + "]"


def _short(values) -> str:
    """1, 2.33, 3: no digits that say nothing."""
    return "[" + ", ".join(f"{v:g}" for v in values) + "]"


def _links(links_NN: np.ndarray) -> str:
    """`none`, `all`, or the pairs, agents counted from 1 as in the rest of the text."""
    N = len(links_NN)
    pairs = [f"{i + 1}-{j + 1}" for i in range(N) for j in range(i + 1, N) if links_NN[i, j]]
    return {0: "none", N * (N - 1) // 2: "all"}.get(len(pairs), ", ".join(pairs))


PAYOFF = {
    "bcz": "Payoff: alpha x - x^2/2 + delta x (sum of linked efforts) - c (links).",
    "pgg": "Groups: the largest sets of 2 or more who are all linked. Your effort x is split evenly over your groups; a "
    "group of k pays each member r k^b / k of what it gets. Payoff: e - x + what your groups pay - c (links).",
}
TYPE = {"bcz": "alpha", "pgg": "e"}  # what agents differ in


def system_message(seen: Observation, style: PromptStyle) -> str:
    """First what all games have in common, then the numbers: the common beginning is computed once for all."""
    stages = ", ".join({"G": "links", "E": "efforts"}[s] for s in seen.stages)
    rounds = "1 round" if seen.rounds == 1 else f"{seen.rounds} rounds"
    belief = "Belief: [what you expect, per agent]\n" if style.belief else ""
    digits = ".3f" if seen.game == "bcz" else "g"
    parameters = ", ".join(f"{name} {value:{digits}}" for name, value in seen.parameters.items())
    return (
        f"{rounds}: {stages}. A link forms if both choose it, at cost c each. {PAYOFF[seen.game]} Reply:\n"
        f"{belief}Decision: [0 or 1 per agent, you 0] or one effort\n"
        f"You are agent {seen.seat + 1} of {seen.N}. {parameters}, effort x 0 to {seen.cap:g}."
    )


def question(seen: Observation, style: PromptStyle) -> str:
    """The user message of one stage: the results since the agent's last decision, its own numbers, the question."""
    news = f"Efforts were {_numbers(seen.efforts)}. " if seen.previous == "E" else ""
    own = f"Your {TYPE[seen.game]} {seen.own_type:g}"
    if seen.previous == "G" and seen.kind == "G":  # (the question about efforts tells the links itself)
        news += f"Links formed: {_links(seen.links)}. "
    if seen.last_payoff is not None and seen.stage == 0:
        news += f"Your payoff was {seen.last_payoff:.2f}. "
    if seen.kind == "G":
        if seen.types is not None:
            own += f" of {_short(seen.types)}" + (LINK_HINT[seen.game](seen) if style.hints else "")
        return f"{news}Round {seen.round} links. {own}. Whom do you choose?"
    own += EFFORT_FACTS[seen.game](seen, style.hints)
    return f"{news}Round {seen.round} efforts. Links: {_links(seen.links)}. {own}. Your effort?"


def _bcz_link_hint(seen: Observation) -> str:
    delta, c = seen.parameters["delta"], seen.parameters["c"]
    if not c:
        return ""
    reply_N = [a + delta * (sum(seen.types) - a) for a in seen.types]  # if all link
    worth = [delta * reply_N[seen.seat] * x / c for x in reply_N]
    worth[seen.seat] = 0
    return f". If all link, at best replies to alpha a link earns {_numbers(worth)} c"


def _bcz_effort_facts(seen: Observation, hints: bool) -> str:
    linked = np.flatnonzero(seen.links[seen.seat])
    text = f", {len(linked)} links"
    if seen.types is not None and len(linked):
        text += f" to alphas {_short(seen.types[j] for j in linked)}"
        if hints:
            response = seen.own_type + seen.parameters["delta"] * sum(seen.types[j] for j in linked)
            text += f". Best reply to efforts alpha: {response:.2f}"
    return text


def _pgg_link_hint(seen: Observation) -> str:
    r, b, c = (seen.parameters[name] for name in "rbc")
    if not c:
        return ""
    e, order = seen.types, sorted(range(seen.N), key=lambda i: -seen.types[i])

    def each_gets(members) -> float:  # from the group, links apart
        return sum(e[i] for i in members) * (r * len(members) ** b - 1) / len(members) if len(members) > 1 else 0.0

    worth = [0.0] * seen.N
    for j in range(seen.N):
        if j != seen.seat:
            first, last = sorted((order.index(seen.seat), order.index(j)))
            group = order[first : last + 1]
            worth[j] = (each_gets(group) - each_gets([i for i in group if i != j])) / c
    return f". If you and all in riches up to an agent give all in one group, its link earns each {_numbers(worth)} c"


def _pgg_effort_facts(seen: Observation, hints: bool) -> str:
    own = [group for group in groups(seen.links) if seen.seat in group]
    text = f", your groups: {', '.join('-'.join(str(i + 1) for i in group) for group in own) or 'none'}"
    if hints and own:
        M = returns(seen.links, seen.parameters["r"], seen.parameters["b"])
        text += f". A unit you give returns {M[seen.seat, seen.seat]:.2f} to you, {M[:, seen.seat].sum():.2f} to all"
    return text


LINK_HINT = {"bcz": _bcz_link_hint, "pgg": _pgg_link_hint}
EFFORT_FACTS = {"bcz": _bcz_effort_facts, "pgg": _pgg_effort_facts}


def messages(state: State, seat: int, own_replies: list[str], style: PromptStyle) -> list[dict]:
    """The prompt of the decision that `seat` takes in `state`, as chat messages.

    own_replies: the texts this agent has answered in the stages before, one for each stage of state.history.
    """
    if len(own_replies) != len(state.history):
        raise ValueError(f"{len(state.history)} stages have passed, but {len(own_replies)} replies are given")
    chat = [{"role": "system", "content": system_message(observe(state, seat, style.information), style)}]
    for stage in range(len(state.history) + 1):
        seen = observe(state.before(stage), seat, style.information)
        chat.append({"role": "user", "content": question(seen, style)})
        if stage < len(own_replies):
            chat.append({"role": "assistant", "content": own_replies[stage]})
    return chat


def with_examples(examples: list[list[dict]], chat: list[dict]) -> list[dict]:
    """The conversation `chat` after other, finished ones, as one conversation. Many chat templates take one system
    message, and take it first: each later conversation has its own at the head of its first user message."""
    first, *rest = [*examples, chat]
    joined = list(first)
    for system, question, *more in rest:
        joined += [{"role": "user", "content": f"A new game. {system['content']}\n{question['content']}"}, *more]
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# what the agent answers


@dataclass(frozen=True, eq=False)
class Decision:
    """One agent's decision. action: row (N,) of {0, 1} for `G`, a float for `E`. belief: what is expected of the
    others, (N,), own position 0; None where there is none."""

    kind: str
    action: np.ndarray | float
    belief: np.ndarray | None = None


def format_reply(decision: Decision, style: PromptStyle) -> str:
    graph = decision.kind == "G"
    lines = []
    if style.belief and decision.belief is not None:
        lines.append("Belief: " + (_short if graph else _numbers)(decision.belief))
    action = _short(decision.action) if graph else f"{decision.action:.{EFFORT_DIGITS}f}"
    lines.append(f"Decision: {action}")
    return "\n".join(lines)


_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_LIST = re.compile(rf"\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*\]", re.ASCII)
_ROW = re.compile(r"\[\s*([01](?:\s*,\s*[01])*)\s*\]", re.ASCII)
_SCALAR = re.compile(_NUMBER, re.ASCII)


def last_line(reply: str, label: str) -> str | None:
    """What stands behind the label in the last line that begins with it."""
    found = [line.strip() for line in reply.split("\n") if line.strip().startswith(label)]
    return found[-1][len(label) :].strip() if found else None


def _parse_list(text: str | None, N: int, pattern: re.Pattern = _LIST) -> np.ndarray | None:
    match = pattern.fullmatch(text) if text is not None else None
    if match is None:
        return None
    values = np.array([float(v) for v in match[1].split(",")])
    return values if len(values) == N and np.isfinite(values).all() else None


def _belief(reply: str, kind: str, seat: int, N: int) -> np.ndarray | None:
    belief_N = _parse_list(last_line(reply, "Belief:"), N)
    if belief_N is None or (kind == "G" and not np.isin(belief_N, (0, 1)).all()):
        return None
    belief_N[seat] = 0
    return belief_N


def parse_reply(reply: str, kind: str, seat: int, N: int, cap: float) -> Decision | None:
    """The decision of a compliant reply, None for any other. A reply is data: parsed, never evaluated or repaired.

    Compliant iff the last `Decision:` line is exactly N entries in {0, 1} with a 0 in the own position (`G`), or one
    finite number in [0, cap] (`E`). The belief is None unless the last `Belief:` line holds N finite numbers (`G`: in
    {0, 1}); it does not decide compliance.
    """
    decision, belief_N = last_line(reply, "Decision:"), _belief(reply, kind, seat, N)
    if decision is None:
        return None
    if kind == "G":
        row_N = _parse_list(decision, N, _ROW)
        if row_N is None or row_N[seat] != 0:
            return None
        return Decision("G", row_N.astype(int), belief_N)
    if _SCALAR.fullmatch(decision) is None or not 0 <= float(decision) <= cap:
        return None
    return Decision("E", float(decision) + 0.0, belief_N)  # + 0.0: -0 becomes 0


def repair_reply(reply: str, kind: str, seat: int, N: int, cap: float) -> Decision | None:
    """The compliant decision that is nearest to a reply; None where no decision can be read. It is for a baseline in
    evaluation that tells formatting from strategy, and nothing in training calls it.

    What is read is the line that follows the last `Decision:`, wherever that stands; without one, for `G` the last list
    in brackets, for `E` all but Belief lines. `G`: the numbers in it, in their order and each to the nearer of 0 and 1, cut or padded with 0 to N entries,
    own position 0; none of them being 0 or 1, it is no row. `E`: the first finite number, clipped to [0, cap].
    """
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
    found = [float(v) for v in re.findall(rf"(?<![\w.]){_NUMBER}(?!\w|\.\d)", text, re.ASCII)]
    belief_N = _belief(reply, kind, seat, N)
    if graph:
        if not any(v in (0, 1) for v in found):
            return None
        row_N = np.zeros(N, int)
        row_N[: len(found[:N])] = [v >= 0.5 for v in found[:N]]
        row_N[seat] = 0
        return Decision("G", row_N, belief_N)
    finite = [v for v in found if np.isfinite(v)]
    return Decision("E", min(max(finite[0], 0.0), float(cap)) + 0.0, belief_N) if finite else None


def fallback(kind: str, N: int) -> Decision:
    """What a reply that is not compliant plays: no links, effort 0."""
    return Decision(kind, np.zeros(N, int) if kind == "G" else 0.0)
