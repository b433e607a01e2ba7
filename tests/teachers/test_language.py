"""Experts that are language models, against real servers on the loopback: good ones, and ones that misbehave by script."""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from teachers import chat_client
from models import adapters as adapter_files
import experts
from teachers import language as llm_experts
from teachers.arithmetic import arithmetic
from teachers.chat_client import AnswerFile, ChatClient
from chat_server import KEY, ChatServer, good_reply
from experts import make_expert, read_records, simulate_many, write_records
from games import State
from world.draws import Family, held_out_grid
from teachers.language import Asking, Question, read
from prompts import PromptStyle, format_reply, messages, parse_reply
from run.files import InputError

STYLE = PromptStyle()
SCRIPT = Path(experts.__file__).resolve()
TWO_ROUNDS = (Family("bcz", "GE", 2),)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short waits; no proxy; every file that a test opened is closed."""
    monkeypatch.setattr(chat_client, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    yield
    for file in list(AnswerFile._open.values()):
        file.close()
    llm_experts._made.clear()


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """ask(server, name of the record, games, ...) -> (records, expert)"""

    def run(server, record="answers.jsonl", games=3, seed=0, name="openai:m", families=TWO_ROUNDS, noise=0.15, **how):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        asking = Asking(STYLE, record=str(tmp_path / record), **how)
        records = simulate_many(games, name, seed, STYLE, (3, 4), families=families, noise=noise, asking=asking)
        return records, next((e for (_, a), e in llm_experts._made.items() if a == asking), None)

    return run


def forget():
    """What the end of a process does."""
    for file in list(AnswerFile._open.values()):
        file.close()
    llm_experts._made.clear()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic


@pytest.mark.parametrize(
    "text, value",
    [
        ("1 + 0.095 * 3", 1.285),
        ("2", 2),
        (".5", 0.5),
        ("5.", 5),
        ("1e2", 100),
        ("1-2-3", -4),
        ("12/2/3", 2),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-2*-3", 6),
        ("--3", 3),
        ("-(1+2)", -3),
        ("1 - -1", 2),
        ("((((1))))", 1),
        ("\t1\t+ 2 ", 3),
        ("(" * 20 + "1" + ")" * 20, 1),
        ("1+" * 99 + "1", 100),
        ("0*-1", 0),
    ],
)
def test_arithmetic(text, value):
    result = arithmetic(text)
    assert result == pytest.approx(value, abs=1e-12) and np.copysign(1, result) == np.copysign(1, value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "-", "+1", "1 +", "* 1", "1 2", "1 + + 2", "(1", "1)", "()", "(1)(2)", "2(3)", "1.2.3", "1,5", "1_000"]
    + ["2**3", "2^3", "7//2", "7%2", "1/0", "1/(2-2)", "0/0", "1e308*10", "1e308+1e308", "-1e308-1e308", "1e400", "1e", "e5"]
    + ["x", "alpha + 1", "abs(1)", "__import__('os')", "1 if 1 else 2", "[1]", "1;2", "1\n+2", "1 = 1", "1 + 2 = 3", "nan", "inf"]
    + ["0x10", "1j", "١", "１", "1 − 2", "1 × 2", "'1'", "1#", "(" * 21 + "1" + ")" * 21, "-" * 22 + "1", "1+" * 100 + "1", "9" * 400],
)
def test_what_is_no_arithmetic(text):
    assert arithmetic(text) is None


def test_arithmetic_is_that_of_python_on_random_expressions():
    rng, compared = random.Random(0), 0

    def expression(depth):
        kind = rng.randrange(5) if depth else 0
        if kind == 0:
            return f"{rng.uniform(0, 9):.{rng.randrange(4)}f}"
        if kind == 1:
            return f"({expression(depth - 1)})"
        if kind == 2:
            return f"-{expression(depth - 1)}"
        return f"{expression(depth - 1)}{rng.choice(['+', ' - ', '*', ' / '])}{expression(depth - 1)}"

    for _ in range(2000):
        text = expression(4)
        if len(text) > 200:
            continue
        try:
            value = eval(text)  # of a text made here
        except ZeroDivisionError:
            value = None
        assert arithmetic(text) == value, text
        compared += 1
    assert compared > 1500


# ---------------------------------------------------------------------------------------------------------------------
# reading an answer


def place(kind, N=3, seat=1, cap=4.0):
    return Question(None, [], "", kind, seat, N, cap)


@pytest.mark.parametrize(
    "text, program, action",
    [
        ("Decision: 1.239", False, 1.24),
        ("Decision: 1 + 0.095 * 3", False, None),
        ("Decision: 1 + 0.095 * 3", True, 1.29),
        ("Decision: 1.5", True, 1.5),
        ("Decision: +1.5", True, 1.5),
        ("Decision: 2 + 2", True, 4.0),
        ("Decision: 2 + 2.001", True, None),
        ("Decision: 1 - 2", True, None),
        ("Decision: 1/0", True, None),
        ("Decision: 1 + 1\nDecision: x", True, None),
        ("Decision: x\nDecision: (1 + 1)/4", True, 0.5),
        ("Decision: 1e-9 * 1", True, 0.0),
        ("1 + 1", True, None),
        ("", True, None),
    ],
)
def test_reading_an_effort(text, program, action):
    decision = read(text, place("E"), program)
    assert (decision.action if decision else None) == action
    if decision:
        label = format_reply(decision, PromptStyle(belief=False))
        assert parse_reply(label, "E", 1, 3, 4.0).action == action


def test_a_label_never_rounds_above_the_cap():
    decision = read("Decision: 3.339", place("E", cap=3.339), False)
    assert decision.action == 3.33 and parse_reply(format_reply(decision, STYLE), "E", 1, 3, 3.339) is not None


def test_reading_a_row_and_beliefs():
    decision = read("Belief: [1, 1, 0]\nDecision: [1, 0, 1]", place("G"), True)
    assert decision.action.tolist() == [1, 0, 1] and decision.belief.tolist() == [1, 0, 0]
    assert read("Decision: [1, 1, 1]", place("G"), True) is None
    assert read("Decision: [1, 0, 2 - 1]", place("G"), True) is None
    assert format_reply(read("Decision: [1, 0, 1]", place("G"), False), STYLE) == "Decision: [1, 0, 1]"
    assert read("Belief: [1e300, 1, 0]\nDecision: 1", place("E"), False).belief is None


# ---------------------------------------------------------------------------------------------------------------------
# whole data sets


def test_the_data_set_says_what_the_server_said(ask, tmp_path):
    with ChatServer() as server:
        records, expert = ask(server)
    asked = {json.dumps(json.loads(q)["messages"]): json.loads(q) for q in server.questions}
    assert len({r.game for r in records}) == 3 and {len(r.instance["alpha"]) for r in records} == {3, 4}
    for r in records:
        body = asked[json.dumps(r.prompt, sort_keys=True)]  # the conversation that the data set shows is the one that was asked
        N = len(r.instance["alpha"])
        said = parse_reply(good_reply(body), r.kind, r.seat, N, r.instance["cap"])
        label = parse_reply(r.label, r.kind, r.seat, N, r.instance["cap"])
        assert np.array_equal(label.action, said.action) and np.array_equal(label.belief, said.belief)
        assert body["model"] == "m" and body["max_tokens"] == llm_experts.MAX_TOKENS
        assert "temperature" not in body
    assert len(asked) == len(server.questions) == len(records) == expert.counts.decisions
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    write_records(tmp_path / "data.jsonl", records)
    assert read_records(tmp_path / "data.jsonl") == records
    kept = lines(tmp_path / "answers.jsonl")
    assert len(kept) == len(records) and all(a["usage"] == [100, 20] and a["attempt"] == 1 for a in kept)
    assert expert.counts.fallbacks == expert.counts.repeated == expert.counts.no_belief == 0


def test_instances_and_replaced_decisions_are_those_of_an_exact_expert(ask):
    for name, exact in (("openai:m", "second-best"), ("noisy:openai:m:0.3", "noisy:second-best:0.3")):
        with ChatServer() as server:
            records, _ = ask(server, f"{exact[:5]}.jsonl", games=6, name=name)
        reference = simulate_many(6, exact, 0, STYLE, (3, 4), families=TWO_ROUNDS)
        assert [(r.game, r.stage, r.seat, r.instance, r.replaced) for r in records] == [
            (r.game, r.stage, r.seat, r.instance, r.replaced) for r in reference
        ]
        replaced = [(a.reply, b.reply) for a, b in zip(records, reference) if a.replaced]
        assert len(replaced) > 5 and all(a == b for a, b in replaced)
    assert len(server.questions) < len(records)  # noisy: some are never asked


def test_order_and_records_do_not_depend_on_concurrency(ask):
    results, most = [], []
    for concurrency in (1, 16):
        rng = random.Random(concurrency)
        with ChatServer(delay=lambda: rng.uniform(0.01, 0.05)) as server:
            results.append(ask(server, f"{concurrency}.jsonl", games=4, concurrency=concurrency)[0])
        most.append(server.most_at_once)
    assert results[0] == results[1] and len(results[0]) > 40
    assert most[0] == 1 and 8 < most[1] <= 16


TROUBLE = [
    ("status", 429, {"Retry-After": "0.05"}, b'{"error": {"message": "slow down"}}'),
    ("status", 500, {}, b"oops"),
    ("status", 503, {}, b""),
    ("body", b"<html>garbage</html>"),
    ("body", b'{"choices": []}'),
    ("body", b'{"choices": [{"message": {"content": 3}}]}'),
    ("body", b'{"error": {"message": "overloaded"}}'),
    ("body", b"[" * 100_000),
    ("body", b"null"),
    ("body", b"\xff\xfe"),
    ("half",),
    ("close",),
    ("slow", 1.0),
]


def test_every_kind_of_trouble_is_outlived(ask, tmp_path, capsys):
    turn = Counter()

    def script(body, n):
        if n > 2:
            return None
        turn["n"] += 1
        return TROUBLE[turn["n"] % len(TROUBLE)]

    with ChatServer(script) as server:
        records, expert = ask(server, "bad.jsonl", games=2, timeout=0.6, concurrency=16)
    with ChatServer() as good:
        reference, _ = ask(good, "good.jsonl", games=2)
    assert records == reference and len(records) >= 24
    assert all(count == 3 for count in Counter(server.questions).values())
    assert all(count == 1 for count in server.answered.values()) and len(server.answered) == len(records)
    assert expert.model.client.failed == 2 * len(records) and expert.model.client.asked == len(records)
    assert len(lines(tmp_path / "bad.jsonl")) == len(records)
    assert "trying again" in capsys.readouterr().out


def client(server, tmp_path, monkeypatch, **settings):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    return ChatClient("m", str(tmp_path / "r.jsonl"), **settings)


CHAT = messages(State(held_out_grid(4)[0]), 0, [], STYLE)


def test_retry_after_is_waited_for_by_all(tmp_path, monkeypatch):
    told = threading.Event()

    def script(body, n):
        if not told.is_set():
            told.set()
            return "status", 429, {"Retry-After": "0.5"}, b""

    with ChatServer(script) as server:
        c = client(server, tmp_path, monkeypatch, concurrency=1)
        c.ask_all([(CHAT, str(i)) for i in range(3)], 1)
    assert len(server.times) == 4 and server.times[1] - server.times[0] > 0.49
    assert chat_client._retry_after("7") == 7
    assert chat_client._retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert [chat_client._retry_after(v) for v in (None, "", "soon", "-3", formatdate(0))] == [0] * 5


def test_the_back_off_doubles(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_client, "BACKOFF", 0.1)
    with ChatServer(lambda body, n: ("status", 500, {}, b"") if n < 4 else None) as server:
        client(server, tmp_path, monkeypatch).ask_all([(CHAT, "")], 1)
    gaps = np.diff(server.times)
    assert len(gaps) == 3 and all(low < gap < high + 0.1 for gap, low, high in zip(gaps, (0.05, 0.1, 0.2), (0.15, 0.3, 0.6)))


FATAL = [
    (("status", 401, {}, b'{"error": {"message": "Incorrect API key provided: ' + KEY.encode() + b'"}}'), "OPENAI_API_KEY"),
    (("status", 403, {}, b""), "403"),
    (("status", 404, {}, b'{"error": "no such\\nmodel"}'), "OPENAI_BASE_URL"),
    (("status", 400, {}, b'{"error": {"message": "bad temperature"}}'), "bad temperature"),
    (("status", 422, {}, b"[" * 50_000), "422"),
    (("status", 302, {"Location": "http://127.0.0.1:9/"}, b""), "302"),
    (("status", 307, {"Location": "http://127.0.0.1:9/"}, b""), "307"),
    (("status", 429, {}, b'{"error": {"message": "no money", "code": "insufficient_quota"}}'), "no money"),
    (("status", 429, {"Retry-After": "86400"}, b""), "86400"),
]


@pytest.mark.parametrize("trouble, word", FATAL, ids=[str(t[1]) + w[:4] for t, w in FATAL])
def test_what_will_not_pass_ends_at_once_in_one_line(ask, trouble, word):
    with ChatServer(lambda body, n: trouble) as server:
        with pytest.raises(InputError) as caught:
            ask(server, concurrency=1)
    message = str(caught.value)
    assert word in message and "\n" not in message and KEY not in message and len(message) < 400
    assert len(server.questions) == 1


def test_retries_used_up(ask, tmp_path):
    bad = []

    def script(body, n):
        with_first = json.dumps(body["messages"])
        if not bad and len(server.answered) >= 3:
            bad.append(with_first)
        return ("status", 500, {}, b"broken") if with_first in bad else None

    with ChatServer(script) as server:
        with pytest.raises(InputError, match="no answer in 3 tries, at last: .*broken") as caught:
            ask(server, retries=2, concurrency=2)
    assert "\n" not in str(caught.value) and str(tmp_path / "answers.jsonl") in str(caught.value)
    assert len(lines(tmp_path / "answers.jsonl")) == sum(server.answered.values()) >= 3
    forget()
    before = server.answered
    with ChatServer() as good:
        records, _ = ask(good, concurrency=2)
    assert not set(before) & set(good.answered) and len(records) == len(before) + len(good.answered)


def test_a_server_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="127.0.0.1:9 gave no answer in 2 tries"):
        ChatClient("m", str(tmp_path / "r"), retries=1).ask_all([(CHAT, "")], 1)


def test_the_newer_name_of_the_limit(tmp_path, monkeypatch):
    detail = b'{"error": {"message": "Unsupported parameter: max_tokens. Use max_completion_tokens instead."}}'

    def script(body, n):
        return ("status", 400, {}, detail) if "max_tokens" in body else None

    with ChatServer(script) as server:
        c = client(server, tmp_path, monkeypatch, max_tokens=9, temperature=0.5, concurrency=1)
        c.ask_all([(CHAT, "a"), (CHAT, "b")], 1)
    sent = [json.loads(q) for q in server.questions]
    assert [("max_tokens" in b, b.get("max_completion_tokens")) for b in sent] == [(True, None), (False, 9), (False, 9)]
    assert all(b["temperature"] == 0.5 for b in sent)


def test_what_is_not_compliant_is_asked_again_and_then_given_up(ask, tmp_path, capsys):
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
    per_seat = len(records) - sum(r.seat != 0 for r in records)
    first = [r for r in records if r.seat == 0]
    assert {r.label for r in first if r.kind == "E"} == {"Decision: 0.00"}
    assert {r.label for r in first if r.kind == "G"} <= {"Decision: [0, 0, 0]", "Decision: [0, 0, 0, 0]"}
    counts = expert.counts
    assert (counts.fallbacks, counts.no_belief, counts.repeated) == (per_seat, per_seat, 4 * per_seat)
    attempts = Counter(a["attempt"] for a in lines(tmp_path / "answers.jsonl"))
    assert attempts == {1: len(records), 2: 2 * per_seat, 3: 2 * per_seat}
    assert len(server.questions) == attempts.total()
    capsys.readouterr()
    llm_experts.print_report()
    text = capsys.readouterr().out
    assert f"{per_seat} decisions not compliant" in text and f"{4 * per_seat} answers asked for again" in text
    assert text.count("\n") == 1
    forget()
    with ChatServer(script) as silent:  # answers that could not be read are kept too
        again, _ = ask(silent, noise=0)
    assert again == records and not silent.questions


def test_expert_program(ask):
    def script(body, n):
        if "Your effort?" in body["messages"][-1]["content"]:
            return "text", "Belief: nothing\nDecision: (1 + 0.5) * 2 / 3 - -0.236"

    with ChatServer(script) as server:
        records, _ = ask(server, program=True, noise=0)
    bodies = [json.loads(q) for q in server.questions]
    assert all(b["messages"][0]["content"].endswith(llm_experts.PROGRAM) for b in bodies)
    assert {r.label for r in records if r.kind == "E"} == {"Decision: 1.24"}
    assert not any(llm_experts.PROGRAM in json.dumps(r.prompt) for r in records)
    said = [m["content"] for b in bodies for m in b["messages"] if m["role"] == "assistant" and "[" not in m["content"]]
    assert said and set(said) == {"Decision: 1.24"}  # in the conversation too


def test_which_equal_prompts_are_one_question(ask):
    """Every game the same instance: at temperature 0 they share, else each is asked for itself."""
    same = (Family("bcz", "GE", 1, types=(1.0,), fixed=(("delta", 0.1), ("c", 0.1))),)
    counts = {}
    for temperature in (0.0, 0.7, None):
        with ChatServer() as server:
            for games in (4, 6):  # more games: those of before are not asked again
                how = dict(families=same, noise=0, temperature=temperature)
                records, expert = ask(server, f"{temperature}.jsonl", games, **how)
                forget()
        sizes = Counter(len(r.instance["alpha"]) for r in records)
        assert set(sizes) == {3, 4}
        counts[temperature] = len(server.questions), len(records)
        assert all(json.loads(q).get("temperature") == temperature for q in server.questions)
    assert counts[0.0] == ((3 + 4) * 2, counts[0.7][1])
    assert counts[0.7][0] == counts[0.7][1] and counts[None][0] == counts[None][1]
    with ChatServer() as server:
        ask(server, "0.7.jsonl", 4, seed=1, families=same, noise=0, temperature=0.7)
    assert len(server.questions) > 0  # another seed, other draws


# ---------------------------------------------------------------------------------------------------------------------
# the record


def test_half_lines_are_tolerated_and_corrupt_nothing(ask, tmp_path):
    path = tmp_path / "answers.jsonl"
    with ChatServer() as server:
        reference, _ = ask(server, games=1)
    forget()
    whole = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(whole[5]) // 2, len(whole[5]) - 1):
        path.write_bytes(b"".join(whole[:5]) + whole[5][:cut])
        for again in (False, True):
            with ChatServer() as server:
                records, _ = ask(server, games=1)
            forget()
            assert records == reference
            complete = cut == len(whole[5]) - 1  # nothing but the end of the line is missing: the answer is whole
            assert len(server.questions) == (0 if again else len(whole) - 5 - complete)
        good = [line for line in path.read_bytes().splitlines() if line != whole[5][:cut] or complete]
        assert len(good) == len(whole) and all(json.loads(line)["text"] for line in good)


def test_files_that_are_no_record(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (tmp_path / "other").write_text('{"a": 1}\n[1]\nnull\n{"key": 1}\n')
    (tmp_path / "folder").mkdir()
    for name in ("other", "folder", "nowhere/x"):
        with pytest.raises(InputError) as caught:
            make_expert("openai:m", Asking(record=str(tmp_path / name)))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_has_one_writer(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    path = str(tmp_path / "r.jsonl")
    code = f"import sys, chat_client; chat_client.AnswerFile({path!r}); print('open', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=SCRIPT.parent, **pipes)
    try:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match="another run is writing"):
            make_expert("openai:m", Asking(record=path))
    finally:
        other.communicate()
    one, two = (make_expert(name, Asking(record=path)) for name in ("openai:m", "openai:n"))
    assert one.model.client.file is two.model.client.file


# ---------------------------------------------------------------------------------------------------------------------
# as a command: kill, budget, dry run, the key


def command(server, *args):
    everything = [sys.executable, str(SCRIPT), "--expert", "openai:m", "--games", "8", "--expert-cache", "answers.jsonl", *args]
    env = os.environ | {"OPENAI_BASE_URL": server.url, "OMP_NUM_THREADS": "1"}
    return everything, env


def run_script(server, *args, cwd):
    everything, env = command(server, *args)
    return subprocess.run(everything, cwd=cwd, capture_output=True, text=True, timeout=60, env=env)


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    with ChatServer(delay=lambda: 0.002, hold_after=37) as server:
        everything, env = command(server, "--out", "data.jsonl")
        process = subprocess.Popen(everything, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record, end = tmp_path / "answers.jsonl", time.monotonic() + 30
        while not (record.exists() and record.read_bytes().count(b"\n") == 37) and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sum(server.answered.values()) == 37 == len(lines(record)) and not (tmp_path / "data.jsonl").exists()
        with record.open("ab") as f:  # and as if the kill had come in the middle of a line
            f.write(record.read_bytes().splitlines()[3][:200])
        server.hold_after = 10**9
        done = run_script(server, "--out", "data.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "data.jsonl")
    assert len(records) == 8 * 4 * 2 == len(server.answered)
    assert set(server.answered.values()) == {1}
    assert "37 answers from" in done.stdout and f"{64 - 37} asked for" in done.stdout
    with ChatServer() as good:
        assert run_script(good, "--out", "new.jsonl", "--expert-cache", "new_answers.jsonl", cwd=tmp_path).returncode == 0
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "data.jsonl").read_bytes()


def test_the_budget_ends_the_run_and_all_is_kept(tmp_path):
    money = "--expert-price", "10", "40", "--expert-budget"  # 100 in, 20 out: 0.0018 an answer
    with ChatServer() as server:
        done = run_script(server, "--out", "data.jsonl", *money, "0.05", "--expert-concurrency", "4", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the budget of $0.05")
        kept = len(lines(tmp_path / "answers.jsonl"))
        assert kept == sum(server.answered.values()) == 27 and not (tmp_path / "data.jsonl").exists()  # 27 x 0.0018 = 0.0486
        again = run_script(server, "--out", "data.jsonl", *money, "0.05", cwd=tmp_path)
        assert again.returncode == 2 and len(server.questions) == kept
        rest = run_script(server, "--out", "data.jsonl", *money, "1", cwd=tmp_path)
        assert rest.returncode == 0, rest.stderr
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 64 == len(read_records(tmp_path / "data.jsonl"))
    assert f"{(64 - kept) * 100} tokens in and {(64 - kept) * 20} out" in rest.stdout
    assert f"${(64 - kept) * 0.0018:.4f} (all of this model in the record: ${64 * 0.0018:.4f})" in rest.stdout


def test_the_first_answers_under_way_may_go_beyond_the_budget_by_no_more(tmp_path, monkeypatch):
    """Nothing is known of what an answer costs before the first one."""
    with ChatServer(delay=lambda: 0.05) as server:
        c = client(server, tmp_path, monkeypatch, price=(10.0, 40.0), budget=0.001, concurrency=4)
        with pytest.raises(InputError, match="budget"):
            c.ask_all([(CHAT, str(i)) for i in range(20)], 1)
    assert 1 <= len(server.questions) <= 4 and len(lines(tmp_path / "r.jsonl")) == len(server.questions)


def test_a_server_that_does_not_count_tokens(tmp_path, monkeypatch):
    with ChatServer(usage=None) as server:
        c = client(server, tmp_path, monkeypatch, price=(10.0, 40.0))
        c.ask_all([(CHAT, "")], 1)
    (line,) = lines(tmp_path / "r.jsonl")
    characters = sum(len(m["content"]) for m in CHAT)
    assert line["usage"] is None and c.tokens[0] == round(characters / chat_client.PROMPT_CHARACTERS) and c.spent > 0


def test_a_dry_run_asks_nothing_and_writes_nothing(tmp_path):
    with ChatServer() as server:
        done = run_script(server, "--dry-run", "--expert-price", "10", "40", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not server.questions and list(tmp_path.iterdir()) == []
        assert run_script(server, "--out", "data.jsonl", cwd=tmp_path).returncode == 0
    assert int(re.search(r"(\d+) questions", done.stdout)[1]) == 64 == len(server.questions)
    tokens = int(re.search(r"(\d+) tokens in", done.stdout)[1])
    really = sum(len(m["content"]) for q in server.questions for m in json.loads(q)["messages"])
    assert tokens == pytest.approx(really / chat_client.PROMPT_CHARACTERS, rel=0.1)
    assert re.search(r"about \$\d+\.\d\d \(at most", done.stdout)


def test_the_key_is_nowhere(tmp_path):
    """Though the server says it in errors, in answers, and to other programs."""

    def script(body, n):
        if n == 1 and "agent 1" in body["messages"][0]["content"] and len(body["messages"]) == 2:
            return "status", 500, {}, f"who is {KEY}?".encode()
        return "text", f"{good_reply(body)}\nBelief: {KEY}"

    with ChatServer(script) as server:
        good = run_script(server, "--out", "data.jsonl", "--games", "1", "--rounds", "2", cwd=tmp_path)
        server.script = lambda body, n: ("status", 401, {}, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode())
        bad = run_script(server, "--out", "more.jsonl", "--games", "2", cwd=tmp_path)
    assert good.returncode == 0 and bad.returncode == 2, good.stderr + bad.stderr
    assert "[key]" in good.stdout + bad.stderr and "Traceback" not in good.stderr + bad.stderr
    assert "[key]" in (tmp_path / "answers.jsonl").read_text()
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) > 1000 and KEY not in written
    assert KEY not in good.stdout + good.stderr + bad.stdout + bad.stderr
    assert bad.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "name",
    ["openai:", "hf:", "openai", "hf", "openai:a\nb", "noisy:openai:0.1", "noisy:hf::0.1", "OpenAI:m", "hf:/nowhere"],
)
def test_bad_names(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        make_expert(name, Asking(record=str(tmp_path / "r")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url, key",
    [("", ""), (None, None), ("localhost:8000", "k"), ("ftp://h/v1", "k"), ("http://", "k"), ("http://u:secretword@h/v1", "k")]
    + [("http://h/v1?key=secretword", "k"), ("http://h:x/v1", "k"), ("http://h h/v1", "k"), ("http://h/v1", "secretword\nx")]
    + [("http://h/v1", "secretword x"), ("http://h/v1", "secretwordé"), ("http://hé/v1", "k"), ("secretword", "k")],
)
def test_a_bad_environment_is_one_line_that_quotes_nothing(url, key, monkeypatch, tmp_path):
    for name, value in (("OPENAI_BASE_URL", url), ("OPENAI_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        make_expert("openai:m", Asking(record=str(tmp_path / "r")))
    assert "\n" not in str(caught.value) and "secretword" not in str(caught.value) and "OPENAI_" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in (
        ("--expert", "openai:m", "--expert-budget", "1"),
        ("--expert", "nash", "--dry-run"),
        ("--expert", "openai:m", "--expert-temperature", "-1"),
        ("--expert", "openai:m", "--expert-price", "1"),
        ("--expert", "openai:m", "--expert-concurrency", "0"),
        ("--expert", "openai:", "--dry-run"),
    ):
        with pytest.raises(SystemExit) as caught:
            experts.main(["--games", "1", "--out", "o.jsonl", *flags])
        assert caught.value.code == 2 and capsys.readouterr().err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_flag_reaches_the_asking():
    from train_sft import add_model_arguments

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    experts.add_style_arguments(parser)
    values = "--expert-temperature 0.25 --expert-max-tokens 11 --expert-attempts 5 --expert-concurrency 7"
    values += " --expert-timeout 12.5 --expert-retries 9 --expert-cache record.jsonl --expert-price 2.5 10 --expert-budget 33"
    argv = ["--expert-program", *values.split(), "--cache", "models", "--device", "cuda:3"]
    known = {text for action in parser._actions for text in action.option_strings if text.startswith("--expert-")}
    assert known == {text for text in argv if text.startswith("--expert-")}  # a flag that is added is tested here
    style, args = PromptStyle("local", True, False), parser.parse_args(argv)
    asked = Asking(
        style=style, program=True, temperature=0.25, max_tokens=11, attempts=5, concurrency=7, timeout=12.5, retries=9,
        record="record.jsonl", price=(2.5, 10.0), budget=33.0, cache="models", device="cuda:3",
    )  # fmt: skip
    assert llm_experts.asking_of(args, style) == asked
    assert llm_experts.asking_of(parser.parse_args(["--device", "cpu"]), STYLE) == Asking(STYLE, device="cpu")
    styled = parser.parse_args([*argv, "--information", "local", "--no-hints"])
    assert experts.asking_of(styled, "openai:m") == asked and experts.asking_of(styled, "nash") == Asking()


# ---------------------------------------------------------------------------------------------------------------------
# evaluation, and local models


def test_evaluation_asks_in_the_conversation_of_each_seat(monkeypatch, tmp_path):
    from play import players

    grid = [g for g in held_out_grid(4, TWO_ROUNDS[0])][:3]

    def player(asks):
        return [f"stage {ask.stage}, and I say nothing." for ask in asks]

    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        expert = make_expert("openai:m", Asking(record=str(tmp_path / "r.jsonl")))
        played = players.play(grid, player, 1, expert, 0)
        asked = len(server.questions)
        assert asked == len(set(server.questions)) == 3 * (4 + 3) * 2  # the policy's own seat in graph stages alone
        again = players.play(grid, players.expert_player(expert, STYLE, 0), 1, expert, 0)
    for question in server.questions:
        chat = json.loads(question)["messages"]
        own = re.search(r"You are agent (\d)", chat[0]["content"])[1]
        said = [m["content"] for m in chat if m["role"] == "assistant"]
        for stage, text in enumerate(said):
            if own == "2" and "nothing" in "".join(said):
                assert text == f"stage {stage}, and I say nothing."
            else:
                assert parse_reply(text, "GE"[stage % 2], int(own) - 1, 4, 99) is not None and text.startswith("Belief: ")
    assert [t.decision for t in played[0].turns] == [None] * 4
    assert all(t.decision is not None and (t.s is None or t.s == 1) for p in again for t in p.turns)
    first = [json.loads(q)["messages"] for q in server.questions[:asked]]
    assert not any(json.loads(q)["messages"] == chat for q in server.questions[asked:] for chat in first)


def test_a_local_model(tiny_model_dir, tmp_path):
    """Compliant by chance at best: the texts are what the policy samples, and do not turn on the batch."""
    import torch

    import policy

    asking = Asking(STYLE, max_tokens=6, attempts=2)
    expert = make_expert(f"hf:{tiny_model_dir}", asking)
    assert expert is make_expert(f"hf:{tiny_model_dir}", asking)
    records = simulate_many(2, f"hf:{tiny_model_dir}", 0, STYLE, (3, 3), asking=asking)
    assert len(records) == 2 * 2 * 3 == expert.counts.decisions
    assert expert.counts.fallbacks == sum(r.label in ("Decision: 0.00", "Decision: [0, 0, 0]") for r in records)
    assert expert.model.asked == 12 + expert.counts.repeated
    states = [State(g) for g in held_out_grid(3)[:3]]
    questions = [expert(s, 0, np.random.default_rng(i)) for i, s in enumerate(states)]
    together = expert.model.ask_all([(q.chat, q.draw, 3) for q in questions], 1)
    alone = [expert.model.ask_all([(q.chat, q.draw, 3)], 1)[0] for q in questions[::-1]][::-1]
    assert together == alone and len(set(together)) == 3
    assert expert.model.ask_all([(questions[0].chat, questions[0].draw, 3)], 2)[0] != together[0]
    greedy = make_expert(f"hf:{tiny_model_dir}", Asking(STYLE, temperature=0.0, max_tokens=6))
    q = greedy(states[0], 0, np.random.default_rng(0))
    base = policy.load_policy(str(tiny_model_dir))
    (rollout,), = base.sample([base.encode_prompt(q.chat)], 1, 6, 0.0)
    assert greedy.model.ask_all([(q.chat, q.draw, 3)], 1) == [rollout.text] and q.draw == ""
    greedy.answer([q])
    assert greedy.model.asked == 2  # no second attempt: it would say the same
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    a = base.sample([base.encode_prompt(q.chat)] * 2, 1, 6, 1.0, generators)
    b = base.sample([base.encode_prompt(q.chat)], 1, 6, 1.0, [torch.Generator().manual_seed(4)])
    assert a[1][0].reply_ids == b[0][0].reply_ids != a[0][0].reply_ids


def test_an_adapter_is_a_local_model(tiny_model_dir, tmp_path):
    import torch

    import lora
    import policy

    base = policy.load_policy(str(tiny_model_dir))
    config = lora.LoRAConfig(4, 8.0, ("q_proj",), str(tiny_model_dir))
    lora.inject(base.model, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in lora.lora_parameters(base.model):
            p.normal_(generator=torch.Generator().manual_seed(1))
    adapter_files.save_adapter(base.model, tmp_path / "adapter", config)
    expert = make_expert(f"hf:{tmp_path / 'adapter'}", Asking(STYLE, temperature=0.0, max_tokens=6))
    chat = expert(State(held_out_grid(3)[0]), 0, None).chat
    (rollout,), = base.sample([base.encode_prompt(chat)], 1, 6, 0.0)
    assert expert.model.ask_all([(chat, "", 3)], 1) == [rollout.text]
    plain = make_expert(f"hf:{tiny_model_dir}", Asking(STYLE, temperature=0.0, max_tokens=6))
    assert plain.model.ask_all([(chat, "", 3)], 1) != [rollout.text]


def test_training_with_experts_on_a_server(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """The training games and the held-out ones; going on asks nothing, and finds the record from another folder."""
    import train_sft

    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_model_dir), "--games", "2", "--sft-held-out", "1", "--expert", "openai:m", "--out", "run"]
    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        train_sft.main([*flags, "--max-steps", "1", "--device", "cpu"])
        assert len(server.questions) == 3 * 4 * 2 and "24 asked for" in capsys.readouterr().out
        forget()
        monkeypatch.chdir("/")
        train_sft.main(["--resume", str(tmp_path / "run")])
        assert len(server.questions) == 24
    assert json.loads((tmp_path / "run/config.json").read_text())["expert_cache"] == str(tmp_path / "expert_answers.jsonl")
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


TWO = """
import sys
from run import ranks
from experts import simulate_many, write_records
from teachers.language import Asking
from prompts import PromptStyle
from run.files import InputError
ranks.start()
for budget in (1.0, 0.0):
    try:
        asking = Asking(PromptStyle(), record=f"answers{budget:g}", price=(10.0, 40.0), budget=budget)
        records = simulate_many(2, "openai:m", 0, PromptStyle(), asking=asking)
        write_records(f"data{ranks.rank()}.jsonl", records)
    except InputError as e:
        open(f"error{ranks.rank()}", "w").write(str(e))
ranks.exchange(None)
ranks.dist.destroy_process_group()
"""


def test_of_two_processes_one_asks_and_both_get_the_answers(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with ChatServer() as server:
        env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"OPENAI_BASE_URL": server.url, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
        how = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        both = [subprocess.Popen([sys.executable, "-c", TWO], env=env | {"RANK": str(r)}, **how) for r in range(2)]
        ends = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert len(server.questions) == 16
    assert (tmp_path / "data0.jsonl").read_bytes() == (tmp_path / "data1.jsonl").read_bytes()
    assert "budget" in (tmp_path / "error0").read_text() == (tmp_path / "error1").read_text()
