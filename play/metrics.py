"""What is measured in games that are over, and the tables that show it. No language model is needed.

Each metric is a function of a Turn (one decision of the policy) or of an Episode (one game); METRICS names
them, and a new one is one entry there. They are a [choice] where the paper only names them; docs/settings.md
explains them at length. A reply that is not compliant plays no links or effort 0, which U2 and U3 measure; in
s, row and belief it counts as 0. Where a metric does not exist, as s for efforts, it is None and left out of
means. The unit of analysis is the game instance: means over instances with 95 % t intervals. Where the policy
sits in several seats, the value of a game is the mean over its seats.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from decisions import LINKS
from games import KINDS, Decision, Game, State, empty_graph
from play.expert_games import history_to_text
from rewards import Target, accuracy, belief_accuracy, graph_likeness
from run.errors import InputError, library_errors
from run.files import read_json


@dataclass(frozen=True, eq=False)
class Turn:
    """One decision of the policy. decision: that of the reply, None if it is not compliant; played: the same,
    or what play/repair.py read in the reply; actions: what all agents play in this stage; expert_actions:
    what the experts of all agents would play, None for kinds that no metric compares with them."""

    state: State
    seat: int
    reply: str
    decision: Decision | None
    played: Decision | None
    actions: np.ndarray
    expert_actions: np.ndarray | None

    @cached_property
    def U2(self) -> float | None:
        """1 - (u_best - u) / (u_best - u_worst): u is the own payoff of the decision given what the others
        play, u_best and u_worst that of the best and the worst choice in its place (decisions.py)."""
        return self.state.kind.efficiency(self.state, self.seat, self.actions)


@dataclass(frozen=True, eq=False)
class Episode:
    """One finished game: the policy's turns, realised welfare by round, all agents' actions by stage."""

    game: Game
    turns: list[Turn]
    welfares: list[float]
    history: tuple[np.ndarray, ...] = ()


# -------------------- the metrics


def compliant(turn: Turn) -> float:
    """U1: whether the reply is compliant, so the mean is the share of compliant replies."""
    return float(turn.decision is not None)


def graph_score(turn: Turn) -> float | None:
    """s: 1 - Hamming(G, G_expert) / (N (N-1)), where the experts' proposals with the policy's row in them
    form G, as in training (rewards.graph_likeness). Links alone."""
    return graph_likeness(turn.played, Target(turn.state, turn.seat, turn.expert_actions))


def row_agreement(turn: Turn) -> float | None:
    """row: the share of the other agents whom a decision about links treats as the expert does. Unlike s it
    sees proposals that nobody answers. Links alone."""
    if turn.state.kind is not LINKS:
        return None
    return accuracy(turn.played.action, turn.expert_actions[turn.seat], turn.seat) if turn.played else 0.0


def efficiency(turn: Turn) -> float | None:
    """U2: see Turn.U2."""
    return turn.U2


@cache
def welfare_bounds(game: Game) -> tuple[float, float]:
    """(W* of the first best, W of nobody linking at Nash efforts)."""
    empty_NN = empty_graph(game.N)
    return game.efficient_graph("planner")[1], game.welfare(empty_NN, game.nash_efforts(empty_NN))


def welfare_share(episode: Episode) -> float | None:
    """U3: W / W*, the welfare of a round (mean over rounds) as a share of that of the first best."""
    first_best, _ = welfare_bounds(episode.game)
    return float(np.mean(episode.welfares)) / first_best if first_best > 1e-9 else None


def welfare_gain(episode: Episode) -> float | None:
    """(W - W_empty) / (W* - W_empty): 0 for nobody linking, 1 for the first best."""
    first_best, empty = welfare_bounds(episode.game)
    gain = float(np.mean(episode.welfares)) - empty
    return gain / (first_best - empty) if first_best - empty > 1e-9 else None


def belief(turn: Turn) -> float | None:
    """How well the Belief line foresees what the others then play, in [0, 1] (rewards.belief_accuracy)."""
    return belief_accuracy(turn.played, Target(turn.state, turn.seat, turn.actions))


def gap(turn: Turn) -> float | None:
    """What the agent would have gained by its best choice, as a share of W* / N. In self-play this is how
    much a best-replying seat exploits the policy."""
    stakes, game = turn.state.kind.stakes(turn.state, turn.seat, turn.actions), turn.state.game
    first_best, _ = welfare_bounds(game)
    return (stakes.best - stakes.chosen) * game.N / first_best if stakes and first_best > 1e-9 else None


def mean_of(metric: Callable[[Turn], float | None], where=lambda turn: True):
    """The metric of a game that is the mean of a metric of decisions, over the turns that `where` selects."""
    return lambda episode: mean_interval(metric(t) for t in episode.turns if where(t))["mean"]


METRICS: dict[str, Callable[[Episode], float | None]] = {
    "U1": mean_of(compliant),  # its interval is Wilson's
    "s": mean_of(graph_score),
    "row": mean_of(row_agreement),
    "U2": mean_of(efficiency),
    "U3": welfare_share,
    "U3 gain": welfare_gain,
    "belief": mean_of(belief),
    "gap": mean_of(gap),
    "U2 | ok": mean_of(efficiency, compliant),
    "U3 | ok": lambda episode: welfare_share(episode) if all(map(compliant, episode.turns)) else None,
}
DETAILS = ("U3 gain", "gap", "U2 | ok", "U3 | ok")  # are in eval.json, and not in printed tables
COMPARED = ("s", "row", "U2", "U3")  # those whose paired differences are printed
CONSTANTS = "always-link", "never-link"  # the experts that give the same answer everywhere
# What a metric can be, for the intervals that are shown; of others nothing is known.
LIMITS = dict.fromkeys(("U1", "s", "row", "U2", "belief", "U2 | ok"), (0.0, 1.0))
LIMITS |= dict.fromkeys(("U3", "U3 gain", "U3 | ok"), (-math.inf, 1.0)) | {"gap": (0.0, math.inf)}


def per_instance(episode: Episode) -> dict[str, float | None]:
    """The metrics of one game; U2 also for each kind of decision."""
    values = {name: metric(episode) for name, metric in METRICS.items()}
    for kind in (kind for letter, kind in KINDS.items() if letter in episode.game.stages):
        values[f"U2 {kind.name}"] = mean_of(efficiency, lambda t, kind=kind: t.state.kind is kind)(episode)
    return values


# -------------------- means and intervals

UNKNOWN = {"mean": None, "low": None, "high": None, "n": 0}
Z95 = 1.959964  # the 0.975 quantile of the normal distribution
# Those of Student's t with 1, 2, ... degrees of freedom
T95 = 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622


def _t95(df: int) -> float:
    """From the table, then by the Cornish-Fisher expansion."""
    if df <= len(T95):
        return T95[df - 1]
    z, second = Z95, (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * df**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    return z + (z**3 + z) / (4 * df) + second + third


def mean_interval(values: Iterable[float | None]) -> dict:
    """Mean and 95 % t interval over instances; nan and None are left out."""
    x = np.array([v for v in values if v is not None and not math.isnan(v)], float)
    if len(x) == 0:
        return dict(UNKNOWN)
    interval = {"mean": float(x.mean()), "low": None, "high": None, "n": len(x)}
    if len(x) > 1:
        half = _t95(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        interval |= {"low": float(x.mean() - half), "high": float(x.mean() + half)}
    return interval


def median_interval(values: Iterable[float | None]) -> dict:
    """Median and 95 % interval between order statistics, whatever the distribution: at least as many values
    lie on each side of the true median with the probability of so many heads of n coins. None is left out."""
    x = np.sort([v for v in values if v is not None])
    if not len(x):
        return dict(UNKNOWN)
    heads = np.cumsum([math.comb(len(x), k) / 2 ** len(x) for k in range(len(x))])
    k = int((heads <= 0.025).sum())
    ends = (float(x[k - 1]), float(x[-k])) if k else (None, None)
    return {"mean": float(np.median(x)), "low": ends[0], "high": ends[1], "n": len(x)}


def possible(metric: str, v: dict, difference: bool = False) -> dict:
    """The interval without what the metric, or a difference of two, cannot be: that of a few games would
    often be wider."""
    low, high = LIMITS.get(metric, (-math.inf, math.inf))
    low, high = (low - high, high - low) if difference else (low, high)
    return v if v["low"] is None else v | {"low": max(low, v["low"]), "high": min(high, v["high"])}


def wilson_interval(successes: float, n: float) -> dict:
    """Share and 95 % Wilson interval."""
    z, share = Z95, successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"mean": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def _intervals(rows: list[dict[str, float | None]], turns: list[Turn], seats: int) -> dict[str, dict]:
    """{metric: mean and interval} over games. rows: the metrics of each; turns: all of theirs. In that of U1
    the decisions of several seats count as those of one, because they are not independent."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: mean_interval(row.get(name) for row in rows) for name in names}
    return table | {"U1": wilson_interval(sum(map(compliant, turns)) / seats, len(turns) / seats)}


