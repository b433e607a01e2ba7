"""A third kind of stage in one file: agents say one line to all. your-own-stage.md walks through it.

This is cheap talk: a message costs nothing, pays nothing and binds nobody. All agents read all lines before
the next question. An exact expert announces what it is about to do: `I choose [0, 1, 1, 0]` before links,
`I give 1.25` before efforts.

    python -m docs.cheap_talk --stages MGE --prompts 6 2 2 --out runs/cheap-talk
"""

import json
import re

import numpy as np

from decisions import EFFORTS, LINKS, tell_hint, tell_type
from experts import RULES
from games import GAMES, KINDS, Decision, Game, Kind, State
from prompts import Observation, PromptStyle
from rewards import Target

LONGEST = 60  # characters of a line
# The marks of chat templates need other characters, so a line cannot pose as a message of another role.
LINE = re.compile(r"[A-Za-z0-9 .,!?:;'()\[\]-]*")


class Messages(Kind):
    """actions: the lines, (N,) strings; "" of an agent that said nothing."""

    letter, name, noun = "M", "message", "messages"
    answer = f"one line of at most {LONGEST} characters"
    beliefs = False

    # The rules.

    def check(self, actions, game: Game) -> np.ndarray:
        actions = np.array(actions)
        wrong_type = actions.shape != (game.N,) or actions.dtype.kind != "U"
        if wrong_type or any(map(self.rule_broken, actions)):
            raise ValueError(f"messages must be {game.N} lines of at most {LONGEST} plain characters")
        return actions

    def rule_broken(self, line: str) -> str | None:
        if len(line) > LONGEST:
            return f"more than {LONGEST} characters"
        return None if LINE.fullmatch(line) else "a character that is not allowed"

    def fallback(self, N: int) -> Decision:
        """An agent whose reply is not compliant says nothing."""
        return Decision(self, "")

    def random(self, game: Game, seat: int, rng: np.random.Generator) -> Decision:
        """A greeting, or the announcement of random links."""
        if rng.random() < 0.5:
            return Decision(self, "hello")
        return Decision(self, f"I choose {LINKS.write(LINKS.random(game, seat, rng).action)}")

    # The text.

    def result(self, seen: Observation) -> str:
        lines = [f'{i} "{line}"' for i, line in enumerate(seen.last_actions, 1) if line]
        return f"Agents said: {', '.join(lines) or 'nothing'}. "

    def question(self, seen: Observation, style: PromptStyle) -> str:
        game = GAMES[seen.game]
        own = f"Your {game.type_name} {tell_type(seen)}{tell_hint(game.link_hint, seen, style)}"
        return f"Round {seen.round} messages. {own}. What do you say to all?"

    def write(self, action: str) -> str:
        return action

    def read(self, text: str, seat: int, N: int, cap: float):
        broken = self.rule_broken(text)
        return (None, broken) if broken else (text, None)

    def to_text(self, actions: np.ndarray) -> str:
        return json.dumps(actions.tolist())

    def from_text(self, text: str) -> np.ndarray:
        return np.array(json.loads(text))

    # Experts and rewards. There are no `stakes`, because a message pays nothing by itself.

    def expert_actions(self, expert: str, state: State) -> np.ndarray:
        """What each seat is about to do in the next stage of links or efforts, if all play by this rule."""
        game, stage = state.game, len(state.history) % len(state.game.stages)
        kind = next(KINDS[letter] for letter in (game.stages * 2)[stage:] if letter in "GE")
        propose, exert = RULES[expert]
        verb, actions = ("give", exert(state)) if kind is EFFORTS else ("choose", propose(state))
        planned = [kind.expert_decision(actions, game, i).action for i in range(game.N)]
        return np.array([f"I {verb} {kind.write(action)}" for action in planned])

    def expert_decision(self, actions: np.ndarray, game: Game, seat: int) -> Decision:
        return Decision(self, str(actions[seat]))

    def likeness(self, decision: Decision, target: Target) -> float:
        """2 for the very announcement of the expert, else 0."""
        return 2.0 * bool(decision.action == target.actions[target.seat])


MESSAGES = KINDS["M"] = Messages()

if __name__ == "__main__":
    import train_rft

    train_rft.main()
