"""The client and its record, against servers on the loopback: good ones, and ones that misbehave."""

import itertools
import json
import random
from collections import Counter

import pytest
from chat_server import KEY, ChatServer
from whole_runs import lines_of

import world  # noqa: F401  (registers the kinds of decisions)
from games import State
from prompts import PromptStyle, messages
from run.errors import InputError
from teachers import record
from teachers.asking import Asking, Question
from world.draws import held_out_grid

pytest.importorskip("openai", reason="no openai: pip install -r requirements-experts.txt")
from teachers.chat_client import ChatClient  # noqa: E402

STATE = State(held_out_grid(4)[0])
CHAT = messages(STATE, 0, [], PromptStyle())


def questions(count):
    return [Question(CHAT, str(i), STATE, 0) for i in range(count)]


@pytest.fixture
def client(monkeypatch):
    def connect(server, **settings):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return ChatClient("m", Asking(record="r.jsonl", **settings))

    return connect


TROUBLE = [
    ("status", 429, {"Retry-After": "0.05"}, b'{"error": {"message": "slow down"}}'),
    ("status", 500, {}, b"oops"),
    ("half",),
    ("close",),
    ("slow", 4.0),
]


def test_what_may_pass_is_tried_again(ask):
    turn = itertools.cycle(TROUBLE)
    with ChatServer(lambda body, n: next(turn) if n < 3 else None) as server:
        records, expert = ask(server, "bad.jsonl", games=2, pairs="timeout=2 concurrency=16")
    with ChatServer() as good:
        reference, _ = ask(good, "good.jsonl", games=2)
    assert records == reference and len(records) >= 24
    assert all(count == 3 for count in Counter(server.questions).values())
    assert all(count == 1 for count in server.answered.values()) and len(server.answered) == len(records)
    assert expert.model.failed == 2 * len(records) and expert.model.asked == len(records)


@pytest.mark.parametrize("first", [0, 30, 60], ids=["nothing", "headers", "body"])
def test_a_server_that_drips_is_left_at_the_deadline(client, first):
    """Every byte comes within the time-out, and the whole would take twenty seconds."""
    with ChatServer(lambda body, n: ("drip", first)) as server:
        with pytest.raises(InputError, match="no answer: TimeoutError"):
            client(server, timeout=0.5, retries=1).ask_all(questions(1), 1)


def test_a_redirect_is_not_followed(client):
    with ChatServer() as other:
        there = {"Location": f"{other.url}/chat/completions"}
        with ChatServer(lambda body, n: ("status", 307, there, b"")) as server:
            with pytest.raises(InputError, match="307"):
                client(server).ask_all(questions(1), 1)
        assert len(server.questions) == 1 and not other.questions


def test_an_answer_without_content_was_paid_for(client):
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'
    with ChatServer(lambda *_: ("body", body)) as server:
        assert client(server).ask_all(questions(1), 1) == [""]
    (line,) = lines_of("r.jsonl")
    assert (line["finish"], line["usage"], len(server.questions)) == ("length", None, 1)


WRONG_KEY = b'{"error": {"message": "Incorrect API key provided: ' + KEY.encode() + b'"}}'
FATAL = [
    (("status", 401, {}, WRONG_KEY), "401"),
    (("status", 404, {}, b'{"error": "no such\nmodel"}'), "no such"),
    (("status", 400, {}, b'{"error": {"message": "bad \x1b]0;temperature\x07"}}'), "temperature"),
    (("status", 422, {}, b"[" * 50_000), "422"),
    (("status", 429, {"Retry-After": "86400"}, b""), "429"),
    (("body", b"<html>garbage</html>"), "garbage"),
    (("body", b'{"choices": []}'), "choices"),
    (("body", b'{"error": {"message": "overloaded"}}'), "overloaded"),
    (("body", b"[" * 100_000), "not a chat completion"),
    (("body", b"\xff\xfe"), "not a chat completion"),
]


@pytest.mark.parametrize("trouble, word", FATAL, ids=[str(t[1])[:9] + w for t, w in FATAL])
def test_what_will_not_pass_ends_at_once_in_one_line(client, trouble, word):
    with ChatServer(lambda body, n: trouble) as server:
        with pytest.raises(InputError) as caught:
            client(server, concurrency=1).ask_all(questions(3), 1)
    message = str(caught.value)
    assert word in message and message.isprintable() and KEY not in message and len(message) < 500
    assert len(server.questions) == 1


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="127.0.0.1:9 gave no answer: APIConnectionError.*r.jsonl, and"):
        ChatClient("m", Asking(record="r.jsonl", retries=1)).ask_all(questions(1), 1)


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
    results, most, rng = [], [], random.Random(0)
    for concurrency in (1, 16):
        with ChatServer(delay=lambda: rng.uniform(0.01, 0.05)) as server:
            record = f"{concurrency}.jsonl"
            results.append(ask(server, record, games=4, pairs=f"concurrency={concurrency}")[0])
        most.append(server.most_at_once)
    assert results[0] == results[1] and len(results[0]) > 40
    assert most[0] == 1 and 8 < most[1] <= 16


