"""The games of the evaluation as every player played them, with the value of every other choice."""

from collections.abc import Iterator

import numpy as np

from decisions import EFFORTS, LINKS, own_rows, payoffs_with_effort, row_payoffs
from games import State, game_from_json
from play.cast import Partners, make_expert
from play.expert_games import history_from_text
from prompts import read_belief, read_reply
from tools.page.text import clean, escaped, rounded, tell_game, thinned

ROWS = 32  # as many rows are listed, and the chosen and the worst one: all for up to 6 agents
CURVE = 25  # efforts at which the payoff is drawn
METRICS = ("U1", "s", "row", "U2", "U3")


def decision_of(state: State, seat: int, actions: np.ndarray, reply: str) -> dict:
    """One decision of the policy: what it believed, and what every choice would have been worth. A kind of
    decision other than links and efforts has no values."""
    game, kind = state.game, state.kind
    _, broken = read_reply(reply, kind, seat, game.N, float(game.caps[seat]))
    decision = {"seat": seat, "reply": clean(reply), "broken": broken}
    decision |= {"belief": read_belief(reply, kind, seat, game.N)}
    decision |= {"U2": kind.efficiency(state, seat, actions)}
    if kind is LINKS:
        own, rows = "".join(map(str, actions[seat])), ["".join(map(str, r)) for r in own_rows(game.N, seat)]
        values = dict(zip(rows, row_payoffs(state, seat, actions), strict=True))
        ranked = [[row, values[row], k] for k, row in enumerate(sorted(rows, key=lambda r: -values[r]), 1)]
        listed = [r for r in ranked if r[2] <= ROWS or r[0] == own or r is ranked[-1]]
        decision |= {"true": actions[:, seat], "rows": listed, "count": len(ranked)}
        choice = {"own": own, "best": ranked[0][0], "chosen": values[own], "value": ranked[0][1]}
    elif kind is EFFORTS:
        own, best = float(actions[seat]), float(game.best_response(state.links, actions)[seat])
        efforts = [own, best, *np.linspace(0, game.caps[seat], CURVE)]
        chosen, value, *payoffs = (payoffs_with_effort(state, seat, actions, x)[seat] for x in efforts)
        decision |= {"true": actions, "curve": list(zip(efforts[2:], payoffs, strict=True))}
        choice = {"own": own, "best": best, "chosen": chosen, "value": value}
    else:
        return decision
    return decision | choice | {"regret": choice["value"] - choice["chosen"]}


def stages_of(summary: dict, i: int) -> Iterator[tuple[State, np.ndarray, State, list[tuple[int, str]]]]:
    """The i-th game of a row of the table, stage by stage: the state before, all agents' actions, the state
    after, and the policy's seats with their replies."""
    game, replies = game_from_json(summary["instances"][i]["instance"]), iter(summary["replies"][i])
    end = history_from_text(game, summary["actions"][i])
    for stage, actions in enumerate(end.history):
        said = [(seat, next(replies)) for seat in summary["seats"][i]]
        yield end.before(stage), actions, end.before(stage + 1), said


def played_of(summary: dict, i: int) -> dict:
    """The i-th game as one row of the table played it."""
    stages = []
    for before, actions, after, said in stages_of(summary, i):
        decisions = [decision_of(before, seat, actions, reply) for seat, reply in said]
        now = {"kind": before.kind.letter, "round": before.round, "actions": actions, "links": after.links}
        payoffs = after.round_results()[-1][2] if after.round > before.round else None
        stages.append(now | {"payoffs": payoffs, "decisions": decisions})
    played = {metric: summary["instances"][i].get(metric) for metric in METRICS}
    return played | {"seats": summary["seats"][i], "stages": stages}


def games_of(results: dict, budget: int, partners: list[str] | None = None) -> dict:
    """The games of the evaluation, by every row of the table that has played them. partners: the rules from
    which that of every other seat was drawn."""
    drawn = Partners([make_expert(name) for name in partners or () if name != "self"])
    own, games = next(iter(results.values()), {"instances": []}), []
    for i, row in enumerate(own["instances"]):
        game = game_from_json(row["instance"])
        links_NN, W = game.efficient_graph("planner")
        efforts_N = game.planner_efforts(links_NN)
        best = {"links": links_NN, "efforts": efforts_N, "payoffs": game.payoffs(links_NN, efforts_N), "W": W}
        facts = {"number": i, "instance": tell_game(game), "types": game.types, "type": game.type_name}
        facts["rules"] = [drawn.rule(game, seat).name for seat in range(game.N) if drawn.rules]
        players = {name: played_of(s, i) for name, s in results.items() if i < len(s["instances"])}
        games.append(rounded(facts | {"N": game.N, "best": best, "players": players}))
    sizes = [len(escaped(game)) for game in games]
    chosen = thinned(len(games), lambda part: sum(sizes[i] for i in part), budget)
    return {"games": [games[i] for i in chosen], "count": len(games)}
