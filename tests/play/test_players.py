"""Players and tables: one seat, self-play by hand, mixed tables, examples in the prompt, shared adapters."""

import re

import numpy as np
import pytest
import torch
from reference import add_adapter
from tables import STYLE, TRIO, by_seat, constant, expert, play

import lora
from games import KINDS, State
from models import adapters as adapter_files
from models.load import load_policy, put_adapter
from play import expert_games, players
from play.cast import make_expert
from play.metrics import METRICS, per_instance
from play.players import Ask, expert_examples, play_tables, policy_player, with_examples
from play.report import summarise
from prompts import PromptStyle, Reply, messages, parse_reply, read_reply
from rewards import Target, accuracy, belief_accuracy, graph_likeness
from run.errors import InputError
from run.seeds import torch_generator
from world.draws import Family, draw_game, held_out_grid, split_of

GRID = list(held_out_grid(4))
TWO_ROUNDS = list(held_out_grid(4, Family("bcz", "GE", 2)))
NASH, PLANNER = make_expert("nash"), make_expert("planner")
VALUES = {name: METRICS[name] for name in ("s", "row", "U2", "belief")}


def values_of(turn):
    """s, row, U2 and belief of one decision."""
    return [metric(players.Episode(turn.state.game, [turn], [])) for metric in VALUES.values()]


def reference_play(instances, player, seat, others, seed):
    """One seat, without tables: (reply, compliant, s, row, U2, belief) by game and stage, and welfare.
    The draws of the others belong to seed, game, seat and stage, and to nothing that the player does."""
    states, replies = [State(g) for g in instances], [[] for _ in instances]
    rows = [[] for _ in instances]
    for stage in range(len(instances[0].stages) * instances[0].rounds):
        texts = player([Ask(i, s, seat, r) for i, (s, r) in enumerate(zip(states, replies, strict=True))])
        for i, (state, text) in enumerate(zip(states, texts, strict=True)):
            N, kind = state.game.N, state.kind
            decision = parse_reply(text, state, seat)
            draws = [np.random.default_rng([seed, i, j, stage]) for j in range(N)]
            experts_N = np.array([others(state, j, rng).action for j, rng in enumerate(draws)])
            actions = experts_N.copy()
            actions[seat] = (decision or kind.fallback(N)).action
            s = row = None
            if kind.letter == "G":
                s = graph_likeness(decision, Target(state, seat, experts_N))
                row = accuracy(decision.action, experts_N[seat], seat) if decision else 0.0
            values = [s, row, kind.efficiency(state, seat, actions)]
            values.append(belief_accuracy(decision, Target(state, seat, actions)))
            rows[i].append((text, decision is not None, values))
            replies[i].append(text)
            states[i] = state.step(actions)
    return rows, [[float(pay.sum()) for _, _, pay in s.round_results()] for s in states]


FAMILIES = [Family("bcz", "GE", 2), Family("bcz", "GGE"), Family("pgg", "GEE")]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("name", ["second-best", "noisy:myopic:0.5"])
def test_a_table_of_one_player_and_experts_is_play_in_one_seat(family, name):
    instances, sometimes = list(held_out_grid(4, family))[::11], expert("random", 3)
    others = make_expert(name)

    def player(asks):  # every third reply is not compliant
        pairs = zip(asks, sometimes(asks), strict=True)
        return [text if (a.game + len(a.replies)) % 3 else "no" for a, text in pairs]

    for seat in range(4):
        rows, welfares = reference_play(instances, player, seat, others, 5)
        played = play(instances, player, seat, others, 5)
        assert [p.welfares for p in played] == welfares
        got = [[(t.reply, t.decision is not None, values_of(t)) for t in p.turns] for p in played]
        assert got == rows and all(t.seat == seat for p in played for t in p.turns)


def test_replies_that_are_not_compliant_play_nothing_and_count():
    """Seat 0 plays no links and effort 0. The two planners link: x = 1 / (1 - 0.2), pi = 0.575 each."""
    (played,) = play([TRIO], constant("I cannot say."), 0, PLANNER, 0)
    row = per_instance(played)
    assert [(t.decision, t.reply) for t in played.turns] == [(None, "I cannot say.")] * 2
    assert row["U1"] == 0 and row["belief"] == 0 and row["U2 | ok"] is None and row["U3 | ok"] is None
    assert row["U3"] == pytest.approx(1.15 / 2.2)
    assert row["U2 graph"] == pytest.approx(0, abs=1e-9) and row["U2 effort"] == pytest.approx(0.75)


