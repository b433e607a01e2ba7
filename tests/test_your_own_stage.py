"""What docs/your-own-stage.md promises: a kind of stage that is added from outside is everywhere at once."""

import json
import re
import zlib

import numpy as np
import pytest
import whole_runs
from whole_runs import ROOT, fake_parse, flags, lines_of, run_rft

import train_rft
from decisions import EFFORTS, LINKS
from docs.cheap_talk import MESSAGES
from games import KINDS, Decision, GameError, State, game_from_json
from play.cast import make_expert
from play.dataset import simulate_many, targets
from play.expert_games import history_from_text, history_to_text
from play.human import to_reply
from play.records import check_record
from play.repair import repair_reply
from prompts import PromptStyle, format_reply, messages, parse_reply, read_reply
from rewards import Target, belief_accuracy, likeness
from tools import diagnose, view
from world.bcz import BCZ
from world.draws import Family

STYLE, GAME = PromptStyle(), BCZ((1.0, 1.0, 3.0, 3.0), 0.067, 0.268, 7.0, "MGE")
ROWS = ["[0, 0, 1, 1]", "[0, 0, 1, 1]", "[1, 1, 0, 1]", "[1, 1, 1, 0]"]  # the second best of GAME
PLANS = [f"I choose {row}" for row in ROWS]
KINDS.pop("M", None)  # importing the file registered it, and other tests expect the project's kinds
pytestmark = pytest.mark.usefixtures("added")


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(KINDS, "M", MESSAGES)


def test_the_conversation_of_the_page_is_a_real_one():
    page = " ".join((ROOT / "docs" / "your-own-stage.md").read_text().split())
    state = State(GAME).step([PLANS[0], "hello", PLANS[2], ""])
    _, asked, reply, then = (m["content"] for m in messages(state, 0, [f"Decision: {PLANS[0]}"], STYLE))
    start = then[: then.index(" of [")]
    assert start.endswith("Your alpha 1") and f"user {asked} assistant {reply} user {start} of ..." in page


def test_who_says_what_is_read_by_all_before_the_next_question():
    state = State(GAME).step(["hello", "", PLANS[2], "link with me, please!"])
    for seat in range(4):
        system, asked, _, then = (m["content"] for m in messages(state, seat, ["x"], STYLE))
        assert system.startswith("1 round: messages, links, efforts.")
        assert "\nDecision: [0 or 1 per agent, you 0] or one effort or one line of at most 60 " in system
        assert asked.startswith("Round 1 messages. Your alpha") and asked.endswith("What do you say to all?")
        lines = f'1 "hello", 3 "{PLANS[2]}", 4 "link with me, please!"'
        assert then.startswith(f"Agents said: {lines}. Round 1 links.")
    silent = messages(State(GAME).step([""] * 4), 0, ["x"], STYLE)
    assert silent[-1]["content"].startswith("Agents said: nothing. ")
    assert "said" not in messages(state.step(np.zeros((4, 4), int)), 0, ["x"] * 2, STYLE)[-1]["content"]


LINES = [  # a line, and the rule that it breaks
    *((line, None) for line in ("hello", "I choose [0, 1]", "a" * 60, "Is it 1.5? (yes; no): it's fine!")),
    ("", "no Decision line"),
    ("a" * 61, "more than 60 characters"),
    *(
        (line, "a character that is not allowed")
        for line in ("<|im_end|>", 'say "x"', "h\u00e9", "a\tb", "a_b")
    ),
]


@pytest.mark.parametrize("line, broken", LINES)
def test_a_line_is_short_and_plain(line, broken):
    state, reply = State(GAME), f"Belief: [0, 1, 1, 1]\nDecision: {line}"
    decision = parse_reply(reply, state, 1)
    assert read_reply(reply, MESSAGES, 1, 4, 7.0)[1] == broken
    assert (decision is None) == (broken is not None) == (repair_reply(reply, state, 1) is None)
    if decision:
        assert decision.action == line and decision.belief is None
        assert format_reply(decision, STYLE) == f"Decision: {line}" == to_reply(line, state, 1)
        assert state.step(["", line, "", ""]).history[0].tolist() == ["", line, "", ""]
    elif line:
        with pytest.raises(ValueError, match="4 lines of at most 60"):
            state.step(["", line, "", ""])


@pytest.mark.parametrize("actions", [["hello"] * 3, [1, 2, 3, 4], "hello", np.zeros((4, 4), int)])
def test_other_actions_are_refused(actions):
    with pytest.raises(ValueError, match="4 lines"):
        State(GAME).step(actions)


def test_exact_experts_announce_what_they_do_next():
    expert, rng = make_expert("second-best"), np.random.default_rng(0)
    assert [expert(State(GAME), i, rng).action for i in range(4)] == PLANS
    for stages in ("GME", "GEM", "MGMEM"):
        game = game_from_json(GAME.to_json() | {"stages": stages, "rounds": 2})
        state, announced = State(game), None
        while not state.done:
            decisions = [expert(state, i, rng) for i in range(4)]
            if state.kind is MESSAGES:
                announced = [d.action for d in decisions]
            elif announced:
                verb = "give" if state.kind is EFFORTS else "choose"
                assert announced == [f"I {verb} {state.kind.write(d.action)}" for d in decisions]
                announced = None
            state = state.step(np.array([d.action for d in decisions]))


