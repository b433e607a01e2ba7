"""What is measured in played games, and the tables that show it. Needs no language model.

Metrics, [choice] where the paper only names them:
    U1      share of the policy's decisions that are compliant; Wilson interval
    s       graph score of its graph decisions against the expert's: see rewards.py; 0 if not compliant
    row     share of the N-1 other agents for whom a graph decision is the expert's; 0 if not compliant.
            Unlike s it sees proposals that nobody answers
    U2      strategic efficiency of a decision: 1 - (u_best - u) / (u_best - u_worst) given what the others
            actually play: over all 2^(N-1) own rows (payoff at the Nash efforts of the graph that would
            form), or over all efforts in [0, cap]; 1 where u_best = u_worst
    U3      cooperative outcome of a game: realised welfare / welfare of the first best (planner); games in
            which that is 0 are left out
    U3 gain (W - W_empty) / (W* - W_empty): 0 for nobody linking at Nash efforts, 1 for the first best; games
            without a difference are left out
    belief  graph: share of the others whose choice of the agent was foreseen; effort: mean over the others of
            max(0, 1 - |belief - effort| / max(effort, 0.05 cap)); 0 without a compliant reply that states one

The unit of analysis is the game instance: means over instances with 95 % t intervals. A reply that is not
compliant plays no links / effort 0, and counts; the columns `| ok` are U2 of compliant decisions and U3 of
games in which every decision of the policy was compliant. Where the policy sits in several seats, a game's
value is the mean over its seats. All of it is also reported for round 1 alone where games have more rounds.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

import games
from games import Game, State
from play.hindsight import effort_payoff, row_payoff, row_payoffs, tell_history
from prompts import Decision
from rewards import Target, accuracy, belief_accuracy, graph_score
from run.files import InputError, read_json

METRICS = ("U1", "s", "row", "U2", "U3", "U3 gain", "belief", "U2 | ok", "U3 | ok")
COMPARED = ("s", "row", "U2", "U3")  # those whose paired differences are printed


# -------------------- metrics


def strategic_efficiency(state: State, seat: int, actions: np.ndarray) -> float:
    """U2 of the decision that `seat` took among `actions`, all agents' actions of the stage."""
    game = state.game
    if state.kind == "G":
        u, all_u = row_payoff(state, seat, actions, actions[seat]), row_payoffs(state, seat, actions)
        best, worst = all_u.max(), all_u.min()
    else:
        u, nothing, cap = (
            effort_payoff(state, seat, actions, x) for x in (actions[seat], 0.0, game.caps[seat])
        )
        best = effort_payoff(state, seat, actions, game.best_response(state.links, actions)[seat])
        worst = min(nothing, cap)  # own payoff is concave in the own effort
    return 1.0 if best - worst < 1e-12 else 1 - (best - u) / (best - worst)


def measured(
    decision: Decision | None, state: State, seat: int, actions: np.ndarray, experts: np.ndarray | None
) -> dict[str, float | None]:
    """s, row, U2 and belief of what `seat` decided. actions: all agents' of the stage; experts: what the
    experts of all agents propose, which graph decisions are compared with."""
    s = row = None
    if state.kind == "G":
        s = graph_score(decision, Target(state, seat, experts))
        row = accuracy(decision.action, experts[seat], seat) if decision else 0.0
    belief = belief_accuracy(decision, Target(state, seat, actions))
    return {"s": s, "row": row, "U2": strategic_efficiency(state, seat, actions), "belief": belief}


@cache
def welfare_bounds(game: Game) -> tuple[float, float]:
    """(W* of the first best, W of nobody linking at Nash efforts)."""
    empty_NN = games.empty_graph(game.N)
    return game.efficient_graph("planner")[1], game.welfare(empty_NN, game.nash_efforts(empty_NN))


@dataclass
class Turn:
    """One decision of the policy. decision is None for a reply that is not compliant; repaired: not
    compliant, but a decision was read out of it and played (see prompts.repair_reply)."""

    round: int
    kind: str
    reply: str
    decision: Decision | None
    s: float | None  # graph decisions only
    row: float | None  # graph decisions only
    U2: float
    belief: float
    seat: int = 0
    repaired: bool = False


@dataclass
class Played:
    """One finished game: the policy's turns, realised welfare by round, all agents' actions by stage."""

    game: Game
    turns: list[Turn]
    welfares: list[float]
    history: tuple[np.ndarray, ...] = ()


# -------------------- results


