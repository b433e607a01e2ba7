"""The two kinds of decisions of the paper, links and efforts, each with all that belongs to it: the
question, the answer, what a random player and an expert choose, the likeness to the expert, and U2. The
methods are explained in games.Kind; docs/your-own-stage.md adds a third kind."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from games import GAMES, KINDS, Decision, Game, Kind, Stakes, State, form_links
from prompts import (
    EFFORT_DIGITS,
    Observation,
    PromptStyle,
    read_list,
    read_number,
    tell_links,
    tell_numbers,
    tell_short,
)
from rewards import Target, accuracy, effort_score, f1

# -------------------- what other choices would have paid: for U2, `selfish` and variants/game.py


def own_rows(N: int, seat: int) -> np.ndarray:
    """All 2^(N-1) rows an agent can propose, (2^(N-1), N): 0/1 with a 0 in its own position."""
    bits = (np.arange(2 ** (N - 1))[:, None] >> np.arange(N - 1)) & 1
    return np.insert(bits, seat, 0, axis=1)


@lru_cache(maxsize=2**16)  # whose arguments must be hashable
def _payoffs(game: Game, links: bytes, efforts: tuple[float, ...] | None) -> np.ndarray:
    links_NN = np.frombuffer(links, dtype=int).reshape(game.N, game.N)
    efforts_N = game.solve_efforts(game.scored_at, links_NN) if efforts is None else np.array(efforts)
    return game.payoffs(links_NN, efforts_N)


def payoffs_with_row(state: State, seat: int, proposals_NN: np.ndarray, row_N: np.ndarray) -> np.ndarray:
    """The payoffs (N,) if the seat proposes this row: at the efforts that `Game.scored_at` names, on the
    graph that forms; if no effort stage follows in this round, at the efforts already made."""
    proposals_NN, game = proposals_NN.copy(), state.game
    proposals_NN[seat] = row_N
    rest = game.stages[len(state.history) % len(game.stages) + 1 :]
    efforts = None if "E" in rest or state.efforts is None else tuple(state.efforts.tolist())
    payoffs_N = _payoffs(game, form_links(proposals_NN).tobytes(), efforts)
    return payoffs_N - game.unanswered_costs(proposals_NN)


def row_payoffs(state: State, seat: int, proposals_NN: np.ndarray) -> np.ndarray:
    """What the seat earns with each of the 2^(N-1) rows that it could have proposed, in the order of
    `own_rows`."""
    rows = own_rows(state.game.N, seat)
    return np.array([payoffs_with_row(state, seat, proposals_NN, row_N)[seat] for row_N in rows])


def payoffs_with_effort(state: State, seat: int, efforts_N: np.ndarray, effort: float) -> np.ndarray:
    """What every agent earns, (N,), with this effort of the seat among the efforts, on the graph that has
    formed. What unanswered proposals cost is spent, and left out."""
    efforts_N = efforts_N.copy()
    efforts_N[seat] = effort
    return state.game.payoffs(state.links, efforts_N)


# -------------------- the kinds


def tell_type(seen: Observation) -> str:
    """`1 of [1, 1, 3, 3]`, or the own one alone where the others' are not known."""
    return f"{seen.own_type:g}" + ("" if seen.types is None else f" of {tell_short(seen.types)}")


def tell_hint(worked: Callable[[Observation], str], seen: Observation, style: PromptStyle) -> str:
    """What follows the facts of a question: the worked number as a sentence, if there is one to tell."""
    text = worked(seen) if style.hints else ""
    return text and f". {text}"


class Links(Kind):
    """actions: the proposals P, (N, N) of {0, 1} with a zero diagonal; row i says whom agent i chooses."""

    # In flags and logs `graph` means decisions about links, not the graph level: reward_graph is their r^S.
    letter, name, noun, answer = "G", "graph", "links", "[0 or 1 per agent, you 0]"

    def check(self, actions, game: Game) -> np.ndarray:
        N, actions = game.N, np.asarray(actions)
        if actions.shape != (N, N) or not np.isin(actions, (0, 1)).all() or actions.diagonal().any():
            raise ValueError(f"proposals must be {N} x {N} entries in {{0, 1}} with a zero diagonal")
        return actions.astype(int)

    def fallback(self, N: int) -> Decision:
        """No links."""
        return Decision(self, np.zeros(N, int))

    def random(self, game: Game, seat: int, rng: np.random.Generator) -> Decision:
        """A fair coin for every entry of the row and of the belief."""
        row_N, belief_N = rng.integers(0, 2, (2, game.N))
        row_N[seat] = belief_N[seat] = 0
        return Decision(self, row_N, belief_N)

    def result(self, seen: Observation) -> str:
        """The question about efforts states the links itself. In a game of several rounds the agent reads who
        chose it, too: it may be worth knowing in the next round."""
        news = "" if seen.kind is EFFORTS else f"Links formed: {tell_links(seen.links)}. "
        if seen.rounds > 1 and seen.last_actions is not None:
            news = f"You were chosen by {tell_short(seen.last_actions[:, seen.seat])}. {news}"
        return news

    def question(self, seen: Observation, style: PromptStyle) -> str:
        game = GAMES[seen.game]
        own = f"Your {game.type_name} {tell_type(seen)}{tell_hint(game.link_hint, seen, style)}"
        return f"Round {seen.round} links. {own}. Whom do you choose?"

    def write(self, action: np.ndarray) -> str:
        return tell_short(action)

    def read(self, text: str, seat: int, N: int, cap: float):
        entries = read_list(text)
        if entries is None:
            return None, "not one list of numbers"
        if not set(entries) <= {"0", "1"}:
            return None, "an entry that is not 0 or 1"
        if len(entries) != N:
            return None, "wrong length"
        if entries[seat] != "0":
            return None, "own position not 0"
        return np.array(entries, int), None

    def allows_belief(self, belief_N: np.ndarray) -> bool:
        return bool(np.isin(belief_N, (0, 1)).all())

    def to_text(self, actions: np.ndarray) -> str:
        return " ".join("".join(map(str, row)) for row in actions.tolist())

    def from_text(self, text: str) -> np.ndarray:
        return np.array([list(map(int, row)) for row in text.split()])

    def expert_decision(self, actions: np.ndarray, game: Game, seat: int) -> Decision:
        return Decision(self, actions[seat], actions[:, seat])

    def likeness(self, decision: Decision, target: Target) -> float:
        """F1 + accuracy of the row against the expert's [source]."""
        expert_N = target.actions[target.seat]
        return f1(decision.action, expert_N, target.seat) + accuracy(decision.action, expert_N, target.seat)

    def belief_accuracy(self, belief_N: np.ndarray, target: Target) -> float:
        """Share of the others whose choice of the agent was foreseen."""
        others = np.arange(target.game.N) != target.seat
        return float((belief_N == target.actions[:, target.seat])[others].mean())

    def stakes(self, state: State, seat: int, actions: np.ndarray, common: bool = False) -> Stakes:
        """Over all own rows."""
        rows = actions[seat], *own_rows(state.game.N, seat)
        payoffs = (payoffs_with_row(state, seat, actions, row_N) for row_N in rows)
        chosen, *others = (pi_N.sum() if common else pi_N[seat] for pi_N in payoffs)
        return Stakes(chosen, max(others), min(others))