def summarise(episodes: list[Episode]) -> dict:
    """{"all rounds" | "round 1" | ...: {metric: mean and interval}, "games": {game and stages: the same},
    "instances": per instance; of every game the policy's "replies", its "seats" (who replies, in that order,
    in each stage), and all agents' "actions" by stage (as text); "repaired": how many replies}."""
    seats = len({t.seat for t in episodes[0].turns})

    def table(pairs):  # of games with their metrics
        return _intervals([row for _, row in pairs], [t for p, _ in pairs for t in p.turns], seats)

    def in_round(episode: Episode, r: int) -> Episode:
        turns = [t for t in episode.turns if t.state.round == r]
        return replace(episode, turns=turns, welfares=episode.welfares[r - 1 : r])

    rounds: dict[str, list[Episode]] = {}
    for p in episodes:
        for r in range(1, p.game.rounds + 1):
            rounds.setdefault(f"round {r}", []).append(in_round(p, r))
    pairs = [(p, per_instance(p)) for p in episodes]
    labels = dict.fromkeys(p.game.label for p in episodes)
    return {
        "all rounds": table(pairs),
        **{name: table([(p, per_instance(p)) for p in part]) for name, part in rounds.items()},
        "games": {label: table([pair for pair in pairs if pair[0].game.label == label]) for label in labels},
        "instances": [{"instance": p.game.to_json()} | row for p, row in pairs],
        "replies": [[t.reply for t in p.turns] for p in episodes],
        "seats": [sorted({t.seat for t in p.turns}) for p in episodes],
        "actions": [history_to_text(State(p.game, p.history)) for p in episodes],
        "repaired": sum(bool(t.played and not t.decision) for p in episodes for t in p.turns),
    }


