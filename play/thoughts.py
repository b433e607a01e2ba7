"""What stands before the two lines of a label with `--think TOKENS` [choice]: the worked number of the
question, which the prompt then need not contain (--no-hints), behind the steps that lead to it. So the agent
learns to write out itself what helps to decide (docs/models.md, room to think)."""

import re

import numpy as np

from games import State
from prompts import Observation, PromptStyle, observe
from world.bcz import BCZ


def thought(state: State, seat: int, style: PromptStyle) -> str:
    """Steps and number as one line; "" without `think`, or where the question has no worked number."""
    game, letter, seen = state.game, state.kind.letter, observe(state, seat, style.information)
    hint = {"G": game.link_hint, "E": game.effort_hint}.get(letter)
    number = hint(seen) if hint and style.think else ""
    steps = STEPS.get((game.name, letter), lambda seen: "")
    return f"{steps(seen)}{number}.\n" if number else ""


def thought_of(label: str) -> str:
    """What stands before the two lines of a label."""
    return re.split(r"(?m)^[ \t]*(?:Belief|Decision):", label)[0]


def bcz_link_steps(seen: Observation) -> str:
    """The best responses to efforts alpha, then one product for each link."""
    delta, c, alpha_N = seen.parameters["delta"], seen.parameters["c"], seen.types
    response_N = BCZ.responses(seen)
    total, own = sum(alpha_N), response_N[seen.seat] * delta / c
    pairs = zip(alpha_N, response_N, strict=True)
    responses = ", ".join(f"{a:g} + {delta:.3f} x {total - a:g} = {x:.2f}" for a, x in pairs)
    share = f"{response_N[seen.seat]:.2f} x {delta:.3f} / {c:g} = {own:.3f}"
    others = np.delete(response_N, seen.seat)
    products = ", ".join(f"{own:.3f} x {x:.2f} = {own * x:.2f}" for x in others)
    return f"Alphas sum to {total:g}. {responses}. {share}. {products}. "


def bcz_effort_steps(seen: Observation) -> str:
    """One sum: the best response to efforts alpha."""
    delta, linked = seen.parameters["delta"], float(seen.links[seen.seat] @ np.array(seen.types))
    return f"{seen.own_type:g} + {delta:.3f} x {linked:g} = {seen.own_type + delta * linked:.2f}. "


# By the game's name and the kind of decision; they are asked only where there is a number.
STEPS = {("bcz", "G"): bcz_link_steps, ("bcz", "E"): bcz_effort_steps}
