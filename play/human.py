"""A person at the table, who is told the rules in words, reads the questions of the model and answers in the
terminal.

An answer is just the numbers, `1 0 1` for the other agents in their order (or for all, with a 0 for oneself)
and `2.5` for an effort, or the two lines of a reply (`Belief: [...]`, which may be left out, and `Decision:
[...]`). Ctrl-D leaves; the games that were over then count.
"""

import re
import textwrap

import numpy as np

from decisions import EFFORTS, LINKS, own_rows, row_payoffs
from games import KINDS, State
from play.metrics import METRICS, Episode
from prompts import NUMBER, PromptStyle, last_line, messages, observe, read_reply, tell_links, tell_numbers
from run import ranks
from run.errors import InputError

NAME = "human"


class Left(InputError):
    """The person has left before a game was over."""


class Human:
    """A player (see play/players.py). Games with it are played one after the other, not side by side. who:
    (game, seat) -> who sits there, if it is to be told when a game is over."""

    def __init__(self, style: PromptStyle, who=None):
        if ranks.world() > 1:
            raise InputError("a person plays in one process: start without torchrun")
        self.style, self.who, self.seats = style, who, set()
        self.scores: list[tuple] = []  # of every game: U2 and U3 (None where they do not exist), own payoff

    def __call__(self, asks: list) -> list[str]:
        return [self.answer(ask.state, ask.seat, ask.replies) for ask in asks]

    def answer(self, state: State, seat: int, replies: list[str]) -> str:
        """The first reply that is compliant. Raises Left."""
        *_, question = messages(state, seat, replies, self.style)
        kind, others = state.kind, (str(j + 1) for j in range(state.game.N) if j != seat)
        self.seats.add(seat)
        if not replies:
            print(f"\n{'=' * 20} a new game: you are agent {seat + 1} of {state.game.N}\n")
            print(rules(state, seat, self.style, bool(self.scores)))
        print(f"\n{question['content']}")
        asked = {
            LINKS: f"0 or 1 for agents {', '.join(others)}",
            EFFORTS: f"a number from 0 to {state.game.caps[seat]:g}",
        }
        while True:
            reply = to_reply(read(asked.get(kind, "your answer")), state, seat)
            _, broken = read_reply(reply, kind, seat, state.game.N, float(state.game.caps[seat]))
            if broken is None:
                return reply
            example = kind.random(state.game, seat, np.random.default_rng(0)).action
            allowed = " ".join(map(str, np.delete(example, seat))) if kind is LINKS else kind.write(example)
            broken = "you have answered nothing" if reply.strip() == "Decision:" else broken
            print(f"not allowed: {broken}. An allowed answer: {allowed}")

    def game_over(self, end: State) -> None:
        self.scores.append(print_outcome(end, sorted(self.seats), self.who))
        self.seats = set()
        U2, U3, payoff = ([own[k] for own in self.scores if own[k] is not None] for k in range(3))
        told = [f"{name} {np.mean(values):.2f}" for name, values in (("U2", U2), ("U3", U3)) if values]
        print(f"Your score, games: {len(payoff)}, {', '.join(told)}, payoffs {sum(payoff):.2f} in all")


def rules(state: State, seat: int, style: PromptStyle, known: bool) -> str:
    """What the system message tells a model, in a person's words; the numbers alone if the rest is known."""
    game, seen = state.game, observe(state, seat, style.information)
    numbers = ", ".join(f"{name} {value:{game.parameter_format}}" for name, value in game.parameters.items())
    numbers = f"The numbers of this game: {numbers}; your effort can be 0 to {seen.cap:g}."
    if known:
        return numbers
    stages = ", then ".join(KINDS[letter].noun for letter in game.stages)
    rounds = "one round" if game.rounds == 1 else f"{game.rounds} rounds"
    free = f"costs you {game.fee:g} c, answered or not" if game.fee else "is free if it is not answered"
    text = f"""\
You play {rounds}: {stages}. All decide at the same time, and then see what came of it.
Links: choose with whom you want to be linked. A link forms only if both choose each other, and costs each of
them c. A choice {free}.
{textwrap.fill(game.payoff_rule.replace("^2", "²"), 110)}
Here x is your effort, {game.type_name} your own number (everybody has one), (links) how many links you have.
{numbers}
"""
    if style.hints and game.link_hint(seen):
        text += f"""\
The hint beside the question about links says what a link with each agent, in their order, would earn if what
stands before it were true. It counts in c: at {1 + game.fee:g} a link earns what it costs, above it pays. The
hint about efforts may suppose something, too: `efforts {game.type_name}` means that each of the others gives
its number.
"""
    return f"""{text}\
Answer with the numbers alone: for links one for each of the others, 1 for whom you choose, such as
{" ".join("10101010101"[: game.N - 1])}; for an effort one number, such as 1.5.
After a game come two scores of at most 1: U2, how near your choices were to your best ones, and U3, how near
all came to the highest welfare. A game that is broken off does not count."""


