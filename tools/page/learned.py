"""What RFT has changed, in one number: whom the policy links to, by what the link is said to be worth.

The prompts of the games state for every other agent what a link with it would earn, in units of c (the worked
number). At 1, or with a fee at 1 + fee, a link earns what it costs. A policy of one threshold links iff that
number is at least some value.
"""

import re
from collections.abc import Iterable

import numpy as np

from decisions import LINKS
from games import State
from prompts import observe, parse_reply, read_list
from tools.page.games import stages_of

EDGES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the bins of worked numbers
Choices = list[tuple[float, bool]]


def worked_numbers(state: State, seat: int) -> list[float]:
    """The worked number of a link with each agent, as the prompt states it (or, with --no-hints, would state
    it): the last list in it, if it has a number for each agent; else []."""
    lists = re.findall(r"\[[^\[\]]*\]", state.game.link_hint(observe(state, seat)))
    numbers = read_list(lists[-1]) if lists else None
    return list(map(float, numbers)) if numbers and len(numbers) == state.game.N else []


def choices_of(decisions: Iterable[tuple[State, int, str]]) -> Choices:
    """(worked number, whether a link was chosen) of each other agent, in all compliant link decisions among
    these. decisions: (state, seat, reply)."""
    choices = []
    for state, seat, reply in decisions:
        decision = parse_reply(reply, state, seat) if state.kind is LINKS else None
        if decision:
            numbers = enumerate(worked_numbers(state, seat))
            choices += [(number, bool(decision.action[j])) for j, number in numbers if j != seat]
    return choices


def best_threshold(choices: Choices, break_even: float = 1.0) -> dict | None:
    """The rule "link iff the worked number is at least t" that agrees with the largest share of the choices.
    t is one of the worked numbers, or a little more than the largest of them: never link. even: the share of
    the choices that agree with t = break_even."""
    if not choices:
        return None
    worth, linked = np.array(choices).T
    thresholds = np.unique(worth)
    thresholds = [*thresholds, thresholds[-1] + 0.01]
    agreed = [float(((worth >= t) == linked).mean()) for t in thresholds]
    best = int(np.argmax(agreed))
    even = float(((worth >= break_even) == linked).mean())
    return {"t": float(thresholds[best]), "agreed": agreed[best], "n": len(choices), "even": even}


def links_by_number(choices: Choices) -> list[list[int]]:
    """[links, choices] of every bin."""
    worth, linked = np.array(choices).reshape(-1, 2).T
    place = np.digitize(worth, EDGES)
    return [[int(linked[place == k].sum()), int((place == k).sum())] for k in range(len(EDGES) + 1)]


def held_out_choices(summary: dict) -> Choices:
    """Those of one row of the evaluation, in all its games."""
    games = range(len(summary["instances"]))
    played = [(state, said) for i in games for state, _, _, said in stages_of(summary, i)]
    return choices_of((state, seat, reply) for state, said in played for seat, reply in said)


def learned(results: dict[str, dict], expert: str) -> dict:
    """The bins and the best threshold before RFT, after it, and of the expert (unless it plays at random), in
    the held-out games. Nothing where those of the policy are not known."""
    rows = {"before RFT": "sft", "after RFT": next(iter(results), ""), "expert": f"expert:{expert}"}
    choices = {who: held_out_choices(results[row]) for who, row in rows.items() if row in results}
    known = choices.get("before RFT") and choices.get("after RFT")
    shown = {who: part for who, part in choices.items() if known and part and rows[who] != "expert:random"}
    bins = {who: links_by_number(part) for who, part in shown.items()}
    games = (row["instance"] for summary in results.values() for row in summary["instances"])
    break_even = 1 + next(games, {}).get("fee", 0)  # all games have the same fee
    thresholds = {who: best_threshold(part, break_even) for who, part in shown.items()}
    return {"edges": EDGES, "bins": bins, "thresholds": thresholds, "breakEven": break_even}
