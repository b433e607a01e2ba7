"""Decisions as text: what an agent is told, how it must answer, and the strict reading of its answer.

[choice] One game is one conversation per agent: the system message states the rules and the numbers the agent
knows; each stage adds a user message (what was seen since, and the question) and the agent's reply. The
prompt of a decision is the conversation so far. `messages` is the only place that builds prompts:
fine-tuning, reinforcement and evaluation all call it.

A reply is two lines, the first of which (the theory-of-mind channel) can be switched off:

    Belief: [1, 0, 1, 0]     graph: whom I expect to choose me     effort: the efforts I expect of the others
    Decision: [1, 0, 1, 0]   graph: whom I choose                  effort: one number

The own position is 0 in every list.
"""

import re
from dataclasses import dataclass

import numpy as np

from games import GAMES, Observation, State, observe

EFFORT_DIGITS = 2  # efforts are told, and by experts played, with two decimals


@dataclass(frozen=True)
class PromptStyle:
    """information: `full` (everyone's type is known) or `local` (only one's own); belief: ask for the Belief
    line; hints: print worked numbers (Game.link_hint, effort_facts) next to the question [choice: a small
    model cannot multiply]. They do not give the answer away: in BCZ, linking wherever the printed number is
    at least 1 still gets one in ten of the efficient graph's entries wrong."""

    information: str = "full"
    belief: bool = True
    hints: bool = True


def tell_numbers(values) -> str:
    """[1.20, 0, 0.95]: how efforts and worked numbers stand in prompts."""
    return "[" + ", ".join(f"{v:.{EFFORT_DIGITS}f}" if v else "0" for v in values) + "]"


def tell_short(values) -> str:
    """[1, 2.33, 3]: how types and rows stand in prompts, without digits that say nothing."""
    return "[" + ", ".join(f"{v:g}" for v in values) + "]"


