"""The exact experts against their definitions written again here, and whole games among them."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from brute import bcz_payoffs

import experts
from experts import nash_graph
from games import State, complete_graph, empty_graph, form_links, game_from_json
from play.cast import make_expert
from play.dataset import simulate_many
from play.expert_games import simulate
from prompts import PromptStyle, format_reply, messages, parse_reply
from run.errors import InputError
from world.bcz import BCZ
from world.draws import Family, draw_game

STYLE = PromptStyle()


def ref_efforts(game, G, k):
    """k = 1: Nash, k = 2: planner. Caps never bind in the games used here."""
    return np.linalg.solve(np.eye(game.N) - k * game.delta * G, np.array(game.alpha))


def sample_games(count, N=4, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [draw_game(rng, N, **kwargs) for _ in range(count)]


def rows(name, state, rng=None):
    """The proposals (N, N) or efforts (N,) of an expert in every seat, and the beliefs (N, N)."""
    decisions = make_expert(name).decide_all([(state, i, rng, ()) for i in range(state.game.N)])
    assert all(d.kind is state.kind for d in decisions)
    return np.array([d.action for d in decisions]), np.array([d.belief for d in decisions])


def test_the_graphs_of_the_exact_solutions():
    """All believe that the others do the same. That these are solutions: tests/world."""
    for game in sample_games(15) + sample_games(5, N=3):
        solutions = [game.efficient_graph("nash")[0], game.efficient_graph("planner")[0], nash_graph(game)]
        solutions += [complete_graph(game.N), empty_graph(game.N)]
        names = ("second-best", "planner", "nash", "always-link", "never-link")
        for name, links_NN in zip(names, solutions, strict=True):
            P, beliefs = rows(name, State(game))
            assert (P == links_NN).all() and (beliefs == links_NN).all()


def test_selfish_by_brute_force():
    differs_from_all = 0
    for game in sample_games(15, seed=2):
        P, _ = rows("selfish", State(game))
        for seat in range(4):
            others, value = [j for j in range(4) if j != seat], {}
            for bits in itertools.product((0, 1), repeat=3):
                G = complete_graph(4)
                G[seat, others] = G[others, seat] = bits  # the others are all willing: own choice decides
                value[bits] = bcz_payoffs(game, G, ref_efforts(game, G, 1))[seat]
            assert P[seat, seat] == 0
            assert value[tuple(P[seat, others].tolist())] == pytest.approx(max(value.values()), abs=1e-9)
            differs_from_all += P[seat].sum() < 3
    assert differs_from_all > 5


@pytest.mark.parametrize("name", [n for n in experts.RULES if n != "myopic"])
def test_efforts_answer_the_graph_that_formed(name):
    rng, k = np.random.default_rng(3), 2 if name == "planner" else 1
    for game in sample_games(10, seed=3):
        P = (rng.random((4, 4)) < 0.6).astype(int) * complete_graph(4)
        efforts, beliefs = rows(name, State(game).step(P))
        expected = ref_efforts(game, form_links(P), k)
        assert np.abs(efforts - expected).max() <= 0.005 + 1e-9 and (efforts == np.round(efforts, 2)).all()
        assert (beliefs == efforts * complete_graph(4)).all()


def test_efforts_stay_within_a_cap_that_binds():
    state = State(BCZ((1.0, 1.0, 1.0), 0.2, 0.0, 1.3)).step(complete_graph(3))
    assert rows("planner", state)[0].tolist() == [1.3] * 3  # uncapped: 1 / (1 - 0.8) = 5
    assert rows("second-best", state)[0].tolist() == [1.3] * 3  # uncapped: 1 / (1 - 0.4) = 1.667


def test_myopic_by_hand():
    """It answers the last round, at first efforts alpha and all consent: links 2-1 earn 0.2, 1-1 earn 0.1."""
    state = State(BCZ((2.0, 1.0, 1.0), 0.1, 0.15, 5.0, rounds=2))
    P, beliefs = rows("myopic", state)
    assert P.tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]] and (beliefs == P.T).all()
    state = state.step([[0, 1, 1], [1, 0, 0], [0, 0, 0]])  # seat 2 refuses
    assert rows("myopic", state)[0].tolist() == [2.1, 1.2, 1.0]
    state = state.step([2.0, 2.0, 2.0])
    # Everybody earns 0.4 > 0.15 now. Seat 2 chose nobody, and only seat 0 chose seat 2.
    assert rows("myopic", state)[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


def test_random_is_coins_and_uniform_efforts():
    game = Family().make(np.ones(4), 0.25, 1.0)
    rng, count = np.random.default_rng(5), 500
    graph, effort = State(game), State(game).step(empty_graph(4))
    P = np.array([rows("random", graph, rng)[0] for _ in range(count)])
    assert (P.diagonal(axis1=1, axis2=2) == 0).all()
    assert P.sum() / (count * 12) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(count * 12))
    x, cap = np.array([rows("random", effort, rng)[0] for _ in range(count)]), game.cap
    assert (x == np.round(x, 2)).all() and 0 <= x.min() < 0.05 * cap and 0.95 * cap < x.max() <= cap
    assert x.mean() == pytest.approx(cap / 2, abs=4 * cap / np.sqrt(12 * x.size))


@pytest.mark.parametrize("rate", [0, 0.3, 1])
def test_the_rate_of_noise(rate):
    game = Family().make(np.ones(4), 0.25, 1.0)
    rng, count = np.random.default_rng(6), 4000
    never, nash = (make_expert(f"noisy:{name}:{rate}") for name in ("never-link", "nash"))
    assert never.name == f"noisy:never-link:{rate}"
    linked = np.mean([never(State(game), 1, rng).action.any() for _ in range(count)])
    p = rate * 7 / 8  # a random row is empty once in eight
    assert linked == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / count))
    state = State(game).step(empty_graph(4))
    differs = np.mean([nash(state, 1, rng).action != 1.0 for _ in range(count)])
    assert differs == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / count) + 0.005)


BAD_NAMES = ["", "bogus", "Nash", "nash ", "noisy", "noisy:", "noisy:nash", "noisy:nash:", "noisy::0.1"]
BAD_NAMES += ["noisy:nash:x", "noisy:nash:1.01", "noisy:nash:-0.1", "noisy:nash:nan", "noisy:nash:inf"]
BAD_NAMES += ["noisy:bogus:0.1", "random:0.5", "noisy:ran\ndom:0.1", "x\ny", "noisy:noisy:nash:0.1:0.1"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_one_line(name):
    with pytest.raises(InputError) as caught:
        make_expert(name)
    inner = name.removeprefix("noisy:").rpartition(":")[0]  # where only the inner name is wrong, it is named
    assert repr(name) in str(caught.value) or repr(inner) in str(caught.value)


@pytest.mark.parametrize("name", [*experts.RULES, "random", "noisy:myopic:0.5"])
@pytest.mark.parametrize("game", ["bcz", "pgg"])
def test_every_named_expert_plays_whole_games_compliantly(name, game):
    drawn, rng = sample_games(2, N=5, seed=8, family=Family(game, "GE", 2)), np.random.default_rng(8)
    records = simulate([(k, g, rng) for k, g in enumerate(drawn)], make_expert(name), STYLE)
    assert [r.game for r in records] == [0] * 20 + [1] * 20
    for r in records:
        state = State(drawn[r.game]) if r.kind == "G" else State(drawn[r.game]).step(empty_graph(5))
        assert all(parse_reply(text, state, r.seat) is not None for text in (r.reply, r.label))


def test_a_data_set_of_fewer_games_is_the_beginning_of_one_of_more():
    """Every game draws from its own random numbers, also beside longer ones."""
    expert, families = make_expert("noisy:nash:0.4"), (Family(), Family("bcz", "GE", 2))
    many, few = (simulate_many(n, expert, 9, STYLE, (3, 6), families=families, noise=0.3) for n in (6, 3))
    assert few == many[: len(few)] and any(r.replaced for r in few) and {r.game for r in few} == {0, 1, 2}


@pytest.mark.parametrize("name", ["second-best", "myopic"])
def test_records_tell_what_was_played_and_what_came_of_it(name):
    """Links, efforts and payoffs follow from the replies alone; prompts are the conversation with those
    replies; labels answer the state that really arose, also those of an expert that looks back."""
    expert, how = make_expert(name), dict(families=(Family("bcz", "GE", 2),), noise=0.3)
    data = simulate_many(60, expert, 0, STYLE, (3, 5), **how)
    replies, states, stages = defaultdict(list), {}, defaultdict(list)
    for r in data:
        stages[r.game, r.stage].append(r)
    for (index, stage), group in stages.items():
        game = game_from_json(group[0].instance)
        state = states.get(index, State(game))
        where = [(r.round, r.kind, r.seat) for r in group]
        assert where == [(stage // 2 + 1, "GE"[stage % 2], seat) for seat in range(game.N)]
        played = np.array([parse_reply(r.reply, state, r.seat).action for r in group])
        states[index] = state.step(played)
        for r in group:
            assert r.label == format_reply(expert(state, r.seat, None), STYLE)
            assert r.prompt == messages(state, r.seat, replies[index, r.seat], STYLE)
            replies[index, r.seat].append(r.reply)
            if r.kind == "G":
                assert r.proposals == played.tolist() and r.links == (played * played.T).tolist()
                assert r.efforts is None and r.payoffs is None
            else:
                assert r.efforts == played.tolist()
                assert np.allclose(r.payoffs, bcz_payoffs(game, np.array(r.links), played), atol=1e-6)
    assert len(data) > 500 and {len(r.instance["alpha"]) for r in data} == {3, 4, 5}
    assert [(r.game, r.stage, r.seat) for r in data] == sorted((r.game, r.stage, r.seat) for r in data)
