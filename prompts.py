"""Decisions as text: what an agent reads, how it must answer, and the strict reading of its answer.

[choice] One game is one conversation per agent: the system message states the rules and the numbers that the
agent knows; each stage adds a user message (what was seen since, and the question) and the agent's reply. The
prompt of a decision is the conversation so far. `messages` is the only place that builds prompts:
fine-tuning, reinforcement and evaluation all call it. One whole game of agent 1, as it reads and answers it:

    system     1 round: links, efforts. A link forms if both choose it, at cost c each. Payoff: alpha x -
               x^2/2 + delta x (sum of linked efforts) - c (links). Reply:
               Belief: [what you expect, per agent]
               Decision: [0 or 1 per agent, you 0] or one effort
               You are agent 1 of 4. delta 0.067, c 0.268, effort x 0 to 7.
    user       Round 1 links. Your alpha 1 of [1, 1, 3, 3]. If all link, at best replies to alpha a link
               earns [0, 0.54, 1.22, 1.22] c. Whom do you choose?
    assistant  Belief: [0, 0, 1, 1]               whom it expects to choose it, for each agent
               Decision: [0, 0, 1, 1]             whom it chooses; the own position is 0 in every list
    user       Round 1 efforts. Links: 1-3, 1-4, 2-3, 2-4, 3-4. Your alpha 1, 2 links to alphas [3, 3]. Best
               reply to efforts alpha: 1.40. Your effort?
    assistant  Belief: [0, 1.46, 3.42, 3.42]      the efforts that it expects of the others
               Decision: 1.46                     its own effort

"A link earns w c" is the hint: w = delta r_i r_j / c with r_i = alpha_i + delta (sum of the other alphas),
the best reply to efforts as large as the alphas. The Belief line is the theory-of-mind channel of the paper;
both can be switched off.
"""

import re
from dataclasses import dataclass

import numpy as np

from games import GAMES, KINDS, Decision, Kind, State

EFFORT_DIGITS = 2  # prompts show efforts, and experts play them, with two decimals


@dataclass(frozen=True)
class PromptStyle:
    """information: `full` (everyone's type is known) or `local` (only one's own); belief: ask for the Belief
    line; hints: print worked numbers (Game.link_hint, effort_hint) next to the question [choice: a small
    model cannot multiply]. They do not give the answer away: in BCZ, linking wherever the printed number is
    at least 1 still gets one in ten of the efficient graph's entries wrong. max_new_tokens: the longest reply
    that is sampled; None for the default; think: how many tokens of free text a reply may have before its two
    lines, 0 for none."""

    information: str = "full"
    belief: bool = True
    hints: bool = True
    max_new_tokens: int | None = None
    think: int = 0

    @property
    def recorded(self) -> dict:
        """The fields that change prompts or labels; every line of a data set holds them."""
        return dict(information=self.information, belief=self.belief, hints=self.hints, think=self.think > 0)

    def reply_limit(self, N: int) -> int:
        """The longest reply in tokens. The default has room for both headings, N links in two lists or N
        efforts in one (7 tokens each), and the free text."""
        return self.max_new_tokens or 20 + 7 * N + self.think


@dataclass(frozen=True)
class Reply:
    """What a policy answers to a prompt. ids: its tokens, with the first end-of-turn token if the reply
    reached it; logps: log pi_old of each token, as it was sampled; ended: whether it reached the end."""

    text: str
    ids: list[int]
    logps: list[float]
    ended: bool


# -------------------- what the agent knows


@dataclass(frozen=True, eq=False)
class Observation:
    """What one seat knows: all that its prompt may tell (of last_actions it tells a part)."""

    # The game.
    game: str
    N: int
    seat: int
    own_type: float
    types: tuple[float, ...] | None  # everybody's, None under `local` information
    parameters: dict[str, float]
    fee: float
    cap: float
    stages: str
    rounds: int
    # The position in it.
    round: int
    stage_of_round: int  # from 0
    kind: Kind
    previous: Kind | None  # the kind of the previous stage, whose result is reported now
    # The results so far.
    links: np.ndarray
    efforts: np.ndarray | None
    last_payoff: float | None  # own, of the last finished round
    last_actions: np.ndarray | None  # everybody's, of the previous stage


