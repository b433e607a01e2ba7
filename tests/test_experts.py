"""The exact experts against their definitions written again here, and the expert data set."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

import experts
from world.bcz import BCZ
from brute import all_graphs, bcz_payoffs
from experts import Record, label_decision, make_expert, read_records, simulate, simulate_many, write_records
from games import State
from world.draws import Family, draw_game, game_from_json, held_out_grid
from prompts import PromptStyle, format_reply, messages, parse_reply
from run.files import InputError

STYLE = PromptStyle()
SCRIPT = Path(experts.__file__).resolve()


# ---------------------------------------------------------------------------------------------------------------------
# references, written from the formulas. Caps never bind in the games used here.


def ref_efforts(game, G, k):
    """k = 1: Nash, k = 2: planner."""
    return np.linalg.solve(np.eye(game.N) - k * game.delta * G, np.array(game.alpha))


def sample_games(count, N=4, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [draw_game(rng, N, **kwargs) for _ in range(count)]


def random_proposals(rng, N, density=0.6):
    P = (rng.random((N, N)) < density).astype(int)
    np.fill_diagonal(P, 0)
    return P


def rows(name, state, rng=None):
    """The proposals (N, N) or efforts (N,) of an expert in every seat, and the beliefs (N, N)."""
    expert = make_expert(name)
    decisions = [expert(state, i, rng) for i in range(state.game.N)]
    assert all(d.kind == state.kind for d in decisions)
    return np.array([d.action for d in decisions]), np.array([d.belief for d in decisions])


# ---------------------------------------------------------------------------------------------------------------------
# graph decisions


@pytest.mark.parametrize("name, k", [("second-best", 1), ("planner", 2)])
def test_the_efficient_graph_by_brute_force(name, k):
    sizes = set()
    for game in sample_games(15) + sample_games(5, N=3):
        P, beliefs = rows(name, State(game))
        assert (P == P.T).all() and (beliefs == P).all()
        best = max(bcz_payoffs(game, G, ref_efforts(game, G, k)).sum() for G in all_graphs(game.N))
        assert bcz_payoffs(game, P, ref_efforts(game, P, k)).sum() == pytest.approx(best, abs=1e-9)
        sizes.add((game.N, int(P.sum()) // 2))
    assert len(sizes) >= 4  # not always the same graph


def test_nash_is_the_greatest_stable_graph():
    """Among all graphs in which every link is worth its cost at Nash efforts, it contains every other."""
    sizes = set()
    for game in sample_games(15, seed=1):
        P, _ = rows("nash", State(game))
        stable = []
        for G in all_graphs(4):
            x = ref_efforts(game, G, 1)
            if all(game.delta * x[i] * x[j] >= game.c for i, j in zip(*np.nonzero(G))):
                stable.append(G)
        assert any((P == G).all() for G in stable)
        assert all((G <= P).all() for G in stable)
        sizes.add(int(P.sum()) // 2)
    assert len(sizes) >= 3


def test_selfish_by_brute_force():
    differs_from_all = 0
    for game in sample_games(15, seed=2):
        P, _ = rows("selfish", State(game))
        for seat in range(4):
            others, value = [j for j in range(4) if j != seat], {}
            for bits in itertools.product((0, 1), repeat=3):
                G = 1 - np.eye(4, dtype=int)
                G[seat, others] = G[others, seat] = bits  # the others are all willing: own choice decides
                value[bits] = bcz_payoffs(game, G, ref_efforts(game, G, 1))[seat]
            assert P[seat, seat] == 0
            assert value[tuple(P[seat, others].tolist())] == pytest.approx(max(value.values()), abs=1e-9)
            differs_from_all += P[seat].sum() < 3
    assert differs_from_all > 5


def test_selfish_wants_the_strong_and_not_the_weak():
    """alpha 3, 3, 1, 1, delta 0.1, c 0.6: a link 3-3 earns at least 0.1 * 9 = 0.9, one with a 1 to a 1 about 0.2."""
    game = BCZ((3.0, 3.0, 1.0, 1.0), 0.1, 0.6, 20.0)
    P, _ = rows("selfish", State(game))
    assert P[0, 1] == P[1, 0] == 1 and P[2, 3] == P[3, 2] == 0


def test_always_and_never_link():
    state = State(Family().make(np.ones(5), 0.25, 1.0))
    assert (rows("always-link", state)[0] == 1 - np.eye(5)).all()
    assert (rows("never-link", state)[0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# effort decisions: the answer to the graph that formed, whoever proposed it


@pytest.mark.parametrize("name", [n for n in experts.RULES if n != "myopic"])
def test_efforts_answer_the_graph_that_formed(name):
    rng, k = np.random.default_rng(3), 2 if name == "planner" else 1
    for game in sample_games(10, seed=3):
        P = random_proposals(rng, 4)
        G = P * P.T
        efforts, beliefs = rows(name, State(game).step(P))
        expected = ref_efforts(game, G, k)
        assert np.abs(efforts - expected).max() <= 0.005 + 1e-9 and (efforts == np.round(efforts, 2)).all()
        assert (beliefs == efforts * (1 - np.eye(4))).all()


def test_efforts_stay_within_a_cap_that_binds():
    game = BCZ((1.0, 1.0, 1.0), 0.2, 0.0, 1.3)
    state = State(game).step(1 - np.eye(3, dtype=int))
    assert rows("planner", state)[0].tolist() == [1.3] * 3  # uncapped: 1 / (1 - 0.8) = 5
    assert rows("second-best", state)[0].tolist() == [1.3] * 3  # uncapped: 1 / (1 - 0.4) = 1.667


# ---------------------------------------------------------------------------------------------------------------------
# myopic


def test_myopic_answers_the_last_round():
    """Round 1: to efforts alpha and everybody's consent; round 2: to what was played in round 1."""
    rng, compared = np.random.default_rng(4), 0
    for game in sample_games(10, seed=4, family=Family("bcz", "GE", 2)):
        state, N = State(game), 4
        x, consent = np.array(game.alpha), np.ones((N, N), int)
        for _ in range(2):
            expected = np.zeros((N, N), int)
            for i, j in itertools.permutations(range(N), 2):
                expected[i, j] = consent[j, i] and game.delta * x[i] * x[j] >= game.c
            assert (rows("myopic", state)[0] == expected).all()
            consent = random_proposals(rng, N)
            state = state.step(consent)
            G = consent * consent.T
            response = [game.alpha[i] + game.delta * sum(x[j] for j in range(N) if G[i, j]) for i in range(N)]
            assert np.abs(rows("myopic", state)[0] - np.minimum(response, game.cap)).max() <= 0.005 + 1e-9
            x = rng.integers(0, int(100 * game.cap), N) / 100
            state = state.step(x)
            compared += 1
    assert compared == 20


