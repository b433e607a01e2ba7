"""Experts that are language models, on a server on the loopback and local."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_server import KEY, ChatServer, good_reply

import experts
from experts import decide, make_expert
from games import State
from prompts import PromptStyle, format_reply, parse_reply
from run import dataset
from run.dataset import read_records, simulate_many, write_records
from run.files import InputError
from teachers import language
from teachers.language import Asking, Question, asking, read
from world.bcz import BCZ
from world.draws import Family, held_out_grid

STYLE = PromptStyle()
ROOT = Path(experts.__file__).resolve().parent
TWO_ROUNDS = (Family("bcz", "GE", 2),)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# reading an answer


def place(kind, cap=4.0):
    game = BCZ((1.0, 1.0, 1.0), 0.1, 0.1, cap)
    return Question([], "", State(game, () if kind == "G" else (np.zeros((3, 3), int),)), 1)


@pytest.mark.parametrize(
    "text, action",
    [
        ("Decision: 1.239", 1.24),
        ("Decision: +1.5", 1.5),
        ("Decision: 4.001", None),
        ("Decision: 1 + 0.5", None),
        ("Decision: 1\nDecision: x", None),
        ("Decision: x\nDecision: 0.5", 0.5),
        ("1", None),
        ("", None),
    ],
)
def test_reading_an_effort(text, action):
    decision = read(text, place("E"))
    assert (decision.action if decision else None) == action
    if decision:
        label = format_reply(decision, PromptStyle(belief=False))
        assert parse_reply(label, "E", 1, 3, 4.0).action == action


def test_a_label_never_rounds_above_the_cap():
    decision = read("Decision: 3.339", place("E", cap=3.339))
    assert decision.action == 3.33
    assert parse_reply(format_reply(decision, STYLE), "E", 1, 3, 3.339) is not None


def test_reading_a_row_and_beliefs():
    decision = read("Belief: [1, 1, 0]\nDecision: [1, 0, 1]", place("G"))
    assert decision.action.tolist() == [1, 0, 1] and decision.belief.tolist() == [1, 0, 0]
    assert read("Decision: [1, 1, 1]", place("G")) is None
    assert format_reply(read("Decision: [1, 0, 1]", place("G")), STYLE) == "Decision: [1, 0, 1]"
    assert read("Belief: [1e300, 1, 0]\nDecision: 1", place("E")).belief is None


# ------------------------------------------------------------------------------------------------------------
# whole data sets


def test_the_data_set_says_what_the_server_said(ask, tmp_path):
    with ChatServer() as server:
        records, expert = ask(server)
    asked = {json.dumps(json.loads(q)["messages"]): json.loads(q) for q in server.questions}
    assert len({r.game for r in records}) == 3 and {len(r.instance["alpha"]) for r in records} == {3, 4}
    for r in records:
        body = asked[json.dumps(r.prompt, sort_keys=True)]  # what the data set shows is what was asked
        place = r.kind, r.seat, len(r.instance["alpha"]), r.instance["cap"]
        said, label = parse_reply(good_reply(body), *place), parse_reply(r.label, *place)
        assert np.array_equal(label.action, said.action) and np.array_equal(label.belief, said.belief)
        assert body["model"] == "m" and body["max_tokens"] == language.MAX_TOKENS
        assert "temperature" not in body
    assert len(asked) == len(server.questions) == len(records) == expert.counts["decisions"]
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    write_records(tmp_path / "data.jsonl", records)
    assert read_records(tmp_path / "data.jsonl") == records
    kept = lines("answers.jsonl")
    assert len(kept) == len(records) and all(a["usage"] == [100, 20] and a["attempt"] == 1 for a in kept)
    assert expert.counts.total() == expert.counts["decisions"]


NOISY = ["openai:m", "noisy:openai:m:0.3", "noisy:noisy:openai:m:0.2:0.3"]


@pytest.mark.parametrize("name", NOISY)
def test_instances_and_replaced_decisions_are_those_of_an_exact_expert(ask, name):
    exact = name.replace("openai:m", "second-best")
    with ChatServer() as server:
        records, expert = ask(server, games=6, name=name)
    reference = simulate_many(6, exact, 0, STYLE, (3, 4), families=TWO_ROUNDS)
    assert [(r.game, r.stage, r.seat, r.instance, r.replaced) for r in records] == [
        (r.game, r.stage, r.seat, r.instance, r.replaced) for r in reference
    ]
    replaced = [(a.reply, b.reply) for a, b in zip(records, reference) if a.replaced]
    assert len(replaced) > 5 and all(a == b for a, b in replaced)
    asked = len(server.questions)
    assert asked == expert.counts["decisions"] and (asked < len(records)) == (name != "openai:m")
    assert re.match(rf"openai:m: {asked} decisions, .* {asked} asked for", expert.report())


@pytest.mark.parametrize("name", NOISY)
def test_noise_draws_as_it_does_around_an_exact_expert(ask, name, monkeypatch):
    """The same seats are random, with the same decisions, and the stream ends in the same place."""
    states, ends, actions = [State(g) for g in held_out_grid(4)[:2]], [], []
    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for player in (name, name.replace("openai:m", "never-link")):
            rngs = [np.random.default_rng(k) for k in range(2)]
            calls = [(states[k], seat, rngs[k], []) for k in range(2) for seat in range(4)]
            actions.append([d.action.tolist() for d in decide(make_expert(player), calls)])
            ends.append([rng.random() for rng in rngs])
    assert ends[0] == ends[1]
    same = [a == b for a, b in zip(*actions)]  # else everybody (the server), or nobody
    assert same.count(False) == len(server.questions)
    assert all(sum(a) == 3 and sum(b) == 0 for a, b, s in zip(*actions, same) if not s)


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
    given_up = {"fallbacks": per_seat, "no belief": per_seat, "repeated": 4 * per_seat}
    assert expert.counts == given_up | {"decisions": len(records)}
    attempts = Counter(a["attempt"] for a in lines("answers.jsonl"))
    assert attempts == {1: len(records), 2: 2 * per_seat, 3: 2 * per_seat}
    assert len(server.questions) == attempts.total()
    capsys.readouterr()
    language.print_report()
    text = capsys.readouterr().out
    assert f"{per_seat} decisions not compliant" in text and f"{4 * per_seat} answers asked for again" in text
    assert text.count("\n") == 1
    forget()
    with ChatServer(script) as silent:  # answers that could not be read are kept too
        again, _ = ask(silent, noise=0)
    assert again == records and not silent.questions


def test_which_equal_prompts_are_one_question(ask, forget):
    """Every game is the same instance: at temperature 0 they share, else each is asked for itself."""
    same = (Family("bcz", "GE", 1, types=(1.0,), fixed=(("delta", 0.1), ("c", 0.1))),)
    counts = {}
    for pairs in ("temperature=0", "temperature=0.7", ""):
        with ChatServer() as server:
            for games in (4, 6):  # more games: those of before are not asked again
                records, _ = ask(server, f"{pairs}.jsonl", games, families=same, noise=0, pairs=pairs)
                forget()
        assert {len(r.instance["alpha"]) for r in records} == {3, 4}
        counts[pairs] = len(server.questions)
        temperature = float(pairs.removeprefix("temperature=")) if pairs else None
        assert all(json.loads(q).get("temperature") == temperature for q in server.questions)
    assert counts == {"temperature=0": (3 + 4) * 2, "temperature=0.7": len(records), "": len(records)}
    with ChatServer() as server:
        ask(server, "temperature=0.7.jsonl", 4, 1, families=same, noise=0, pairs="temperature=0.7")
    assert server.questions  # another seed, other draws


# ------------------------------------------------------------------------------------------------------------
# as a command: kill, budget, the key


def command(server, folder, out="data.jsonl", ask=(), flags=("--games", "8")):
    everything = [sys.executable, "-m", "tools.expert_games", "--expert", "openai:m", *flags]
    everything += ["--out", str(folder / out), "--ask", f"record={folder / 'answers.jsonl'}", *ask]
    env = os.environ | {"OPENAI_BASE_URL": server.url, "OMP_NUM_THREADS": "1"}
    return everything, dict(cwd=ROOT, env=env)


def run_command(*args, **kwargs):
    everything, where = command(*args, **kwargs)
    return subprocess.run(everything, **where, capture_output=True, text=True, timeout=60)


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    with ChatServer(delay=lambda: 0.002, hold_after=37) as server:
        everything, where = command(server, tmp_path)
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(everything, **where, **quiet)
        record, end = tmp_path / "answers.jsonl", time.monotonic() + 30

        def stuck():
            """All answers that came are recorded, and the 8 questions under way have come and wait."""
            kept = record.exists() and record.read_bytes().count(b"\n")
            return kept == 37 and len(server.questions) == 37 + 8 and server.at_once == 0

        while not stuck() and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sum(server.answered.values()) == 37 == len(lines(record))
        assert not (tmp_path / "data.jsonl").exists()
        with record.open("ab") as f:  # and as if the kill had come in the middle of a line
            f.write(record.read_bytes().splitlines()[3][:200])
        server.hold_after = 10**9
        done = run_command(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / "data.jsonl")) == 8 * 4 * 2 == len(server.answered)
    assert set(server.answered.values()) == {1}
    assert "37 answers from" in done.stdout and f"{64 - 37} asked for" in done.stdout
    with ChatServer() as good:
        new = run_command(good, tmp_path, "new.jsonl", [f"record={tmp_path / 'new_answers.jsonl'}"])
        assert new.returncode == 0, new.stderr
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "data.jsonl").read_bytes()


def test_ctrl_c_waits_for_what_was_paid_for(tmp_path):
    answering = threading.Event()
    with ChatServer(delay=lambda: 0.0 * answering.wait(30)) as server:
        everything, where = command(server, tmp_path)
        where["env"]["PYTHONUNBUFFERED"] = "1"
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # What a shell starts in the background ignores Ctrl-C, and its children too; here they must not.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(everything, **where, **pipes)
        end = time.monotonic() + 30
        while len(server.questions) < 8 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert "waiting for the answers under way" in process.stdout.readline()
        answering.set()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert len(server.questions) == 8 == sum(server.answered.values())
    assert len(lines(tmp_path / "answers.jsonl")) == 8


WITHOUT = """
import runpy, sys
sys.modules["openai"] = None  # what an import finds where the package is not installed
sys.argv = ["expert_games", "--games", "1", "--out", sys.argv[2], "--expert", sys.argv[1]]
runpy.run_module("tools.expert_games", run_name="__main__")
"""


def test_without_the_package_one_line_says_how_to_get_it(tmp_path):
    def run(expert):
        argv = [sys.executable, "-c", WITHOUT, expert, str(tmp_path / f"{expert}.jsonl")]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)

    exact, asking = run("nash"), run("openai:m")
    assert exact.returncode == 0 and (tmp_path / "nash.jsonl").exists()
    line = "error: openai:m needs the package openai: pip install -r requirements-experts.txt\n"
    assert (asking.returncode, asking.stderr) == (2, line)
    assert [p.name for p in tmp_path.iterdir()] == ["nash.jsonl"]


def test_the_budget_ends_the_run_and_all_is_kept(tmp_path):
    money = (
        "price-in=10",
        "price-out=40",
        "concurrency=4",
        "max-tokens=25",
    )  # 100 in, 20 out: 0.0018 an answer
    with ChatServer() as server:
        done = run_command(server, tmp_path, ask=[*money, "budget=0.05"])
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the budget of $0.05")
        kept = len(lines(tmp_path / "answers.jsonl"))
        assert kept == sum(server.answered.values()) and 15 < kept <= 27  # 27 x 0.0018 = 0.0486
        assert not (tmp_path / "data.jsonl").exists()
        again = run_command(server, tmp_path, ask=[*money, "budget=0.05"])
        assert again.returncode == 2 and len(server.questions) == kept
        rest = run_command(server, tmp_path, ask=[*money, "budget=1"])
        assert rest.returncode == 0, rest.stderr
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 64 == len(read_records(tmp_path / "data.jsonl"))
    assert f"{(64 - kept) * 100} tokens in and {(64 - kept) * 20} out" in rest.stdout
    spent = f"${(64 - kept) * 0.0018:.4f} (all of this model in the record: ${64 * 0.0018:.4f})"
    assert spent in rest.stdout


def test_the_key_is_nowhere(tmp_path, monkeypatch):
    """Though the server says it in errors and in answers, and the package logs all that it can."""
    monkeypatch.setenv("OPENAI_LOG", "debug")

    def script(body, n):
        if n == 1 and "agent 1" in body["messages"][0]["content"] and len(body["messages"]) == 2:
            return "status", 500, {}, f"who is {KEY}?".encode()
        return "text", f"{good_reply(body)}\nBelief: {KEY}"

    refusal = "status", 401, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    with ChatServer(script) as server:
        good = run_command(server, tmp_path, flags=("--games", "1", "--rounds", "2"))
        server.script = lambda body, n: refusal
        bad = run_command(server, tmp_path, "more.jsonl", flags=("--games", "2"))
    assert good.returncode == 0 and bad.returncode == 2, good.stderr + bad.stderr
    assert "Sending HTTP Request" in good.stderr
    assert "[key]" in good.stdout and "[key]" in bad.stderr.splitlines()[-1]
    assert "Traceback" not in good.stderr + bad.stderr
    assert "[key]" in (tmp_path / "answers.jsonl").read_text()
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) > 1000 and KEY not in written
    assert KEY not in good.stdout + good.stderr + bad.stdout + bad.stderr
    assert bad.stderr.splitlines()[-1].startswith("error: ")


# ------------------------------------------------------------------------------------------------------------
# names and settings


@pytest.mark.parametrize(
    "name",
    [
        "openai:",
        "hf:",
        "openai",
        "hf",
        "openai:a\nb",
        "noisy:openai:0.1",
        "noisy:hf::0.1",
        "noisy:openai:m:2",
        "OpenAI:m",
        "hf:/nowhere",
    ],
)
def test_bad_names(name, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        make_expert(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pairs",
    [
        "temperature=-1",
        "temperature=nan",
        "temperature",
        "attempts=0",
        "attempts=1.5",
        "concurrency=",
        "timeout=inf",
        "style=1",
        "max_tokens=9",
        "=3",
        "",
    ],
)
def test_bad_settings_are_one_line_with_the_names(pairs):
    with pytest.raises(InputError) as caught:
        asking([pairs], STYLE)
    message = str(caught.value)
    assert repr(pairs) in message and "\n" not in message
    for name in (*language.LOWEST, "record"):
        assert name in message


@pytest.mark.parametrize("pairs", ["budget=1", "price-in=1", "budget=1 price-out=1"])
def test_a_budget_needs_both_prices(pairs):
    with pytest.raises(InputError, match="price-in and price-out"):
        asking(pairs.split(), STYLE)


def test_every_setting_reaches_the_asking(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    dataset.add_style_arguments(parser)
    pairs = "temperature=0.25 max-tokens=11 attempts=5 concurrency=7 timeout=12.5 retries=9 record=r.jsonl"
    pairs += " price-in=2.5 price-out=10 budget=33"
    assert {pair.partition("=")[0] for pair in pairs.split()} == {*language.LOWEST, "record"}
    style, record = PromptStyle("local", True, False), str(tmp_path / "r.jsonl")
    args = parser.parse_args(["--information", "local", "--no-hints", "--ask", *pairs.split()])
    args.device = "cuda:3"
    asked = Asking(style, "cuda:3", 0.25, 11, 5, 7, 12.5, 9, record, 2.5, 10.0, 33.0)
    assert dataset.ask_of(args, "noisy:openai:m:0.1") == asked and dataset.ask_of(args, "nash") is None
    default = Asking(STYLE, record=str(tmp_path / "expert_answers.jsonl"))
    assert dataset.ask_of(parser.parse_args([]), "openai:m") == asking([], STYLE) == default
    kept = language.with_record(pairs.split()), language.with_record(None)
    monkeypatch.chdir("/")  # a run that is resumed from elsewhere
    assert asking(kept[0], style, "cuda:3") == asked and asking(kept[1], STYLE) == default


# ------------------------------------------------------------------------------------------------------------
# evaluation, and local models


def test_evaluation_asks_in_the_conversation_of_each_seat(monkeypatch):
    from play import players

    grid = [g for g in held_out_grid(4, TWO_ROUNDS[0])][:3]

    def player(asks):
        return [f"stage {ask.stage}, and I say nothing." for ask in asks]

    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        expert = make_expert("openai:m")
        played = players.play(grid, player, 1, expert, 0)
        asked = len(server.questions)
        # The policy's own seat is asked about in graph stages alone.
        assert asked == len(set(server.questions)) == 3 * (4 + 3) * 2
        again = players.play(grid, players.expert_player(expert, STYLE, 0), 1, expert, 0)
    for question in server.questions:
        chat = json.loads(question)["messages"]
        own = re.search(r"You are agent (\d)", chat[0]["content"])[1]
        said = [m["content"] for m in chat if m["role"] == "assistant"]
        for stage, text in enumerate(said):
            if own == "2" and "nothing" in "".join(said):
                assert text == f"stage {stage}, and I say nothing."
            else:
                assert parse_reply(text, "GE"[stage % 2], int(own) - 1, 4, 99) is not None
                assert text.startswith("Belief: ")
    assert [t.decision for t in played[0].turns] == [None] * 4
    assert all(t.decision is not None and (t.s is None or t.s == 1) for p in again for t in p.turns)
    first = [json.loads(q)["messages"] for q in server.questions[:asked]]
    assert not any(json.loads(q)["messages"] in first for q in server.questions[asked:])


def question(expert, state, rng=None):
    return expert._begin(state, 0, rng)


def test_a_local_model(tiny_model_dir):
    """It is compliant by chance at best: the texts are what the policy samples, whatever the batch."""
    from models.load import load_policy

    name, asked = f"hf:{tiny_model_dir}", asking(["max-tokens=6", "attempts=2"], STYLE, "cpu")
    expert = make_expert(name, asked)
    assert expert.model is make_expert(f"noisy:{name}:0.5", asked).model
    records = simulate_many(2, name, 0, STYLE, (3, 3), ask=asked)
    nothing = sum(r.label in ("Decision: 0.00", "Decision: [0, 0, 0]") for r in records)
    assert len(records) == 2 * 2 * 3 == expert.counts["decisions"] and expert.counts["fallbacks"] == nothing
    assert expert.model.asked == 12 + expert.counts["repeated"]
    states = [State(g) for g in held_out_grid(3)[:3]]
    questions = [question(expert, s, np.random.default_rng(i)) for i, s in enumerate(states)]
    together = expert.model.ask_all(questions, 1)
    alone = [expert.model.ask_all([q], 1)[0] for q in questions[::-1]][::-1]
    assert together == alone and len(set(together)) == 3
    assert expert.model.ask_all(questions[:1], 2)[0] != together[0]  # another attempt is another draw
    greedy = make_expert(name, asking(["max-tokens=6", "temperature=0"], STYLE, "cpu"))
    q = question(greedy, states[0], np.random.default_rng(0))
    base = load_policy(str(tiny_model_dir))
    [[rollout]] = base.sample([base.encode_prompt(q.chat)], 1, 6, 0.0)
    assert greedy.model.ask_all([q], 1) == [rollout.text] and q.draw == ""
    greedy(states[0], 0, np.random.default_rng(0))
    assert greedy.model.asked == 2  # no second attempt: it would say the same


def test_an_adapter_and_a_chain_are_local_models(tiny_model_dir, tmp_path):
    import torch

    import lora
    from models import adapters
    from models.load import load_policy

    base = load_policy(str(tiny_model_dir))
    config = lora.LoRAConfig(4, 8.0, ("q_proj",), str(tiny_model_dir))
    state = State(held_out_grid(3)[0])
    texts = []
    for k, name in enumerate(("", "first", "first+second")):
        if name:
            lora.inject(base.model, config, torch.Generator().manual_seed(k), base.layer)
            with torch.no_grad():
                for p in lora.lora_parameters(base.model):
                    p.normal_(generator=torch.Generator().manual_seed(k))
            adapters.save_adapter(base.model, tmp_path / name.split("+")[-1], config)
        path = "+".join(str(tmp_path / folder) for folder in name.split("+")) if name else tiny_model_dir
        expert = make_expert(f"hf:{path}", asking(["max-tokens=6", "temperature=0"], STYLE, "cpu"))
        q = question(expert, state)
        [[rollout]] = base.sample([base.encode_prompt(q.chat)], 1, 6, 0.0)
        texts += expert.model.ask_all([q], 1)
        assert texts[-1] == rollout.text
        if name:
            lora.merge(base.model)
    assert len(set(texts)) == 3


def test_training_with_experts_on_a_server(model_dir, tmp_path, monkeypatch, capsys, forget):
    """Going on asks nothing, and finds the record from another folder."""
    import train_sft

    flags = ["--model", model_dir, "--games", "3", "--expert", "openai:m", "--out", "run", "--device", "cpu"]
    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        train_sft.main([*flags, "--max-steps", "1", "--ask", "record=kept.jsonl", "attempts=2"])
        asked = len(server.questions)
        assert asked >= 3 * 4 * 2 and f"{asked} asked for" in capsys.readouterr().out
        forget()
        monkeypatch.chdir("/")
        train_sft.main(["--resume", str(tmp_path / "run")])
        assert len(server.questions) == asked
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert f"record={tmp_path / 'kept.jsonl'}" in config["ask"]
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


TWO = """
from prompts import PromptStyle
from run import ranks
from run.dataset import simulate_many, write_records
from run.files import InputError
from teachers.language import asking
ranks.start()
for budget in (1, 0):
    try:
        pairs = [f"record=answers{budget}", "price-in=10", "price-out=40", f"budget={budget}"]
        records = simulate_many(2, "openai:m", 0, PromptStyle(), ask=asking(pairs, PromptStyle()))
        write_records(f"data{ranks.rank()}.jsonl", records)
    except InputError as e:
        open(f"error{ranks.rank()}", "w").write(str(e))
ranks.exchange(None)
ranks.dist.destroy_process_group()
"""


def test_of_two_processes_one_asks_and_both_get_the_answers(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with ChatServer() as server:
        env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"OPENAI_BASE_URL": server.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        how = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        start = [sys.executable, "-c", TWO]
        both = [subprocess.Popen(start, env=env | {"RANK": str(r)}, **how) for r in range(2)]
        ends = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert len(server.questions) == 16
    assert (tmp_path / "data0.jsonl").read_bytes() == (tmp_path / "data1.jsonl").read_bytes()
    assert "budget" in (tmp_path / "error0").read_text() == (tmp_path / "error1").read_text()