def mean_interval(values) -> dict:
    """Mean and 95 % t interval over instances; nan and None are left out."""
    x = np.array([v for v in values if v is not None and not math.isnan(v)], float)
    if len(x) == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    half = _t95(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    low, high = (None, None) if math.isnan(half) else (float(x.mean() - half), float(x.mean() + half))
    return {"mean": float(x.mean()), "low": low, "high": high, "n": len(x)}


def _t95(df: int) -> float:
    """The 0.975 quantile of Student's t (a table below 10 degrees of freedom, then the Cornish-Fisher
    expansion)."""
    table = {
        1: 12.7062,
        2: 4.3027,
        3: 3.1824,
        4: 2.7764,
        5: 2.5706,
        6: 2.4469,
        7: 2.3646,
        8: 2.3060,
        9: 2.2622,
    }
    if df in table:
        return table[df]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def wilson_interval(successes: float, n: float) -> dict:
    """Share and 95 % Wilson interval."""
    z = 1.959964
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"mean": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def per_instance(played: Played, rounds: int | None = None) -> dict:
    """The metrics of one game, over its first `rounds` rounds."""
    rounds = rounds or played.game.rounds
    turns = [t for t in played.turns if t.round <= rounds]
    first_best, empty = welfare_bounds(played.game)
    W = float(np.mean(played.welfares[:rounds]))
    gain = (W - empty) / (first_best - empty) if first_best - empty > 1e-9 else None
    share = W / first_best if first_best > 1e-9 else None  # in some games nobody can do better than 0
    ok = [t for t in turns if t.decision is not None]
    return {
        "U1": len(ok) / len(turns),
        "s": float(np.mean([t.s for t in turns if t.kind == "G"])),
        "row": float(np.mean([t.row for t in turns if t.kind == "G"])),
        "U2": float(np.mean([t.U2 for t in turns])),
        "U3": share,
        "U3 gain": gain,
        "belief": float(np.mean([t.belief for t in turns])),
        "U2 | ok": _mean([t.U2 for t in ok]),
        "U3 | ok": share if len(ok) == len(turns) else None,
        "U2 graph": float(np.mean([t.U2 for t in turns if t.kind == "G"])),
        "U2 effort": float(np.mean([t.U2 for t in turns if t.kind == "E"])),
    }


def _compliance(turns: list[Turn], seats: float) -> dict:
    """U1. The decisions of several seats of a game are not independent: for the interval they count as those
    of one."""
    return wilson_interval(sum(t.decision is not None for t in turns) / seats, len(turns) / seats)


def summarise(games_played: list[Played]) -> dict:
    """{"all rounds" | "round 1": {metric: mean and interval}, "games": {game and stages: the same},
    "instances": per instance; of every game the policy's "replies", its "seats" (who replies, in that order,
    in each stage), and all agents' "actions" by stage (play/hindsight.py); "repaired": how many replies}."""
    seats = len({t.seat for t in games_played[0].turns})

    def table(rows, turns):
        return {"U1": _compliance(turns, seats)} | {
            m: mean_interval([row[m] for row in rows]) for m in rows[0] if m != "U1"
        }

    rows = [per_instance(p) for p in games_played]
    first = [per_instance(p, 1) for p in games_played]
    turns = [t for p in games_played for t in p.turns]
    parts: dict[str, list[int]] = {}
    for i, p in enumerate(games_played):
        parts.setdefault(p.game.label, []).append(i)

    def table_of(part):
        return table([rows[i] for i in part], [t for i in part for t in games_played[i].turns])

    return {
        "all rounds": table(rows, turns),
        "round 1": table(first, [t for t in turns if t.round == 1]),
        "games": {label: table_of(part) for label, part in parts.items()},
        "instances": [{"instance": p.game.to_json()} | row for p, row in zip(games_played, rows)],
        "replies": [[t.reply for t in p.turns] for p in games_played],
        "seats": [sorted({t.seat for t in p.turns}) for p in games_played],
        "actions": [tell_history(p.history) for p in games_played],
        "repaired": sum(t.repaired for t in turns),
    }


def of_seat(games_played: list[Played], seat: int) -> list[Played]:
    """The same games with the turns of one seat alone."""
    return [replace(p, turns=[t for t in p.turns if t.seat == seat]) for p in games_played]


def mean_over_seats(by_seat: list[list[Played]]) -> dict[str, dict]:
    """{metric: mean and interval} of several plays of the same games, each with the policy in another seat: a
    game counts once, with its mean over the plays."""
    rows = [[per_instance(p) for p in plays] for plays in zip(*by_seat)]  # [game][seat]
    turns = [t for of_one in by_seat for p in of_one for t in p.turns]

    def mean(metric):
        return [_mean([row[metric] for row in of_game if row[metric] is not None]) for of_game in rows]

    return {"U1": _compliance(turns, len(by_seat))} | {
        m: mean_interval(mean(m)) for m in rows[0][0] if m != "U1"
    }


def paired_difference(a: dict, b: dict, metric: str) -> dict:
    """a - b of two summaries over the same instances: mean and interval of the differences."""
    pairs = [(x[metric], y[metric]) for x, y in zip(a["instances"], b["instances"])]
    return mean_interval([x - y for x, y in pairs if x is not None and y is not None])


def tell_interval(v: dict, digits: int = 2, sign: str = "") -> str:
    """mean [low, high]; digits: of the interval; sign: "+" for differences; "-" where nothing is known."""
    if v["mean"] is None:
        return "-"
    ends = "" if v["low"] is None else f" [{v['low']:{sign}.{digits}f}, {v['high']:{sign}.{digits}f}]"
    return f"{v['mean']:{sign}.3f}{ends}"


def format_table(tables: dict[str, dict]) -> str:
    """One line per policy: mean [low, high] of every metric. tables: {policy: {metric: mean and
    interval}}."""

    rows = [["policy", *METRICS]]
    rows += [[name, *(tell_interval(table[m]) for m in METRICS)] for name, table in tables.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(text.ljust(w) for text, w in zip(row, widths)).rstrip() for row in rows)


def report(results: dict[str, dict], rounds: int) -> str:
    """The tables that are printed, and the paired differences of the first row to every other."""
    first, *others = results
    text = format_table({name: summary["all rounds"] for name, summary in results.items()})
    if rounds > 1:
        text += "\n\nround 1 alone\n" + format_table(
            {name: summary["round 1"] for name, summary in results.items()}
        )
    labels = results[first]["games"]
    for label in labels if len(labels) > 1 else ():
        text += f"\n\n{label} alone\n" + format_table(
            {name: summary["games"][label] for name, summary in results.items()}
        )
    differences = {
        name: {metric: paired_difference(results[first], results[name], metric) for metric in COMPARED}
        for name in others
    }
    return text + f"\n\n{first} minus the others, paired by instance:" + _difference_lines(differences)


def _difference_lines(differences: dict[str, dict[str, dict]]) -> str:
    text = ""
    for name, of_metric in differences.items():
        line = f"\n  - {name}: ".ljust(max(map(len, differences)) + 7)
        for metric, d in of_metric.items():
            line += f"{metric} {tell_interval(d, 3, '+')}".ljust(30)
        text += line.rstrip()
    return text


def read_results(path: str) -> dict[str, dict]:
    """The results in an eval.json. Raises InputError."""
    try:
        results = read_json(path)["results"]
        for summary in results.values():
            summary["instances"], [summary["all rounds"][m]["mean"] for m in METRICS]
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            f"{path} is not an eval.json of this version; give those that train_rft.py or --json wrote"
        ) from None
    return results


