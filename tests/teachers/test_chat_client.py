"""The client and its record, against servers on the loopback: good ones, and ones that misbehave."""

import gzip
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_server import KEY, ChatServer

from experts import make_expert
from games import State
from prompts import PromptStyle, messages
from run.files import InputError
from teachers import record
from teachers.language import Asking, Question
from world.draws import held_out_grid

pytest.importorskip("openai", reason="no openai: pip install -r requirements-experts.txt")
from teachers import chat_client  # noqa: E402
from teachers.chat_client import ChatClient  # noqa: E402

ROOT = Path(chat_client.__file__).resolve().parents[1]
STATE = State(held_out_grid(4)[0])
CHAT = messages(STATE, 0, [], PromptStyle())


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def questions(count):
    return [Question(CHAT, str(i), STATE, 0) for i in range(count)]


@pytest.fixture
def client(monkeypatch):
    def make(server, **settings):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return ChatClient("m", "r.jsonl", **settings)

    return make


# ------------------------------------------------------------------------------------------------------------
# trouble


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
    ("slow", 4.0),
]


def test_every_kind_of_trouble_is_outlived(ask, capsys):
    turn = Counter()

    def script(body, n):
        if n > 2:
            return None
        turn["n"] += 1
        return TROUBLE[turn["n"] % len(TROUBLE)]

    with ChatServer(script) as server:
        records, expert = ask(server, "bad.jsonl", games=2, pairs="timeout=2 concurrency=16")
    with ChatServer() as good:
        reference, _ = ask(good, "good.jsonl", games=2)
    assert records == reference and len(records) >= 24
    assert all(count == 3 for count in Counter(server.questions).values())
    assert all(count == 1 for count in server.answered.values()) and len(server.answered) == len(records)
    assert expert.model.failed == 2 * len(records) and expert.model.asked == len(records)
    assert len(lines("bad.jsonl")) == len(records)
    assert "a try failed" in capsys.readouterr().out


def test_retry_after_is_waited_for(client):
    later = "status", 429, {"Retry-After": "0.5"}, b""
    with ChatServer(lambda body, n: later if n == 1 else None) as server:
        client(server).ask_all(questions(1), 1)
    assert len(server.times) == 2 and server.times[1] - server.times[0] > 0.49


@pytest.mark.parametrize("first", [0, 30, 60], ids=["nothing", "headers", "body"])
def test_a_server_that_drips_is_left_at_the_deadline(client, first):
    """Every byte comes within the time-out, and the whole would take twenty seconds."""
    with ChatServer(lambda body, n: ("drip", first) if n < 3 else None) as server:
        started = time.monotonic()
        c = client(server, timeout=0.5)
        c.ask_all(questions(1), 1)
        took = time.monotonic() - started
    assert c.failed == 2 and len(server.questions) == 3 and 1.0 < took < 15


ENDLESS = [({}, b" " * 2**16), ({"Content-Encoding": "gzip"}, gzip.compress(bytes(2**25)))]


@pytest.mark.parametrize("headers, data", ENDLESS, ids=["plain", "gzip"])
def test_a_body_without_end_is_left_at_its_limit(client, headers, data):
    with ChatServer(lambda body, n: ("endless", headers, data)) as server:
        with pytest.raises(InputError, match="no answer in 1 tries, at last: a body without end"):
            client(server, timeout=60, retries=0).ask_all(questions(1), 1)
    assert server.sent < 3 * chat_client.LARGEST_BODY


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(client, status):
    with ChatServer() as other:
        there = {"Location": f"{other.url}/chat/completions"}
        with ChatServer(lambda body, n: ("status", status, there, b"")) as server:
            with pytest.raises(InputError, match=str(status)):
                client(server).ask_all(questions(1), 1)
        assert not other.questions


def test_no_other_try_begins_when_a_question_has_failed_for_good(client):
    def script(body, n):
        return ("status", 500, {"Retry-After": "2"}, b"") if n == 1 else ("status", 400, {}, b"no")

    with ChatServer(script) as server:
        with pytest.raises(InputError, match="400: no"):
            client(server, concurrency=2).ask_all(questions(3), 1)
    assert len(server.questions) == 2


