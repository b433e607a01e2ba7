"""What RFT has changed in one number: whom the policy links to, against what the link is said to be worth.

The prompts of the games tell for every other agent what a link with it would earn, in units of its cost (the
worked number). The best policy of one threshold links iff that number is at least some value.
"""

import re

import numpy as np

from games import State, game_from_json, observe
from play import hindsight
from prompts import parse_reply

EDGES = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the bins


def worked_numbers(state: State, seat: int) -> np.ndarray | None:
    """What the prompt says (or, without hints, would say) of a link with each agent, (N,); None for
    nothing."""
    lists = re.findall(r"\[([^\[\]]*)\]", state.game.link_hint(observe(state, seat)))
    return np.array([float(v) for v in lists[-1].split(",")]) if lists else None


def choices(state: State, seat: int, row_N) -> list[tuple[float, bool]]:
    """(worked number, linked?) of each other agent."""
    worth_N = worked_numbers(state, seat)
    if worth_N is None or row_N is None:
        return []
    return [(float(worth_N[j]), bool(row_N[j])) for j in range(state.game.N) if j != seat]


def of_samples(samples: list[dict], prompts: dict[tuple, dict], steps: set[int], who: str) -> list[tuple]:
    """The choices of the compliant link decisions of these steps; who: `reply` or `expert`."""
    found = []
    for s in samples:
        state = prompts[s["game"], s["stage"], s["seat"]].get("state")
        if s["kind"] == "G" and s["step"] in steps and state is not None:
            decision = parse_reply(s[who], "G", s["seat"], state.game.N, 0)
            found += choices(state, s["seat"], decision.action) if decision else []
    return found


def of_games(summary: dict) -> list[tuple]:
    """The same of the games of the evaluation."""
    found = []
    for row, told, seats, replies in zip(*(summary[k] for k in ("instances", "actions", "seats", "replies"))):
        end, left = hindsight.read_history(game_from_json(row["instance"]), told), iter(replies)
        for stage in range(len(end.history)):
            state = end.before(stage)
            for seat, reply in [(seat, next(left)) for seat in seats]:
                decision = parse_reply(reply, state.kind, seat, state.game.N, 0)
                if state.kind == "G" and decision:
                    found += choices(state, seat, decision.action)
    return found


def best_cut(worth: np.ndarray, linked: np.ndarray) -> tuple[np.ndarray, int, float]:
    """(the different worked numbers, rising; k; share): "link iff it is one of them from the k-th on" is most
    often what was chosen, in this share of the choices."""
    ends = np.unique(worth)
    agreed = [float(((worth >= end) == linked).mean()) for end in [*ends, np.inf]]
    best = int(np.argmax(agreed))
    return ends, best, agreed[best]


def best_threshold(found: list[tuple]) -> dict | None:
    """Which "link iff the worked number is at least t" is most often what was chosen, and how often."""
    if not found:
        return None
    worth, linked = np.array([w for w, _ in found]), np.array([chosen for _, chosen in found])
    ends, best, agreed = best_cut(worth, linked)
    candidates = [ends[0] - 0.01, *((ends[1:] + ends[:-1]) / 2), ends[-1] + 0.01]
    return {"t": candidates[best], "agreed": agreed, "n": len(found)}


def table(found: dict[str, list[tuple]]) -> dict:
    """{who: [links, choices] by bin} and the best threshold of each."""
    bins = {}
    for who, of_one in found.items():
        worth, linked = np.array([w for w, _ in of_one]), np.array([chosen for _, chosen in of_one])
        place = np.digitize(worth, EDGES) if of_one else np.array([])
        bins[who] = [[int(linked[place == k].sum()), int((place == k).sum())] for k in range(len(EDGES) + 1)]
    return {"bins": bins, "thresholds": {who: best_threshold(of_one) for who, of_one in found.items()}}


def learned(samples: list[dict], prompts: dict[tuple, dict], results: dict) -> dict:
    """The tables before and after RFT: in the games of the evaluation, and in the groups of training."""
    found, names = {"edges": EDGES, "sources": {}}, list(results)
    if "sft" in results and all("actions" in results[name] for name in results):
        expert = next((n for n in names if n.startswith("expert:") and n != "expert:random"), None)
        shown = {"before RFT (sft)": "sft", f"after RFT ({names[0]})": names[0], f"{expert}": expert}
        of_all = {label: of_games(results[name]) for label, name in shown.items() if name}
        found["sources"]["games of the evaluation"] = table(of_all)
    steps = sorted({s["step"] for s in samples})
    if any("state" in p for p in prompts.values()) and len(steps) > 1:
        late = steps[-max(1, len(steps) // 4) :]
        of_all = {
            "step 0, the SFT policy": of_samples(samples, prompts, {steps[0]}, "reply"),
            f"steps {late[0]} to {late[-1]}": of_samples(samples, prompts, set(late), "reply"),
            "expert": of_samples(samples, prompts, {steps[0], *late}, "expert"),
        }
        found["sources"]["groups of training"] = table(of_all)
    return found