def test_myopic_by_hand():
    """alpha 2, 1, 1; delta 0.1; c 0.15: 2-1 links earn 0.2, 1-1 links 0.1."""
    game = BCZ((2.0, 1.0, 1.0), 0.1, 0.15, 5.0, rounds=2)
    state = State(game)
    P, beliefs = rows("myopic", state)
    assert P.tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]] and (beliefs == P.T).all()
    state = state.step([[0, 1, 1], [1, 0, 0], [0, 0, 0]])  # seat 2 refuses
    assert rows("myopic", state)[0].tolist() == [2.1, 1.2, 1.0]
    state = state.step([2.0, 2.0, 2.0])
    # everybody earns 0.4 > 0.15 now; seat 2 chose nobody, nobody but seat 0 chose seat 2
    assert rows("myopic", state)[0].tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# random and noisy


def test_random_is_coins_and_uniform_efforts():
    game = Family().make(np.ones(4), 0.25, 1.0)
    rng, count = np.random.default_rng(5), 500
    graph, effort = State(game), State(game).step(np.zeros((4, 4), int))
    P = np.array([rows("random", graph, rng)[0] for _ in range(count)])
    assert (P.diagonal(axis1=1, axis2=2) == 0).all()
    assert P.sum() / (count * 12) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(count * 12))
    x = np.array([rows("random", effort, rng)[0] for _ in range(count)])
    assert (x == np.round(x, 2)).all() and 0 <= x.min() < 0.05 * game.cap and 0.95 * game.cap < x.max() <= game.cap
    assert x.mean() == pytest.approx(game.cap / 2, abs=4 * game.cap / np.sqrt(12 * x.size))


