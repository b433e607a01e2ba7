"""Experts that are language models, on a server on the loopback and local."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from chat_server import KEY, ChatServer, good_reply
from reference import add_adapter
from tables import play
from whole_runs import ROOT, ended, lines_of, sft_flags, start

import lora
import train_sft
from games import KINDS, State, game_from_json
from models import adapters
from models.load import load_policy
from play.cast import make_expert
from play.dataset import simulate_many
from play.records import read_records
from prompts import PromptStyle, format_reply, parse_reply, read_reply
from run.errors import InputError
from teachers import language
from teachers.asking import LOWEST, Asking, Question, asking, with_record
from teachers.language import read
from tools import expert_games
from world.bcz import BCZ
from world.draws import Family, held_out_grid

STYLE, TWO_ROUNDS = PromptStyle(), (Family("bcz", "GE", 2),)


EFFORTS_READ = {"Decision: 1.239": 1.24, "Decision: 3.341": None, "1": None}
EFFORTS_READ |= {"Decision: 3.339": 3.33}  # never rounded to above the cap


@pytest.mark.parametrize("text, action", EFFORTS_READ.items())
def test_reading_an_effort(text, action):
    state = State(BCZ((1.0, 1.0, 1.0), 0.1, 0.1, 3.339), (np.zeros((3, 3), int),))
    question = Question([], "", state, 1)
    decision = read(text, question)
    assert (decision.action if decision else None) == action
    if decision:  # the label says the same
        label = format_reply(decision, PromptStyle(belief=False))
        assert parse_reply(label, question.state, 1).action == action


def test_the_data_set_says_what_the_server_said(ask):
    with ChatServer() as server:
        records, expert = ask(server)
    asked = {json.dumps(json.loads(q)["messages"]): json.loads(q) for q in server.questions}
    assert len({r.game for r in records}) == 3 and {len(r.instance["alpha"]) for r in records} == {3, 4}
    for r in records:
        body = asked[json.dumps(r.prompt, sort_keys=True)]  # what the data set shows is what was asked
        game = game_from_json(r.instance)
        texts = good_reply(body), r.label
        said, label = (read_reply(text, KINDS[r.kind], r.seat, game.N, game.cap)[0] for text in texts)
        assert np.array_equal(label.action, said.action) and np.array_equal(label.belief, said.belief)
        assert body["model"] == "m" and body["max_tokens"] == 4096 and "temperature" not in body
    assert len(asked) == len(server.questions) == len(records) == expert.counts["decisions"]
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert [(a["usage"], a["attempt"]) for a in lines_of("answers.jsonl")] == [([100, 20], 1)] * len(records)


NOISY = ["openai:m", "noisy:openai:m:0.3"]


@pytest.mark.parametrize("name", NOISY)
def test_instances_and_replaced_decisions_are_those_of_an_exact_expert(ask, name):
    exact = name.replace("openai:m", "second-best")
    with ChatServer() as server:
        records, expert = ask(server, games=6, name=name)
    reference = simulate_many(6, make_expert(exact), 0, STYLE, (3, 4), families=TWO_ROUNDS)
    for a, b in zip(records, reference, strict=True):
        assert (a.game, a.stage, a.seat, a.replaced) == (b.game, b.stage, b.seat, b.replaced)
    assert [r.instance for r in records] == [r.instance for r in reference]
    replaced = [(a.reply, b.reply) for a, b in zip(records, reference, strict=True) if a.replaced]
    assert len(replaced) > 5 and all(a == b for a, b in replaced)
    asked = len(server.questions)
    assert asked == expert.counts["decisions"] and (asked < len(records)) == (name != "openai:m")
    assert re.match(rf"openai:m: {asked} decisions, .* {asked} asked for", expert.report())


def test_recorded_answers_of_earlier_versions_are_found_again(ask):
    """The keys of the record are those that the same expert has always had (in games of one round: in others
    the prompts of an earlier version did not say who had chosen the agent)."""
    for name, digest in (("openai:m", "9241517a21da8e64"), ("noisy:openai:m:0.3", "510380431c94c746")):
        with ChatServer() as server:
            ask(server, f"{name}.jsonl", 4, name=name, families=(Family(),))
        keys = sorted(answer["key"] for answer in lines_of(f"{name}.jsonl"))
        assert hashlib.sha256("".join(keys).encode()).hexdigest()[:16] == digest


def test_what_is_not_compliant_is_asked_again_and_then_given_up(ask, forget, capsys):
    def script(body, n):
        own = re.search(r"agent (\d+)", body["messages"][0]["content"])[1]
        if own == "1":
            return "text", "I would rather not."
        if own == "2" and n < 3:
            return "text", "Decision: [1, 1, 1, 1]"
        if own == "3":
            return "text", good_reply(body).splitlines()[1]

    with ChatServer(script) as server:
        records, expert = ask(server, noise=0)
    per_seat = sum(r.seat == 0 for r in records)
    nothing = {"Decision: 0.00", "Decision: [0, 0, 0]", "Decision: [0, 0, 0, 0]"}
    assert {r.label for r in records if r.seat == 0} == nothing
    given_up = {"fallbacks": per_seat, "repeated": 4 * per_seat}
    assert expert.counts == given_up | {"decisions": len(records)}
    attempts = Counter(a["attempt"] for a in lines_of("answers.jsonl"))
    assert attempts == {1: len(records), 2: 2 * per_seat, 3: 2 * per_seat}
    assert len(server.questions) == attempts.total()
    language.print_report()
    text = capsys.readouterr().out
    assert f"{per_seat} decisions not compliant" in text and f"{4 * per_seat} answers asked for again" in text
    forget()
    with ChatServer(script) as silent:  # answers that could not be read are kept too
        again, _ = ask(silent, noise=0)
    assert again == records and not silent.questions


def test_which_equal_prompts_are_one_question(ask, forget):
    """Every game is the same instance: at temperature 0 they share, else each is asked for itself."""
    same = (Family("bcz", "GE", 1, types=(1.0,), fixed=(("delta", 0.1), ("c", 0.1))),)
    counts = {}
    for pairs in ("temperature=0", ""):
        with ChatServer() as server:
            for games in (4, 6):  # more games: those of before are not asked again
                records, _ = ask(server, f"{pairs}.jsonl", games, families=same, noise=0, pairs=pairs)
                forget()
        assert {len(r.instance["alpha"]) for r in records} == {3, 4}
        counts[pairs] = len(server.questions)
        assert all(json.loads(q).get("temperature") == (0 if pairs else None) for q in server.questions)
    assert counts == {"temperature=0": (3 + 4) * 2, "": len(records)}


def flags(folder, out="data.jsonl", ask=(), games=("--games", "8")):
    ask = [f"record={folder / 'answers.jsonl'}", *ask]
    return ["--expert", "openai:m", *games, "--out", str(folder / out), "--ask", *ask]


def begin(server, argv, **pipes):
    """Starts the command in a process of its own."""
    env = os.environ | {"OPENAI_BASE_URL": server.url, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-m", "tools.expert_games", *argv]
    return subprocess.Popen(argv, cwd=ROOT, env=env, text=True, **pipes)


@pytest.fixture
def run(monkeypatch, capsys, forget):
    """Runs the command in this process: run(server, flags) -> (exit status, standard output, its errors)."""

    def main(server, argv):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        capsys.readouterr()
        status = 0
        try:
            expert_games.main(argv)
        except SystemExit as e:
            status = e.code
        forget()
        return status, *capsys.readouterr()

    return main


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path, run):
    record = tmp_path / "answers.jsonl"
    with ChatServer(delay=lambda: 0.002, hold_after=37) as server:
        process = begin(server, flags(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def stuck():
            """All answers that came are recorded, and the 8 questions under way have come and wait."""
            recorded = record.exists() and record.read_bytes().count(b"\n")
            return recorded == 37 and len(server.questions) == 37 + 8 and server.at_once == 0

        wait_until(stuck)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sum(server.answered.values()) == 37 == len(lines_of(record))
        assert not (tmp_path / "data.jsonl").exists()
        with record.open("ab") as f:  # and as if the kill had come in the middle of a line
            f.write(record.read_bytes().splitlines()[3][:200])
        server.hold_after = 10**9
        status, out, err = run(server, flags(tmp_path))
    assert status == 0, err
    assert len(read_records(tmp_path / "data.jsonl")) == 8 * 4 * 2 == len(server.answered)
    assert set(server.answered.values()) == {1}
    assert "37 answers from" in out and f"{64 - 37} asked for" in out
    with ChatServer() as good:
        assert run(good, flags(tmp_path, "new.jsonl", [f"record={tmp_path / 'new_answers.jsonl'}"]))[0] == 0
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "data.jsonl").read_bytes()


def test_ctrl_c_waits_for_what_was_paid_for(tmp_path):
    answering = threading.Event()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # What a shell starts in the background ignores Ctrl-C, and its children too; here they must not.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with ChatServer(delay=lambda: 0.0 * answering.wait(30)) as server:
        process = begin(server, flags(tmp_path), **pipes)
        wait_until(lambda: len(server.questions) == 8)
        process.send_signal(signal.SIGINT)
        assert "waiting for the answers under way" in process.stdout.readline()
        answering.set()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert len(server.questions) == 8 == sum(server.answered.values())
    assert len(lines_of(tmp_path / "answers.jsonl")) == 8


def test_without_the_package_one_line_says_how_to_get_it(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # what an import finds where it is not installed
    monkeypatch.delitem(sys.modules, "teachers.chat_client", raising=False)
    with pytest.raises(InputError, match="openai:m needs: pip install -r requirements-experts.txt"):
        make("openai:m")
    assert make("nash")


def test_the_key_is_nowhere(tmp_path, run, caplog):
    """Though the server says it in errors and in answers, and the package logs all that it can."""
    caplog.set_level("DEBUG")

    def script(body, n):
        if n == 1 and "agent 1" in body["messages"][0]["content"] and len(body["messages"]) == 2:
            return "status", 500, {}, f"who is {KEY}?".encode()
        return "text", f"{good_reply(body)}\nBelief: {KEY}"

    refusal = "status", 401, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    with ChatServer(script) as server:
        first = run(server, flags(tmp_path, games=("--games", "1", "--rounds", "2")))
        server.script = lambda body, n: refusal
        second = run(server, flags(tmp_path, "more.jsonl", games=("--games", "2", "--rounds", "2")))
    assert (first[0], second[0]) == (0, 2) and "Sending HTTP Request" in caplog.text
    assert "error: " in second[2].splitlines()[-1] and "[key]" in second[2].splitlines()[-1]
    assert KEY not in f"{first} {second} {caplog.text}"
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "[key]" in written and KEY not in written


NAMES = ["openai:", "hf:", "openai", "hf", "OpenAI:m", "openai:a\nb", "hf:/nowhere"]


@pytest.mark.parametrize("name", [*NAMES, "noisy:openai:0.1", "noisy:hf::0.1", "noisy:openai:m:2"])
def test_bad_names(name, make, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError):
        make(name)


BAD = ["temperature=-1", "temperature=nan", "temperature", "attempts=0", "attempts=1.5", "concurrency="]
BAD += ["timeout=inf", "style=1", "max_tokens=9", "=3", ""]


def test_a_budget_needs_both_prices():
    for pairs in (["budget=1"], ["price-in=1"], ["budget=1", "price-out=1"]):
        with pytest.raises(InputError, match="price-in and price-out"):
            asking(pairs, STYLE)


@pytest.mark.parametrize("pair", BAD)
def test_bad_settings_are_one_line_with_the_names(pair):
    with pytest.raises(InputError) as caught:
        asking([pair], STYLE)
    for words in (repr(pair), *LOWEST, "record"):
        assert words in str(caught.value)


def test_every_setting_reaches_the_asking(tmp_path, monkeypatch):
    pairs = "temperature=0.25 max-tokens=11 attempts=5 concurrency=7 timeout=12.5 retries=9 record=r.jsonl"
    pairs += " price-in=2.5 price-out=10 budget=33"
    style, record = PromptStyle("local", True, False), str(tmp_path / "r.jsonl")
    asked = Asking(style, 0.25, 11, 5, 7, 12.5, 9, record, 2.5, 10.0, 33.0)
    assert asking(["attempts=8", "record=other", *pairs.split()], style) == asked
    default = Asking(STYLE, record=str(tmp_path / "expert_answers.jsonl"))
    assert asking(None, STYLE) == asking([], STYLE) == default
    stored = with_record(pairs.split()), with_record(None)
    assert all(with_record(pairs) == pairs for pairs in stored)
    monkeypatch.chdir("/")  # a run that is resumed from elsewhere
    assert asking(stored[0], style) == asked and asking(stored[1], STYLE) == default


def test_evaluation_asks_in_the_conversation_of_each_seat(make, monkeypatch):
    grid = [g for g in held_out_grid(4, TWO_ROUNDS[0])][:3]

    def player(asks):
        return [f"stage {len(ask.replies)}, and I say nothing." for ask in asks]

    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        play(grid, player, 1, make("openai:m"), 0)
        # The policy's own seat is asked about in graph stages alone.
        assert len(server.questions) == len(set(server.questions)) == 3 * (4 + 3) * 2
    for question in server.questions:
        chat = json.loads(question)["messages"]
        own = int(re.search(r"You are agent (\d)", chat[0]["content"])[1])
        said = [m["content"] for m in chat if m["role"] == "assistant"]
        for stage, text in enumerate(said):
            if own == 2:
                assert text == f"stage {stage}, and I say nothing."
            else:
                assert read_reply(text, KINDS["GE"[stage % 2]], own - 1, 4, 99)[0] is not None


def test_a_local_model(tiny_model_dir, make):
    """It is compliant by chance at best: the texts are what the policy samples, whatever the batch."""
    name = f"hf:{tiny_model_dir}"
    expert = make(name, "max-tokens=6 attempts=2")
    assert expert.model is make(f"noisy:{name}:0.5", "max-tokens=6 attempts=2").inner.model
    records = simulate_many(2, expert, 0, STYLE, (3, 3))
    nothing = sum(r.label in ("Decision: 0.00", "Decision: [0, 0, 0]") for r in records)
    assert len(records) == 2 * 2 * 3 == expert.counts["decisions"] and expert.counts["fallbacks"] == nothing
    assert expert.model.asked == 12 + expert.counts["repeated"]
    states = [State(g) for g in held_out_grid(3)[:3]]
    questions = [expert.question(s, 0, np.random.default_rng(i)) for i, s in enumerate(states)]
    together = expert.model.ask_all(questions, 1)
    alone = [expert.model.ask_all([q], 1)[0] for q in questions[::-1]][::-1]
    assert together == alone and len(set(together)) == 3
    assert expert.model.ask_all(questions[:1], 2)[0] != together[0]  # another attempt is another draw
    greedy = make(name, "max-tokens=6 temperature=0")
    greedy(states[0], 0, np.random.default_rng(0))
    assert greedy.model.asked == 1  # no second attempt: it would say the same


def test_an_adapter_and_a_chain_are_local_models(tiny_model_dir, tmp_path, make):
    base = load_policy(str(tiny_model_dir))
    state = State(held_out_grid(3)[0])
    texts = set()
    for k, name in enumerate(("first", "first+second")):
        config = add_adapter(base, seed=k, size=3.0)
        adapters.save_adapter(base.model, tmp_path / name.split("+")[-1], config)
        path = "+".join(str(tmp_path / folder) for folder in name.split("+"))
        expert = make(f"hf:{path}", "max-tokens=6 temperature=0")
        q = expert.question(state, 0, None)
        [[reply]] = base.sample([base.encode_prompt(q.chat)], torch.zeros(1, 1, 6), 0.0)
        assert expert.model.ask_all([q], 1) == [reply.text]
        texts.add(reply.text)
        lora.merge(base.model)
    assert len(texts) == 2


def test_training_with_experts_on_a_server(model_dir, tmp_path, monkeypatch, capsys, forget):
    """Going on asks nothing, and finds the record from another folder."""
    flags = ["--model", model_dir, "--games", "3", "--expert", "openai:m", "--out", "run"]
    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        train_sft.main([*flags, "--sft-steps", "1", "--ask", "record=kept.jsonl", "attempts=2"])
        asked = len(server.questions)
        assert asked >= 3 * 4 * 2 and f"{asked} asked for" in capsys.readouterr().out
        forget()
        monkeypatch.chdir("/")
        train_sft.main(["--resume", str(tmp_path / "run")])
        assert len(server.questions) == asked
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert f"record={tmp_path / 'kept.jsonl'}" in config["ask"]


def test_of_two_processes_one_asks_and_both_get_the_answers_or_its_error(model_dir, tmp_path):
    """6 games, also those of the held-out loss, in which 3 agents decide twice."""
    for budget, statuses in ((1, [0, 0]), (0, [2, 2])):
        folder, ask = tmp_path / f"run{budget}", [f"record={tmp_path}/answers{budget}", f"budget={budget}"]
        argv = sft_flags(model_dir, folder, expert="openai:m", games=2, sft_steps=1)
        argv += ["--ask", *ask, "price-in=10", "price-out=40"]
        with ChatServer() as server:
            how = dict(script="train_sft", environment={"OPENAI_BASE_URL": server.url})
            ended_with = ended(start(argv, tmp_path / "said", 2, **how))
        assert ended_with == statuses, (tmp_path / "said").read_text()
        assert len(server.questions) == len(set(server.questions)) == (6 * 3 * 2 if budget else 0)
    assert (tmp_path / "said").read_text().count("error: the budget of $0 is used up") == 2