def test_a_compressed_answer(client):
    data = gzip.compress(b'{"choices": [{"message": {"content": "yes"}}]}')
    with ChatServer(lambda *_: ("status", 200, {"Content-Encoding": "gzip"}, data)) as server:
        assert client(server).ask_all(questions(1), 1) == ["yes"]


def test_an_answer_without_content_was_paid_for(client):
    body = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    body["usage"] = {"prompt_tokens": 5, "completion_tokens": 7}
    with ChatServer(lambda *_: ("body", json.dumps(body).encode())) as server:
        assert client(server).ask_all(questions(1), 1) == [""]
    (line,) = lines("r.jsonl")
    assert (line["finish"], line["usage"], len(server.questions)) == ("length", [5, 7], 1)


WRONG_KEY = b'{"error": {"message": "Incorrect API key provided: ' + KEY.encode() + b'"}}'
FATAL = [
    (("status", 401, {}, WRONG_KEY), "OPENAI_API_KEY"),
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
def test_what_will_not_pass_ends_at_once_in_one_line(client, trouble, word):
    with ChatServer(lambda body, n: trouble) as server:
        with pytest.raises(InputError) as caught:
            client(server, concurrency=1).ask_all(questions(3), 1)
    message = str(caught.value)
    assert word in message and "\n" not in message and KEY not in message and len(message) < 400
    assert len(server.questions) == 1


def test_retries_used_up(ask, forget):
    bad = []

    def script(body, n):
        with_first = json.dumps(body["messages"])
        if not bad and len(server.answered) >= 3:
            bad.append(with_first)
        return ("status", 500, {}, b"broken") if with_first in bad else None

    with ChatServer(script) as server:
        with pytest.raises(InputError, match="no answer in 3 tries, at last: .*broken") as caught:
            ask(server, pairs="retries=2 concurrency=2")
    assert "\n" not in str(caught.value) and str(Path("answers.jsonl").absolute()) in str(caught.value)
    assert len(lines("answers.jsonl")) == sum(server.answered.values()) >= 3
    forget()
    with ChatServer() as good:
        records, _ = ask(good, pairs="concurrency=2")
    assert not set(server.answered) & set(good.answered)
    assert len(records) == len(server.answered) + len(good.answered)


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="127.0.0.1:9 gave no answer in 2 tries"):
        ChatClient("m", "r.jsonl", retries=1).ask_all(questions(1), 1)


def test_the_newer_name_of_the_limit(client):
    message = "Unsupported parameter: max_tokens. Use max_completion_tokens instead."
    refusal = "status", 400, {}, json.dumps({"error": {"message": message}}).encode()

    with ChatServer(lambda body, n: refusal if "max_tokens" in body else None) as server:
        client(server, max_tokens=9, temperature=0.5, concurrency=1).ask_all(questions(2), 1)
    sent = [json.loads(q) for q in server.questions]
    named = [("max_tokens" in b, b.get("max_completion_tokens")) for b in sent]
    assert named == [(True, None), (False, 9), (False, 9)]
    assert all(b["temperature"] == 0.5 for b in sent)


def test_order_and_records_do_not_depend_on_concurrency(ask):
    results, most = [], []
    for concurrency in (1, 16):
        rng = random.Random(concurrency)
        with ChatServer(delay=lambda: rng.uniform(0.01, 0.05) * concurrency**0.5) as server:
            record = f"{concurrency}.jsonl"
            results.append(ask(server, record, games=4, pairs=f"concurrency={concurrency}")[0])
        most.append(server.most_at_once)
    assert results[0] == results[1] and len(results[0]) > 40
    assert most[0] == 1 and 8 < most[1] <= 16


@pytest.mark.parametrize("budget, answers", [(0.01, 0), (0.05, 1), (0.11, 4)])
def test_questions_under_way_together_stay_within_the_budget(client, budget, answers):
    """Every answer is as dear as one may be, $0.0225; a question waits until the others cannot use it up."""
    with ChatServer(delay=lambda: 0.05, usage=(0, 1000)) as server:
        c = client(server, price=(2.5, 22.5), budget=budget, concurrency=16, max_tokens=1000)
        with pytest.raises(InputError, match=f"the budget of .{budget} is used up"):
            c.ask_all(questions(20), 1)
    assert answers <= len(server.questions) == len(lines("r.jsonl")) <= budget / 0.0225
    assert c.spent == pytest.approx(len(server.questions) * 0.0225) and c.spent <= budget