def test_the_rate_of_noise():
    game = Family().make(np.ones(4), 0.25, 1.0)
    rng, count, rate = np.random.default_rng(6), 4000, 0.3
    never, state = make_expert("noisy:never-link:0.3"), State(game)
    linked = np.mean([never(state, 1, rng).action.any() for _ in range(count)])
    p = rate * 7 / 8  # a random row is empty once in eight
    assert linked == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / count))
    nash, state = make_expert("noisy:nash:0.3"), State(game).step(np.zeros((4, 4), int))
    differs = np.mean([nash(state, 1, rng).action != 1.0 for _ in range(count)])
    assert differs == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / count) + 0.005)


def test_the_ends_of_the_rate_and_nested_noise():
    state, rng = State(Family().make(np.ones(6), 0.25, 1.0)), np.random.default_rng(7)
    zero, one, nested = (make_expert(n) for n in ("noisy:always-link:0", "noisy:always-link:1", "noisy:noisy:nash:0:0"))
    assert all(zero(state, 0, rng).action.tolist() == [0, 1, 1, 1, 1, 1] for _ in range(50))
    assert np.mean([one(state, 0, rng).action.sum() for _ in range(400)]) == pytest.approx(2.5, abs=0.25)
    assert (nested(state, 0, rng).action == make_expert("nash")(state, 0, rng).action).all()


@pytest.mark.parametrize(
    "name",
    ["", "bogus", "Nash", "nash ", "noisy", "noisy:", "noisy:nash", "noisy:nash:", "noisy::0.1", "noisy:nash:x"]
    + ["noisy:nash:1.01", "noisy:nash:-0.1", "noisy:nash:nan", "noisy:nash:inf", "noisy:bogus:0.1", "random:0.5"]
    + ["noisy:ran\ndom:0.1", "x\ny"],
)
def test_bad_names_are_one_line(name):
    with pytest.raises(InputError) as caught:
        make_expert(name)
    inner = name.removeprefix("noisy:").rpartition(":")[0]  # where only the inner name is wrong, that is what is named
    assert "\n" not in str(caught.value) and (repr(name) in str(caught.value) or repr(inner) in str(caught.value))


def test_every_named_expert_plays_a_whole_game_compliantly():
    rng, count = np.random.default_rng(8), 0
    for name in (*experts.NAMES, "noisy:myopic:0.5"):
        for game in sample_games(2, N=5, seed=8, family=Family("bcz", "GE", 2)):
            for r in simulate(game, make_expert(name), rng, STYLE):
                for text in (r.reply, r.label):
                    assert parse_reply(text, r.kind, r.seat, 5, game.cap) is not None
                    count += 1
    assert count == 9 * 2 * (2 * 2 * 5) * 2


# ---------------------------------------------------------------------------------------------------------------------
# simulated games


def by_stage(records):
    stages = defaultdict(list)
    for r in records:
        stages[r.game, r.stage].append(r)
    return stages


@pytest.fixture(scope="module")
def data():
    return simulate_many(60, "second-best", 0, STYLE, (3, 5), families=(Family("bcz", "GE", 2),), noise=0.15)


