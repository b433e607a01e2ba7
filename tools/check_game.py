"""Checks a game of one's own against brute force, before anything is trained on it.

    python -m tools.check_game docs/coordination.py

A wrong solution causes no error in training: the experts play it, the rewards compare with it, and the
metrics divide by it. So every game in the file is drawn many times with 2 to 5 agents, and what it says is
compared with its own payoffs: its solutions with all that they should beat. One line for each check; the exit
status is 1 if one of them disagrees. What is not checked is whether the payoffs are those that you mean:
write their formula as a loop and give it to `check_payoffs`, as tests/test_your_own_game.py does.

The tests of the project's own games are these functions. make(rng, N) draws an instance.
"""

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import world  # noqa: F401  (registers the kinds of decisions, which prompts name)
from games import GAMES, Game
from prompts import tell_links, tell_numbers
from run.errors import InputError, one_line, reports_errors
from world.draws import Family, draw_game, held_out_grid

Make = Callable[[np.random.Generator, int], Game]


class Disagreement(AssertionError):
    """What a game says, and what is found instead."""


def agree(said, found, what: str, game: Game) -> None:
    """Raises Disagreement unless both are the same up to rounding."""
    said, found = np.asarray(said, float), np.asarray(found, float)
    if not np.allclose(said, found, rtol=1e-9, atol=1e-9):
        numbers = f"{tell_numbers(said.flat)}, and not {tell_numbers(found.flat)}"
        raise Disagreement(f"{what} is {numbers}, of {game}")


# -------------------- what is compared with


def all_graphs(N: int) -> np.ndarray:
    """Every labelled graph on N nodes, (2^(N(N-1)/2), N, N)."""
    pairs = list(itertools.combinations(range(N), 2))
    graphs = np.zeros((2 ** len(pairs), N, N), int)
    for k, (i, j) in enumerate(pairs):
        graphs[:, i, j] = graphs[:, j, i] = np.arange(len(graphs)) >> k & 1
    return graphs


def random_graph(rng: np.random.Generator, N: int, density: float = 0.5) -> np.ndarray:
    upper = np.triu(rng.random((N, N)) < density, 1).astype(int)
    return upper + upper.T


def drawn(make: Make, seed: int) -> Iterator[tuple[np.random.Generator, Game, np.ndarray, np.ndarray]]:
    """40 times (rng, game, a graph, the largest effort that is tried for each agent)."""
    rng = np.random.default_rng(seed)
    for k in range(40):
        N = 2 + k % 4
        game, links_NN = make(rng, N), random_graph(rng, N, 0.7)
        yield rng, game, links_NN, np.minimum(game.caps, 2 * game.planner_efforts(links_NN).max() + 1)


def with_effort(game: Game, links_NN: np.ndarray, x: np.ndarray, i: int, effort: float) -> np.ndarray:
    return game.payoffs(links_NN, np.r_[x[:i], effort, x[i + 1 :]])


# -------------------- the checks


def check_payoffs(make: Make, payoffs=None) -> int:
    """The gains of a link are the change of the payoffs, whether it is there or not, and the fee is paid for
    every link. payoffs: (game, links_NN, efforts_N) -> (N,), written another time, which they must equal."""
    rng = np.random.default_rng(0)
    for k in range(100):
        N = 2 + k % 6
        game, links_NN = make(rng, N), random_graph(rng, N, 0.6)
        kept, x = links_NN.copy(), rng.uniform(0, np.minimum(game.caps, 9))
        told = payoffs or (lambda game, links_NN, x: game.payoffs(links_NN, x))
        agree(game.payoffs(links_NN, x), told(game, links_NN, x), "payoffs", game)
        free = replace(game, fee=0.0).payoffs(links_NN, x)
        paid = free - 0.3 * game.c * links_NN.sum(1)
        agree(replace(game, fee=0.3).payoffs(links_NN, x), paid, "the payoff with a fee of 0.3", game)
        i, j = pair = rng.permutation(N)[:2]
        with_it, without = links_NN.copy(), links_NN.copy()
        with_it[i, j] = with_it[j, i] = 1
        without[i, j] = without[j, i] = 0
        change = (told(game, with_it, x) - told(game, without, x))[pair]
        agree(game.link_gains(links_NN, x)[pair, pair[::-1]], change, "what a link gains", game)
        agree(links_NN, kept, "the graph that was handed in, afterwards,", game)
    return 100