def read(asked: str) -> str:
    """One line, or the two lines of a reply."""
    try:
        text = input(f"{asked} (Ctrl-D leaves): ").strip()
        return text + "\n" + input().strip() if text.startswith("Belief:") else text
    except EOFError:
        print()  # the cursor is still behind the question
        raise Left("you left before a game was over, so there is nothing to count") from None


def to_reply(text: str, state: State, seat: int) -> str:
    """The reply that a plain answer stands for; any other text as it is."""
    if last_line(text, "Decision:"):
        return text
    kind, N, numbers = state.kind, state.game.N, re.findall(NUMBER, text)
    if not numbers or re.sub(NUMBER, "", text).strip("[], \t"):
        return f"Decision: {text}"
    if not kind.write(kind.fallback(N).action).startswith("["):  # the kind does not want a list
        return f"Decision: {', '.join(numbers)}"
    row = numbers if len(numbers) == N else [*numbers[:seat], "0", *numbers[seat:]]
    return f"Decision: [{', '.join(row)}]"


def print_outcome(end: State, seats: list[int], who=None) -> tuple[float | None, float | None, float]:
    """Everybody's choices and payoffs, the best replies of these seats, the first best, and who sat where.
    Returns the mean U2 of these seats, U3 and their payoff."""
    game, payoffs = end.game, [payoffs_N for _, _, payoffs_N in end.round_results()]
    print(f"\n{'-' * 20} the game is over")
    effects = []  # U2 of every decision of these seats
    for stage, actions in enumerate(end.history):
        state, kind = end.before(stage), end.kind_of(stage)
        print(f"Round {state.round}, {kind.noun}:")
        for i in range(game.N):
            print(f"  agent {i + 1}{' (you)' if i in seats else ''}: {kind.write(actions[i])}")
        for seat in seats if kind in (LINKS, EFFORTS) else ():
            if kind is LINKS:
                best = own_rows(game.N, seat)[row_payoffs(state, seat, actions).argmax()]
            else:
                best = game.best_response(state.links, actions)[seat]
            effects.append(U2 := kind.efficiency(state, seat, actions))
            print(f"  agent {seat + 1}: U2 {U2:.2f}, the best reply was {kind.write(best)}")
        if (stage + 1) % len(game.stages) == 0:
            paid_N = payoffs[state.round - 1]
            print(f"Payoffs of round {state.round}: {tell_numbers(paid_N)}, in all {paid_N.sum():.2f}")
    links_NN, W = game.efficient_graph("planner")
    efforts = tell_numbers(game.planner_efforts(links_NN))
    print(f"First best: links {tell_links(links_NN)}, efforts {efforts}, in all {W:.2f}")
    if who:
        others = (i for i in range(game.N) if i not in seats)
        print("The others were: " + ", ".join(f"agent {i + 1} {who(game, i)}" for i in others))
    U3 = METRICS["U3"](Episode(game, [], [float(paid_N.sum()) for paid_N in payoffs]))
    print(f"U3, welfare of a round against the first best: {'-' if U3 is None else format(U3, '.3f')}")
    own = float(sum(paid_N[seats].sum() for paid_N in payoffs))
    return float(np.mean(effects)) if effects else None, U3, own