def test_records_come_in_order_of_play(data):
    expected = [
        (index, stage // 2 + 1, stage, "GE"[stage % 2], seat)
        for index in range(60)
        for stage in range(4)
        for seat in range(len(next(r for r in data if r.game == index).instance["alpha"]))
    ]
    assert [(r.game, r.round, r.stage, r.kind, r.seat) for r in data] == expected
    assert {len(r.instance["alpha"]) for r in data} == {3, 4, 5}


def test_records_tell_what_was_played_and_what_came_of_it(data):
    """Links, efforts and payoffs follow from the replies alone."""
    checked = 0
    for (_, stage), group in by_stage(data).items():
        game = game_from_json(group[0].instance)
        played = np.array([parse_reply(r.reply, r.kind, r.seat, game.N, game.cap).action for r in group])
        for r in group:
            if r.kind == "G":
                assert r.proposals == played.tolist() and r.links == (played * played.T).tolist()
                assert r.efforts is None and r.payoffs is None
            else:
                assert r.efforts == played.tolist()
                assert np.allclose(r.payoffs, bcz_payoffs(game, np.array(r.links), played), atol=1e-6)
            checked += 1
    assert checked == len(data) > 500


def test_labels_answer_the_state_that_really_arose(data):
    """Also after other agents' moves were replaced: the effort is Nash for the links that formed."""
    stages, off_path, checked = by_stage(data), 0, 0
    for (index, stage), group in stages.items():
        game = game_from_json(group[0].instance)
        for r in group:
            action = label_decision(r).action
            if r.kind == "E":
                G = np.array(stages[index, stage - 1][0].links)
                assert action == pytest.approx(ref_efforts(game, G, 1)[r.seat], abs=0.005 + 1e-9)
                off_path += (G != game.efficient_graph()[0]).any()
            else:
                assert action.tolist() == game.efficient_graph()[0][r.seat].tolist()
            checked += 1
    assert checked == len(data) and off_path > 50


def test_labels_of_an_expert_that_looks_back():
    """myopic: labels are rebuilt from the recorded history of the game."""
    records, checked = simulate_many(15, "myopic", 1, STYLE, families=(Family("bcz", "GE", 3),), noise=0.3), 0
    history = {}
    for (index, stage), group in by_stage(records).items():
        game = game_from_json(group[0].instance)
        state = State(game, tuple(history.get(index, ())))
        for r in group:
            assert r.label == format_reply(make_expert("myopic")(state, r.seat, None), STYLE)
            checked += 1
        played = [parse_reply(r.reply, r.kind, r.seat, 4, game.cap).action for r in group]
        history.setdefault(index, []).append(np.array(played))
    assert checked == len(records) == 15 * 6 * 4


def test_prompts_are_the_conversation_with_the_replies_that_were_played(data):
    said, states, checked = defaultdict(list), {}, 0
    for (index, stage), group in by_stage(data).items():
        game = game_from_json(group[0].instance)
        state = states.get(index, State(game))
        for r in group:
            assert r.prompt == messages(state, r.seat, said[index, r.seat], STYLE)
            assert [m["content"] for m in r.prompt if m["role"] == "assistant"] == said[index, r.seat]
            checked += 1
        for r in group:
            said[index, r.seat].append(r.reply)
        states[index] = state.step(np.array(group[0].proposals if r.kind == "G" else group[0].efforts))
    assert checked == len(data)


def test_the_share_of_replaced_decisions():
    records = simulate_many(300, "always-link", 2, STYLE)
    count = len(records)
    assert count == 300 * 8
    share = np.mean([r.replaced for r in records])
    assert share == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / count))
    assert all(r.reply == r.label for r in records if not r.replaced)
    differs = np.mean([r.reply != r.label for r in records if r.replaced])
    assert differs > 0.9  # a random decision may happen to be the label
    assert not any(r.replaced for r in simulate_many(5, "always-link", 2, STYLE, noise=0))
    assert all(r.replaced for r in simulate_many(5, "always-link", 2, STYLE, noise=1))


def test_the_same_seed_gives_the_same_records_and_another_does_not():
    settings = dict(agents=(3, 6), families=(Family("bcz", "GE", 2),))
    a, b, c = (simulate_many(40, "noisy:second-best:0.2", seed, STYLE, **settings) for seed in (3, 3, 4))
    compared = 0
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for field in fields(Record):
            assert getattr(x, field.name) == getattr(y, field.name)
            compared += 1
    assert compared == len(a) * len(fields(Record)) > 40 * 4 * 3 * 14
    assert [r.instance for r in a] != [r.instance for r in c] and [r.label for r in a] != [r.label for r in c]