def _links(links_NN: np.ndarray) -> str:
    """`none`, `all`, or the pairs, agents counted from 1 as in the rest of the text."""
    N = len(links_NN)
    pairs = [f"{i + 1}-{j + 1}" for i in range(N) for j in range(i + 1, N) if links_NN[i, j]]
    return {0: "none", N * (N - 1) // 2: "all"}.get(len(pairs), ", ".join(pairs))


def system_message(seen: Observation, style: PromptStyle) -> str:
    """First what all games have in common, then the numbers: what is common is computed once for all."""
    stages = ", ".join({"G": "links", "E": "efforts"}[s] for s in seen.stages)
    rounds = "1 round" if seen.rounds == 1 else f"{seen.rounds} rounds"
    belief = "Belief: [what you expect, per agent]\n" if style.belief else ""
    game = GAMES[seen.game]
    digits = game.parameter_format
    parameters = ", ".join(f"{name} {value:{digits}}" for name, value in seen.parameters.items())
    return (
        f"{rounds}: {stages}. A link forms if both choose it, at cost c each. {game.payoff_rule} Reply:\n"
        f"{belief}Decision: [0 or 1 per agent, you 0] or one effort\n"
        f"You are agent {seen.seat + 1} of {seen.N}. {parameters}, effort x 0 to {seen.cap:g}."
    )


def question(seen: Observation, style: PromptStyle) -> str:
    """The user message of a stage: the results since the agent's last decision, its own numbers, the
    question."""
    news = f"Efforts were {tell_numbers(seen.efforts)}. " if seen.previous == "E" else ""
    game = GAMES[seen.game]
    own = f"Your {game.type_name} {seen.own_type:g}"
    if seen.previous == "G" and seen.kind == "G":  # (the question about efforts tells the links itself)
        news += f"Links formed: {_links(seen.links)}. "
    if seen.last_payoff is not None and seen.stage == 0:
        news += f"Your payoff was {seen.last_payoff:.2f}. "
    if seen.kind == "G":
        if seen.types is not None:
            own += f" of {tell_short(seen.types)}" + (game.link_hint(seen) if style.hints else "")
        return f"{news}Round {seen.round} links. {own}. Whom do you choose?"
    own += game.effort_facts(seen, style.hints)
    return f"{news}Round {seen.round} efforts. Links: {_links(seen.links)}. {own}. Your effort?"


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


# -------------------- what the agent answers


@dataclass(frozen=True, eq=False)
class Decision:
    """One agent's decision. action: row (N,) of {0, 1} for `G`, a float for `E`. belief: what is expected of
    the others, (N,), own position 0; None where there is none."""

    kind: str
    action: np.ndarray | float
    belief: np.ndarray | None = None


def format_reply(decision: Decision, style: PromptStyle) -> str:
    graph = decision.kind == "G"
    lines = []
    if style.belief and decision.belief is not None:
        lines.append("Belief: " + (tell_short if graph else tell_numbers)(decision.belief))
    action = tell_short(decision.action) if graph else f"{decision.action:.{EFFORT_DIGITS}f}"
    lines.append(f"Decision: {action}")
    return "\n".join(lines)


NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_LIST = re.compile(rf"\[\s*({NUMBER}(?:\s*,\s*{NUMBER})*)\s*\]", re.ASCII)
_SCALAR = re.compile(NUMBER, re.ASCII)


def last_line(reply: str, label: str) -> str:
    """What stands behind the label in the last line that begins with it; "" without one."""
    found = [line.strip() for line in reply.split("\n") if line.strip().startswith(label)]
    return found[-1][len(label) :].strip() if found else ""


def read_belief(reply: str, kind: str, seat: int, N: int) -> np.ndarray | None:
    """What the last `Belief:` line expects, (N,): N finite numbers, for `G` each 0 or 1; else None."""
    match = _LIST.fullmatch(last_line(reply, "Belief:"))
    belief_N = np.array([float(v) for v in match[1].split(",")]) if match else np.array([])
    if len(belief_N) != N or not np.isfinite(belief_N).all():
        return None
    if kind == "G" and not np.isin(belief_N, (0, 1)).all():
        return None
    belief_N[seat] = 0
    return belief_N


def _read(reply: str, kind: str, seat: int, N: int, cap: float) -> Decision | str:
    """The decision of a compliant reply, or the first rule that the reply breaks."""
    text, belief_N = last_line(reply, "Decision:"), read_belief(reply, kind, seat, N)
    if not text:
        return "no Decision line"
    if kind == "E":
        if _SCALAR.fullmatch(text) is None:
            return "not one number"
        if not 0 <= float(text) <= cap:
            return "number outside [0, cap]"
        return Decision("E", float(text) + 0.0, belief_N)  # + 0.0: -0 becomes 0
    match = _LIST.fullmatch(text)
    if match is None:
        return "not one list of numbers"
    entries = [entry.strip() for entry in match[1].split(",")]
    if not set(entries) <= {"0", "1"}:
        return "an entry that is not 0 or 1"
    if len(entries) != N:
        return "wrong length"
    if entries[seat] != "0":
        return "own position not 0"
    return Decision("G", np.array(entries, int), belief_N)


def parse_reply(reply: str, kind: str, seat: int, N: int, cap: float) -> Decision | None:
    """The decision of a compliant reply, None for any other. A reply is data: parsed, never evaluated or
    repaired.

    Compliant iff the last `Decision:` line is exactly N entries in {0, 1} with a 0 in the own position (`G`),
    or one finite number in [0, cap] (`E`). The Belief line does not decide compliance."""
    found = _read(reply, kind, seat, N, cap)
    return found if isinstance(found, Decision) else None


def broken_rule(reply: str, kind: str, seat: int, N: int, cap: float) -> str | None:
    """The first rule of `parse_reply` that a reply breaks, for logs; None for a compliant one."""
    found = _read(reply, kind, seat, N, cap)
    return None if isinstance(found, Decision) else found


def reply_tokens(N: int) -> int:
    """The longest reply that is sampled unless --max-new-tokens says so: room for two lines of N entries."""
    return 20 + 7 * N


def fallback(kind: str, N: int) -> Decision:
    """What a reply that is not compliant plays: no links, effort 0."""
    return Decision(kind, np.zeros(N, int) if kind == "G" else 0.0)
