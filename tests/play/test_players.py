"""Players and tables: one seat, self-play by hand, mixed tables, examples in the prompt, shared adapters."""

import re

import numpy as np
import pytest
import torch
from tables import STYLE, TRIO, by_seat, constant, expert

import experts
import lora
from fast.shared_prefix import History
from games import State
from models import adapters as adapter_files
from models.load import load_policy, put_adapter
from play import expert_games, players
from play.metrics import per_instance, strategic_efficiency, summarise
from play.players import Ask, expert_examples, play, play_tables, policy_player, with_examples
from policy import Rollout
from prompts import PromptStyle, fallback, messages, parse_reply, reply_tokens
from rewards import Target, accuracy, belief_accuracy, graph_score
from world.draws import Family, draw_game, held_out_grid, split_of

GRID = list(held_out_grid(4))
TWO_ROUNDS = list(held_out_grid(4, Family("bcz", "GE", 2)))

# -------------------- one seat


def reference_play(instances, player, seat, expert, seed):
    """One seat, without tables: (reply, compliant, s, row, U2, belief) by game and stage, and welfare.
    The draws of the others belong to seed, game, seat and stage, and to nothing that the player does."""
    others = experts.make_expert(expert)
    states, replies = [State(g) for g in instances], [[] for _ in instances]
    rows = [[] for _ in instances]
    for stage in range(len(instances[0].stages) * instances[0].rounds):
        texts = player([Ask(i, s, seat, r) for i, (s, r) in enumerate(zip(states, replies))])
        for i, (state, text) in enumerate(zip(states, texts)):
            N = state.game.N
            decision = parse_reply(text, state.kind, seat, N, state.game.caps[seat])
            draws = [np.random.default_rng([seed, i, j, stage]) for j in range(N)]
            experts_N = [others(state, j, rng).action for j, rng in enumerate(draws)]
            actions = np.array(experts_N)
            actions[seat] = (decision or fallback(state.kind, N)).action
            s = row = None
            if state.kind == "G":
                s = graph_score(decision, Target(state, seat, np.array(experts_N)))
                row = accuracy(decision.action, experts_N[seat], seat) if decision else 0.0
            U2 = strategic_efficiency(state, seat, actions)
            belief = belief_accuracy(decision, Target(state, seat, actions))
            rows[i].append((text, decision is not None, s, row, U2, belief))
            replies[i].append(text)
            states[i] = state.step(actions)
    return rows, [[float(pay.sum()) for _, _, pay in s.round_results()] for s in states]


FAMILIES = [Family("bcz", "GE", 2), Family("bcz", "GGE"), Family("pgg", "GEE")]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("others", ["second-best", "noisy:myopic:0.5"])
def test_a_table_of_one_player_and_experts_is_play_in_one_seat(family, others):
    instances, sometimes = list(held_out_grid(4, family))[::11], expert("random", 3)

    def player(asks):  # every third reply is not compliant
        return [text if (a.game + a.stage) % 3 else "no" for a, text in zip(asks, sometimes(asks))]

    for seat in range(4):
        rows, welfares = reference_play(instances, player, seat, others, 5)
        played = play(instances, player, seat, others, 5)
        assert [p.welfares for p in played] == welfares
        got = [
            [(t.reply, t.decision is not None, t.s, t.row, t.U2, t.belief) for t in p.turns] for p in played
        ]
        assert got == rows and all(t.seat == seat for p in played for t in p.turns)


@pytest.mark.parametrize("seat", range(4))
def test_planners_among_planners_reach_the_first_best(seat):
    """U3 = 1 up to the two decimals of the efforts, whichever seat is watched, on the whole grid."""
    rows = summarise(play(GRID[::4], expert("planner"), seat, "planner", 0))
    assert len(rows["instances"]) == 15
    for row in rows["instances"]:
        assert row["U3"] == pytest.approx(1, abs=1e-4) and row["U3"] <= 1 + 1e-12
        assert row["U1"] == 1 and row["belief"] == pytest.approx(1)
    assert rows["all rounds"]["U3 gain"]["mean"] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("text", ["", "Decision: [1, 1, 1]", "I cannot say.", "Decision: nan"])