def test_train_and_held_out_instances_are_disjoint_in_any_seat_order():
    keys = {}
    for split in ("train", "held-out"):
        records = simulate_many(150, "never-link", 5, STYLE, split=split)
        keys[split] = {(tuple(sorted(r.instance["alpha"])), r.instance["delta"], r.instance["c"]) for r in records}
    grid = {(tuple(sorted(g.alpha)), g.delta, g.c) for g in held_out_grid(4)}
    assert len(keys["train"]) > 140 and len(keys["held-out"]) > 100 and len(grid) > 40
    assert not keys["train"] & (keys["held-out"] | grid)


def test_the_style_reaches_prompts_and_replies():
    style = PromptStyle("local", belief=False, hints=False)
    for r in simulate_many(3, "nash", 6, style):
        assert "Belief" not in r.reply + r.label + json.dumps(r.prompt)


def test_the_style_is_that_of_the_flags():
    parser = argparse.ArgumentParser()
    experts.add_style_arguments(parser)
    for flags, style in (
        ([], PromptStyle("full", True, True)),
        (["--information", "local", "--no-belief", "--no-hints"], PromptStyle("local", False, False)),
        (["--information", "local"], PromptStyle("local", True, True)),
        (["--no-belief"], PromptStyle("full", False, True)),
        (["--no-hints"], PromptStyle("full", True, False)),
    ):
        assert experts.style_of(parser.parse_args(flags)) == style


# ---------------------------------------------------------------------------------------------------------------------
# the data set as a file


@pytest.fixture(scope="module")
def few():
    return simulate_many(2, "second-best", 7, STYLE, families=(Family("bcz", "GE", 2),))


def test_what_is_written_is_read_back(few, tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, few)
    back = read_records(path)
    assert back == few and len(back) == 2 * 4 * 4
    assert all(type(getattr(a, f.name)) is type(getattr(b, f.name)) for a, b in zip(few, back) for f in fields(Record))
    assert len(path.read_text().splitlines()) == len(few)


def line_of(record, **changes):
    return json.dumps(asdict(record) | changes)


def without(record, field):
    return json.dumps({k: v for k, v in asdict(record).items() if k != field})


