"""Players and tables: seats, self-play by hand, mixed tables, examples in the prompt, lenient reading, shared adapters.

The game of most tests by hand is that of test_eval.py: N = 3, alpha = 1, delta = 0.1, c = 0.05, cap 3, W* = 2.2.
"""

import argparse
import json
import math
import re

import numpy as np
import pytest
import torch

from models import adapters as adapter_files
import eval as evaluation
import experts
import lora
from play import players
from world.bcz import BCZ
from games import State
from world.draws import Family, draw_game, held_out_grid, split_of
from play.metrics import mean_over_seats, of_seat, per_instance, strategic_efficiency, summarise
from play.players import Ask, expert_examples, expert_player, play, play_tables, policy_player
from policy import load_policy, put_adapter
from prompts import PromptStyle, fallback, messages, parse_reply, repair_reply, with_examples
from rewards import Target, accuracy, belief_accuracy, graph_score
from run.files import InputError
from fast.shared_prefix import History

STYLE = PromptStyle()
TRIO = BCZ((1.0, 1.0, 1.0), 0.1, 0.05, 3.0)


def constant(text):
    return lambda asks: [text] * len(asks)


def expert(name, seed=0):
    return expert_player(name, STYLE, seed)


def run(tmp_path, *flags, games=4):
    """The results that eval.py writes with these flags."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    evaluation.main(["--eval-games", str(games), "--json", str(path), *flags])
    return json.loads(path.read_text())["results"]


# ---------------------------------------------------------------------------------------------------------------------
# one seat


def reference_play(instances, player, seat, expert, seed):
    """One seat, written without tables: rows of (reply, compliant, s, row, U2, belief) per game, and welfare."""
    others = experts.make_expert(expert)
    states, replies, rows = [State(g) for g in instances], [[] for _ in instances], [[] for _ in instances]
    for stage in range(len(instances[0].stages) * instances[0].rounds):
        texts = player([Ask(i, s, seat, r) for i, (s, r) in enumerate(zip(states, replies))])
        for i, (state, text) in enumerate(zip(states, texts)):
            N, cap = state.game.N, state.game.caps[seat]
            decision = parse_reply(text, state.kind, seat, N, cap)
            played = [others(state, j, np.random.default_rng([seed, i, j, stage])) for j in range(N)]
            played[seat] = decision or fallback(state.kind, N)
            actions = np.array([d.action for d in played])
            s = row = None
            if state.kind == "G":
                expert_NN = actions.copy()
                expert_NN[seat] = others(state, seat, np.random.default_rng([seed, i, seat, stage])).action
                s = graph_score(decision, Target(state.game, "G", seat, expert_NN))
                row = accuracy(decision.action, expert_NN[seat], seat) if decision else 0.0
            U2, belief = strategic_efficiency(state, seat, actions), belief_accuracy(decision, state.game, seat, actions)
            rows[i].append((text, decision is not None, s, row, U2, belief))
            replies[i].append(text)
            states[i] = state.step(actions)
    return rows, [[float(pay.sum()) for _, _, pay in s.round_results()] for s in states]


@pytest.mark.parametrize("family", [Family("bcz", "GE", 2), Family("bcz", "GGE"), Family("pgg", "GEE")], ids=str)
@pytest.mark.parametrize("others", ["second-best", "noisy:myopic:0.5"])
def test_a_table_of_one_player_and_experts_is_play_in_one_seat(family, others):
    instances, sometimes = list(held_out_grid(4, family))[::11], expert("random", 3)

    def player(asks):  # every third reply is not compliant
        return [text if (a.game + a.stage) % 3 else "no" for a, text in zip(asks, sometimes(asks))]

    for seat in range(4):
        rows, welfares = reference_play(instances, player, seat, others, 5)
        played = play(instances, player, seat, others, 5)
        assert [p.welfares for p in played] == welfares
        got = [[(t.reply, t.decision is not None, t.s, t.row, t.U2, t.belief) for t in p.turns] for p in played]
        assert got == rows and all(t.seat == seat for p in played for t in p.turns)


# ---------------------------------------------------------------------------------------------------------------------
# several seats


def by_seat(rows, effort):
    """A player with a row of links for each seat and one effort."""
    return lambda asks: [f"Decision: {rows[a.seat] if a.state.kind == 'G' else effort}" for a in asks]


def test_self_play_by_hand():
    """Seats 0 and 1 link, seat 2 refuses, x = 1: pi = 1 - 0.5 + 0.1 - 0.05 = 0.55 twice, and 0.5. Best replies are 1.1,
    1.1 and 1, own payoffs before costs 0.6 of 0.605 (0 effort: 0, 3: -1.2), 0.5 of 0.5. The planners' graph is complete."""
    rows = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    (played,) = play([TRIO], by_seat(rows, "1.0"), [(0, 1, 2)], "planner", 0)
    assert [(t.kind, t.seat) for t in played.turns] == [("G", 0), ("G", 1), ("G", 2), ("E", 0), ("E", 1), ("E", 2)]
    row = per_instance(played)
    assert row["U1"] == 1 and row["U3"] == pytest.approx(1.6 / 2.2)
    assert row["s"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3) and row["row"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert row["U2 effort"] == pytest.approx(1 - 2 * (0.005 / 1.805) / 3)
    # graph: seats 0 and 1 do best by their one consenting link, seat 2 has none to gain: all its rows are the same
    assert row["U2 graph"] == pytest.approx(1)
    u1 = summarise([played])["all rounds"]["U1"]
    assert (u1["mean"], u1["n"]) == (1, 2)  # six decisions of three seats count as those of one


def test_silence_in_all_seats_is_nothing():
    (played,) = play([TRIO], constant("no"), [(0, 1, 2)], "planner", 0)
    row = per_instance(played)
    assert row["U3"] == row["U1"] == row["s"] == row["row"] == 0 and row["U2 effort"] == pytest.approx(0.75)


def test_planners_in_all_seats_reach_the_first_best(tmp_path):
    results = run(tmp_path, "--policy", "expert:planner", "--seat", "all", "--expert", "never-link", games=9)
    assert all(row["U3"] == pytest.approx(1, abs=1e-4) for row in results["expert:planner"]["instances"])
    assert results["expert:planner"]["all rounds"]["U3"]["n"] == 9  # the game is the unit
    assert results["expert:planner"]["all rounds"]["U1"]["n"] == 18
    assert results["expert:never-link"]["all rounds"]["s"]["mean"] == 1


def test_all_seats_are_asked_at_once():
    calls, seen = [], expert("second-best")

    def player(asks):
        calls.append([(a.game, a.seat) for a in asks])
        return seen(asks)

    play([TRIO, TRIO], player, [(0, 1, 2)] * 2, "planner", 0)
    assert calls == [[(i, j) for i in range(2) for j in range(3)]] * 2


def test_random_seats_belong_to_the_game_and_the_seed():
    grid = list(held_out_grid(4))
    seats = evaluation.seats_in(grid, "random", 0)
    assert {j for (j,) in seats} == {0, 1, 2, 3}
    assert evaluation.seats_in(grid[3::7], "random", 0) == seats[3::7]
    assert evaluation.seats_in(grid, "random", 1) != seats
    asked = []

    def player(asks):
        asked.extend((a.game, a.seat) for a in asks)
        return ["no"] * len(asks)

    play(grid, player, seats, "nash", 0)
    assert asked == [(i, j) for i, (j,) in enumerate(seats)] * 2


def test_the_seat_of_evaluation_is_that_of_training_unless_another_is_named():
    """train_rft.py has --seat for the data and --eval-seat; eval.py has --seat alone."""
    for argv, seat in (([], 2), (["--eval-seat", "1"], 1), (["--eval-seat", "all"], "all"), (["--eval-seat", "0"], 0)):
        parser = argparse.ArgumentParser()
        experts.add_data_arguments(parser)
        evaluation.add_eval_arguments(parser, "--eval-seat")
        args = parser.parse_args(["--seat", "2", *argv])
        assert (args.seat, evaluation.seat_of(args)) == (2, seat)
        assert len(evaluation.held_out_instances(args)) == 60
    with pytest.raises(InputError):
        evaluation.held_out_instances(parser.parse_args(["--eval-seat", "4"]))


def test_random_seats_are_the_same_for_all_policies(tmp_path):
    """Two names of the same behaviour play the same games."""
    policies = "expert:noisy:nash:0.0", "expert:nash"
    a, b, *_ = run(tmp_path, "--policy", *policies, "--seat", "random", games=12).values()
    assert a["instances"] == b["instances"]
    zero = run(tmp_path, "--policy", *policies, games=12)["expert:nash"]
    assert a["instances"] != zero["instances"]


@pytest.mark.parametrize("name", ["expert:random", "expert:noisy:planner:0.5"])
def test_by_seat_is_every_seat_alone(tmp_path, name, capsys):
    results = run(tmp_path, "--policy", name, "--by-seat", games=7)
    printed = capsys.readouterr().out
    alone = [run(tmp_path, "--policy", name, "--seat", str(i), games=7)[name] for i in range(4)]
    assert list(results) == [f"{name} seat {i}" for i in range(4)]
    assert list(results.values()) == alone
    means = np.mean([[row["U3"] for row in s["instances"]] for s in alone], 0)
    half = 2.4469 * means.std(ddof=1) / math.sqrt(7)
    line = next(line for line in printed.splitlines() if line.startswith("mean"))
    assert f"{means.mean():.3f} [{means.mean() - half:.2f}, {means.mean() + half:.2f}]" in line
    assert len({s["all rounds"]["U3"]["mean"] for s in alone}) == 4


def test_the_mean_over_seats_leaves_out_what_is_not_there():
    """One seat is never compliant: `U2 | ok` of a game is that of the other seat; U1 counts both."""
    grid = list(held_out_grid(4))[:3]
    played = [play(grid, expert("nash"), 0, "nash", 0), play(grid, constant("no"), 1, "nash", 0)]
    mean = mean_over_seats(played)
    assert mean["U1"]["mean"] == 0.5 and mean["U1"]["n"] == 6
    assert mean["U2 | ok"]["mean"] == pytest.approx(np.mean([per_instance(p)["U2 | ok"] for p in played[0]]))


# ---------------------------------------------------------------------------------------------------------------------
# mixed tables


def test_a_table_of_experts(tmp_path):
    """Always-link among planners where the planners' graph is not complete: its seat alone has s below 1."""
    table = ["expert:planner", "expert:always-link", "expert:planner", "expert:never-link"]
    results = run(tmp_path, "--table", *table, "--expert", "planner", games=20)
    assert list(results) == [f"seat {i} {name}" for i, name in enumerate(table)]
    first, always, third, never = (results[key]["all rounds"] for key in results)
    assert first["row"]["mean"] == third["row"]["mean"] == 1 and 0 < always["row"]["mean"] < 1
    assert always["row"]["mean"] + never["row"]["mean"] < 2 and never["s"]["mean"] < 1
    assert len({json.dumps(results[key]["all rounds"]["U3"]) for key in results}) == 1  # one table, one welfare
    alone = run(tmp_path, "--table", *["expert:planner"] * 4, games=20)
    assert all(summary["all rounds"]["U3"]["mean"] == pytest.approx(1, abs=1e-4) for summary in alone.values())


def test_the_turns_of_one_seat():
    (played,) = play([TRIO], by_seat([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "1.0"), [(0, 1, 2)], "planner", 0)
    (own,) = of_seat([played], 2)
    assert [t.seat for t in own.turns] == [2, 2] and per_instance(own)["s"] == pytest.approx(1 / 3)


def test_every_player_hears_only_its_own_replies():
    heard = {0: [], 1: []}

    def player(k):
        def answer(asks):
            heard[k] += [(a.seat, tuple(a.replies)) for a in asks]
            return [f"{k} says {a.stage} in {a.seat}" for a in asks]

        return answer

    zero, one = player(0), player(1)
    play_tables([TRIO], [[zero, one, one]], [(0, 1, 2)], "nash", 0)
    assert heard[0] == [(0, ()), (0, ("0 says 0 in 0",))]
    assert heard[1] == [(1, ()), (2, ()), (1, ("1 says 0 in 1",)), (2, ("1 says 0 in 2",))]


# ---------------------------------------------------------------------------------------------------------------------
# models: random numbers, adapters, one model for all


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(str(tiny_model_dir))


@pytest.fixture(scope="module")
def adapter_dir(policy, tmp_path_factory):
    """An adapter that changes what the tiny model says."""
    config = lora.LoRAConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"), policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for k, p in enumerate(lora.lora_parameters(policy.model)):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    folder = tmp_path_factory.mktemp("adapter")
    adapter_files.save_adapter(policy.model, folder, config)
    lora.remove(policy.model)
    return str(folder)


def replies_of(played):
    return [[t.reply for t in p.turns] for p in played]


def test_an_adapter_that_comes_and_goes_says_what_one_that_stays_says(policy, adapter_dir):
    grid = list(held_out_grid(4))[:3]
    settings = policy, STYLE, 6, 1.0, 0
    base = replies_of(play(grid, policy_player(*settings), 1, "nash", 0))
    shared = policy_player(*settings, adapters=dict.fromkeys("GE", adapter_files.read_adapter(adapter_dir)))
    comes = replies_of(play(grid, shared, 1, "nash", 0))
    assert not lora.lora_layers(policy.model)
    put_adapter(policy, adapter_dir)
    stays = replies_of(play(grid, policy_player(*settings), 1, "nash", 0))
    lora.remove(policy.model)
    assert comes == stays and all(a != b for a, b in zip(comes, base))


def test_players_at_one_table_have_their_own_random_numbers(policy):
    grid, nash = list(held_out_grid(4))[:3], expert("nash")
    played = []
    for streams in ((100, 101), (100, 100)):
        two = [policy_player(policy, STYLE, 6, 1.0, 0, stream=stream) for stream in streams]
        played.append(replies_of(play_tables(grid, [[*two, nash, nash]] * 3, [(0, 1)] * 3, "nash", 0)))
    first, second = ([[r[k::2] for r in replies] for replies in played] for k in (0, 1))
    assert first[0] == first[1] and all(a != b for a, b in zip(*second))


def test_self_play_of_a_model_does_not_depend_on_what_is_asked_together(policy):
    """Seat-for-seat, a batch of all seats at temperature 0 says what separate calls say."""
    asks = [Ask(i, State(g), j, []) for i, g in enumerate(list(held_out_grid(4))[:2]) for j in range(4)]
    settings = policy, STYLE, 6, 0.0, 0
    together = policy_player(*settings)(asks)
    assert together == [policy_player(*settings)([ask])[0] for ask in asks] and len(set(together)) > 1
    assert together == policy_player(*settings, batch=3)(asks)


def test_what_is_kept_of_conversations_is_memory_and_not_mathematics(policy):
    """In batches of 1 only the first two conversations are kept."""
    grid, kept = list(held_out_grid(4, Family("bcz", "GE", 2)))[:4], []

    class Recorder:
        model = policy.model
        encode_prompt = staticmethod(policy.encode_prompt)

        def sample(self, prompts, M, limit, temperature, generator, history, only):
            kept.append(history is not None)
            return policy.sample(prompts, M, limit, temperature, generator, history, only)

    one = play(grid, policy_player(Recorder(), STYLE, 6, 0.0, 0, batch=1), 0, "nash", 0)
    assert kept == [True, True, False, False] * 4
    assert replies_of(one) == replies_of(play(grid, policy_player(policy, STYLE, 6, 0.0, 0), 0, "nash", 0))


def test_the_command_with_a_model_in_several_seats(tiny_model_dir, adapter_dir, tmp_path, monkeypatch):
    loads = []
    load = players.load_policy_of_rank
    monkeypatch.setattr(players, "load_policy_of_rank", lambda args: loads.append(1) or load(args))
    flags = ["--model", str(tiny_model_dir), "--device", "cpu", "--max-new-tokens", "4"]
    table = run(tmp_path, *flags, "--table", "base", adapter_dir, "expert:nash", "base", games=2)
    assert list(table) == ["seat 0 base", f"seat 1 {adapter_dir}", "seat 2 expert:nash", "seat 3 base"]
    assert loads == [1] and table["seat 2 expert:nash"]["all rounds"]["U1"]["mean"] == 1
    seats = run(tmp_path, *flags, "--policy", "base", adapter_dir, "--by-seat", games=2)
    assert seats["base seat 0"] == run(tmp_path, *flags, "--policy", "base", games=2)["base"]
    assert seats["base seat 3"] == run(tmp_path, *flags, "--policy", "base", "--seat", "3", games=2)["base"]
    assert seats[f"{adapter_dir} seat 2"] == run(tmp_path, *flags, "--policy", adapter_dir, "--seat", "2", games=2)[adapter_dir]
    alone = run(tmp_path, *flags, "--policy", "base", "--seat", "all", "--few-shot", "1", "--repair", games=2)
    rows = ["base", "base repaired", "few-shot:1", "few-shot:1 repaired", "expert:second-best", "expert:random"]
    assert list(alone) == rows
    assert len(alone["base"]["replies"][0]) == 8  # 4 seats, 2 stages


@pytest.mark.parametrize(
    "flags",
    [
        ("--seat", "some"),
        ("--seat", "-1"),
        ("--table", "expert:nash"),
        ("--table", *["expert:nash"] * 3, "nowhere"),
        ("--table", *["expert:nash"] * 4, "--by-seat"),
        ("--by-seat", "--seat", "all"),
        ("--by-seat", "--repair"),
        ("--policy", "few-shot:0"),
        ("--policy", "few-shot:x"),
        ("--few-shot", "0"),
        ("--few-shot", "1", "--alpha", "1", "--delta", "0.1", "--cost", "0.1"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line(flags, capsys, monkeypatch):
    monkeypatch.setattr(players, "load_policy_of_rank", lambda args: None)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--eval-games", "1", "--policy", "expert:nash", *flags])
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "error:" in line]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# examples in the prompt


@pytest.mark.parametrize("family, N", [(Family(), 4), (Family("pgg", "GEE"), 5), (Family("bcz", "GE", 2), 3)], ids=str)
def test_examples_are_training_games_and_compliant(family, N, monkeypatch):
    drawn = []
    monkeypatch.setattr(players, "draw_game", lambda *a: drawn.append(draw_game(*a)) or drawn[-1])
    chats = expert_examples(3, family, N, experts.make_expert("second-best"), STYLE, 0)
    assert len(chats) == len(drawn) == 3
    compared = 0
    for chat, game in zip(chats, drawn):
        assert split_of(game) == "train" and (game.label, game.N) == (family.label, N)
        assert game.key not in {g.key for g in held_out_grid(N, family)}
        seat = int(re.search(r"agent (\d+) of", chat[0]["content"])[1]) - 1
        assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * (len(game.stages) * game.rounds)]
        for kind, turn in zip(game.stages * game.rounds, chat[2::2]):
            assert parse_reply(turn["content"], kind, seat, N, game.caps[seat]) is not None
            compared += 1
    assert compared == 3 * len(family.stages) * family.rounds
    assert expert_examples(3, family, N, experts.make_expert("second-best"), STYLE, 0) == chats
    assert expert_examples(2, family, N, experts.make_expert("second-best"), STYLE, 0) == chats[:2]
    assert expert_examples(3, family, N, experts.make_expert("second-best"), STYLE, 1) != chats


def test_examples_stand_before_the_conversation():
    state = State(held_out_grid(4)[0])
    chat, examples = messages(state, 2, [], STYLE), expert_examples(2, Family(), 4, experts.make_expert("nash"), STYLE, 0)
    joined = with_examples(examples, chat)
    assert [m["role"] for m in joined] == ["system", *["user", "assistant"] * 4, "user"]
    assert joined[:5] == examples[0] and joined[6:9] == examples[1][2:]
    assert examples[1][0]["content"] in joined[5]["content"] and examples[1][1]["content"] in joined[5]["content"]
    assert chat[0]["content"] in joined[-1]["content"] and joined[-1]["content"].endswith(chat[1]["content"])
    assert with_examples([], chat) == chat


def test_a_prompt_with_examples_goes_on_where_the_last_one_ended(policy):
    """So that the keys and values of the first stage serve in the second: with and without them the replies agree."""
    examples = {"BCZ-GE": expert_examples(1, Family(), 4, experts.make_expert("nash"), STYLE, 0)}
    grid, asked = list(held_out_grid(4))[:2], []

    class Recorder:
        model = policy.model
        encode_prompt = staticmethod(policy.encode_prompt)

        def sample(self, prompts, M, limit, temperature, generator, history, only):
            groups = policy.sample(prompts, M, limit, temperature, generator, history, only)
            asked.append((prompts, [group[0].reply_ids for group in groups], history))
            return groups

    played = play(grid, policy_player(Recorder(), STYLE, 8, 0.0, 0, examples=examples), 0, "nash", 0)
    (first, replies, history), (second, _, same) = asked
    assert history is same and isinstance(history, History)
    common = [sum(a == b for a, b in zip(p + r, q)) for p, r, q in zip(first, replies, second)]
    assert all(n >= len(p) for n, p in zip(common, first))
    alone = [policy.sample([p], 1, 8, 0.0)[0][0].text for p in second]
    assert alone == [p.turns[1].reply for p in played]


# ---------------------------------------------------------------------------------------------------------------------
# lenient reading


@pytest.mark.parametrize(
    "reply, row",
    [
        ("Decision: [0, 1, 0, 1]", [0, 1, 0, 1]),  # compliant: as it is
        ("Decision: [0, 1, 0, 1].", [0, 1, 0, 1]),
        ("Decision: I choose [0, 1, 0, 1], because", [0, 1, 0, 1]),
        ("Decision: 0, 1, 0, 1", [0, 1, 0, 1]),
        ("Decision: [0 1 0 1]", [0, 1, 0, 1]),
        ("Decision: [1, 1, 0, 1]", [0, 1, 0, 1]),  # own position
        ("Decision: [0, 1, 1]", [0, 1, 1, 0]),
        ("Decision: [0, 1, 1, 1, 1, 0]", [0, 1, 1, 1]),
        ("Decision: [0, 2, 0, 1]", [0, 1, 0, 1]),
        ("Decision: [0, 1.54, 0.3, -1]", [0, 1, 0, 0]),
        ("Decision: [0, 1, 0, 1", [0, 1, 0, 1]),  # cut off
        ("Decision: [1]", [0, 0, 0, 0]),
        ("Decision: [0, 1, 1, 1]\nDecision: [0, 0, 0, 1] or so", [0, 0, 0, 1]),  # the last
        ("Belief: [0, 1, 1, 1] Decision: [0, 1, 0, 1]", [0, 1, 0, 1]),  # on one line
        ("Decision:\n[0, 1, 0, 1]\n[0, 0, 0, 0]", [0, 1, 0, 1]),
        ("I link: [0, 1, 0, 1]", [0, 1, 0, 1]),
        ("[0, 0, 0, 1] and then [0, 1, 0, 0]", [0, 1, 0, 0]),
        ("Belief: [0, 1, 1, 1]", None),  # a belief is no decision
        ("Belief: [0, 1, 1, 1]\nmine: [0, 1, 0, 0]", [0, 1, 0, 0]),
        ("Decision: agents 2 and 3", None),
        ("Decision: 0101", None),
        ("Decision:", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_rows_that_can_be_read(reply, row):
    decision = repair_reply(reply, "G", 0, 4, 5.0)
    if row is None:
        assert decision is None
    else:
        assert decision.action.tolist() == row and decision.action.dtype == np.zeros(1, int).dtype
        assert parse_reply(f"Decision: {row}", "G", 0, 4, 5.0) is not None


@pytest.mark.parametrize(
    "reply, effort",
    [
        ("Decision: 1.5", 1.5),
        ("Decision: 1.5 units", 1.5),
        ("Decision: about 1.5.", 1.5),
        ("Decision: 7", 5.0),
        ("Decision: -2", 0.0),
        ("Decision: [1.5, 2]", 1.5),
        ("Decision: 1e999, or 2", 2.0),
        ("Decision: nan", None),
        ("Decision: 1.5x", None),
        ("My effort is 2.25", 2.25),
        ("Belief: [0, 3, 3, 3]", None),
        ("Belief: [0, 3, 3, 3]\nI take 2", 2.0),
        ("Decision: 1\nDecision: 2!", 2.0),
        ("none", None),
    ],
)
def test_efforts_that_can_be_read(reply, effort):
    decision = repair_reply(reply, "E", 0, 4, 5.0)
    assert (decision and decision.action) == effort


def test_a_repaired_row_keeps_the_strict_compliance():
    """The three play as planners, but their graph replies end in a full stop: strictly nobody links."""
    links = {0: [0, 1, 1], 1: [1, 0, 1], 2: [1, 1, 0]}
    player = lambda asks: [f"Decision: {links[a.seat]}." if a.state.kind == "G" else "Decision: 1.6667" for a in asks]
    (strict,) = play([TRIO], player, 0, "planner", 0)
    (repaired,) = play([TRIO], player, 0, "planner", 0, repair=True)
    a, b = per_instance(strict), per_instance(repaired)
    assert a["U1"] == b["U1"] == 0.5 and a["U3 | ok"] is b["U3 | ok"] is None
    assert a["U3"] < 0.9 and b["U3"] == pytest.approx(1, abs=1e-4)
    assert (a["s"], a["row"], b["s"], b["row"]) == (0, 0, 1, 1)
    assert [t.repaired for t in repaired.turns] == [True, False] and not any(t.repaired for t in strict.turns)
    assert summarise([repaired])["repaired"] == 1 and summarise([strict])["repaired"] == 0
    for text in ("", "nothing to read"):
        silent = [play([TRIO], constant(text), 0, "planner", 0, repair=r)[0] for r in (False, True)]
        assert per_instance(silent[0]) == per_instance(silent[1]) and per_instance(silent[1])["s"] == 0