def check_concave(make: Make) -> int:
    """The own payoff and the welfare are concave in the own effort, so the worst effort is 0 or the cap."""
    for rng, game, links_NN, top in drawn(make, 3):
        x = rng.uniform(0, top)
        for i in range(game.N):
            pays = [with_effort(game, links_NN, x, i, e) for e in np.linspace(0, top[i], 21)]
            for name, values in (("payoff", [pay[i] for pay in pays]), ("welfare", np.sum(pays, 1))):
                if np.diff(values, 2).max() > 1e-9 * (1 + np.abs(values).max()):
                    raise Disagreement(f"the {name} is not concave in the effort of agent {i + 1} of {game}")
    return 40


def no_better(what: str, game: Game, links_NN, x, best, top, common: bool = False) -> None:
    """No effort pays an agent (or, if `common`, all of them) more than `best` where the others play x."""
    for i in range(game.N):
        near = np.clip([best[i] - 1e-3, best[i] + 1e-3], 0, game.caps[i])
        tried = [best[i], *near, *np.linspace(0, top[i], 21)]
        pays = [with_effort(game, links_NN, x, i, effort) for effort in tried]
        values = [pay.sum() if common else pay[i] for pay in pays]
        most = int(np.argmax(values))
        if not 0 <= best[i] <= game.caps[i]:
            raise Disagreement(f"{what}: {best[i]:.4g} of agent {i + 1} is not from 0 to its cap, of {game}")
        if not values[0] >= values[most] - 1e-9 * (1 + abs(values[most])):
            found = f"{tried[most]:.4g} is better than {best[i]:.4g}, by {values[most] - values[0]:.2g}"
            where = f"agent {i + 1} with links {tell_links(links_NN)} and efforts {tell_numbers(x)}"
            raise Disagreement(f"{what}: {found}, for {where} of {game}")


def check_replies(make: Make) -> int:
    """No reply is better than the best one, for the agent or for all."""
    for rng, game, links_NN, top in drawn(make, 1):
        x = rng.uniform(0, top)
        no_better("best_response", game, links_NN, x, game.best_response(links_NN, x), top)
        no_better("planner_response", game, links_NN, x, game.planner_response(links_NN, x), top, True)
    return 40


def check_nash(make: Make) -> list[tuple[Game, np.ndarray]]:
    """Nobody gains alone at Nash efforts. Returns (game, efforts) of every draw."""
    found = [(game, links, game.nash_efforts(links), top) for _, game, links, top in drawn(make, 1)]
    for game, links_NN, x, top in found:
        no_better("nash_efforts", game, links_NN, x, x, top)
    return [(game, x) for game, _, x, _ in found]


def check_planner(make: Make) -> list[tuple[Game, np.ndarray]]:
    """No efforts near those of the planner, and no coarse ones, have a higher welfare. Returns the same."""
    found = []
    for rng, game, links_NN, top in drawn(make, 1):
        x = game.planner_efforts(links_NN)
        if not ((x >= 0) & (x <= game.caps)).all():
            raise Disagreement(f"planner_efforts: {tell_numbers(x)} are not from 0 to the caps, of {game}")
        near = [np.clip(x + size * rng.normal(size=game.N), 0, game.caps) for size in (1e-2, 0.3, 3.0) * 30]
        coarse = itertools.product(*([0, cap / 2, cap] for cap in top))
        better = max((*near, *map(np.array, coarse)), key=partial(game.welfare, links_NN))
        W, most = game.welfare(links_NN, x), game.welfare(links_NN, better)
        if not most <= W + 1e-9 * (1 + abs(W)):
            what = f"{tell_numbers(better)} is better than {tell_numbers(x)}, by {most - W:.2g}"
            raise Disagreement(f"planner_efforts: {what}, with links {tell_links(links_NN)} of {game}")
        found.append((game, x))
    return found