BAD_LINES = {
    "not JSON": lambda g, e: "game 1",
    "half a line": lambda g, e: line_of(g)[:100],
    "empty line": lambda g, e: "",
    "null": lambda g, e: "null",
    "number": lambda g, e: "3",
    "list": lambda g, e: "[1, 2]",
    "empty object": lambda g, e: "{}",
    "deep": lambda g, e: "[" * 100_000,
    "extra field": lambda g, e: line_of(g, extra=1),
    **{f"no {f.name}": lambda g, e, f=f: without(g, f.name) for f in fields(Record)},
    "wrong kind": lambda g, e: line_of(g, kind="X"),
    "kind null": lambda g, e: line_of(g, kind=None),
    "kind of another reply": lambda g, e: line_of(g, kind="E"),
    "seat 4 of 4": lambda g, e: line_of(g, seat=4),
    "seat -1": lambda g, e: line_of(g, seat=-1),
    "seat text": lambda g, e: line_of(g, seat="0"),
    "seat null": lambda g, e: line_of(g, seat=None),
    "seat 0.5, graph": lambda g, e: line_of(g, seat=0.5),
    "seat 0.5, effort": lambda g, e: line_of(e, seat=0.5),
    "seat of another row": lambda g, e: line_of(g, seat=1, label="Decision: [0, 1, 1, 1]"),
    "label not compliant": lambda g, e: line_of(g, label="Decision: [1, 1, 1, 1]"),
    "label of the wrong length": lambda g, e: line_of(g, label="Decision: [0, 1, 1]"),
    "label above the cap": lambda g, e: line_of(e, label=f"Decision: {e.instance['cap'] + 1}"),
    "label not finite": lambda g, e: line_of(e, label="Decision: nan"),
    "label empty": lambda g, e: line_of(e, label=""),
    "label null": lambda g, e: line_of(g, label=None),
    "label a list": lambda g, e: line_of(g, label=[0, 1, 0, 1]),
    "reply not compliant": lambda g, e: line_of(g, reply="no"),
    "instance null": lambda g, e: line_of(g, instance=None),
    "instance empty": lambda g, e: line_of(g, instance={}),
    "instance alpha text": lambda g, e: line_of(g, instance=g.instance | {"alpha": "1111"}),
    "instance alpha negative": lambda g, e: line_of(g, instance=g.instance | {"alpha": [1, 1, 1, -1]}),
    "instance alpha nan": lambda g, e: line_of(g, instance=g.instance | {"alpha": [1, 1, 1, float("nan")]}),
    "instance of one agent": lambda g, e: line_of(g, instance=g.instance | {"alpha": [1]}),
    "instance stages": lambda g, e: line_of(g, instance=g.instance | {"stages": "EE"}),
    "instance rounds": lambda g, e: line_of(g, instance=g.instance | {"rounds": 0}),
    "prompt null": lambda g, e: line_of(g, prompt=None),
    "prompt of texts": lambda g, e: line_of(g, prompt=["hello"]),
    "prompt without role": lambda g, e: line_of(g, prompt=[{"content": "hello"}]),
    "prompt without text": lambda g, e: line_of(g, prompt=[{"role": "user", "content": None}]),
    "prompt empty": lambda g, e: line_of(g, prompt=[]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(few, tmp_path, name):
    graph, effort = few[0], few[4]
    assert (graph.kind, effort.kind) == ("G", "E")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([line_of(graph), line_of(effort), BAD_LINES[name](graph, effort), line_of(graph)]))
    with pytest.raises(InputError) as caught:
        read_records(path)
    message = str(caught.value)
    assert str(path) in message and "line 3" in message and "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x9fPK\x03\x04", "folder"], ids=str)
def test_files_that_are_no_data_set(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_label_decision_is_the_label_and_not_the_reply(few):
    r = replace(few[4], label="Belief: [0, 1, 1, 1]\nDecision: 1.25", reply="Decision: 0")
    assert label_decision(r).action == 1.25


# ---------------------------------------------------------------------------------------------------------------------
# command line


def run_script(*args, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_script_writes_a_data_set_and_does_not_overwrite_it(tmp_path):
    out = tmp_path / "games.jsonl"
    done = run_script("--games", "5", "--rounds", "2", "--seed", "3", "--out", out.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = read_records(out)
    assert len(out.read_text().splitlines()) == len(records) == 5 * 4 * 4
    assert "80" in done.stdout and out.name in done.stdout
    assert records == simulate_many(5, "second-best", 3, STYLE, families=(Family("bcz", "GE", 2),))
    before = out.read_bytes()
    again = run_script("--games", "1", "--out", out.name, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [out.name]


BAD_FLAGS = [
    ("--expert", "bogus"),
    ("--expert", "noisy:nash:2"),
    ("--out", "nowhere/games.jsonl"),
    ("--games", "0"),
    ("--games", "x"),
    ("--agents", "1"),
    ("--agents", "5-4"),
    ("--agents", "4-99"),
    ("--agents", "x"),
    ("--rounds", "-1"),
    ("--information", "none"),
    ("--split", "test"),
    ("--noise", "x"),
    ("--noise", "1.5"),
    ("--noise", "-0.1"),
    ("--noise", "nan"),
    ("--seed", "-1"),
    ("--seed", "x"),
    ("--bogus", "1"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flags_end_in_one_line_and_write_nothing(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        experts.main(["--games", "1", "--out", "o.jsonl", *flags])
    assert caught.value.code == 2
    complaint = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(complaint) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_flag_as_a_command(tmp_path):
    done = run_script("--expert", "bogus", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