def test_self_play_by_hand():
    """Seats 0 and 1 link, seat 2 refuses, x = 1: pi = 1 - 0.5 + 0.1 - 0.05 = 0.55 twice, and 0.5. Best
    replies are 1.1, 1.1 and 1, own payoffs before costs 0.6 of 0.605 (0 effort: 0, 3: -1.2), 0.5 of 0.5. The
    planners' graph is complete."""
    rows = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    (played,) = play([TRIO], by_seat(rows, "1.0"), [(0, 1, 2)], PLANNER, 0)
    places = [(t.state.kind.letter, t.seat) for t in played.turns]
    assert places == [(letter, seat) for letter in "GE" for seat in range(3)]
    row = per_instance(played)
    assert row["U1"] == 1 and row["U3"] == pytest.approx(1.6 / 2.2)
    assert row["s"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert row["row"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert row["U2 effort"] == pytest.approx(1 - 2 * (0.005 / 1.805) / 3)
    assert row["U2 graph"] == pytest.approx(1)  # of seat 2, whom nobody chooses, all rows are the same
    u1 = summarise([played])["all rounds"]["U1"]
    assert (u1["mean"], u1["n"]) == (1, 2)  # six decisions of three seats count as those of one


def test_all_seats_are_asked_at_once_and_every_player_hears_only_its_own_replies():
    heard = []

    def player(k):
        def answer(asks):
            heard.append((k, [(a.game, a.seat, tuple(a.replies)) for a in asks]))
            return [f"{k} says {len(a.replies)} in {a.seat}" for a in asks]

        return answer

    zero, one = player(0), player(1)
    play_tables([TRIO, TRIO], [[zero, one, one]] * 2, [(0, 1, 2)] * 2, NASH, 0)
    first = [(0, [(i, 0, ()) for i in (0, 1)]), (1, [(i, j, ()) for i in (0, 1) for j in (1, 2)])]
    then = [(k, [(i, j, (f"{k} says 0 in {j}",)) for i, j, _ in asked]) for k, asked in first]
    assert heard == first + then


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(str(tiny_model_dir))


class Recorder:
    """Stands in for a policy or, made by another one, for a session of it; keeps what it was asked, and
    answers in its place if `says` is given."""

    def __init__(self, policy, says=None, parent=None):
        self.policy, self.says, self.parent = policy, says, parent
        self.asked, self.chats = parent.asked if parent else [], []

    def session(self):
        return Recorder(self.policy.session(), self.says, self)

    def encode_prompt(self, chat):
        self.chats.append(chat)
        return self.policy.encode_prompt(chat)

    def encode_reply(self, text):
        return self.policy.encode_reply(text)

    def sample(self, prompts, uniforms, temperature, guesses):
        assert len(guesses) == len(prompts)
        if self.says:
            groups = [[Reply(self.says(k), [0], [0.0], True)] for k in range(len(prompts))]
        else:
            groups = self.policy.sample(prompts, uniforms, temperature, guesses)
        session = self if self.parent else None
        self.asked.append((prompts, [group[0] for group in groups], session, uniforms, temperature))
        return groups


def replies_of(played):
    return [[t.reply for t in p.turns] for p in played]


@pytest.mark.parametrize("style", [PromptStyle(), PromptStyle("local", belief=False, hints=False)], ids=str)
def test_evaluation_prompts_are_the_training_prompts(policy, style, monkeypatch):
    """The policy that answers as in a recorded expert game is asked, letter for letter, what it says."""
    instances, seat = TWO_ROUNDS[7:60:13], 2
    plays = [(i, game, np.random.default_rng(0)) for i, game in enumerate(instances)]
    records = expert_games.simulate(plays, NASH, style)
    by_game = [[r for r in records if r.game == i and r.seat == seat] for i in range(len(instances))]
    by_stage = [r for stage in zip(*by_game, strict=True) for r in stage]
    recorder = Recorder(policy)
    monkeypatch.setattr(players, "BATCH", 3)
    recorder.says = lambda k: by_stage[sum(len(asked[0]) for asked in recorder.asked) + k].reply
    played = play(instances, policy_player(recorder, style, 0.7, 0), seat, NASH, 0)
    assert recorder.chats == [r.prompt for r in by_stage] and len(recorder.chats) == 20
    assert replies_of(played) == [[r.reply for r in game] for game in by_game]
    sessions = [asked[2] for asked in recorder.asked]  # batches of 3 and 2 games, in each of 4 stages
    assert all(s is sessions[i % 2] for i, s in enumerate(sessions))
    for i, (prompts, _, _, uniforms, temperature) in enumerate(recorder.asked):
        generator = torch_generator(0, 100, i // 2, 3 * (i % 2))
        expected = torch.rand(len(prompts), 1, style.reply_limit(4), generator=generator)
        assert temperature == 0.7 and len(prompts) == (3, 2)[i % 2] and torch.equal(uniforms, expected)


def test_an_adapter_that_comes_and_goes_says_what_one_that_stays_says(policy, tmp_path):
    adapter_files.save_adapter(policy.model, tmp_path, add_adapter(policy, size=1.0))
    lora.remove(policy.model)
    how = policy, PromptStyle(max_new_tokens=6), 1.0, 0
    base = replies_of(play(GRID[:3], policy_player(*how), 1, NASH, 0))
    shared = policy_player(*how, adapter=adapter_files.read_adapter(tmp_path))
    comes = replies_of(play(GRID[:3], shared, 1, NASH, 0))
    assert not lora.lora_layers(policy.model)
    put_adapter(policy, tmp_path)
    stays = replies_of(play(GRID[:3], policy_player(*how), 1, NASH, 0))
    lora.remove(policy.model)
    assert comes == stays and all(a != b for a, b in zip(comes, base, strict=True))


SHORT = PromptStyle(max_new_tokens=6)


def test_players_at_one_table_have_their_own_random_numbers(policy):
    nash, played = expert("nash"), []
    for streams in ((100, 101), (100, 100)):
        two = [policy_player(policy, SHORT, 1.0, 0, stream=stream) for stream in streams]
        played.append(replies_of(play_tables(GRID[:3], [[*two, nash, nash]] * 3, [(0, 1)] * 3, NASH, 0)))
    first, second = ([[r[k::2] for r in replies] for replies in played] for k in (0, 1))
    assert first[0] == first[1] and all(a != b for a, b in zip(*second, strict=True))


def test_games_that_are_played_alone_have_numbers_of_their_own(policy):
    """As at the table with a person: the first player draws other replies in the second game."""
    texts = [policy_player(policy, SHORT, 1.0, 0)([Ask(k, State(GRID[0]), 0, [])]) for k in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_replies_do_not_depend_on_what_is_asked_together_or_kept(policy, monkeypatch):
    """At temperature 0. In batches of 1 only the first two conversations are kept."""
    asks = [Ask(i, State(g), j, []) for i, g in enumerate(GRID[:2]) for j in range(4)]
    how = policy, SHORT, 0.0, 0
    texts = policy_player(*how)(asks)
    assert texts == [policy_player(*how)([ask])[0] for ask in asks] and len(set(texts)) > 1
    together = play(TWO_ROUNDS[:4], policy_player(*how), 0, NASH, 0)
    monkeypatch.setattr(players, "BATCH", 1)
    recorder = Recorder(policy)
    one = play(TWO_ROUNDS[:4], policy_player(recorder, SHORT, 0.0, 0), 0, NASH, 0)
    assert [asked[2] is not None for asked in recorder.asked] == [True, True, False, False] * 4
    assert replies_of(one) == replies_of(together)


@pytest.mark.parametrize("family, N", [(Family("pgg", "GEE"), 5), (Family("bcz", "GE", 2), 3)], ids=str)
def test_examples_are_training_games_and_compliant(family, N, monkeypatch):
    drawn, second_best = [], make_expert("second-best")
    monkeypatch.setattr(players, "draw_game", lambda *a: drawn.append(draw_game(*a)) or drawn[-1])
    chats = expert_examples(3, family, N, second_best, STYLE, 0)
    assert len(chats) == len(drawn) == 3
    for chat, game in zip(chats, drawn, strict=True):
        assert split_of(game) == "train" and (game.label, game.N) == (family.label, N)
        seat = int(re.search(r"agent (\d+) of", chat[0]["content"])[1]) - 1
        kinds = game.stages * game.rounds
        assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * len(kinds)]
        for letter, turn in zip(kinds, chat[2::2], strict=True):
            cap = float(game.caps[seat])
            assert read_reply(turn["content"], KINDS[letter], seat, N, cap)[1] is None
    assert expert_examples(3, family, N, second_best, STYLE, 0) == chats
    assert expert_examples(2, family, N, second_best, STYLE, 0) == chats[:2]
    assert expert_examples(3, family, N, second_best, STYLE, 1) != chats


def test_no_example_is_an_evaluated_game():
    family = Family(fixed=(("delta", 0.07), ("c", 0.1)))  # only the types are drawn
    with pytest.raises(InputError, match="few-shot games would be evaluated ones"):
        expert_examples(1, family, 4, NASH, STYLE, 0)


@pytest.mark.parametrize("hints", [True, False])
def test_with_think_every_answer_of_an_example_begins_with_a_thought(hints):
    """The worked number of the question that it answers, as in the labels of SFT. Else nothing differs."""
    plain, style = PromptStyle(hints=hints), PromptStyle(hints=hints, think=40)
    given, ask = (3, Family("bcz", "GE", 2), 3, make_expert("planner")), "Think first, then reply"
    pairs = zip(expert_examples(*given, style, 0), expert_examples(*given, plain, 0), strict=True)
    for chat, other in pairs:
        assert chat[0]["content"] == other[0]["content"].replace("Reply", ask) and chat[1::2] == other[1::2]
        for question, turn, without in zip(chat[1::2], chat[2::2], other[2::2], strict=True):
            thought = turn["content"].removesuffix(without["content"])
            alone = " 0 links" in question["content"]  # then there is no number to work out
            assert without["content"][:8] == "Belief: " and bool(thought) != alone
            assert not hints or thought.rstrip("\n. ").split(". ")[-1] in question["content"]


def test_examples_stand_before_the_conversation():
    examples, chat = expert_examples(2, Family(), 4, NASH, STYLE, 0), messages(State(GRID[0]), 2, [], STYLE)
    joined = with_examples(examples, chat)
    assert [m["role"] for m in joined] == ["system", *["user", "assistant"] * 4, "user"]
    assert joined[:5] == examples[0] and joined[6:9] == examples[1][2:] and with_examples([], chat) == chat
    for game, question in ((examples[1], joined[5]), (chat, joined[-1])):
        assert game[0]["content"] in question["content"] and question["content"].endswith(game[1]["content"])