def report_seeds(paths: list[str]) -> str:
    """The tables of several runs' eval.json that differ in their training seed. Raises InputError."""
    runs = [read_results(path) for path in paths]
    played = [[i["instance"] for i in next(iter(run.values()))["instances"]] for run in runs]
    for path, of_run, run in zip(paths, played, runs):
        if of_run != played[0]:
            raise InputError(
                f"{path} was played on other games than {paths[0]}; give runs with the same flags"
            )
        if list(run)[0] != list(runs[0])[0]:
            raise InputError(
                f"{path} is a run of {list(run)[0]}, {paths[0]} of {list(runs[0])[0]}; give one kind"
            )
    return format_seeds(runs)


def format_seeds(runs: list[dict[str, dict]]) -> str:
    """The same of several runs that differ in their training seed: means over runs with 95 % t intervals over
    the runs' means, so they speak of training, not of one adapter. runs: the results of each."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    first, *others = names

    def over_runs(value):
        return mean_interval([value(run)["mean"] for run in runs])

    table = {name: {m: over_runs(lambda run: run[name]["all rounds"][m]) for m in METRICS} for name in names}
    differences = {
        name: {m: over_runs(lambda run: paired_difference(run[first], run[name], m)) for m in COMPARED}
        for name in others
    }
    text = f"{len(runs)} runs: means and 95 % t intervals over the means of the runs\n\n" + format_table(
        table
    )
    return (
        text
        + f"\n\n{first} minus the others, paired by instance within each run:"
        + _difference_lines(differences)
    )
