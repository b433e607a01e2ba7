"""What RFT has changed, in one number: whom the policy links to, by what the link is said to be worth.

The prompts of the games state for every other agent what a link with it would earn, in units of its cost (the
worked number). At 1, a link earns what it costs. A policy of one threshold links iff that number is at least
some value.
"""

import re
from collections.abc import Iterable

import numpy as np

from decisions import LINKS
from games import State, game_from_json
from play.expert_games import history_from_text
from prompts import observe, parse_reply
from rewards import Target

EDGES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the bins of worked numbers
Choices = list[tuple[float, bool]]


def worked_numbers(state: State, seat: int) -> list[float]:
    """The worked number of a link with each agent, as the prompt states it (or, with --no-hints, would state
    it); [] in a game that has none."""
    lists = re.findall(r"\[([^\[\]]*)\]", state.game.link_hint(observe(state, seat)))
    return [float(number) for number in lists[-1].split(",")] if lists else []


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


def training_choices(samples: list[dict], targets: dict[tuple, Target], author: str = "reply") -> Choices:
    """The choices of these lines of samples.jsonl, or with the author `expert` of the expert in their place.
    targets: by (game, stage, seat)."""
    asked = [(targets.get((s["game"], s["stage"], s["seat"])), s[author]) for s in samples]
    return choices_of((target.state, target.seat, text) for target, text in asked if target)


def best_threshold(choices: Choices) -> dict | None:
    """The rule "link iff the worked number is at least t" that agrees with the largest share of the choices.
    t is one of the worked numbers, or a little more than the largest of them: never link. even: the share of
    the choices that agree with t = 1."""
    if not choices:
        return None
    worth, linked = np.array(choices).T
    thresholds = np.unique(worth)
    thresholds = [*thresholds, thresholds[-1] + 0.01]
    agreed = [float(((worth >= t) == linked).mean()) for t in thresholds]
    best = int(np.argmax(agreed))
    even = float(((worth >= 1) == linked).mean())
    return {"t": float(thresholds[best]), "agreed": agreed[best], "n": len(choices), "even": even}


def links_by_number(choices: Choices) -> list[list[int]]:
    """[links, choices] of every bin."""
    worth, linked = np.array(choices).reshape(-1, 2).T
    place = np.digitize(worth, EDGES)
    return [[int(linked[place == k].sum()), int((place == k).sum())] for k in range(len(EDGES) + 1)]


def held_out_choices(summary: dict) -> Choices:
    """Those of one row of the evaluation, in all its games; [] in an older file, which has no actions."""
    decisions = []
    for row, actions, seats, replies in zip(
        *(summary.get(key, ()) for key in ("instances", "actions", "seats", "replies")), strict=False
    ):
        end, left = history_from_text(game_from_json(row["instance"]), actions), iter(replies)
        states = (end.before(stage) for stage in range(len(end.history)))
        decisions += [(state, seat, next(left)) for state in states for seat in seats]
    return choices_of(decisions)


def learned(samples: list[dict], targets: dict[tuple, Target], results: dict[str, dict], expert: str) -> dict:
    """The bins and the best threshold before RFT, after it, and of the expert (unless it plays at random): in
    the held-out games, else in the first step and the last quarter of training. Nothing where neither is
    known, or after a single step."""
    names = {"before RFT": "sft", "after RFT": next(iter(results), ""), "expert": f"expert:{expert}"}
    choices = {who: held_out_choices(results.get(name, {})) for who, name in names.items()}
    steps, where = sorted({s["step"] for s in samples}), "the held-out games"
    if not choices["before RFT"] or not choices["after RFT"]:
        choices, where = {}, "the groups of training"
        if targets and len(steps) > 1:
            late = steps[-max(1, len(steps) // 4) :]
            first, last = ([s for s in samples if s["step"] in part] for part in (steps[:1], late))
            choices["before RFT (step 0)"] = training_choices(first, targets)
            choices[f"late in RFT (steps {late[0]} to {late[-1]})"] = training_choices(last, targets)
            choices["expert"] = training_choices(first + last, targets, "expert")
    if expert == "random" or not choices.get("expert"):
        choices.pop("expert", None)
    bins = {who: links_by_number(part) for who, part in choices.items()}
    thresholds = {who: best_threshold(part) for who, part in choices.items()}
    return {"where": where, "edges": EDGES, "bins": bins, "thresholds": thresholds}