def test_replies_that_are_not_compliant_play_nothing_and_count(text):
    """Seat 0 plays no links and effort 0. The two planners link: x = 1 / (1 - 0.2), pi = 0.575 each."""
    (played,) = play([TRIO], constant(text), 0, "planner", 0)
    row = per_instance(played)
    assert [(t.decision, t.reply) for t in played.turns] == [(None, text)] * 2
    assert row["U1"] == 0 and row["belief"] == 0 and row["U2 | ok"] is None and row["U3 | ok"] is None
    assert row["U3"] == pytest.approx(1.15 / 2.2) and row["U3 gain"] == pytest.approx(-0.35 / 0.7)
    assert row["U2 graph"] == pytest.approx(0, abs=1e-9) and row["U2 effort"] == pytest.approx(0.75)


def test_one_bad_reply_does_not_spoil_the_other():
    says = {"G": "Belief: [0, 1, 1]\nDecision: [0, 1, 1]", "E": "Decision: 3.01"}
    (played,) = play([TRIO], lambda asks: [says[a.state.kind] for a in asks], 0, "planner", 0)
    row = per_instance(played)
    # others: x = 1.67 (complete graph), 1.67 - 1.39445 + 0.27889 - 0.1 = 0.45444 each; seat 0: -0.1
    assert row["U1"] == 0.5 and row["belief"] == 0.5
    assert row["U3"] == pytest.approx(0.80889 / 2.2, abs=1e-5) and row["U3 | ok"] is None
    assert row["U2 | ok"] == row["U2 graph"] == 1


def test_the_graph_score_and_the_row_compare_with_the_expert_in_the_same_seat():
    """Among three planners the expert graph is complete; one link fewer is 2 of 6 entries, and 1 of 2 of the
    row. Links that nobody answers show in the row and not in the graph."""
    cases = {"[0, 1, 1]": (1, 1), "[0, 1, 0]": (2 / 3, 1 / 2), "[0, 0, 0]": (1 / 3, 0), "[1, 0, 0]": (0, 0)}
    for text, (s, row) in cases.items():
        (played,) = play([TRIO], constant(f"Decision: {text}"), 0, "planner", 0)
        assert [(t.s, t.row) for t in played.turns] == [(pytest.approx(s), row), (None, None)]
    (played,) = play([TRIO], constant("Decision: [0, 1, 1]"), 0, "never-link", 0)
    assert (played.turns[0].s, played.turns[0].row) == (1, 0)


def test_the_others_expert_scores_1_also_where_it_errs_at_random():
    for name, seed, right in (
        ("second-best", 2, 1),
        ("noisy:nash:0.5", 2, 1),
        ("random", 2, 1),
        ("random", 9, 0),
    ):
        rows = summarise(play(TWO_ROUNDS[::6], expert(name, seed), 1, name, 2))["instances"]
        assert len(rows) == 10 and all(row["s"] == row["row"] == 1 for row in rows) == bool(right)


def test_a_repaired_row_keeps_the_strict_compliance():
    """The three play as planners, but their graph replies end in a full stop: strictly nobody links."""
    links = {0: [0, 1, 1], 1: [1, 0, 1], 2: [1, 1, 0]}
    player = lambda asks: [
        f"Decision: {links[a.seat]}." if a.state.kind == "G" else "Decision: 1.6667" for a in asks
    ]
    (strict,), (repaired,) = (play([TRIO], player, 0, "planner", 0, repair=r) for r in (False, True))
    a, b = per_instance(strict), per_instance(repaired)
    assert a["U1"] == b["U1"] == 0.5 and a["U3 | ok"] is b["U3 | ok"] is None
    assert a["U3"] < 0.9 and b["U3"] == pytest.approx(1, abs=1e-4)
    assert (a["s"], a["row"], b["s"], b["row"]) == (0, 0, 1, 1)
    assert [t.repaired for t in repaired.turns] == [True, False] and not any(t.repaired for t in strict.turns)
    assert (summarise([repaired])["repaired"], summarise([strict])["repaired"]) == (1, 0)
    silent = [play([TRIO], constant("nothing to read"), 0, "planner", 0, repair=r)[0] for r in (False, True)]
    assert per_instance(silent[0]) == per_instance(silent[1]) and per_instance(silent[1])["s"] == 0


# -------------------- several seats