class Efforts(Kind):
    """actions: the efforts x, (N,) floats from 0 to the cap of the seat."""

    letter, name, noun, answer = "E", "effort", "efforts", "one effort"

    def check(self, actions, game: Game) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.shape != (game.N,) or not ((actions >= 0) & (actions <= game.caps)).all():
            raise ValueError(f"efforts must be {game.N} numbers from 0 to the cap of the seat")
        return actions.astype(float)

    def fallback(self, N: int) -> Decision:
        """Effort 0."""
        return Decision(self, 0.0)

    def random(self, game: Game, seat: int, rng: np.random.Generator) -> Decision:
        """Efforts and beliefs are uniform in [0, cap]."""
        caps = game.caps
        belief_N = np.round(rng.uniform(0, caps), EFFORT_DIGITS)
        belief_N[seat] = 0
        effort = round(rng.uniform(0, caps[seat]), EFFORT_DIGITS)
        return Decision(self, float(min(caps[seat], effort)), belief_N)

    def result(self, seen: Observation) -> str:
        return f"Efforts were {tell_numbers(seen.efforts)}. "

    def question(self, seen: Observation, style: PromptStyle) -> str:
        game = GAMES[seen.game]
        own = f"Your {game.type_name} {seen.own_type:g}, {game.effort_facts(seen)}"
        own += tell_hint(game.effort_hint, seen, style)
        return f"Round {seen.round} efforts. Links: {tell_links(seen.links)}. {own}. Your effort?"

    def write(self, action: float) -> str:
        return f"{action:.{EFFORT_DIGITS}f}"

    def read(self, text: str, seat: int, N: int, cap: float):
        effort = read_number(text)
        if effort is None:
            return None, "not one number"
        if not 0 <= effort <= cap:
            return None, "number outside [0, cap]"
        return effort + 0.0, None  # -0.0 + 0.0 is 0.0

    def write_belief(self, belief_N: np.ndarray) -> str:
        return tell_numbers(belief_N)

    def to_text(self, actions: np.ndarray) -> str:
        return " ".join(map(str, actions.tolist()))

    def from_text(self, text: str) -> np.ndarray:
        return np.array([float(effort) for effort in text.split()])

    def expert_decision(self, actions: np.ndarray, game: Game, seat: int) -> Decision:
        efforts_N = np.clip(np.round(actions, EFFORT_DIGITS), 0, game.caps)
        belief_N = efforts_N.copy()
        belief_N[seat] = 0
        return Decision(self, float(efforts_N[seat]), belief_N)

    def likeness(self, decision: Decision, target: Target) -> float:
        """Nearness to the expert's effort, in [0, 2] [choice]."""
        return effort_score(decision.action, target.actions[target.seat], target.cap)

    def belief_accuracy(self, belief_N: np.ndarray, target: Target) -> float:
        """Mean over the others of max(0, 1 - |belief - effort| / max(effort, 0.05 cap))."""
        others, actions = np.arange(target.game.N) != target.seat, target.actions
        error_N = np.abs(belief_N - actions) / np.maximum(actions, 0.05 * target.game.caps)
        return float(np.maximum(0, 1 - error_N)[others].mean())

    def stakes(self, state: State, seat: int, actions: np.ndarray, common: bool = False) -> Stakes:
        """Over all efforts in [0, cap], on the links of the moment. The own payoff and the welfare are
        concave in the own effort, so its worst value is 0 or the cap."""
        game = state.game
        best_effort = (game.planner_response if common else game.best_response)(state.links, actions)[seat]
        efforts = actions[seat], best_effort, 0.0, game.caps[seat]
        payoffs = (payoffs_with_effort(state, seat, actions, x) for x in efforts)
        chosen, best, *ends = (pi_N.sum() if common else pi_N[seat] for pi_N in payoffs)
        return Stakes(chosen, best, min(ends))


LINKS, EFFORTS = Links(), Efforts()
KINDS |= {kind.letter: kind for kind in (LINKS, EFFORTS)}