def observe(state: State, seat: int, information: str = "full") -> Observation:
    """`full`: everyone's type is known; `local`: only one's own. Links that formed and efforts are public. Of
    the proposals an agent reads only who chose it, and only in games of several rounds. (c and BCZ's cap were
    computed from all types, so even `local` reveals a little about the others.)"""
    if information not in ("full", "local"):
        raise ValueError(f"information must be full or local, got {information!r}")
    game, per_round, stage = state.game, len(state.game.stages), len(state.history)
    ended = state.before(stage // per_round * per_round)  # the end of the last finished round
    P, x = ended.last("G"), ended.efforts
    return Observation(
        game=game.name,
        N=game.N,
        seat=seat,
        own_type=game.types[seat],
        types=game.types if information == "full" else None,
        parameters=game.parameters,
        fee=game.fee,
        cap=float(game.caps[seat]),
        stages=game.stages,
        rounds=game.rounds,
        round=state.round,
        stage_of_round=stage % per_round,
        kind=state.kind,
        previous=state.kind_of(stage - 1) if stage else None,
        links=state.links,
        efforts=state.efforts,
        last_payoff=None if P is None or x is None else float(game.round_payoffs(P, x)[seat]),
        last_actions=state.history[-1] if stage else None,
    )


# -------------------- what the agent reads


def tell_numbers(values) -> str:
    """[1.20, 0, 0.95]: the format of efforts and worked numbers."""
    return "[" + ", ".join(f"{v:.{EFFORT_DIGITS}f}" if v else "0" for v in values) + "]"


def tell_short(values) -> str:
    """[1, 2.33, 3]: the format of types and rows, without trailing zeros."""
    return "[" + ", ".join(f"{v:g}" for v in values) + "]"


def tell_links(links_NN: np.ndarray) -> str:
    """`none`, `all`, or the pairs, with agents counted from 1 as everywhere in the text."""
    N = len(links_NN)
    pairs = [f"{i + 1}-{j + 1}" for i in range(N) for j in range(i + 1, N) if links_NN[i, j]]
    return {0: "none", N * (N - 1) // 2: "all"}.get(len(pairs), ", ".join(pairs))


def tell_partners(seen: Observation) -> str:
    """`2 links to alphas [3, 3]`: how many links the agent has, and the types at their other ends."""
    linked = np.flatnonzero(seen.links[seen.seat])
    text = f"{len(linked)} links"
    if seen.types is not None and len(linked):
        text += f" to {GAMES[seen.game].type_name}s {tell_short(seen.types[j] for j in linked)}"
    return text


def system_message(seen: Observation, style: PromptStyle) -> str:
    """The shared rules come first, so that the fast engine computes their keys and values once for all
    prompts."""
    stages = ", ".join(KINDS[letter].noun for letter in seen.stages)
    rounds = "1 round" if seen.rounds == 1 else f"{seen.rounds} rounds"
    belief = "Belief: [what you expect, per agent]\n" if style.belief else ""
    answers = " or ".join(kind.answer for letter, kind in KINDS.items() if letter in seen.stages)
    game = GAMES[seen.game]
    digits = game.parameter_format
    parameters = ", ".join(f"{name} {value:{digits}}" for name, value in seen.parameters.items())
    reply = "Think first, then reply" if style.think else "Reply"
    fee = f", and every choice costs {seen.fee:g} c, answered or not" if seen.fee else ""
    return (
        f"{rounds}: {stages}. {game.link_rule}{fee}. {game.payoff_rule} {reply}:\n"
        f"{belief}Decision: {answers}\n"
        f"You are agent {seen.seat + 1} of {seen.N}. {parameters}, effort x 0 to {seen.cap:g}."
    )


def news(seen: Observation) -> str:
    """The results since the agent's last decision: the part of a user message that depends on the history."""
    text = seen.previous.result(seen) if seen.previous else ""
    if seen.last_payoff is not None and seen.stage_of_round == 0:
        text += f"Your payoff was {seen.last_payoff:.2f}. "
    return text


def messages(state: State, seat: int, own_replies: list[str], style: PromptStyle) -> list[dict]:
    """The prompt of the decision that `seat` takes in `state`, as chat messages.

    own_replies: the texts this agent has answered in the stages before, one for each stage of state.history.
    With `think` it reads its answers again, but not what it thought [choice].
    """
    if len(own_replies) != len(state.history):
        raise ValueError(f"{len(state.history)} stages have passed, but {len(own_replies)} replies are given")
    own = [answer_lines(text) for text in own_replies] if style.think else own_replies
    chat = [{"role": "system", "content": system_message(observe(state, seat, style.information), style)}]
    for stage in range(len(state.history) + 1):
        seen = observe(state.before(stage), seat, style.information)
        chat.append({"role": "user", "content": news(seen) + seen.kind.question(seen, style)})
        if stage < len(own_replies):
            chat.append({"role": "assistant", "content": own[stage]})
    return chat


# -------------------- what the agent answers


def answer_lines(reply: str) -> str:
    """The lines of a reply that are read, without what stands around them."""
    lines = {heading: last_line(reply, heading) for heading in ("Belief:", "Decision:")}
    return "\n".join(f"{heading} {text}" for heading, text in lines.items() if text) or "Decision: none"


def format_reply(decision: Decision, style: PromptStyle) -> str:
    """The compliant reply that says this: the text that read_reply reads."""
    lines = [f"Decision: {decision.kind.write(decision.action)}"]
    if style.belief and decision.belief is not None:
        lines.insert(0, f"Belief: {decision.kind.write_belief(decision.belief)}")
    return "\n".join(lines)


NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_LIST = re.compile(rf"\[\s*({NUMBER}(?:\s*,\s*{NUMBER})*)\s*\]", re.ASCII)
_SCALAR = re.compile(NUMBER, re.ASCII)


def read_list(text: str) -> list[str] | None:
    """The entries of a text that is one list of numbers, as they are written; else None."""
    match = _LIST.fullmatch(text)
    return [entry.strip() for entry in match[1].split(",")] if match else None


def read_number(text: str) -> float | None:
    """The number, if the text is one number and nothing else."""
    return float(text) if _SCALAR.fullmatch(text) else None


def last_line(reply: str, heading: str) -> str:
    """What follows the heading in the last line that begins with it; "" without such a line."""
    lines = [line.strip() for line in reply.split("\n") if line.strip().startswith(heading)]
    return lines[-1][len(heading) :].strip() if lines else ""


def read_belief(reply: str, kind: Kind, seat: int, N: int) -> np.ndarray | None:
    """What the last `Belief:` line expects, (N,): N finite numbers that the kind allows; else None."""
    if not kind.beliefs:
        return None
    belief_N = np.array([float(v) for v in read_list(last_line(reply, "Belief:")) or ()])
    if len(belief_N) != N or not np.isfinite(belief_N).all() or not kind.allows_belief(belief_N):
        return None
    belief_N[seat] = 0
    return belief_N


def read_reply(reply: str, kind: Kind, seat: int, N: int, cap: float) -> tuple[Decision | None, str | None]:
    """(the decision, None) of a compliant reply, else (None, the first rule that the reply breaks).

    A reply is data: it is parsed, never evaluated or repaired. It is compliant iff its last `Decision:`
    line is exactly N entries in {0, 1} with a 0 in the own position (links), or one finite number in [0,
    cap] (efforts). The Belief line does not decide compliance."""
    text = last_line(reply, "Decision:")
    action, broken = kind.read(text, seat, N, cap) if text else (None, "no Decision line")
    if broken:
        return None, broken
    return Decision(kind, action, read_belief(reply, kind, seat, N)), None


def parse_reply(reply: str, state: State, seat: int) -> Decision | None:
    """The decision that `seat` takes in `state` with this reply; None for a reply that is not compliant."""
    decision, _ = read_reply(reply, state.kind, seat, state.game.N, float(state.game.caps[seat]))
    return decision
