"""What stands before the two lines of a label with `--think TOKENS` [choice]: the worked number of the
question, which the prompt then need not contain (--no-hints). So the agent learns to write out itself what
helps to decide (docs/models.md, room to think)."""

import re

from games import State
from prompts import PromptStyle, observe


def thought(state: State, seat: int, style: PromptStyle) -> str:
    """The number as one line; "" without `think`, or where the question has no worked number."""
    game, seen = state.game, observe(state, seat, style.information)
    hint = {"G": game.link_hint, "E": game.effort_hint}.get(state.kind.letter)
    number = hint(seen) if hint and style.think else ""
    return f"{number}.\n" if number else ""


def thought_of(label: str) -> str:
    """What stands before the two lines of a label."""
    return re.split(r"(?m)^[ \t]*(?:Belief|Decision):", label)[0]
