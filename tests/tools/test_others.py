"""Who reads the others: exact players against brute force, every changed question, the command line."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tables import STYLE
from tiny import make_tiny_model

import settings as flags
from decisions import own_rows
from eval import playing_parser
from experts import Exact
from games import State, form_links
from models.load import load_policy
from play.cast import make_expert
from play.players import policy_player
from prompts import messages
from run.errors import InputError
from run.seeds import Stream, torch_generator
from tools import others
from tools.readers import NO_DRAWS, Bayes, BestReply, Constant, Halves, Oracle

RULES = ["second-best", "always-link", "never-link", "selfish"]
FLAGS = ["--rounds", "3", "--fix", "fee=0.05", "--eval-games", "12", "--partners", *RULES]


def play_of(*argv, partners=None):
    settings = flags.resolve(playing_parser("").parse_args([*FLAGS, *argv]))
    return others.Play(settings, partners or settings.players.partners)


PLAY, NOTHING = play_of(), np.zeros(4, int)
ASKS = others.second_rounds(PLAY)
PAIRS = others.flips(ASKS)
TRUE = np.array([PLAY.actions(ask.state, NOTHING)[:, 0] for ask in ASKS])


def played_by(expert, play=PLAY):
    return play.played("", play.player(expert))


def row(expert, state, seat):
    return expert(state, seat, NO_DRAWS).action.tolist()


def best(state, worlds):
    """Of seat 0, from the rules of the game alone. worlds: equally likely proposals."""

    def payoff(proposals_NN, row_N):
        proposals_NN = np.array([row_N, *proposals_NN[1:]])
        efforts_N = state.game.nash_efforts(form_links(proposals_NN))
        return state.game.round_payoffs(proposals_NN, efforts_N)[0]

    values = [np.mean([payoff(world, row_N) for world in worlds]) for row_N in own_rows(4, 0)]
    return own_rows(4, 0)[np.argmax(np.round(values, 9))].tolist()


def test_best_reply_and_oracle_have_the_highest_payoff_of_all_rows():
    for ask in ASKS:
        assert row(BestReply(), ask.state, 0) == best(ask.state, [ask.state.history[0]])
        assert row(BestReply(), ask.state.before(0), 0) == best(ask.state, [1 - np.eye(4, dtype=int)])
        assert row(Oracle(PLAY.others), ask.state, 0) == best(ask.state, [PLAY.actions(ask.state, NOTHING)])


@pytest.mark.parametrize("names", [RULES, ["always-link", "never-link", "reciprocal", "always-link"]])
def test_bayes_averages_over_all_assignments_of_rules_that_fit_the_past(names):
    """A rule that is twice in the list is twice as likely."""
    rules, chosen = [make_expert(name) for name in names], set()
    for ask in others.second_rounds(play_of("--partners", *names, "--eval-games", "6")):
        for state, past in ((ask.state.before(0), []), (ask.state, [ask.state.history[0]])):
            worlds = []
            for own in product(rules, repeat=3):
                if all(row(own[j - 1], state.before(0), j) == P[j].tolist() for P in past for j in (1, 2, 3)):
                    worlds.append([[0] * 4, *(row(own[j - 1], state, j) for j in (1, 2, 3))])
            decision = Bayes(rules)(state, 0, NO_DRAWS)
            assert decision.action.tolist() == best(state, worlds)
            assert decision.belief.tolist() == (np.mean(worlds, 0)[:, 0] > 0.5).astype(int).tolist()
            chosen.add(str(decision.action))
    assert len(chosen) > 2


@pytest.mark.parametrize(("to", "name"), [(0, "always-link"), (2, "never-link")])
def test_where_no_rule_fits_the_choice_of_the_seat_counts_first(to, name):
    proposals_NN = np.zeros((4, 4), int)
    proposals_NN[1, to] = 1
    state, rules = State(PLAY.games[0]).step(proposals_NN), [Exact("always-link"), Exact("never-link")]
    assert [rule.name for rule in Bayes(rules).likely(state, 0, 1)] == [name]


def test_the_best_constant_row():
    play = play_of("--partners", "selfish", "--eval-games", "3", "--types", "3", "1", "1", "3")
    values = [others.regret(play, play.player(c), played_by(c, play)) for c in map(Constant, own_rows(4, 0))]
    means = [np.mean([v[f"round {r}"]["mean"] for r in (1, 2, 3)]) for v in values]
    best_of_all = own_rows(4, 0).tolist().index(others.best_constant(play).tolist())
    assert means[best_of_all] == max(means) > np.median(means)


def test_a_placebo_hits_those_who_read_and_nobody_else():
    def columns(expert):
        return others.regret(PLAY, PLAY.player(expert), played_by(expert))

    for blind in map(columns, (Exact("second-best"), Exact("always-link"))):
        assert blind["lost"]["games"] == [0] * 12 and blind["placebo 2"]["games"] == blind["round 2"]["games"]
    for reader in map(columns, (BestReply(), Bayes(PLAY.others.rules))):
        assert reader["round 2"]["games"] == reader["round 3"]["games"] == [1] * 12
        assert reader["placebo 3"]["mean"] < 0.9 and reader["round 1"]["mean"] < 1
        kept = np.mean([reader[f"placebo {r}"]["games"] for r in (2, 3)], 0)
        assert reader["lost"]["games"] == pytest.approx(1 - kept)
        first, *later = (reader[f"round {r}"]["games"] for r in (1, 2, 3))
        assert reader["gained"]["games"] == pytest.approx(np.mean(later, 0) - first)
    oracle = columns(Oracle(PLAY.others))
    assert oracle.pop("lost")["mean"] == oracle.pop("gained")["mean"] == 0 and all(
        c["games"] == [1] * 12 for c in oracle.values()
    )


def test_the_placebo_keeps_the_question_and_takes_all_else_from_the_other_game():
    ask, other = ASKS[0], ASKS[20]
    changed = others.with_other_history(ask, other, STYLE)
    own, far = (messages(a.state, 0, a.replies, STYLE) for a in (ask, other))
    assert changed.chat[:-1] == [own[0], *far[1:-1]] and own[0] != far[0]
    news, question = changed.chat[-1]["content"].split("Round 2 links.")
    assert far[-1]["content"].startswith(news) and own[-1]["content"].endswith(question)
    assert not own[-1]["content"].startswith(news) and not far[-1]["content"].endswith(question)
    assert changed.state.game is ask.state.game and changed.state.history is other.state.history


def test_shares_by_rule():
    met = [any(PLAY.others.rule(g, j).name == "never-link" for j in (1, 2, 3)) for g in PLAY.games]
    for expert, means in ((Oracle(PLAY.others), (1, 1, 1)), (Exact("never-link"), (1, 1, 1))):
        columns = others.by_rule(PLAY.others, played_by(expert), "never-link")
        assert tuple(cell["mean"] for cell in columns.values()) == means
        assert [v is not None for v in columns["round 1"]["games"]] == met and not all(met)
    assert others.by_rule(PLAY.others, played_by(Exact("always-link")), "never-link")["round 3"]["mean"] == 0
    assert 0 < others.by_rule(PLAY.others, played_by(Exact("nash")), "selfish")["round 1"]["mean"] < 1


def test_beliefs_and_what_they_would_earn():
    experts = Oracle(PLAY.others), Exact("always-link"), Constant(NOTHING)
    oracle, always, silent = (others.beliefs(played_by(expert)) for expert in experts)
    assert {oracle[f"Brier {r}"]["mean"] for r in (1, 2, 3)} == {0} and oracle["U2 3"]["games"] == [1] * 12
    assert always["Brier 2"]["games"] == pytest.approx(1 - TRUE[:: others.DRAWS, 1:].mean(1))
    firsts = [(State(g), PLAY.actions(State(g), NOTHING)) for g in PLAY.games]
    hoped = [best(s, [[NOTHING, *np.c_[[1] * 3, P[1:, 1:]]]]) for s, P in firsts]
    values = [others.worth(s, 0, P, np.array(r)) for (s, P), r in zip(firsts, hoped, strict=True)]
    assert always["U2 1"]["games"] == pytest.approx(values) and min(values) < 1
    assert silent["Brier 1"]["mean"] is None and silent["unread"]["mean"] == 1 > always["unread"]["mean"]


def test_partners_that_switch():
    play = play_of("--rounds", "6", partners=Halves(PLAY.games, *map(make_expert, others.SWITCHES)))
    for k, played in enumerate(played_by(Exact("always-link"), play)):
        counts = [int(actions[1:].sum()) for actions in played.history[::2]]
        assert counts == ([0] * 3 + [9] * 3 if k % 2 else [9] * 3 + [0] * 3)


def test_pairs_differ_in_one_digit_of_who_chose_the_player_for_every_agent_that_was_not_chosen():
    assert len(ASKS) == 12 * others.DRAWS and len({str(a.state.history[0][0]) for a in ASKS}) > 4
    assert len(PAIRS) == sum(int((a.state.history[0][0, 1:] == 0).sum()) for a in ASKS)
    for (k, j), a in PAIRS.items():
        one, two = ASKS[k], others.flipped(ASKS[k], j)
        if two.state.history[0][j, 0] < one.state.history[0][j, 0]:
            one, two = two, one
        assert two.state.history[0][j, 0] - one.state.history[0][j, 0] == 1
        assert a == (best(one.state, [one.state.history[0]])[j] != best(two.state, [two.state.history[0]])[j])
        a, b = ("".join(m["content"] for m in messages(x.state, 0, x.replies, STYLE)) for x in (one, two))
        (place,) = (k for k, (c, d) in enumerate(zip(a, b, strict=True)) if c != d)
        before, _, inside = a[:place].rpartition("[")
        assert a[place] + b[place] == "01" and before.endswith("You were chosen by ") and "]" not in inside


def contrary(asks):
    return [f"Decision: {[0, *(1 - a.state.history[0][1:, 0]).tolist()]}" for a in asks]


EXPECTED = {BestReply(): (1, 0, 1, 1), Exact("reciprocal"): (1, 1, 0, 1), Exact("second-best"): (0, 0, 0, 0)}
EXPECTED |= {Exact("always-link"): (0, 0, 0, 0), contrary: (1, 1, 0, -1)}


@pytest.mark.parametrize("player", EXPECTED)
def test_counterfactual_pairs(player):
    asked = player if player is contrary else PLAY.player(player)()
    cells = others.counterfactual(asked, ASKS, PAIRS).values()
    assert [cell["mean"] for cell in cells] == pytest.approx(EXPECTED[player])


def test_ratios_over_games():
    values = others.ratio(np.array([1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 3]), 4)
    assert values == pytest.approx(0.6 + (np.array([1, 1, 0, 1]) - 0.6 * np.array([3, 1, 0, 1])) * 4 / 5)
    assert others.cell(others.ratio(np.zeros(0), np.zeros(0, int), 3))["mean"] is None


def test_forced_beliefs_are_true_opposite_and_of_another_game():
    seen = []

    def copy(asks):
        seen.append([json.loads(a.begin.split("\n")[0].removeprefix("Belief: ")) for a in asks])
        return [f"{a.begin} {belief}" for a, belief in zip(asks, seen[-1], strict=True)]

    columns = others.after_beliefs(PLAY, copy, ASKS)
    assert np.array_equal(seen, [TRUE, (1 - TRUE) * [0, 1, 1, 1], [*TRUE[18:], *TRUE[:18]]])
    assert all(columns[f"{name}: equal"]["mean"] == 1 for name in ("true", "opposite", "other"))
    earned = [others.worth(a.state, 0, PLAY.actions(a.state, t), t) for a, t in zip(ASKS, TRUE, strict=True)]
    assert columns["true: U2"]["games"] == pytest.approx(np.reshape(earned, (12, 3)).mean(1))
    silent = others.after_beliefs(PLAY, lambda asks: ["?"] * len(asks), ASKS)
    assert silent["true: equal"]["mean"] == pytest.approx(1 - TRUE[:, 1:].mean())


def test_a_reply_goes_on_from_what_it_is_forced_to_begin_with(model_dir):
    policy, style = load_policy(model_dir, "float32", "cpu", "fast"), replace(STYLE, max_new_tokens=6)
    begin, ask = "Belief: [0, 1, 0, 1]\nDecision:", ASKS[0]
    changes = {"begin": begin}, {}, {"chat": [{"role": "user", "content": "?"}]}
    texts = [policy_player(policy, style, 1.0, 0)([replace(ask, **change)])[0] for change in changes]
    ids = policy.encode_prompt(messages(ask.state, 0, ask.replies, style)) + policy.tokenizer.encode(begin)
    uniforms_11S = torch.rand(1, 1, 6, generator=torch_generator(0, Stream.PLAYERS, 2, 0))
    assert texts[0] == begin + policy.sample([ids], uniforms_11S)[0][0].text
    assert len({texts[0].removeprefix(begin), *texts[1:]}) == 3


def test_the_whole_command(tmp_path, capsys):
    texts = [m["content"] for ask in ASKS for m in messages(ask.state, 0, ask.replies, STYLE)]
    path, model = tmp_path / "others.json", make_tiny_model(tmp_path / "model", texts)
    argv = ["--model", str(model), "--max-new-tokens", "4", "--unmet", "reciprocal", "--eval-games", "2"]
    others.main([*FLAGS, *argv, "--policy", "base", "expert:reciprocal", "--json", str(path)])
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    tables = written["questions"]
    assert list(tables) == ["1", *(f"2 {rule}" for rule in RULES), "3", "4", "5", "6 reciprocal", "7"]
    assert all(f"\n{question}: " in printed for question in tables)
    names = ["base", "expert:reciprocal", "constant", *RULES[1:3], RULES[0], "reciprocal", "best-reply"]
    names += ["bayes", "oracle"]
    assert all([name.split(" [")[0] for name in rows] == names for rows in tables.values())
    assert tables["1"]["base"]["round 2"] == tables["1"]["never-link"]["round 2"]  # 4 tokens are no reply
    assert list(tables["5"]["base"]) == [f"round {r}" for r in range(1, 7)]
    assert len(tables["4"]["base"]) == 6 and not tables["4"]["expert:reciprocal"] | tables["3"]["oracle"]
    assert len(tables["6 reciprocal"]["base"]) == 3 and tables["7"]["base"]["unread"]["mean"] == 1
    other = tmp_path / "other.json"
    tables["1"]["base"]["round 1"]["mean"] += 0.5
    tables["1"] = {name.replace("base", "another name"): row for name, row in tables["1"].items()}
    other.write_text(json.dumps(written))
    others.main(["--seeds", str(path), str(other), "--figure", str(tmp_path / "others.png")])
    assert (tmp_path / "others.png").read_bytes().startswith(b"\x89PNG")
    first = others.over_seeds([str(path), str(other)])["1"]["base"]
    assert first["round 1"]["mean"] == pytest.approx(tables["1"]["another name"]["round 1"]["mean"] - 0.25)
    assert first["round 2"]["high"] == first["round 2"]["low"] and first["round 1"]["n"] == 2
    assert "2 runs" in capsys.readouterr().out

    def complaint(**changes):
        other.write_text(json.dumps(written | changes))
        with pytest.raises(InputError) as error:
            others.over_seeds([str(path), str(other)])
        return str(error.value)

    assert "differ in --rounds, --partners" in complaint(
        arguments=written["arguments"] | {"rounds": 6, "partners": ["nash"]}
    )
    for questions in ([], {}, {"1": 3}, {"1": {"a": {}}}, {"1": {"a": {"lost": 1}}}):
        assert "no file that --json wrote" in complaint(questions=questions)
    assert "not of as many policies" in complaint(questions={"1": dict(list(tables["1"].items())[1:])})


def test_quick_leaves_out_three_questions(tmp_path, capsys):
    path, whole = tmp_path / "quick.json", tmp_path / "whole.json"
    argv = [*FLAGS, "--eval-games", "2", "--policy", "expert:reciprocal", "--json"]
    others.main([*argv, str(path), "--quick"])
    questions = json.loads(path.read_text())["questions"]
    assert list(questions) == ["1", *(f"2 {rule}" for rule in RULES), "7"]
    others.main([*argv, str(whole)])
    capsys.readouterr()
    others.main(["--seeds", str(path), str(whole)])
    printed = capsys.readouterr().out
    assert "\n1 (2 runs): " in printed and "\n5 (1 runs): " in printed
    assert others.over_seeds([str(path), str(whole)])["1"]["best-reply"]["round 1"]["n"] == 2