def mean_over_seats(by_seat: list[list[Episode]]) -> dict[str, dict]:
    """{metric: mean and interval} of several plays of the same games, each with the policy in another seat: a
    game counts once, with its mean over the plays."""
    rows = []
    for plays in zip(*by_seat, strict=True):  # of one game
        values = [per_instance(episode) for episode in plays]
        rows.append({name: mean_interval(row[name] for row in values)["mean"] for name in values[0]})
    return _intervals(rows, [t for plays in by_seat for p in plays for t in p.turns], len(by_seat))


def paired_difference(a: dict, b: dict, metric: str, centre=mean_interval) -> dict:
    """a - b of two summaries over the same instances: mean and interval of the differences (or what `centre`
    makes of them). A person may have played only the first instances."""
    instances = zip(a["instances"], b["instances"], strict=False)
    pairs = [(x.get(metric), y.get(metric)) for x, y in instances]
    return centre(x - y for x, y in pairs if x is not None and y is not None)


# -------------------- tables


def tell_interval(v: dict, digits: int = 2, sign: str = "", short: bool = False) -> str:
    """`mean [low, high]`, or with `short` `mean ±half its width` if it is symmetric, as t intervals are, and
    ends of exactly 0 or 1 without decimals; "-" where nothing is known. digits: of the interval; sign: "+"
    for differences."""
    if v["low"] is None:
        return "-" if v["mean"] is None else f"{v['mean']:{sign}.3f}"
    mean, low, high = v["mean"], v["low"], v["high"]
    if short and abs(low + high - 2 * mean) < 1e-9:
        return f"{mean:{sign}.3f} ±{high - mean:.{digits}f}"
    ends = (f"{end:g}" if short and end in (0, 1) else f"{end:{sign}.{digits}f}" for end in (low, high))
    return f"{mean:{sign}.3f} [{', '.join(ends)}]"


