"""The games as an environment of verifiers: the real package asks servers on the loopback."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from tables import normalised
from whole_runs import ROOT, lines_of

vf = pytest.importorskip("verifiers.v1", reason="no verifiers: pip install -r requirements-verifiers.txt")
sys.path += [str(ROOT / "bridges"), str(ROOT / "tests" / "teachers")]
import verifiers_tompo as bridge  # noqa: E402
from chat_server import ChatServer, good_reply  # noqa: E402
from serve_policy import answers  # noqa: E402

import settings  # noqa: E402
from eval import play_among_experts  # noqa: E402
from models.load import load_policy  # noqa: E402
from play.dataset import make_prompts, trained_seats  # noqa: E402
from play.expert_games import history_to_text  # noqa: E402
from play.metrics import per_instance  # noqa: E402
from prompts import PromptStyle, Reply, messages, parse_reply  # noqa: E402
from rewards import Memory, Sample, expert_rewards  # noqa: E402

FLAGS = "--games 4 --agents 3 --noise 0.3 --seat all --seed 3 --m 4 --prompts 2 1 --steps 2"
ONE_GAME = "--games 1 --agents 4 --seat all --m 4 --prompts 2 0 --steps 6"
GAMES = "--agents 4 --stages GE GEE --rounds 2 --eval-games 4 --expert noisy:nash:0.3"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "x")
    monkeypatch.setenv("no_proxy", "*")


def make(**taskset):
    return vf.load_environment(vf.resolve_env_config({"taskset": {"id": "verifiers-tompo", **taskset}}))


def episodes(environment, server, count, at_once=8):
    """What the environment makes of its first tasks, each of which it is sent, as in training."""
    client = vf.EvalClientConfig(base_url=server.url, api_key_var="SERVER_KEY")
    how = vf.ModelContext(client=client, model="any", sampling=vf.SamplingConfig(temperature=0.9))
    sent = [task.data.model_dump(mode="json") for task in environment.taskset.take(count)]
    gate, tasks = asyncio.Semaphore(at_once), [bridge.Task(bridge.Data(**data)) for data in sent]

    async def run():
        async with environment.serving():
            slots = [environment.slots(task)[0] for task in tasks]
            return await asyncio.gather(*(environment.run_slot(slot, how, gate) for slot in slots))

    return asyncio.run(run())


def plain(chat):
    return [{"role": message.role, "content": message.content} for message in chat]


def test_the_tasks_are_the_prompts_of_training(model_dir):
    settings = bridge.parse(FLAGS)
    records = settings.data.load(settings.games, settings.players)
    trained, rft = trained_seats(records, "all", 3), settings.rft
    pool = make_prompts(load_policy(model_dir), records, trained, rft.counts, settings.players.style)
    prompts = [q for step in range(2) for q in rft.next_batch(pool, rft.counts, step, 3)]
    tasks = list(make(flags=FLAGS).taskset)
    assert [plain(task.data.prompt) for task in tasks] == [q.record.prompt for q in prompts]
    kinds = {q.target.kind.letter for q in prompts}
    assert len(tasks) == 6 and kinds == {"G", "E"} and len({task.key for task in tasks}) == 6
    for task, q in zip(tasks, prompts, strict=True):
        assert task.data.history == history_to_text(q.target.state) and task.data.seat == q.target.seat
        assert (q.target.kind.from_text(task.data.experts) == q.target.actions).all()


def mixed(body, n):
    """The good reply, no decision and two others, in the order in which the question comes."""
    good = json.loads(good_reply(body).splitlines()[-1].removeprefix("Decision: "))
    none, half = ([0] * len(good), [0, *good[1:-1], 0]) if isinstance(good, list) else (0, good / 2)
    texts = good_reply(body), f"Decision: {none}", "I cannot decide.", f"Decision: {half} \n"
    return "text", texts[(n - 1) % 4]


def expected_rewards(target, texts, memory):
    """Of these replies, by rewards.py; the memory then knows them."""
    replies = [Reply(text, [], [], True) for text in texts]
    group = [Sample(reply, parse_reply(reply.text, target.state, target.seat)) for reply in replies]
    expert_rewards([target], [group], memory)
    memory.update([target], [group])
    return [o.rewards for o in group]


def test_a_group_is_rewarded_by_rewards_py_and_the_memory_learns_of_it(model_dir):
    settings, memory, seen = bridge.parse(ONE_GAME), Memory(), set()
    records = settings.data.load(settings.games, settings.players)
    trained, rft = trained_seats(records, "all", 0), settings.rft
    pool = make_prompts(load_policy(model_dir), records, trained, rft.counts, settings.players.style)
    targets = [q.target for step in range(6) for q in rft.next_batch(pool, rft.counts, step, 0)]
    environment = make(flags=ONE_GAME)
    with ChatServer(mixed) as server:
        done = episodes(environment, server, 12, at_once=1)
    assert all(episode.ok and len(episode.traces) == 4 for episode in done)
    for episode, target in zip(done, targets, strict=True):
        replies = [trace.messages[-1].content for trace in episode.traces]
        expected = expected_rewards(target, replies, memory)
        A = 0.8 * normalised([r["r_S"] for r in expected]) + 0.2 * normalised([r["R_G"] for r in expected])
        for trace, terms, advantage in zip(episode.traces, expected, A, strict=True):
            assert trace.metrics == terms | {"U1": float(terms["compliance"] > 0)}
            assert trace.reward == pytest.approx(advantage, abs=1e-5)
            assert plain(trace.messages)[:-1] == plain(episode.task.data.prompt)
            seen.add((terms["compliance"], terms["local"], terms["global"], terms["s"]))
    assert environment.memory.best == memory.best and len(memory.best) == 1
    best = max(s for *_, s in seen)
    assert {local for _, local, _, _ in seen} == {0, 0.5} and (-0.5, 0, 0, 0) in seen
    assert any(above == 0 and 0 < s < best for _, _, above, s in seen)  # below the memory: no bonus


def test_efforts_have_no_graph_level():
    with ChatServer(mixed) as server:
        done = episodes(make(flags=FLAGS.replace("2 1", "0 2")), server, 4)
    for episode in done:
        r_S = [trace.metrics["r_S"] for trace in episode.traces]
        A = normalised(r_S) if len(set(r_S)) > 1 else [0] * 4
        assert [t.reward for t in episode.traces] == pytest.approx(list(A), abs=1e-5)
        assert all("R_G" not in trace.metrics for trace in episode.traces)
    assert any(trace.reward for episode in done for trace in episode.traces)


def test_a_reply_that_does_not_come_is_not_in_the_group():
    def failing(body, n):
        return ("status", 400, {}, b"{}") if n == 2 else mixed(body, n)

    with ChatServer(failing) as server:
        (episode,) = episodes(make(flags=ONE_GAME), server, 1)
    lost = [trace for trace in episode.traces if not trace.ok]
    assert not episode.ok and len(lost) == 1 and not lost[0].rewards and lost[0].last_error.status_code == 400
    others = [trace.reward for trace in episode.traces if trace.ok]
    assert len(others) == 3 and sum(others) == pytest.approx(0, abs=1e-5) and max(others) > 0.5


def half_good(body, n=None):
    """The effort of round 1 is not compliant, and links have an end of line that belongs to the reply."""
    question = body["messages"][-1]["content"]
    silent = "Your effort?" in question and "Round 1" in question
    return "text", "I do not know.\n" if silent else good_reply(body) + "\n"


def test_a_whole_game_is_that_of_eval():
    settings, asked = bridge.parse(GAMES), []

    def player(asks):
        chats = [messages(ask.state, ask.seat, ask.replies, PromptStyle()) for ask in asks]
        replies = [half_good({"messages": c})[1] for c in chats]
        asked.extend([*c, {"role": "assistant", "content": r}] for c, r in zip(chats, replies, strict=True))
        return replies

    expected = play_among_experts(settings, "x", lambda: player)
    with ChatServer(half_good) as server:
        done = episodes(make(flags=GAMES, whole_games=True), server, 10)
    assert len(done) == len(expected) == 4 and {len(e.turns) for e in expected} == {4, 6}
    for episode, theirs in zip(done, expected, strict=True):
        (trace,) = episode.traces
        assert episode.ok and plain(trace.messages) in asked and trace.num_turns == len(theirs.turns)
        metrics = {name: value for name, value in per_instance(theirs).items() if value is not None}
        assert trace.metrics == metrics and trace.reward == metrics["U3"]
        assert 0.4 < metrics["U1"] < 1 and "U2 | ok" in metrics


def test_a_game_that_the_server_ends_is_no_result():
    refusal = "status", 400, {}, b"{}"
    with ChatServer(lambda body, n: refusal if len(body["messages"]) > 2 else None) as server:
        (episode,) = episodes(make(flags=GAMES, whole_games=True), server, 1)
    assert not episode.ok and "the game has ended early" in episode.last_error.message
    assert not episode.traces[0].rewards and episode.traces[0].num_turns == 1


def test_a_real_model_answers_as_long_as_in_training(model_dir):
    with ChatServer(answers(load_policy(model_dir)), usage=None) as server:
        decisions = episodes(make(flags=FLAGS + " --max-new-tokens 9"), server, 2)
        (game,) = episodes(make(flags="--eval-games 1", whole_games=True), server, 1)
    sent = [json.loads(question) for question in server.questions]
    assert [body["max_tokens"] for body in sent] == [9] * 8 + [48] * 2
    assert all(body["temperature"] == 0.9 and body["model"] == "any" for body in sent)
    replies = [trace.messages[-1].content for episode in decisions for trace in episode.traces]
    assert len(set(replies)) > 4
    for episode in decisions:  # a random model's replies are garbage
        assert all(t.metrics["compliance"] == -0.5 and t.reward == 0 for t in episode.traces)
    assert game.ok and game.traces[0].metrics["U1"] == 0 and game.traces[0].num_turns == 2


def test_the_command_line(tmp_path):
    """As it is documented, in a process of its own."""
    with ChatServer() as server:
        script = "import sys; from verifiers.v1.cli.eval.main import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", script, "verifiers-tompo", "--env.taskset.flags", "--games 2 --m 3"]
        command += ["--model", "any", "--client.base-url", server.url, "--client.api-key-var", "SERVER_KEY"]
        command += ["-n", "2", "--no-push", "--no-rich", "--output-dir", str(tmp_path), "--run.name", "run"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "bridges")])
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = lines_of(tmp_path / "run" / "traces.jsonl")
    traces = [trace for line in lines for trace in line["traces"]]
    assert len(lines) == 2 and len(traces) == 6 and all("A" in trace["rewards"] for trace in traces)


def test_flags_that_the_environment_cannot_follow_are_refused():
    wrong = {
        "--lr 1": "the environment has no --lr",
        "--sft-adapter x": "the environment has no --sft-adapter",
        "--partners self --seat all --reward-from game": "--partners self",
        "--reward-from joint --seat all": "--reward-from joint",
        "--seat 7": "--seat 7 must be below",
        "--help": "--help: see train_rft.py --help",
        "--nothing": "unrecognized arguments: --nothing",
        "--m x": "argument --m: 'x' is not a whole number",
    }
    for flags, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            make(flags=flags)
    assert make(flags="--preset paper --algo grpo").settings.rft.w_graph == 0


def test_a_new_flag_is_followed_where_it_is_in_a_group_that_is(monkeypatch):
    def with_new_flags(*given, make=bridge.training_parser):
        parser = make(*given)
        groups = {group.title: group for group in parser._action_groups}
        for kind in (*followed, *others):
            groups[kind.title].add_argument(f"--new-{kind.__name__}")
        return parser

    followed, others = (settings.Games, settings.Players, settings.Data), (settings.Model, settings.SFT)
    monkeypatch.setattr(bridge, "training_parser", with_new_flags)
    for kind in followed:
        assert bridge.parse(f"--new-{kind.__name__} 3").flags[f"new_{kind.__name__}"] == "3"
    for kind in others:
        with pytest.raises(ValueError, match="the environment has no --new"):
            bridge.parse(f"--new-{kind.__name__} 3")
