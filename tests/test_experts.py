"""The exact experts against their definitions written again here, and whole games among them."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from brute import bcz_payoffs

import experts
from decisions import EFFORTS, LINKS
from experts import make_expert
from games import State, complete_graph, empty_graph, form_links, game_from_json
from play.dataset import simulate_many
from play.expert_games import label_decision, simulate
from prompts import PromptStyle, format_reply, messages, parse_reply
from run.errors import InputError
from world.bcz import BCZ
from world.draws import Family, draw_game

STYLE = PromptStyle()

# --- references, written from the formulas. Caps never bind in the games used here.


def ref_efforts(game, G, k):
    """k = 1: Nash, k = 2: planner."""
    return np.linalg.solve(np.eye(game.N) - k * game.delta * G, np.array(game.alpha))


def sample_games(count, N=4, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [draw_game(rng, N, **kwargs) for _ in range(count)]


def rows(name, state, rng=None):
    """The proposals (N, N) or efforts (N,) of an expert in every seat, and the beliefs (N, N)."""
    decisions = make_expert(name).decide_all([(state, i, rng, ()) for i in range(state.game.N)])
    assert all(d.kind is state.kind for d in decisions)
    return np.array([d.action for d in decisions]), np.array([d.belief for d in decisions])


# --- decisions about links


def test_the_graphs_of_the_exact_solutions():
    """All believe that the others do the same. That these are solutions: tests/world."""
    for game in sample_games(15) + sample_games(5, N=3):
        solutions = [game.efficient_graph("nash")[0], game.efficient_graph("planner")[0], game.nash_graph()]
        solutions += [complete_graph(game.N), empty_graph(game.N)]
        names = ("second-best", "planner", "nash", "always-link", "never-link")
        for name, links_NN in zip(names, solutions, strict=True):
            P, beliefs = rows(name, State(game))
            assert (P == links_NN).all() and (beliefs == links_NN).all()


def test_selfish_by_brute_force_and_by_hand():
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
    # alpha 3, 3, 1, 1, delta 0.1, c 0.6: a link 3-3 earns at least 0.1 * 9 = 0.9, one 1-1 about 0.2.
    P, _ = rows("selfish", State(BCZ((3.0, 3.0, 1.0, 1.0), 0.1, 0.6, 20.0)))
    assert P[0, 1] == P[1, 0] == 1 and P[2, 3] == P[3, 2] == 0


# --- decisions about efforts: the answer to the graph that formed, whoever proposed it


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
    """Myopic answers the last round, at first efforts alpha and everybody's consent.

    alpha 2, 1, 1; delta 0.1; c 0.15: 2-1 links earn 0.2, 1-1 links 0.1."""
    state = State(BCZ((2.0, 1.0, 1.0), 0.1, 0.15, 5.0, rounds=2))
    P, beliefs = rows("myopic", state)
    assert P.tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]] and (beliefs == P.T).all()
    state = state.step([[0, 1, 1], [1, 0, 0], [0, 0, 0]])  # seat 2 refuses
    assert rows("myopic", state)[0].tolist() == [2.1, 1.2, 1.0]
    state = state.step([2.0, 2.0, 2.0])
    # Everybody earns 0.4 > 0.15 now. Seat 2 chose nobody, and only seat 0 chose seat 2.
    assert rows("myopic", state)[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


# --- random and noisy


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


def test_the_rate_of_noise():
    game = Family().make(np.ones(4), 0.25, 1.0)
    rng, count, rate = np.random.default_rng(6), 4000, 0.3
    for name in ("noisy:never-link:0.3", "noisy:noisy:never-link:0.2:0.125"):  # 0.7 = 0.8 * 0.875
        never, state = make_expert(name), State(game)
        linked = np.mean([never(state, 1, rng).action.any() for _ in range(count)])
        p = rate * 7 / 8  # a random row is empty once in eight
        assert linked == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / count))
    nash, state = make_expert("noisy:nash:0.3"), State(game).step(empty_graph(4))
    differs = np.mean([nash(state, 1, rng).action != 1.0 for _ in range(count)])
    assert differs == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / count) + 0.005)


def test_the_ends_of_the_rate_and_nested_noise():
    state, rng = State(Family().make(np.ones(6), 0.25, 1.0)), np.random.default_rng(7)
    names = ("noisy:always-link:0", "noisy:always-link:1", "noisy:noisy:nash:0:0")
    zero, one, nested = map(make_expert, names)
    assert all(zero(state, 0, rng).action.tolist() == [0, 1, 1, 1, 1, 1] for _ in range(50))
    assert np.mean([one(state, 0, rng).action.sum() for _ in range(400)]) == pytest.approx(2.5, abs=0.25)
    assert (nested(state, 0, rng).action == make_expert("nash")(state, 0, rng).action).all()
    assert [expert.name for expert in (zero, one, nested)] == list(names)


BAD_NAMES = ["", "bogus", "Nash", "nash ", "noisy", "noisy:", "noisy:nash", "noisy:nash:", "noisy::0.1"]
BAD_NAMES += ["noisy:nash:x", "noisy:nash:1.01", "noisy:nash:-0.1", "noisy:nash:nan", "noisy:nash:inf"]
BAD_NAMES += ["noisy:bogus:0.1", "random:0.5", "noisy:ran\ndom:0.1", "x\ny"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_one_line(name):
    with pytest.raises(InputError) as caught:
        make_expert(name)
    inner = name.removeprefix("noisy:").rpartition(":")[0]  # where only the inner name is wrong, it is named
    text = str(caught.value)
    assert "\n" not in text and (repr(name) in text or repr(inner) in text)


# --- whole games


@pytest.mark.parametrize("name", [*experts.NAMES, "noisy:myopic:0.5"])
@pytest.mark.parametrize("game", ["bcz", "pgg"])
def test_every_named_expert_plays_whole_games_compliantly(name, game):
    drawn, rng = sample_games(2, N=5, seed=8, family=Family(game, "GE", 2)), np.random.default_rng(8)
    records = simulate([(k, g, rng) for k, g in enumerate(drawn)], make_expert(name), STYLE)
    assert [r.game for r in records] == [0] * 20 + [1] * 20
    for r in records:
        state = State(drawn[r.game]) if r.kind == "G" else State(drawn[r.game]).step(empty_graph(5))
        assert all(parse_reply(text, state, r.seat) is not None for text in (r.reply, r.label))


def test_games_side_by_side_are_the_games_alone():
    """Each draws from its own random numbers; of unequal length too."""
    families = [Family("bcz", "GE", 1 + k % 2) for k in range(4)]
    drawn = [draw_game(np.random.default_rng(k), 3 + k, family=families[k]) for k in range(4)]
    expert = make_expert("noisy:nash:0.4")
    plays, alone = (
        [(7 * k, game, np.random.default_rng([9, k])) for k, game in enumerate(drawn)] for _ in range(2)
    )
    expected = [r for play in alone for r in simulate([play], expert, STYLE, 0.3)]
    assert simulate(plays, expert, STYLE, 0.3) == expected
    assert {r.game for r in expected} == {0, 7, 14, 21} and any(r.replaced for r in expected)


@pytest.fixture(scope="module")
def data():
    family = Family("bcz", "GE", 2)
    return simulate_many(60, make_expert("second-best"), 0, STYLE, (3, 5), families=(family,), noise=0.15)


def by_stage(records):
    stages = defaultdict(list)
    for r in records:
        stages[r.game, r.stage].append(r)
    return stages


def test_records_tell_what_was_played_and_what_came_of_it(data):
    """Links, efforts and payoffs follow from the replies alone; prompts are the conversation with those
    replies."""
    replies, states = defaultdict(list), {}
    for (index, stage), group in by_stage(data).items():
        game = game_from_json(group[0].instance)
        state = states.get(index, State(game))
        where = [(r.round, r.kind, r.seat) for r in group]
        assert where == [(stage // 2 + 1, "GE"[stage % 2], seat) for seat in range(game.N)]
        played = np.array([parse_reply(r.reply, state, r.seat).action for r in group])
        states[index] = state.step(played)
        for r in group:
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


def test_labels_answer_the_state_that_really_arose(data):
    """Also after other agents' moves were replaced: the effort is Nash for the links that formed."""
    off_path = 0
    for r in data:
        game, label = game_from_json(r.instance), label_decision(r)
        if label.kind is EFFORTS:
            G = np.array(r.links)
            assert label.action == pytest.approx(ref_efforts(game, G, 1)[r.seat], abs=0.005 + 1e-9)
            off_path += (G != game.efficient_graph()[0]).any()
        else:
            assert label.action.tolist() == game.efficient_graph()[0][r.seat].tolist()
    assert off_path > 50


def test_labels_of_an_expert_that_looks_back():
    """myopic: labels are rebuilt from the recorded history of the game."""
    expert, family = make_expert("myopic"), Family("bcz", "GE", 3)
    records, states = simulate_many(15, expert, 1, STYLE, families=(family,), noise=0.3), {}
    for (index, _), group in by_stage(records).items():
        state = states.get(index, State(game_from_json(group[0].instance)))
        for r in group:
            assert r.label == format_reply(expert(state, r.seat, None), STYLE)
        states[index] = state.step(group[0].proposals if state.kind is LINKS else group[0].efforts)
    assert len(records) == 15 * 6 * 4 and all(state.done for state in states.values())