def test_counts_that_no_answer_has_are_not_believed(client, forget):
    """They were an error after the answer was recorded, and so in every later run."""
    settings = dict(price=(10.0, 40.0), budget=1.0, max_tokens=100)
    with ChatServer(usage=(10**400, 20)) as server:
        spent = [client(server, **settings)]
        spent[0].ask_all(questions(1), 1)
        (line,) = lines("r.jsonl")
        assert line["usage"] is None and 0 < spent[0].spent < 0.1
        forget()
        Path("r.jsonl").write_text(json.dumps(line | {"usage": [10**400, 10**400]}) + "\n")
        assert client(server, **settings).spent == spent[0].spent


def test_what_a_server_says_cannot_steer_the_terminal(client, capsys):
    evil = json.dumps({"error": {"message": "\x1b]0;owned\x07"}}).encode()
    with ChatServer(lambda body, n: ("status", 500, {}, evil) if n == 1 else None) as server:
        client(server).ask_all(questions(1), 1)
    said = capsys.readouterr().out
    assert "owned" in said and "\x1b" not in said and "\x07" not in said


def test_a_server_that_does_not_count_tokens(client):
    with ChatServer(usage=None) as server:
        c = client(server, price=(10.0, 40.0))
        c.ask_all(questions(1), 1)
    characters = sum(len(m["content"]) for m in CHAT)
    assert lines("r.jsonl")[0]["usage"] is None
    assert c.tokens[0] == round(characters / record.PROMPT_CHARACTERS) and c.spent > 0


@pytest.mark.parametrize(
    "url, key",
    [
        ("", ""),
        (None, None),
        ("localhost:8000", "k"),
        ("ftp://h/v1", "k"),
        ("http://", "k"),
        ("http://u:secretword@h/v1", "k"),
        ("http://h/v1?key=secretword", "k"),
        ("http://h:x/v1", "k"),
        ("http://h h/v1", "k"),
        ("http://h/v1", "secretword\nx"),
        ("http://h/v1", "secretword x"),
        ("http://h/v1", "secretwordé"),
        ("http://hé/v1", "k"),
        ("secretword", "k"),
    ],
)
def test_a_bad_environment_is_one_line_that_quotes_nothing(url, key, monkeypatch, tmp_path):
    for name, value in (("OPENAI_BASE_URL", url), ("OPENAI_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        make_expert("openai:m")
    message = str(caught.value)
    assert "\n" not in message and "secretword" not in message and "OPENAI_" in message
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# the record


def test_half_lines_are_tolerated_and_corrupt_nothing(ask, forget, tmp_path):
    path = tmp_path / "answers.jsonl"
    with ChatServer() as server:
        reference, _ = ask(server, games=1)
    forget()
    whole = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(whole[5]) // 2, len(whole[5]) - 1):
        path.write_bytes(b"".join(whole[:5]) + whole[5][:cut])
        complete = cut == len(whole[5]) - 1  # only the end of the line is missing: the answer is whole
        for again in (False, True):
            with ChatServer() as server:
                records, _ = ask(server, games=1)
            forget()
            assert records == reference
            assert len(server.questions) == (0 if again else len(whole) - 5 - complete)
        good = [line for line in path.read_bytes().splitlines() if line != whole[5][:cut] or complete]
        assert len(good) == len(whole) and all(json.loads(line)["text"] for line in good)


def test_files_that_are_no_record(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (tmp_path / "other").write_text('{"a": 1}\n[1]\nnull\n{"key": 1}\n')
    (tmp_path / "folder").mkdir()
    for name in ("other", "folder", "nowhere/x"):
        with pytest.raises(InputError) as caught:
            make_expert("openai:m", Asking(record=name))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_has_one_writer(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    path = str(tmp_path / "r.jsonl")
    code = f"import sys; from teachers.record import AnswerFile; f = AnswerFile({path!r})"
    code += "; print('open', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    try:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match="another run is writing"):
            make_expert("openai:m", Asking(record=path))
    finally:
        other.communicate()
    one, two = (make_expert(name, Asking(record=path)) for name in ("openai:m", "openai:n"))
    assert one.model.file is two.model.file
