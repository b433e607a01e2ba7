"""The games of the evaluation as every player played them, with what every other choice was worth."""

import numpy as np

from games import Game, State, game_from_json, own_rows
from play import hindsight
from play.metrics import strategic_efficiency
from prompts import broken_rule, read_belief
from tools.page.text import clean, escaped, rounded, tell_game, thinned

ROWS = 32  # values of rows that are listed: all for up to 6 agents
CURVE = 25  # efforts at which the payoff is drawn


def decision_of(state: State, seat: int, actions: np.ndarray, reply: str) -> dict:
    """One decision of the policy: what it believed, and what every choice would have been worth."""
    game, kind = state.game, state.kind
    place = kind, seat, game.N, float(game.caps[seat])
    seen = {"seat": seat, "reply": clean(reply), "broken": broken_rule(reply, *place)}
    seen |= {
        "belief": read_belief(reply, kind, seat, game.N),
        "U2": strategic_efficiency(state, seat, actions),
    }
    if kind == "G":
        seen["true"], own = actions[:, seat], "".join(map(str, actions[seat]))
        rows = ["".join(map(str, row)) for row in own_rows(game.N, seat)]
        values = sorted(zip(hindsight.row_payoffs(state, seat, actions), rows), key=lambda v: -v[0])
        ranked = [[row, value, rank] for rank, (value, row) in enumerate(values, 1)]
        listed = [
            v for v in ranked if len(ranked) <= ROWS or v[2] <= ROWS - 8 or v[0] == own or v is ranked[-1]
        ]
        chosen = next(value for row, value, _ in ranked if row == own)
        seen |= {"rows": listed, "count": len(ranked), "own": own, "best": ranked[0][0]}
        return seen | {"chosen": chosen, "value": ranked[0][1], "regret": ranked[0][1] - chosen}
    best = float(game.best_response(state.links, actions)[seat])
    chosen, value = (hindsight.effort_payoff(state, seat, actions, x) for x in (actions[seat], best))
    xs = np.linspace(0, game.caps[seat], CURVE)
    curve = [[x, hindsight.effort_payoff(state, seat, actions, x)] for x in xs]
    seen |= {"true": actions, "curve": curve, "own": actions[seat], "best": best}
    return seen | {"chosen": chosen, "value": value, "regret": value - chosen}


def played_of(game: Game, summary: dict, i: int) -> dict:
    """A game as one row of the table played it, stage by stage."""
    seen = {m: summary["instances"][i].get(m) for m in ("U1", "s", "row", "U2", "U3")}
    if "actions" not in summary:
        return seen
    end, seats = hindsight.read_history(game, summary["actions"][i]), summary["seats"][i]
    replies, stages = iter(summary["replies"][i]), []
    for stage, actions in enumerate(end.history):
        before, after = end.before(stage), end.before(stage + 1)
        over = len(after.history) % len(game.stages) == 0
        decisions = [decision_of(before, seat, actions, next(replies)) for seat in seats]
        seen_now = {"kind": before.kind, "round": before.round, "actions": actions, "links": after.links}
        payoffs = after.round_results()[-1][2] if over else None
        stages.append(seen_now | {"payoffs": payoffs, "decisions": decisions})
    return seen | {"seats": seats, "stages": stages}


def games_of(results: dict, budget: int) -> dict:
    """The games of the evaluation, by every row of the table that has played them."""
    own = next(iter(results.values()), {"instances": []})
    found = []
    for i, row in enumerate(own["instances"]):
        game = game_from_json(row["instance"])
        links_NN, W = game.efficient_graph("planner")
        efforts_N = game.planner_efforts(links_NN)
        best = {"links": links_NN, "efforts": efforts_N, "payoffs": game.payoffs(links_NN, efforts_N), "W": W}
        seen = {"instance": tell_game(game), "types": game.types, "type": game.type_name, "N": game.N}
        players = {name: played_of(game, s, i) for name, s in results.items() if i < len(s["instances"])}
        found.append(rounded(seen | {"best": best, "players": players}))
    sizes = [len(escaped(game)) for game in found]
    kept = thinned(len(found), lambda kept: sum(sizes[i] for i in kept), budget)
    return {"games": [found[i] | {"number": i} for i in kept], "count": len(found)}