def check_efficient_graph(make: Make, solution: str, draws: int = 40) -> list[float]:
    """It is the best of all labelled graphs. Returns which share of the links it has, of every draw."""
    rng, shares = np.random.default_rng(2), []
    for k in range(draws):
        game = make(rng, 2 + k % 3)
        graphs = all_graphs(game.N)
        welfares = [game.welfare(G, game.solve_efforts(solution, G)) for G in graphs]
        G, W = game.efficient_graph(solution)
        G[:] = 2  # the cached answer is not the array that was handed out
        G, _ = game.efficient_graph(solution)
        if (G != G.T).any() or not set(G.flat) <= {0, 1} or G.diagonal().any():
            raise Disagreement(f"efficient_graph is no graph of links that both ends have, of {game}")
        own, best = game.welfare(G, game.solve_efforts(solution, G)), tell_links(graphs[np.argmax(welfares)])
        agree(own, max(welfares), f"the welfare of the links {tell_links(G)} (the best are {best})", game)
        agree(W, own, f"the welfare that efficient_graph gives with the links {tell_links(G)}", game)
        shares.append(G.sum() / game.N / (game.N - 1))
    return shares


def check_key(make: Make) -> int:
    """Two instances have one key where they have the same types, in any order of the seats, and the same
    parameters that can be fixed, and only there. The key has the name of the game (that of BCZ is older)."""
    for _, game, _, _ in drawn(make, 4):
        if game.name not in ("bcz", *game.key.split('"')):
            raise Disagreement(
                f"the key {game.key!r} lacks the name {game.name}: another game may have the same"
            )
        changes: list[dict] = [dict(stages="GEE", rounds=2, fee=0.5)]
        changes += [{p: getattr(game, p) + 0.001} for p in game.fixable]
        for name, v in vars(game).items():
            if isinstance(v, tuple):
                changes += [{name: w} for w in (v[::-1], (v[-1], *v[1:]), (v[0] + 0.001, *v[1:]))]
        for other in [replace(game, **change) for change in changes]:
            a, b = ([sorted(g.types), *(getattr(g, p) for p in g.fixable)] for g in (game, other))
            if (a == b) != (game.key == other.key):
                raise Disagreement(f"the key {game.key!r} of {game}, and {other.key!r} of {other}")
    return 40


def check_grid(name: str) -> int:
    """The held-out games of 4 agents do not all have one efficient graph: then there is nothing to learn."""
    grid = held_out_grid(4, Family(name))
    if len({game.efficient_graph(game.scored_at)[0].tobytes() for game in grid}) == 1:
        raise Disagreement(f"one graph is the best in all {len(grid)} of them")
    return len(grid)


# -------------------- a file


def games_in(path: Path) -> list[str]:
    """The names of the games that the file registers. Raises InputError."""
    before, spec = dict(GAMES), importlib.util.spec_from_file_location("checked_game", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file: its name does not end in .py")
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules["checked_game"] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise InputError(f"{path} cannot be imported: {type(e).__name__}: {one_line(e)}") from None
    if not (names := [name for name, game in GAMES.items() if before.get(name) is not game]):
        raise InputError(f"{path} registers no game: decorate its class with games.register")
    return names


def checks_of(name: str) -> dict[str, Callable]:
    def make(rng, N):
        return draw_game(rng, N, family=Family(name))

    checks: dict[str, Callable] = {"payoffs, link gains and the fee": check_payoffs}
    checks |= {"payoffs are concave": check_concave, "best replies": check_replies}
    checks |= {"Nash efforts": check_nash, "planner efforts": check_planner, "the key": check_key}
    for solution in ("nash", "planner"):
        checks[f"efficient graph at {solution} efforts"] = partial(check_efficient_graph, solution=solution)
    return {what: partial(check, make) for what, check in checks.items()} | {
        "the held-out games differ": partial(check_grid, name)
    }


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Check a game of your own against brute force.")
    parser.add_argument("file", type=Path, help="a Python file that registers a game (docs/your-own-game.md)")
    wrong = 0
    for name in games_in(parser.parse_args(argv).file):
        for what, check in checks_of(name).items():
            try:
                found = check()
                print(f"ok     {name}, {what}: {found if isinstance(found, int) else len(found)} instances")
            except Exception as e:  # also one that the game itself raises
                told = str(e) if isinstance(e, Disagreement) else f"{type(e).__name__}: {one_line(e)}"
                print(f"wrong  {name}, {what}: {told}")
                wrong += 1
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
