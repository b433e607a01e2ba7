"""Exact players between which a policy that reads the others should lie: tools/others.py. None needs a model,
all play Nash efforts."""

from itertools import product

import numpy as np

from decisions import LINKS, own_rows, row_payoffs
from experts import Exact, Expert
from games import Decision, Game, State, complete_graph
from run.seeds import numpy_generator

NO_DRAWS = numpy_generator(0)  # for rules that draw nothing


def best_row(state: State, seat: int, proposals: list[np.ndarray]) -> np.ndarray:
    """The row (N,) with the highest own payoff, as a mean over these proposals (N, N) of all agents, in which
    the seat's own do not count. The first of equal ones."""
    payoffs = np.mean([row_payoffs(state, seat, proposals_NN) for proposals_NN in proposals], 0)
    return own_rows(state.game.N, seat)[np.argmax(np.round(payoffs, 9))]


def worth(state: State, seat: int, proposals_NN: np.ndarray, row_N: np.ndarray) -> float:
    """U2 of this row, where the others choose as in proposals_NN."""
    proposals_NN = proposals_NN.copy()
    proposals_NN[seat] = row_N
    return LINKS.efficiency(state, seat, proposals_NN)


class Constant(Expert):
    """The same row everywhere."""

    def __init__(self, row_N: np.ndarray):
        self.name, self.row_N = f"constant {row_N.tolist()}", row_N

    def __call__(self, state, seat, rng, past=()) -> Decision:
        return Decision(LINKS, self.row_N) if state.kind is LINKS else Exact("nash")(state, seat, rng)


class Reader(Expert):
    """Plays the row with the highest expected payoff, where the others choose independently of each other,
    each one of the rows that are `expected` of it, which are equally likely."""

    def expected(self, state: State, seat: int) -> list[list[np.ndarray]]:
        """The possible rows of every agent; any one of the seat itself, which does not count."""
        raise NotImplementedError

    def __call__(self, state, seat, rng, past=()) -> Decision:
        if state.kind is not LINKS:
            return Exact("nash")(state, seat, rng)
        rows = self.expected(state, seat)
        consent_N = np.array([np.mean([row_N[seat] for row_N in own]) for own in rows])
        row_N = best_row(state, seat, [np.array(chosen) for chosen in product(*rows)])
        return Decision(LINKS, row_N, (consent_N > 0.5).astype(int))


class BestReply(Reader):
    """Expects everybody to choose as in the last round, and in round 1 to choose everybody."""

    name = "best-reply"

    def expected(self, state, seat):
        last_NN = state.last("G")
        return [[row_N] for row_N in (complete_graph(state.game.N) if last_NN is None else last_NN)]


class Bayes(Reader):
    """Knows the list of rules, each of which is equally likely for every other seat at first. The rules draw
    nothing, so all that fit the past are equally likely ever after. Where none fits, those count that differ
    least from the choices of the seat itself, and then from the others."""

    name = "bayes"

    def __init__(self, rules: list[Expert]):
        self.rules = rules

    def likely(self, state: State, seat: int, agent: int) -> list[Expert]:
        past = [state.before(k) for k in range(len(state.history)) if state.kind_of(k) is LINKS]
        errors = []
        for rule in self.rules:
            wrong_N = np.zeros(state.game.N, int)
            for before in past:
                would_N = rule(before, agent, NO_DRAWS).action
                wrong_N += would_N != state.history[len(before.history)][agent]
            errors.append((wrong_N[seat], wrong_N.sum()))
        return [rule for rule, error in zip(self.rules, errors, strict=True) if error == min(errors)]

    def expected(self, state, seat):
        agents = range(state.game.N)
        rules = [self.likely(state, seat, j) if j != seat else self.rules[:1] for j in agents]
        return [[rule(state, j, NO_DRAWS).action for rule in rules[j]] for j in agents]


class Oracle(Reader):
    """Knows what the others choose now."""

    name = "oracle"

    def __init__(self, others: Expert):
        self.others = others

    def expected(self, state, seat):
        return [[self.others(state, j, NO_DRAWS).action] for j in range(state.game.N)]


class Halves(Expert):
    """One rule in every second of these games, another one in the rest."""

    name = "halves"

    def __init__(self, games: list[Game], *rules: Expert):
        self.rules = {game.seated_key: rules[k % 2] for k, game in enumerate(games)}

    def __call__(self, state, seat, rng, past=()) -> Decision:
        return self.rules[state.game.seated_key](state, seat, rng, past)


def exact_players(row_N: np.ndarray, rules: list[Expert], others: Expert) -> dict[str, Expert]:
    """By name: three that never look at the past, one that looks at types, one that answers whoever chose it,
    and three that read the others."""
    simple = [Constant(row_N), *map(Exact, ("always-link", "never-link", "second-best", "reciprocal"))]
    return {expert.name: expert for expert in (*simple, BestReply(), Bayes(rules), Oracle(others))}
