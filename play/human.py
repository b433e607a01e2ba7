"""A person at the table: reads what the model reads, and answers in the terminal.

    python eval.py --table human runs/tompo/adapter expert:nash expert:random --eval-games 3

An answer is the two lines of a reply (`Belief: [...]`, which may be left out, and `Decision: [...]`), or just
the numbers: `1 0 1` for the other agents in their order (or for all, with a 0 for oneself), `2.5` for an
effort. What is not allowed is said at once, and asked again. After each game everybody's choices and payoffs
are shown, with the best reply and the first best. Ctrl-D leaves; the games that were over by then count.
"""

import re
from collections.abc import Callable

import numpy as np

from games import State, own_rows
from play.hindsight import effort_payoff, row_payoff, row_payoffs
from play.metrics import strategic_efficiency, welfare_bounds
from prompts import NUMBER, PromptStyle, broken_rule, last_line, messages, tell_numbers, tell_short
from run import ranks
from run.files import InputError

NAME = "human"


class Left(InputError):
    """The person has left before a game was over."""


class Human:
    """A player (see play/players.py). Games with it are played one after the other, not side by side."""

    def __init__(self, style: PromptStyle, ask: Callable[[str], str] = input, tell: Callable = print):
        if ranks.world() > 1:
            raise InputError("a person plays in one process: start without torchrun")
        self.style, self.ask, self.tell, self.seats = style, ask, tell, set()

    def __call__(self, asks: list) -> list[str]:
        return [self.answer(ask.state, ask.seat, ask.replies) for ask in asks]

    def answer(self, state: State, seat: int, replies: list) -> str:
        """The reply to this decision, once it is compliant. Raises Left."""
        self.seats.add(seat)
        past = [reply if isinstance(reply, str) else "" for reply in replies]
        chat = messages(state, seat, past, self.style)
        if not replies:
            self.tell(f"\n{'=' * 20} a new game: you are agent {seat + 1}\n\n{chat[0]['content']}")
        self.tell(f"\n{chat[-1]['content']}")
        place = state.kind, seat, state.game.N, float(state.game.caps[seat])
        while True:
            reply = written_out(self.read(), state.kind, seat, state.game.N)
            broken = broken_rule(reply, *place)
            if broken is None:
                return reply
            self.tell(f"not allowed: {broken}. {self.example(state, seat)}")

    def read(self) -> str:
        """One line, or the two lines of a reply."""
        try:
            text = self.ask("your answer (Ctrl-D leaves): ").strip()
            while text.splitlines()[-1:] and text.splitlines()[-1].startswith("Belief:"):
                text += "\n" + self.ask("").strip()
            return text
        except EOFError:
            self.tell("")  # the cursor is still behind the question
            raise Left("you left before a game was over, so there is nothing to count") from None

    def example(self, state: State, seat: int) -> str:
        if state.kind == "E":
            return f"One number from 0 to {state.game.caps[seat]:g}, such as {state.game.caps[seat] / 2:g}."
        others = [i + 1 for i in range(state.game.N) if i != seat]
        row = " ".join(str(1 - k % 2) for k in range(len(others)))
        return f"A 0 or 1 for each of agents {', '.join(map(str, others))}, such as {row}."

    def game_over(self, end: State) -> None:
        """Tells how a finished game went."""
        for line in outcome(end, sorted(self.seats)):
            self.tell(line)
        self.seats = set()


def written_out(text: str, kind: str, seat: int, N: int) -> str:
    """The reply that a plain answer stands for; any other text as it is."""
    if last_line(text, "Decision:"):
        return text
    numbers = re.findall(NUMBER, text)
    if not numbers or re.sub(NUMBER, "", text).strip("[], \t"):
        return f"Decision: {text}"
    if kind == "E":
        return f"Decision: {', '.join(numbers)}"
    row = numbers if len(numbers) == N else [*numbers[:seat], "0", *numbers[seat:]]
    return f"Decision: [{', '.join(row)}]"


def outcome(end: State, seats: list[int]) -> list[str]:
    """Everybody's choices and payoffs, what the best replies of these seats would have been, first best."""
    game, lines = end.game, [f"\n{'-' * 20} the game is over"]
    for stage, actions in enumerate(end.history):
        state = end.before(stage)
        graph, where = state.kind == "G", f"Round {state.round}"
        lines.append(f"{where}, {'links' if graph else 'efforts'}:")
        for i in range(game.N):
            you = " (you)" if i in seats else ""
            lines.append(f"  agent {i + 1}{you}: {tell_short(actions[i]) if graph else f'{actions[i]:.2f}'}")
        for seat in seats:
            best, worth, got = best_reply(state, seat, actions)
            U2 = strategic_efficiency(state, seat, actions)
            then = " at the Nash efforts that follow" if graph else ""
            told = f"the best reply {best}: {worth:.3f} (U2 {U2:.2f})"
            lines.append(f"  worth {got:.3f} to agent {seat + 1}{then}; {told}")
        after = end.before(stage + 1)
        if len(after.history) % len(game.stages) == 0:
            payoffs_N = after.round_results()[-1][2]
            told = f"{tell_numbers(payoffs_N)}, in all {payoffs_N.sum():.2f}"
            lines.append(f"Payoffs of round {state.round}: {told}")
    links_NN, W = game.efficient_graph("planner")
    efforts = tell_numbers(game.planner_efforts(links_NN))
    pairs = [f"{i + 1}-{j + 1}" for i in range(game.N) for j in range(i + 1, game.N) if links_NN[i, j]]
    lines.append(f"First best: links {', '.join(pairs) or 'none'}, efforts {efforts}, in all {W:.2f}")
    first_best, _ = welfare_bounds(game)
    got = float(np.mean([pay.sum() for _, _, pay in end.round_results()]))
    share = f"{got / first_best:.3f}" if first_best > 1e-9 else "-"
    return [*lines, f"U3, welfare of a round against the first best: {share}"]


def best_reply(state: State, seat: int, actions: np.ndarray) -> tuple[str, float, float]:
    """(the seat's best choice given the others', what it is worth, what the one that was taken is worth)."""
    if state.kind == "G":
        worth = row_payoffs(state, seat, actions)
        best = own_rows(state.game.N, seat)[int(worth.argmax())]
        return tell_short(best), float(worth.max()), float(row_payoff(state, seat, actions, actions[seat]))
    best = float(state.game.best_response(state.links, actions)[seat])
    return f"{best:.2f}", *(float(effort_payoff(state, seat, actions, x)) for x in (best, actions[seat]))