def test_self_play_by_hand():
    """Seats 0 and 1 link, seat 2 refuses, x = 1: pi = 1 - 0.5 + 0.1 - 0.05 = 0.55 twice, and 0.5. Best
    replies are 1.1, 1.1 and 1, own payoffs before costs 0.6 of 0.605 (0 effort: 0, 3: -1.2), 0.5 of 0.5. The
    planners' graph is complete."""
    rows = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    (played,) = play([TRIO], by_seat(rows, "1.0"), [(0, 1, 2)], "planner", 0)
    assert [(t.kind, t.seat) for t in played.turns] == [(kind, seat) for kind in "GE" for seat in range(3)]
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
            return [f"{k} says {a.stage} in {a.seat}" for a in asks]

        return answer

    zero, one = player(0), player(1)
    play_tables([TRIO, TRIO], [[zero, one, one]] * 2, [(0, 1, 2)] * 2, "nash", 0)
    first = [(0, [(i, 0, ()) for i in (0, 1)]), (1, [(i, j, ()) for i in (0, 1) for j in (1, 2)])]
    then = [(k, [(i, j, (f"{k} says 0 in {j}",)) for i, j, _ in asked]) for k, asked in first]
    assert heard == first + then


# -------------------- models: random numbers, adapters, one model for all


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load_policy(str(tiny_model_dir))


class Recorder:
    """Stands in for a policy; keeps what it was asked, and answers in its place if `says` is given."""

    def __init__(self, policy, says=None):
        self.policy, self.says, self.asked, self.chats = policy, says, [], []
        self.new_history = policy.new_history

    def encode_prompt(self, chat):
        self.chats.append(chat)
        return self.policy.encode_prompt(chat)

    def sample(self, prompts, M, limit, temperature, generator, history, only):
        if self.says:
            groups = [[Rollout(ids, [0], [0.0], self.says(k), True)] for k, ids in enumerate(prompts)]
        else:
            groups = self.policy.sample(prompts, M, limit, temperature, generator, history, only)
        self.asked.append((prompts, [group[0] for group in groups], history, (M, limit, temperature, only)))
        return groups


def replies_of(played):
    return [[t.reply for t in p.turns] for p in played]


@pytest.mark.parametrize("style", [PromptStyle(), PromptStyle("local", belief=False, hints=False)], ids=str)
def test_evaluation_prompts_are_the_training_prompts(policy, style):
    """The policy that answers as in a recorded expert game is asked, letter for letter, what it says."""
    instances, seat, nash = TWO_ROUNDS[7:60:13], 2, experts.make_expert("nash")
    records = expert_games.simulate(
        [(i, g, np.random.default_rng(0)) for i, g in enumerate(instances)], nash, style
    )
    of_seat = [[r for r in records if r.game == i and r.seat == seat] for i in range(len(instances))]
    by_stage = [r.reply for stage in zip(*of_seat) for r in stage]
    recorder = Recorder(policy)
    recorder.says = lambda k: by_stage[sum(len(asked[0]) for asked in recorder.asked) + k]
    played = play(instances, policy_player(recorder, style, None, 0.7, 0, batch=3), seat, "nash", 0)
    assert (
        recorder.chats == [r.prompt for stage in zip(*of_seat) for r in stage] and len(recorder.chats) == 20
    )
    assert replies_of(played) == [[r.reply for r in of_game] for of_game in of_seat]
    histories = [asked[2] for asked in recorder.asked]  # batches of 3 and 2 games, in each of 4 stages
    assert all(h is histories[i % 2] for i, h in enumerate(histories)) and histories[0] is not histories[1]
    settings = [asked[3] for asked in recorder.asked]
    assert settings == [(1, reply_tokens(4), 0.7, [0, 1, 2]), (1, reply_tokens(4), 0.7, [0, 1])] * 4


def test_an_adapter_that_comes_and_goes_says_what_one_that_stays_says(policy, tmp_path):
    config = lora.LoRAConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"), policy.name)
    lora.inject(policy.model, config, torch.Generator().manual_seed(0), policy.layer)
    with torch.no_grad():
        for k, p in enumerate(lora.lora_parameters(policy.model)):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    adapter_files.save_adapter(policy.model, tmp_path, config)
    lora.remove(policy.model)
    settings = policy, STYLE, 6, 1.0, 0
    base = replies_of(play(GRID[:3], policy_player(*settings), 1, "nash", 0))
    shared = policy_player(*settings, adapters=dict.fromkeys("GE", adapter_files.read_adapter(tmp_path)))
    comes = replies_of(play(GRID[:3], shared, 1, "nash", 0))
    assert not lora.lora_layers(policy.model)
    put_adapter(policy, tmp_path)
    stays = replies_of(play(GRID[:3], policy_player(*settings), 1, "nash", 0))
    lora.remove(policy.model)
    assert comes == stays and all(a != b for a, b in zip(comes, base))


