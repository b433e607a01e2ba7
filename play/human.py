"""A person at the table, who reads what the model reads and answers in the terminal.

An answer is the two lines of a reply (`Belief: [...]`, which may be left out, and `Decision: [...]`), or just
the numbers: `1 0 1` for the other agents in their order (or for all, with a 0 for oneself), `2.5` for an
effort. Ctrl-D leaves; the games that were over then count.
"""

import re

import numpy as np

from decisions import EFFORTS, LINKS, own_rows, row_payoffs
from games import State
from play.metrics import METRICS, Episode, mean_interval, tell_interval
from prompts import NUMBER, PromptStyle, last_line, messages, read_reply, tell_links, tell_numbers
from run import ranks
from run.errors import InputError

NAME = "human"


class Left(InputError):
    """The person has left before a game was over."""


class Human:
    """A player (see play/players.py). Games with it are played one after the other, not side by side."""

    def __init__(self, style: PromptStyle):
        if ranks.world() > 1:
            raise InputError("a person plays in one process: start without torchrun")
        self.style, self.seats = style, set()

    def __call__(self, asks: list) -> list[str]:
        return [self.answer(ask.state, ask.seat, ask.replies) for ask in asks]

    def answer(self, state: State, seat: int, replies: list[str]) -> str:
        """The first reply that is compliant. Raises Left."""
        (system, *_, question), kind = messages(state, seat, replies, self.style), state.kind
        self.seats.add(seat)
        if not replies:
            print(f"\n{'=' * 20} a new game: you are agent {seat + 1}\n\n{system['content']}")
        print(f"\n{question['content']}")
        while True:
            reply = to_reply(read(), state, seat)
            _, broken = read_reply(reply, kind, seat, state.game.N, float(state.game.caps[seat]))
            if broken is None:
                return reply
            example = kind.random(state.game, seat, np.random.default_rng(0)).action
            print(f"not allowed: {broken}. An allowed answer: {kind.write(example)}")

    def game_over(self, end: State) -> None:
        print_outcome(end, sorted(self.seats))
        self.seats = set()


def read() -> str:
    """One line, or the two lines of a reply."""
    try:
        text = input("your answer (Ctrl-D leaves): ").strip()
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


def print_outcome(end: State, seats: list[int]) -> None:
    """Everybody's choices and payoffs, the best replies of these seats, and the first best."""
    game, payoffs = end.game, [payoffs_N for _, _, payoffs_N in end.round_results()]
    print(f"\n{'-' * 20} the game is over")
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
            U2 = kind.efficiency(state, seat, actions)
            print(f"  agent {seat + 1}: U2 {U2:.2f}, the best reply was {kind.write(best)}")
        if (stage + 1) % len(game.stages) == 0:
            paid_N = payoffs[state.round - 1]
            print(f"Payoffs of round {state.round}: {tell_numbers(paid_N)}, in all {paid_N.sum():.2f}")
    links_NN, W = game.efficient_graph("planner")
    efforts = tell_numbers(game.planner_efforts(links_NN))
    print(f"First best: links {tell_links(links_NN)}, efforts {efforts}, in all {W:.2f}")
    U3 = mean_interval([METRICS["U3"](Episode(game, [], [float(paid_N.sum()) for paid_N in payoffs]))])
    print(f"U3, welfare of a round against the first best: {tell_interval(U3)}")
