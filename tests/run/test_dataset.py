"""The data set of expert games: what is drawn, the file, its targets, and the script that writes it."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

from experts import make_expert
from play.expert_games import Record, label_decision
from prompts import PromptStyle, format_reply, parse_reply
from run import dataset
from run.dataset import read_records, simulate_many, targets, write_records
from run.files import InputError
from tools import expert_games
from world.draws import Family, held_out_grid

STYLE, TWO_ROUNDS = PromptStyle(), (Family("bcz", "GE", 2),)

# --- what is drawn


def test_the_share_of_replaced_decisions():
    records = simulate_many(300, "always-link", 2, STYLE)
    assert len(records) == 300 * 8
    share = np.mean([r.replaced for r in records])
    assert share == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / len(records)))
    assert all(r.reply == r.label for r in records if not r.replaced)
    differs = np.mean([r.reply != r.label for r in records if r.replaced])
    assert differs > 0.9  # a random decision may happen to be the label
    assert not any(r.replaced for r in simulate_many(5, "always-link", 2, STYLE, noise=0))
    assert all(r.replaced for r in simulate_many(5, "always-link", 2, STYLE, noise=1))


def test_the_same_seed_gives_the_same_records_and_another_does_not():
    settings = dict(agents=(3, 6), families=TWO_ROUNDS)
    a, b, c = (simulate_many(40, "noisy:second-best:0.2", seed, STYLE, **settings) for seed in (3, 3, 4))
    assert len(a) > 40 * 4 * 3 and [asdict(r) for r in a] == [asdict(r) for r in b]
    assert [r.instance for r in a] != [r.instance for r in c] and [r.label for r in a] != [r.label for r in c]


def test_train_and_held_out_instances_are_disjoint_in_any_seat_order():
    keys = {}
    for split in ("train", "held-out"):
        records = simulate_many(150, "never-link", 5, STYLE, split=split)
        keys[split] = {(*sorted(r.instance["alpha"]), r.instance["delta"], r.instance["c"]) for r in records}
    grid = {(*sorted(g.alpha), g.delta, g.c) for g in held_out_grid(4)}
    assert len(keys["train"]) > 140 and len(keys["held-out"]) > 100 and len(grid) > 40
    assert not keys["train"] & (keys["held-out"] | grid)


def test_families_take_turns_in_the_data():
    records = simulate_many(6, "planner", 0, STYLE, families=(Family(), Family("pgg", "GEE")))
    of_games = {r.game: (r.instance["game"], r.instance["stages"]) for r in records}
    assert list(of_games.values()) == [("bcz", "GE"), ("pgg", "GEE")] * 3
    assert [sum(r.game == k for r in records) for k in range(6)] == [8, 12] * 3


STYLES = [
    ("", PromptStyle("full", True, True)),
    ("--information local --no-belief --no-hints", PromptStyle("local", False, False)),
    ("--no-belief", PromptStyle("full", False, True)),
    ("--no-hints", PromptStyle("full", True, False)),
]


@pytest.mark.parametrize("flags, style", STYLES)
def test_the_style_is_that_of_the_flags_and_reaches_prompts_and_replies(flags, style):
    parser = argparse.ArgumentParser()
    dataset.add_style_arguments(parser)
    assert dataset.style_of(parser.parse_args(flags.split())) == style
    for r in simulate_many(2, "nash", 6, style):
        assert ("Belief" in r.reply + r.label + json.dumps(r.prompt)) == style.belief


# --- the file


@pytest.fixture(scope="module")
def few():
    return simulate_many(2, "second-best", 7, STYLE, families=TWO_ROUNDS)


def test_what_is_written_is_read_back(few, tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, few)
    back = read_records(path)
    assert back == few and len(back) == 2 * 4 * 4 == len(path.read_text().splitlines())
    for a, b in zip(few, back):
        assert all(type(getattr(a, f.name)) is type(getattr(b, f.name)) for f in fields(Record))


BAD_LINES = ["game 1", '{"game": 1, "inst', "", "null", "3", "[1, 2]", "{}", "[" * 100_000]
BAD_CHANGES = {  # of a record about links; what is changed in it
    "extra": [1],
    "kind": ["X", None, "E"],  # E is that of another reply
    "seat": [4, -1, "0", None, 0.5],
    "label": ["Decision: [1, 1, 1, 1]", "Decision: [0, 1, 1]", "", None, [0, 1, 0, 1]],
    "reply": ["no"],
    "instance": [None, {}],
    "prompt": [None, ["hello"], [{"content": "hello"}], [{"role": "user", "content": None}], []],
    "game": ["0"],
    "stage": [0.5, -1, 4, 1],  # there are four stages, and the next one is of efforts
    "round": [0, 2, None],
}
U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
BAD_CHANGES["prompt"] += [[A], [S, S], [U, A], [U, A, U], [{"role": "tool", "content": "x"}]]
BAD_CHANGES["prompt"] += [[{"role": "user", "content": "\ud800"}]]  # half a character, which JSON can hold
BAD_INSTANCES = {"alpha": ["1111", [1, 1, 1, -1], [1, 1, 1, float("nan")], [1]]}
BAD_INSTANCES |= {"stages": ["EE"], "rounds": [0]}
BAD_EFFORTS = {"label": ["Decision: 1000", "Decision: nan"], "seat": [0.5]}


def bad_lines(graph, effort):
    yield from BAD_LINES
    for record, changes in ((graph, BAD_CHANGES), (effort, BAD_EFFORTS)):
        yield from (json.dumps(record | {name: v}) for name, values in changes.items() for v in values)
    for name, values in BAD_INSTANCES.items():
        yield from (json.dumps(graph | {"instance": graph["instance"] | {name: value}}) for value in values)
    for name in graph:
        yield json.dumps({k: v for k, v in graph.items() if k != name})
    yield json.dumps(graph | {"seat": 1, "label": "Decision: [0, 1, 1, 1]"})  # its own position is another


def test_a_bad_line_is_named(few, tmp_path):
    graph, effort = (asdict(few[i]) for i in (0, 4))
    assert (graph["kind"], effort["kind"]) == ("G", "E")
    path, count, good = tmp_path / "data.jsonl", 0, [json.dumps(graph), json.dumps(effort)]
    for line in bad_lines(graph, effort):
        path.write_text("\n".join([*good, line, good[0]]))
        with pytest.raises(InputError) as caught:
            read_records(path)
        message = str(caught.value)
        assert str(path) in message and "line 3" in message and "\n" not in message, line[:200]
        count += 1
    assert count == 8 + 36 + 3 + 6 + len(fields(Record)) + 1


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x9fPK\x03\x04", "folder"], ids=str)
def test_files_that_are_no_data_set(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- targets


def test_targets_are_the_states_that_arose_and_what_all_experts_do_there(few):
    shuffled = [few[i] for i in np.random.default_rng(0).permutation(len(few))]
    found = targets(shuffled)
    assert [r for r, _ in found] == few
    for r, target in found:
        others = [label_decision(o).action for o in few if (o.game, o.stage) == (r.game, r.stage)]
        assert (target.kind, target.seat, len(target.state.history)) == (r.kind, r.seat, r.stage)
        assert target.actions.tolist() == np.array(others).tolist() and target.cap == r.instance["cap"]
        said = [m["content"] for m in r.prompt[2::2]]
        for k, (actions, reply) in enumerate(zip(target.state.history, said, strict=True)):
            assert np.array_equal(actions[r.seat], parse_reply(reply, "GE"[k % 2], r.seat, 4, 99).action)


@pytest.mark.parametrize("lost", [0, 5, slice(0, 4)])
def test_a_data_set_without_a_seat_or_a_stage_has_no_targets(few, lost):
    kept = list(few)
    del kept[lost]
    with pytest.raises(InputError, match="lacks decisions of game 0, stage"):
        targets(kept)


ROW = [0, 1, 1, 1]
NO_PROPOSALS = [None, "hi", [[1]], [[2] * 4] * 4, [[1] * 4] * 4, [ROW, ROW[1:]], [["a"] * 4] * 4, {"a": 1}]
NO_EFFORTS = [None, "hi", 1, [-1, 1, 1, 1], [float("nan")] * 4, [1e9] * 4, [1, 1], ["a"] * 4]


@pytest.mark.parametrize("index, field, values", [(0, "proposals", NO_PROPOSALS), (4, "efforts", NO_EFFORTS)])
def test_states_that_never_were_are_refused(few, index, field, values):
    for value in values:
        bad = list(few)
        bad[index] = replace(bad[index], **{field: value})
        with pytest.raises(InputError, match=f"game 0, stage {index // 4}") as caught:
            targets(bad)
        assert "\n" not in str(caught.value)


# --- tools/expert_games.py


def test_the_script_writes_a_data_set_and_does_not_overwrite_it(tmp_path, capsys, refused):
    out = tmp_path / "games.jsonl"
    expert_games.main(["--games", "5", "--rounds", "2", "--seed", "3", "--out", str(out)])
    said = capsys.readouterr().out
    records = read_records(out)
    assert "80" in said and out.name in said and len(records) == 5 * 4 * 4
    assert records == simulate_many(5, "second-best", 3, STYLE, families=TWO_ROUNDS)
    before = out.read_bytes()
    assert "not overwritten" in refused(expert_games.main, ["--games", 1, "--out", out])
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [out.name]


BAD_FLAGS = (
    "expert bogus | expert noisy:nash:2 | out nowhere/games.jsonl | games 0 | games x | agents 1 | "
    "agents 5-4 | agents 4-99 | agents x | rounds -1 | information none | split test | noise x | noise 1.5 | "
    "noise -0.1 | noise nan | seed -1 | seed x | bogus 1 | fix r=1 | types ring"
).split(" | ")


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line_and_write_nothing(flags, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(expert_games.main, ["--games", "1", "--out", "o.jsonl", *f"--{flags}".split()])
    assert list(tmp_path.iterdir()) == []


def test_a_bad_flag_as_a_command(tmp_path):
    argv = ["-m", "tools.expert_games", "--expert", "bogus", "--out", str(tmp_path / "o.jsonl")]
    how = dict(cwd=Path(dataset.__file__).parents[1], capture_output=True, text=True)
    done = subprocess.run([sys.executable, *argv], **how)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_label_noise_replaces_its_share_of_the_decisions_and_nothing_else():
    records = simulate_many(60, "second-best", 0, PromptStyle())
    noisy = dataset.with_label_noise(records, {"G": 0.5, "E": 0.0}, 3, PromptStyle())
    changed = {"G": 0, "E": 0}
    for before, after in zip(records, noisy, strict=True):
        assert asdict(before) | {"label": after.label} == asdict(after)  # prompts and play stay as they are
        assert label_decision(after) is not None  # a random label is compliant
        assert after.label.splitlines()[0] == before.label.splitlines()[0]  # the Belief line is the expert's
        changed[before.kind] += before.label != after.label
    graph = sum(r.kind == "G" for r in records)
    assert changed["E"] == 0
    # half are drawn, and a drawn row is the expert's by chance in 1 of 8: 4 standard deviations
    share = 0.5 * 7 / 8
    assert abs(changed["G"] / graph - share) < 4 * (share * (1 - share) / graph) ** 0.5
    few = dataset.with_label_noise(records[:10], {"G": 0.5}, 3, PromptStyle())
    assert few == noisy[:10]  # which labels are replaced does not depend on what else is in the data
    assert dataset.with_label_noise(records, {"G": 0.0, "E": 0.0}, 3, PromptStyle()) == records
    assert dataset.with_label_noise(records, {"G": 0.5}, 4, PromptStyle()) != noisy


def test_a_weaker_teacher_labels_the_states_that_arose():
    """In two rounds with replaced decisions, so states differ from those of the teacher's own games."""
    records = simulate_many(8, "second-best", 0, PromptStyle(), families=(Family("bcz", "GE", 2),), noise=0.4)
    seen = [r for r in records if r.seat == 1]
    args = argparse.Namespace(sft_expert="myopic", label_noise=[0.0], seed=0, information="full")
    args.belief = args.hints = True
    args.ask = None
    labels = dataset.weak_labels(args, records, seen)
    teacher, states = (
        make_expert("myopic"),
        {(r.game, r.stage, r.seat): t for r, t in dataset.targets(records)},
    )
    for before, after in zip(seen, labels, strict=True):
        assert asdict(before) | {"label": after.label} == asdict(after)
        decision = teacher(states[before.game, before.stage, 1].state, 1, None)
        assert after.label == format_reply(decision, PromptStyle())
    assert sum(a.label != b.label for a, b in zip(seen, labels)) > 8
    args.sft_expert = None
    assert dataset.weak_labels(args, records, seen) == seen