def test_players_at_one_table_have_their_own_random_numbers(policy):
    nash, played = expert("nash"), []
    for streams in ((100, 101), (100, 100)):
        two = [policy_player(policy, STYLE, 6, 1.0, 0, stream=stream) for stream in streams]
        played.append(replies_of(play_tables(GRID[:3], [[*two, nash, nash]] * 3, [(0, 1)] * 3, "nash", 0)))
    first, second = ([[r[k::2] for r in replies] for replies in played] for k in (0, 1))
    assert first[0] == first[1] and all(a != b for a, b in zip(*second))


def test_self_play_of_a_model_does_not_depend_on_what_is_asked_together(policy):
    """Seat-for-seat, a batch of all seats at temperature 0 says what separate calls say."""
    asks = [Ask(i, State(g), j, []) for i, g in enumerate(GRID[:2]) for j in range(4)]
    settings = policy, STYLE, 6, 0.0, 0
    together = policy_player(*settings)(asks)
    assert together == [policy_player(*settings)([ask])[0] for ask in asks] and len(set(together)) > 1
    assert together == policy_player(*settings, batch=3)(asks)


def test_what_is_kept_of_conversations_is_memory_and_not_mathematics(policy):
    """In batches of 1 only the first two conversations are kept."""
    recorder = Recorder(policy)
    one = play(TWO_ROUNDS[:4], policy_player(recorder, STYLE, 6, 0.0, 0, batch=1), 0, "nash", 0)
    assert [asked[2] is not None for asked in recorder.asked] == [True, True, False, False] * 4
    together = play(TWO_ROUNDS[:4], policy_player(policy, STYLE, 6, 0.0, 0), 0, "nash", 0)
    assert replies_of(one) == replies_of(together)


# -------------------- examples in the prompt


@pytest.mark.parametrize(
    "family, N", [(Family(), 4), (Family("pgg", "GEE"), 5), (Family("bcz", "GE", 2), 3)], ids=str
)
def test_examples_are_training_games_and_compliant(family, N, monkeypatch):
    drawn, second_best = [], experts.make_expert("second-best")
    monkeypatch.setattr(players, "draw_game", lambda *a: drawn.append(draw_game(*a)) or drawn[-1])
    chats = expert_examples(3, family, N, second_best, STYLE, 0)
    assert len(chats) == len(drawn) == 3
    for chat, game in zip(chats, drawn):
        assert split_of(game) == "train" and (game.label, game.N) == (family.label, N)
        seat = int(re.search(r"agent (\d+) of", chat[0]["content"])[1]) - 1
        kinds = game.stages * game.rounds
        assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * len(kinds)]
        for kind, turn in zip(kinds, chat[2::2], strict=True):
            assert parse_reply(turn["content"], kind, seat, N, game.caps[seat]) is not None
    assert expert_examples(3, family, N, second_best, STYLE, 0) == chats
    assert expert_examples(2, family, N, second_best, STYLE, 0) == chats[:2]
    assert expert_examples(3, family, N, second_best, STYLE, 1) != chats


def test_examples_stand_before_the_conversation():
    examples = expert_examples(2, Family(), 4, experts.make_expert("nash"), STYLE, 0)
    chat = messages(State(GRID[0]), 2, [], STYLE)
    joined = with_examples(examples, chat)
    assert [m["role"] for m in joined] == ["system", *["user", "assistant"] * 4, "user"]
    assert joined[:5] == examples[0] and joined[6:9] == examples[1][2:]
    for game, question in ((examples[1], joined[5]), (chat, joined[-1])):
        assert game[0]["content"] in question["content"] and question["content"].endswith(game[1]["content"])
    assert with_examples([], chat) == chat


def test_a_prompt_with_examples_goes_on_where_the_last_one_ended(policy):
    """So the keys and values of the first stage serve in the second: with and without them replies agree."""
    examples = {"BCZ-GE": expert_examples(1, Family(), 4, experts.make_expert("nash"), STYLE, 0)}
    recorder = Recorder(policy)
    player = policy_player(recorder, STYLE, 8, 0.0, 0, examples=examples)
    played = play(GRID[:2], player, 0, "nash", 0)
    (first, rollouts, history, _), (second, _, same, _) = recorder.asked
    assert history is same and isinstance(history, History)
    for prompt, rollout, following in zip(first, rollouts, second):
        assert following[: len(prompt)] == prompt and len(following) > len(prompt) + len(rollout.reply_ids)
    alone = [policy.sample([p], 1, 8, 0.0)[0][0].text for p in second]
    assert alone == [p.turns[1].reply for p in played]
