"""ToMPO without a language model: where do the weights of the two levels lead, if nothing else is in the way?

    python -m docs.two_levels --figure results/levels.png      # half an hour on one core; prints a table

The groups, the rewards and the advantages are those of training; only the policy is a table. In every game
each agent has a probability of choosing each other agent, and a number k for its effort x = Nash effort
+ k (planner effort - Nash effort) + noise, both those of the graph that has formed. All seats are trained in
self-play with rewards from the game (variants/game.py): the sample level is the own payoff, the graph level
the welfare. What comes out is one point for each pair of weights: U2, how good the decisions are for the
agents themselves, and U3, the welfare as a share of the largest possible.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from decisions import EFFORTS, LINKS
from games import Decision, Game, State
from play.cast import make_expert
from play.intervals import mean_interval
from play.metrics import Episode, welfare_share
from play.report import align
from prompts import Reply
from rewards import Memory, Sample, Target
from run.curves import png
from run.errors import reports_errors
from run.files import refuse_missing_folder, write_atomic
from run.values import number
from tompo import two_levels
from train_rft import advantages
from variants.game import game_rewards
from variants.objective import ADVANTAGES
from world.draws import Family, held_out_games

GAMES, STEPS, M, PLAYS = 6, 60, 8, 4  # games, each played in every step; replies of a group; plays at the end
NOISE = 0.2  # of an effort, as a share of the way from Nash to planner effort
WEIGHTS = ((1.0, 0.0), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.0, 1.0))  # of A^S and A^G
# name -> (how a level is normalised, the lengths of the steps of links and of efforts, the weight of both
# bonuses of the graph level). Without the division by the spread, advantages of efforts are small.
SERIES = {
    "std": (ADVANTAGES["std"], 2.0, 0.5, 0.0),
    "mean": (ADVANTAGES["mean"], 8.0, 60.0, 0.0),
    "std with bonuses": (ADVANTAGES["std"], 2.0, 0.5, 0.5),
}
LANDMARKS = ("second-best", "planner")


@dataclass
class Play:
    """One round: what all agents choose, and in which state."""

    first: State
    proposals_NN: np.ndarray
    second: State
    efforts_N: np.ndarray

    @classmethod
    def of(cls, game: Game, choose: Callable[[State, int], np.ndarray | float]) -> "Play":
        """choose: (state, seat) -> the action of that seat."""
        seats, first = range(game.N), State(game)
        proposals_NN = np.array([choose(first, i) for i in seats])
        second = first.step(proposals_NN)
        return cls(first, proposals_NN, second, np.array([choose(second, i) for i in seats]))

    @property
    def U2(self) -> float:
        seats = range(self.first.game.N)
        links = [LINKS.efficiency(self.first, i, self.proposals_NN) for i in seats]
        efforts = [EFFORTS.efficiency(self.second, i, self.efforts_N) for i in seats]
        return float(np.mean(links + efforts))

    @property
    def U3(self) -> float:
        W = self.first.game.round_payoffs(self.proposals_NN, self.efforts_N).sum()
        return welfare_share(Episode(self.first.game, [], [W]))


@dataclass
class Table:
    """The policy of one game. logits (N, N): of whom each agent chooses; k (N,): see above."""

    game: Game
    logits_NN: np.ndarray = field(init=False)
    k_N: np.ndarray = field(init=False)

    def __post_init__(self):
        self.logits_NN, self.k_N = np.zeros((self.game.N, self.game.N)), np.full(self.game.N, 0.5)

    def chances(self, seat: int) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logits_NN[seat]))

    def row(self, seat: int, rng: np.random.Generator) -> np.ndarray:
        row_N = (rng.random(self.game.N) < self.chances(seat)).astype(int)
        row_N[seat] = 0
        return row_N

    def effort(self, state: State, seat: int, z: float) -> float:
        """z: the noise, a standard normal number."""
        nash, planner = (self.game.solve_efforts(name, state.links)[seat] for name in ("nash", "planner"))
        effort = nash + (self.k_N[seat] + NOISE * z) * (planner - nash)
        return float(np.clip(effort, 0, self.game.caps[seat]))

    def play(self, rng: np.random.Generator) -> Play:
        def choose(state, i):
            return self.row(i, rng) if state.kind is LINKS else self.effort(state, i, rng.standard_normal())

        return Play.of(self.game, choose)


def played_by_expert(name: str, game: Game) -> Play:
    expert, rng = make_expert(name), np.random.default_rng(0)
    return Play.of(game, lambda state, i: expert(state, i, rng).action)


def step(tables: list[Table], memory: Memory, weights: tuple[float, float], series: str, rng) -> None:
    """One step of ToMPO on the tables: M decisions in every place of a new play, their rewards and
    advantages, and the policy gradient."""
    advantage, link_rate, effort_rate, bonus = SERIES[series]
    targets, groups, owners = [], [], []

    def add(table, target, decisions):
        targets.append(target)
        groups.append([Sample(Reply("", [], [], True), decision) for decision in decisions])
        owners.append(table)

    noise_M = rng.standard_normal(M)
    for table in tables:
        play = table.play(rng)
        for i in range(table.game.N):
            rows = [Decision(LINKS, table.row(i, rng)) for _ in range(M)]
            add(table, Target(play.first, i, play.proposals_NN), rows)
            efforts = [Decision(EFFORTS, table.effort(play.second, i, z)) for z in noise_M]
            add(table, Target(play.second, i, play.efforts_N), efforts)
    game_rewards(targets, groups, memory, weights={"local": bonus, "global": bonus})
    memory.update(targets, groups)
    A_S, A_G = (advantages(groups, name, advantage) for name in ("r_S", "R_G"))
    for k, (table, target, group) in enumerate(zip(owners, targets, groups, strict=True)):
        A_M, i = two_levels(A_S[k], A_G[k], *weights).numpy(), target.seat
        if target.kind is LINKS:  # d log pi / d logit = action - chance
            rows_MN = np.array([o.decision.action for o in group])
            table.logits_NN[i] += link_rate * (A_M[:, None] * (rows_MN - table.chances(i))).mean(0)
        else:  # d log pi / d k = z / NOISE, and a step as long as the noise
            k = table.k_N[i] + effort_rate * NOISE * (A_M * noise_M).mean()
            table.k_N[i] = np.clip(k, -0.5, 1.5)  # beyond 0 or 1 PGG's efforts are at an end of their range


def trained(games: list[Game], weights: tuple[float, float], series: str, seed: int) -> dict[str, float]:
    """Means over PLAYS plays of every game with trained tables: U2, U3, the share of links; and k."""
    rng, tables, memory = np.random.default_rng(seed), [Table(game) for game in games], Memory()
    for _ in range(STEPS):
        step(tables, memory, weights, series, rng)
    plays = [table.play(rng) for table in tables for _ in range(PLAYS)]
    links = [play.second.links.sum() / (play.first.game.N * (play.first.game.N - 1)) for play in plays]
    k = [table.k_N for table in tables]
    values = {"U2": [p.U2 for p in plays], "U3": [p.U3 for p in plays], "links": links, "k": k}
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def draw(points: dict, landmarks: dict) -> bytes:
    """A column for each game, U3 above and U2 below, over the weight of the graph level; dotted: experts."""
    from matplotlib.figure import Figure  # it needs no screen

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, by_series) in zip(figure.subplots(2, len(points)).T, points.items(), strict=True):
        for axis, key, label in zip(axes, ("U3", "U2"), ("U3, welfare", "U2, own payoff"), strict=True):
            for c, (series, by_weights) in enumerate(by_series.items()):
                cells = [cells[key] for cells in by_weights.values()]
                means, half = [x["mean"] for x in cells], [x["mean"] - x["low"] for x in cells]
                x = [w_G + 0.01 * (c - 1) for _, w_G in by_weights]
                axis.errorbar(x, means, half, color=f"C{c}", marker="os^"[c], capsize=2, label=series)
            for expert in LANDMARKS:
                y = landmarks[name][expert][key]
                axis.axhline(y, color="k", ls=":", lw=0.8)
                axis.annotate(expert, (1.04, y), fontsize=7, va="bottom", ha="left")
            axis.set(xlabel="weight of the graph level", ylabel=label, xlim=(-0.05, 1.25))
            axis.set_xticks([w_G for _, w_G in WEIGHTS])
        axes[0].set_title(name.upper())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return png(figure, dpi=120)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Where the weights of the two levels lead a tabular policy.")
    parser.add_argument("--figure", metavar="PNG", help="draw U3 and U2 over the weight of the graph level")
    parser.add_argument("--seeds", type=number(int, 2), default=4, help="runs of each pair of weights")
    args = parser.parse_args(argv)
    if args.figure:
        refuse_missing_folder(args.figure)
    points, landmarks, lines = {}, {}, [["game", "advantage", "A_S", "A_G", "U2", "U3", "links", "k"]]
    for name in ("bcz", "pgg"):
        games, points[name] = held_out_games([Family(name)], 4, GAMES), {}
        landmarks[name] = {}
        for expert in LANDMARKS:
            plays = [played_by_expert(expert, game) for game in games]
            means = {"U2": np.mean([p.U2 for p in plays]), "U3": np.mean([p.U3 for p in plays])}
            landmarks[name][expert] = means
            lines.append([name, expert, "", "", *(f"{value:.3f}" for value in means.values()), "", ""])
        for series in SERIES:
            points[name][series] = {}
            for weights in WEIGHTS:
                runs = [trained(games, weights, series, seed) for seed in range(args.seeds)]
                cells = {key: mean_interval([run[key] for run in runs]) for key in runs[0]}
                points[name][series][weights] = cells
                row = [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells.values()]
                lines.append([name, series, *map(str, weights), *row])
                print(*lines[-1], flush=True)
    print(f"\n{align(lines)}")
    if args.figure:
        write_atomic(args.figure, draw(points, landmarks))


if __name__ == "__main__":
    main()