@pytest.mark.parametrize("budget, answers", [(0.01, 0), (0.05, 1), (0.11, 4)])
def test_questions_under_way_together_stay_within_the_budget(client, budget, answers, forget):
    """Every answer is as dear as one may be, $0.0225; a question waits until the others cannot use it up."""
    prices = dict(price_in=2.5, price_out=22.5, concurrency=16, max_tokens=1000)
    with ChatServer(delay=lambda: 0.05, usage=(0, 1000)) as server:
        c = client(server, budget=budget, **prices)
        with pytest.raises(InputError, match=f"the budget of .{budget} is used up"):
            c.ask_all(questions(20), 1)
        count = len(server.questions)
        assert answers <= count == len(lines_of("r.jsonl")) <= budget / 0.0225
        assert sum(c.costs()) == pytest.approx(count * 0.0225) and sum(c.costs()) <= budget
        forget()
        c = client(server, budget=1, **prices)
        c.ask_all(questions(20), 1)
    assert len(server.questions) == 20 == len(lines_of("r.jsonl"))
    assert c.report().endswith(f"${0.45 - count * 0.0225:.4f} (all of this model in the record: $0.4500)")


@pytest.mark.parametrize("usage", [None, (10**400, 20), ("100", "20")])
def test_a_server_that_does_not_count_tokens(client, usage):
    with ChatServer(usage=usage) as server:
        c = client(server, price_in=10.0, price_out=40.0, budget=1.0, max_tokens=100)
        c.ask_all(questions(1), 1)
    characters = sum(len(m["content"]) for m in CHAT)
    assert lines_of("r.jsonl")[0]["usage"] is None
    assert c.tokens[0] == round(characters / record.PROMPT_CHARACTERS) and 0 < sum(c.costs()) < 0.1


URLS = ["localhost:8000", "ftp://h/v1", "http://h:x/v1", "http://hé/v1", "http://u:secretword@h/v1"]
URLS += ["secretword", "http://h/v1?key=secretword"]
KEYS = ["secretword x", "secretwordé"]
WRONG = [("", ""), *((url, "k") for url in URLS), *(("http://h/v1", key) for key in KEYS)]


@pytest.mark.parametrize("url, key", WRONG)
def test_a_bad_environment_is_one_line_that_quotes_nothing(url, key, make, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError) as caught:
        make("openai:m")
    message = str(caught.value)
    assert "secretword" not in message and "OPENAI_" in message
    assert list(tmp_path.iterdir()) == []


def test_half_lines_are_tolerated_and_corrupt_nothing(ask, forget, tmp_path):
    path = tmp_path / "answers.jsonl"
    with ChatServer() as server:
        reference, _ = ask(server, games=1)
    forget()
    whole = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(whole[5]) // 2, len(whole[5]) - 1):
        path.write_bytes(b"".join(whole[:5]) + whole[5][:cut])
        complete = cut == len(whole[5]) - 1  # only the end of the line is missing: the answer is whole
        for missing in (len(whole) - 5 - complete, 0):
            with ChatServer() as server:
                records, _ = ask(server, games=1)
            forget()
            assert records == reference and len(server.questions) == missing
        good = [line for line in path.read_bytes().splitlines() if line != whole[5][:cut] or complete]
        assert len(good) == len(whole) and all(json.loads(line)["text"] for line in good)


def test_files_that_are_no_record_or_that_of_another_process(make, tmp_path):
    (tmp_path / "other").write_text('{"a": 1}\n[1]\nnull\n{"key": 1}\n')
    (tmp_path / "folder").mkdir()
    for name in ("other", "folder", "nowhere/x"):
        with pytest.raises(InputError, match=name):
            make("openai:m", f"record={name}")
    one, two = (make(name, f"record={tmp_path}/r.jsonl") for name in ("openai:m", "openai:n"))
    assert one.model.file is two.model.file
    with pytest.raises(InputError, match="another run is writing"):
        record.AnswerFile(str(tmp_path / "r.jsonl"))  # as another process would open it