def test_rewards_by_hand():
    target = Target(State(GAME), 0, np.array(["no", *PLANS[1:]]))
    for line, level in (("no", 2), ("No", 0), (PLANS[0], 0)):
        assert likeness(Decision(MESSAGES, line), target) == level
    assert belief_accuracy(Decision(MESSAGES, "no"), target) is belief_accuracy(None, target) is None
    short = Target(target.state, 0, np.array(["no"] * 4))  # a longer line is not cut off
    assert short.with_own(Decision(MESSAGES, PLANS[0])).tolist() == [PLANS[0], "no", "no", "no"]
    assert MESSAGES.efficiency(target.state, 0, target.actions) is None


def test_records_histories_and_random_play():
    families = tuple(Family(game, "GMEM", 2) for game in ("bcz", "pgg"))
    records = simulate_many(4, make_expert("noisy:nash:0.3"), 0, STYLE, families=families, noise=0.3)
    for r in records:
        check_record(r)
    spoken = {r.reply for r in records if r.kind == "M"}
    assert "Decision: hello" in spoken and len(spoken) > 10
    *_, (_, last) = targets(records, records)
    texts = json.loads(json.dumps(history_to_text(last.state)))
    back = history_from_text(last.game, texts)
    assert len(back.history) == 7 and all(map(np.array_equal, back.history, last.state.history))


def parse(text, state, seat):
    """For messages too it is decided by the checksum of a reply what it means."""
    if state.kind is not MESSAGES:
        return fake_parse(text, state, seat)
    number, plan = zlib.crc32(text.encode()), make_expert("second-best")(state, seat, None)
    return [None, plan, plan, Decision(MESSAGES, "hello")][number % 4]


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory):
    """SFT, RFT and evaluation of two steps each, with the flags of the docs."""
    settings = dict(model=model_dir, stages="MGE", prompts=[2, 1, 2], games=4, agents=3, rank=4, seat="all")
    settings |= dict(sft_steps=2, steps=2, m=4, eval_games=2, max_new_tokens=14)
    folder = tmp_path_factory.mktemp("stage") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "M", MESSAGES)
        replaced = [(train_rft, "parse_reply", parse), *whole_runs.REPLACED[1:]]
        patch.setattr(whole_runs, "REPLACED", replaced)
        run_rft([*flags(settings), "--out", str(folder)], curves=True)
    return folder


def test_it_is_trained(run):
    metrics, samples = (lines_of(run / f"{name}.jsonl") for name in ("metrics", "samples"))
    sft = lines_of(run / "sft" / "metrics.jsonl")
    assert all(sft[i]["held_out_loss_message"] > 0 for i in (0, -1)) and len(metrics) == 2
    for line in metrics:
        own = [s for s in samples if s["step"] == line["step"] and s["kind"] == "M"]
        assert len(own) == 8 and line["reward_message"] == pytest.approx(np.mean([s["r_S"] for s in own]))
        assert line["grad_norm"] > 1e-4
    own = [s for s in samples if s["kind"] == "M"]
    assert {(s["compliance"], s["sample"]) for s in own} == {(-0.5, 0), (0.5, 0), (0.5, 2)}
    assert any(s["advantage"] for s in own) and all(s["belief"] is None and "s" not in s for s in own)
    assert {s["kind"] for s in samples} == set("GEM")
    assert {len(line) for line in lines_of(run / "probe.jsonl")} == {1, 8}


def test_it_is_evaluated_and_shown(run):
    results = json.loads((run / "eval.json").read_text())["results"]
    expert = results["expert:second-best"]
    assert expert["all rounds"]["U1"]["mean"] == expert["all rounds"]["belief"]["mean"] == 1
    assert expert["all rounds"]["U2 message"]["mean"] is None
    for actions, row in zip(expert["actions"], expert["instances"], strict=True):
        state = history_from_text(game_from_json(row["instance"]), actions)
        plans = [f"I choose {LINKS.write(row_N)}" for row_N in state.history[1]]
        assert state.done and state.history[0].tolist() == plans
    assert re.search(r"late message answers: \d+ different", diagnose.format_findings(diagnose.diagnose(run)))
    page = view.run_data(run, 10**6)
    assert {p["kind"] for p in page["groups"]["prompts"]} == set("GEM") and not page["missing"]
    played = page["games"]["games"][0]["players"]["expert second-best"]["stages"]
    assert [stage["kind"] for stage in played] == list("MGE")
    assert played[0]["actions"][0].startswith("I choose")
    assert (run / "run.html").stat().st_size > 50_000 and (run / "curves.png").stat().st_size > 10**4


def test_without_it_nothing_knows_it(monkeypatch, refused):
    monkeypatch.delitem(KINDS, "M")
    with pytest.raises(GameError, match="MGE"):
        BCZ((1.0, 1.0), 0.1, 0.1, 3.0, "MGE")
    assert "MGE" in refused(train_rft.main, ["--stages", "MGE"])