def align(rows: list[list[str]]) -> str:
    """The rows as lines of up to 120 characters, in columns as wide as their longest text. A long first text,
    such as the folder of an adapter, stands in a line of its own."""
    first, *widths = (max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    first, lines = min(first, 32, max(20, 122 - sum(widths))), []
    for name, *cells in rows:
        start = name.ljust(first) if len(name) + 2 <= first else f"{name}\n{' ' * first}"
        cells = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append((start + "".join(cells)).rstrip())
    return "\n".join(lines)


def format_table(tables: dict[str, dict], metrics=None, digits: int = 2, sign: str = "") -> str:
    """One line per policy: mean and interval of these metrics, or of all but DETAILS. tables: {policy:
    {metric: both}}; intervals are cut off at what is possible. sign: "+" for differences."""
    metrics = metrics or [name for name in METRICS if name not in DETAILS]
    rows = [["policy", *metrics]]
    for name, table in tables.items():
        values = [possible(m, table.get(m, UNKNOWN), bool(sign)) for m in metrics]
        rows.append([name, *(tell_interval(v, digits, sign, True) for v in values)])
    return align(rows)


def report_differences(first: str, others: list[str], difference: Callable[[str, str], dict]) -> str:
    """difference: (name of another, metric) -> mean and interval of first - other."""
    tables = {name: {m: difference(name, m) for m in COMPARED} for name in others}
    return f"\n\n{first} minus the others, paired by instance\n" + format_table(tables, COMPARED, 3, "+")


def report_rounds(names: list[str], rounds: int, value: Callable[[str, str], dict]) -> str:
    """Nothing for games of one round. value: (name of a policy, `round R`) -> mean and interval."""
    columns = [f"round {r}" for r in range(1, rounds + 1)]
    tables = {name: {r: value(name, r) for r in columns} for name in names}
    return f"\n\nU2 of links by round\n{format_table(tables, columns)}" if rounds > 1 else ""


def links_in_round(summary: dict, name: str) -> dict:
    return summary.get(name, {}).get("U2 graph", UNKNOWN)


def about_constant(results: dict[str, dict]) -> str:
    """What is to be known where a row links with everybody and proposals are free; else ""."""
    row = results.get("expert:always-link")
    if row is None or row["instances"][0]["instance"].get("fee"):
        return ""
    return (
        "always-link gives the same answer everywhere: in the paper's game an unanswered proposal is free.\n"
        "With the fee of docs/others.md no constant answer is good."
    )


def report(results: dict[str, dict]) -> str:
    """The tables that are printed, and the paired differences of the first row to every other."""
    first, *others = results
    text, parts = format_table({name: s["all rounds"] for name, s in results.items()}), {}
    rounds = results[first]["instances"][0]["instance"]["rounds"]
    if rounds > 1:
        parts["round 1"] = {name: s["round 1"] for name, s in results.items()}
    if len(results[first]["games"]) > 1:
        for label in results[first]["games"]:
            parts[label] = {name: s["games"][label] for name, s in results.items()}
    for label, tables in parts.items():
        text += f"\n\n{label} alone\n{format_table(tables)}"
    text += report_rounds(list(results), rounds, lambda name, r: links_in_round(results[name], r))
    text += report_differences(
        first, others, lambda name, m: paired_difference(results[first], results[name], m)
    )
    return f"{text}\n\n{about_constant(results)}".rstrip("\n")


def report_seeds(paths: list[str]) -> str:
    """The tables of several runs' eval.json that differ in their training seed: means over runs with 95 % t
    intervals over the runs' means, so they describe training and not one adapter. Metrics that are newer than
    a file may be missing in it. Raises InputError."""
    runs: list[dict] = []
    partners: list[list[str] | None] = []
    for path in paths:
        with library_errors(f"{path} is not an eval.json that train_rft.py or --json wrote"):
            written = read_json(path)
            runs.append(written["results"])
            partners.append(written.get("arguments", {}).get("partners"))
            for summary in runs[-1].values():
                summary["instances"][0]["instance"], summary["all rounds"]["U1"]["mean"]
    first, *rest = runs[0]
    for path, run, others in zip(paths, runs, partners, strict=True):
        games, expected = ([row["instance"] for row in r[next(iter(r))]["instances"]] for r in (run, runs[0]))
        if next(iter(run)) != first or games != expected or others != partners[0]:
            raise InputError(f"{path} and {paths[0]} are not runs of one kind on the same games")
    names = [first, *(name for name in rest if all(name in run for run in runs))]

    def mean(name, m):
        return mean_interval(run[name]["all rounds"].get(m, UNKNOWN)["mean"] for run in runs)

    def difference(name, m):
        return mean_interval(paired_difference(run[first], run[name], m)["mean"] for run in runs)

    text = f"{len(runs)} runs: means and 95 % t intervals over the means of the runs\n\n"
    text += format_table({name: {m: mean(name, m) for m in METRICS} for name in names})
    text += report_rounds(
        names,
        runs[0][first]["instances"][0]["instance"]["rounds"],
        lambda name, r: mean_interval(links_in_round(run[name], r)["mean"] for run in runs),
    )
    return text + report_differences(first, names[1:], difference)
