"""The data set of expert games: what is drawn, the file, its targets, the script that writes it, and what RFT
makes of it: prompts and batches."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from whole_runs import edited, given, parsed

from games import game_from_json
from models.load import load_policy
from play import dataset
from play.cast import make_expert
from play.dataset import targets
from play.expert_games import label_decision
from play.records import read_records, write_records
from prompts import PromptStyle, parse_reply
from run.errors import InputError
from tools import expert_games
from train_sft import main as train_sft
from world.draws import Family, held_out_grid, split_of
from world.families import families_of

STYLE, TWO_ROUNDS = PromptStyle(), (Family("bcz", "GE", 2),)


def simulate_many(count, expert="second-best", seed=0, style=STYLE, **changes):
    return dataset.simulate_many(count, make_expert(expert), seed, style, **changes)


def test_the_share_of_replaced_decisions():
    records = simulate_many(300, "always-link", 2)
    assert len(records) == 300 * 8
    share = np.mean([r.replaced for r in records])
    assert share == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / len(records)))
    assert all(r.reply == r.label for r in records if not r.replaced)
    differs = np.mean([r.reply != r.label for r in records if r.replaced])
    assert differs > 0.9  # a random decision may happen to be the label
    assert not any(r.replaced for r in simulate_many(5, "always-link", 2, noise=0))
    assert all(r.replaced for r in simulate_many(5, "always-link", 2, noise=1))


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_instances_are_those_of_the_split(split):
    records = simulate_many(50, "never-link", 5, split=split)
    assert {split_of(game_from_json(r.instance)) for r in records} == {split}


def test_a_file_with_held_out_games_is_refused_unless_the_flags_give_all_numbers(tmp_path, refused):
    path, flags = str(tmp_path / "games.jsonl"), "--types 1.5 --fix delta=0.06 c=0.2"
    write_records(path, simulate_many(2, "nash", 0, split="held-out"))
    assert f"{path}: game 0 is held out of training, for evaluation" in refused(train_sft, ["--games", path])
    (family,) = families_of(["bcz"], ["GE"], 1, types=(1.5,), fixed={"delta": 0.06, "c": 0.2})
    assert split_of(held_out_grid(4, family)[0], family) == "held-out" and family.nothing_drawn
    write_records(path, simulate_many(2, "nash", 0, families=(family,)))
    settings = parsed(["--games", path, *flags.split()])[1]
    assert len(settings.data.load(settings.games, settings.players)) == 2 * 4 * 2


def test_families_take_turns_in_the_data():
    records = simulate_many(6, "planner", 0, families=(Family(), Family("pgg", "GEE")))
    games = {r.game: (r.instance["game"], r.instance["stages"]) for r in records}
    assert list(games.values()) == [("bcz", "GE"), ("pgg", "GEE")] * 3
    assert [sum(r.game == k for r in records) for k in range(6)] == [8, 12] * 3


@pytest.mark.parametrize("style", [STYLE, PromptStyle("local", belief=False, hints=False)], ids=str)
def test_the_style_reaches_prompts_and_replies(style):
    for r in simulate_many(2, "nash", 6, style):
        assert ("Belief" in r.reply + r.label + json.dumps(r.prompt)) == style.belief


@pytest.fixture(scope="module")
def few():
    return simulate_many(2, "second-best", 7, families=TWO_ROUNDS)


def test_what_is_written_is_read_back(few, tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, few)
    back = read_records(path)
    assert len(back) == 2 * 4 * 4 == len(path.read_text().splitlines())
    assert back == few and str(back) == str(few)  # of the same types too


BAD_LINES = ["game 1", '{"game": 1, "inst', "", "null", "3", "[1, 2]", "{}", "[" * 100_000]


def bad_lines(graph, effort):
    yield from BAD_LINES
    for record, section in ((graph, "record"), (effort, "efforts")):
        yield from (edited(json.dumps(record), change).decode() for change in given(section))
    for name in graph.keys() - {"style"}:  # which files of older versions lack
        yield json.dumps({k: v for k, v in graph.items() if k != name})
    yield from (json.dumps(graph | {"style": style}) for style in ("full", [1], 3))
    yield json.dumps(graph | {"seat": 1, "label": "Decision: [0, 1, 1, 1]"})  # its own position is another


def test_a_bad_line_is_named(few, tmp_path):
    graph, effort = (asdict(few[i]) for i in (0, 4))
    assert (graph["kind"], effort["kind"]) == ("G", "E")
    path, good = tmp_path / "data.jsonl", [json.dumps(graph), json.dumps(effort)]
    for line in bad_lines(graph, effort):
        path.write_text("\n".join([*good, line, good[0]]))
        with pytest.raises(InputError) as caught:
            read_records(path)
        assert str(path) in str(caught.value) and "line 3" in str(caught.value), line[:200]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x9fPK\x03\x04", "folder"], ids=str)
def test_files_that_are_no_data_set(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        read_records(path)


def test_targets_are_the_states_that_arose_and_what_all_experts_do_there(few):
    shuffled = [few[i] for i in np.random.default_rng(0).permutation(len(few))]
    pairs = targets(shuffled, few)
    assert [r for r, _ in pairs] == few and [r for r, _ in targets(shuffled, few[3:5])] == few[3:5]
    for r, target in pairs:
        others = [label_decision(o).action for o in few if (o.game, o.stage) == (r.game, r.stage)]
        assert (target.kind.letter, target.seat, target.game_index) == (r.kind, r.seat, r.game)
        assert target.actions.tolist() == np.array(others).tolist() and target.cap == r.instance["cap"]
        replies = [m["content"] for m in r.prompt if m["role"] == "assistant"]
        for k, (actions, reply) in enumerate(zip(target.state.history, replies, strict=True)):
            decision = parse_reply(reply, target.state.before(k), r.seat)
            assert np.array_equal(actions[r.seat], decision.action)


@pytest.mark.parametrize("lost", [0, 5, slice(0, 4)])
def test_a_data_set_without_a_seat_or_a_stage_has_no_targets(few, lost):
    rest = list(few)
    del rest[lost]
    with pytest.raises(InputError, match="lacks decisions of game 0, stage"):
        targets(rest, rest)


@pytest.mark.parametrize("index", [0, 4])
def test_records_of_different_instances_in_one_game_are_refused(few, index):
    """The first seat's instance counts: with a lower cap the efforts of the others are not allowed."""
    instance = few[index].instance | ({"cap": 0.01} if index else {"alpha": [1.0] * 3})
    bad = [*few[:index], replace(few[index], instance=instance), *few[index + 1 :]]
    with pytest.raises(InputError, match="different instances|all seats"):
        targets(bad, bad)


def test_the_script_writes_a_data_set(tmp_path, capsys):
    out = tmp_path / "games.jsonl"
    expert_games.main(["--games", "5", "--rounds", "2", "--seed", "3", "--out", str(out)])
    said = capsys.readouterr().out
    records = read_records(out)
    assert "80" in said and out.name in said and len(records) == 5 * 4 * 4
    assert records == simulate_many(5, "second-best", 3, families=TWO_ROUNDS)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--stages GGE", "game 0 is BCZ-GE of 3 rounds with fee 1; give the same flags here"),
        ("--fix fee=0.5", "game 0 is BCZ-GE of 3 rounds with fee 1;"),
        ("--rounds 2", "game 0 is BCZ-GE of 3 rounds with fee 1;"),
        (
            "--partners never-link selfish",
            "was made with partners never-link, and not with never-link or selfish;",
        ),
    ],
)
def test_a_file_of_other_games_or_partners_is_refused(flags, message, tmp_path, refused):
    """It would be trained on, and probed and evaluated in the games of the flags."""
    path, made = str(tmp_path / "games.jsonl"), "--rounds 3 --fix fee=1 --partners never-link"
    expert_games.main(["--games", "2", "--out", path, *made.split()])
    _, s = parsed(["--games", path, *made.split()])
    assert len(s.data.load(s.games, s.players)) == 2 * 4 * 6
    assert message in refused(train_sft, ["--games", path, *made.split(), *flags.split()])


MADE = {"information": "full", "belief": True, "hints": True, "think": False}  # by default
WHO = {"expert": "second-best", "partners": None}


@pytest.mark.parametrize("flag", ["--information=local", "--no-belief", "--no-hints", "--think=60"])
def test_a_file_says_with_which_flags_of_prompts_it_was_made_and_goes_with_no_others(flag, tmp_path, refused):
    path, name = tmp_path / "games.jsonl", re.sub("--(no-)?|=.*", "", flag)
    other = MADE | {name: flag.partition("=")[2] if name == "information" else not MADE[name]}
    for own, foreign, made, here in (([], [flag], MADE, other), ([flag], [], other, MADE)):
        expert_games.main(["--games", "2", "--out", str(path), *own])
        assert {str(r.style) for r in read_records(path)} == {str(made | WHO)}
        argv = ["--games", str(path), "--model", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
        said = f"{path} was made with {name} {made[name]}, and not with {here[name]}; give the same flags, or"
        assert said in refused(train_sft, [*argv, *foreign]) and not (tmp_path / "run").exists()
        _, s = parsed([*argv, *own, "--max-new-tokens", "99"])
        assert s.data.load(s.games, s.players) == read_records(path)
        old = [{k: v for k, v in asdict(r).items() if k != "style"} for r in read_records(path)]
        path.write_text("".join(json.dumps(line) + "\n" for line in old))  # of an older version
        _, s = parsed([*argv, *foreign])
        assert len(s.data.load(s.games, s.players)) == len(old) == 16
        path.unlink()


def test_how_many_tokens_thoughts_have_is_free():
    tight, long = PromptStyle(think=5), PromptStyle(think=60, max_new_tokens=9)
    assert tight.recorded == long.recorded == MADE | {"think": True}


def test_label_noise_replaces_its_share_of_the_decisions_and_nothing_else():
    records = simulate_many(60)
    noisy = dataset.with_label_noise(records, {"G": 0.5, "E": 0.0}, 3, STYLE)
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
    few = dataset.with_label_noise(records[:10], {"G": 0.5}, 3, STYLE)
    assert few == noisy[:10]  # which labels are replaced does not depend on what else is in the data
    assert dataset.with_label_noise(records, {"G": 0.0, "E": 0.0}, 3, STYLE) == records
    assert dataset.with_label_noise(records, {"G": 0.5}, 4, STYLE) != noisy


def test_with_think_labels_begin_with_worked_numbers_and_keep_them_under_noise():
    plain, style = PromptStyle(hints=False), PromptStyle(hints=False, think=60)
    records, before = simulate_many(6, style=style), simulate_many(6, style=plain)
    noisy = dataset.with_label_noise(records, {"G": 1.0}, 3, style)
    assert noisy != records
    for r, other, without in zip(records, noisy, before, strict=True):
        assert (r.reply, r.replaced) == (without.reply, without.replaced)
        thought = r.label.removesuffix(without.label)
        assert other.label.startswith(thought) and label_decision(r) and label_decision(other)
        assert bool(thought) == (r.kind == "G" or "0 links" not in r.prompt[-1]["content"])
        assert "Think" in r.prompt[0]["content"] and r.prompt[1::2] == without.prompt[1::2]


def test_labels_that_are_longer_than_think_allows_are_refused(policy, refused, tmp_path):
    style = PromptStyle(think=300)
    records = simulate_many(2, style=style)
    assert prompts_of(policy, records, style=style)
    for tight, flag in ((replace(style, think=1), "think"), (replace(style, max_new_tokens=9), "max-new-to")):
        with pytest.raises(InputError, match=f"a label has .* give more to --{flag}"):
            prompts_of(policy, records, style=tight)
    argv = f"--model {policy.model.name_or_path} --games 2 --sft-steps 1 --think 1 --out {tmp_path / 'run'}"
    assert "give more to --think" in refused(train_sft, argv.split())


def test_label_noise_replaces_a_label_whatever_its_spacing():
    (record, *_), style = simulate_many(1), PromptStyle(think=60)
    for label in ("Decision: [0,1,1,1]", "A thought.\n Belief: [0,0,0,1]\nDecision: [0,1,1,1]\n"):
        (noisy,) = dataset.with_label_noise([replace(record, label=label)], {"G": 1.0}, 3, style)
        thought, belief = ("A thought.\n", "Belief: [0, 0, 0, 1]\n") if "Belief" in label else ("", "")
        assert noisy.label.startswith(f"{thought}{belief}Decision: [0, ")
        assert noisy.label.count("Decision") == 1 and label_decision(noisy)


def prompts_of(policy, records, seat="all", graph=8, effort=2, style=STYLE):
    trained = dataset.trained_seats(records, seat, 0)
    return dataset.make_prompts(policy, records, trained, {"G": graph, "E": effort}, style)


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(model_dir)


def test_a_random_seat_is_one_for_each_game_and_belongs_to_the_seed():
    records = simulate_many(40, agents=(4, 8))

    def seats(seed):
        trained = dataset.trained_seats(records, "random", seed)
        by_game = {r.game: {other.seat for other in trained if other.game == r.game} for r in trained}
        assert set(by_game) == set(range(40)) and all(len(own) == 1 for own in by_game.values())
        assert len(trained) == 80  # both decisions of the seat
        return [own.pop() for own in by_game.values()]

    assert seats(1) == seats(1) != seats(2) and set(seats(1)) >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("seat", ["all", 2])
def test_the_decisions_of_the_trained_seats_become_prompts_by_conversation(policy, seat):
    """Every prompt knows what the experts of all seats do, whoever is trained."""
    records = simulate_many(3, agents=(3, 3), families=TWO_ROUNDS, noise=0.6)
    pool = prompts_of(policy, records, seat)
    assert len(pool) == (9 if seat == "all" else 3)
    for conversation in pool:
        assert len({p.conversation for p in conversation}) == 1
        assert [p.record.stage for p in conversation] == [0, 1, 2, 3]
    prompts = sum(pool, [])
    expected = [r for r in records if seat in ("all", r.seat)]
    assert sorted(map(id, expected)) == sorted(id(p.record) for p in prompts)
    for p in prompts:
        r, t = p.record, p.target
        assert p.ids == policy.encode_prompt(r.prompt)
        assert (t.kind.letter, t.seat, len(t.state.history)) == (r.kind, r.seat, r.stage)
        assert len(t.actions) == 3
        assert np.array_equal(t.actions[r.seat], label_decision(r).action)


@pytest.mark.parametrize(("graph", "effort"), [(3, 3), (3, 1), (1, 2), (4, 0), (0, 2)])
def test_a_batch_has_the_asked_decisions_of_as_few_conversations_as_possible(policy, graph, effort):
    """6 conversations of 2 rounds. An epoch draws each once, every decision has its turn."""
    pool = prompts_of(policy, simulate_many(2, agents=(3, 3), families=TWO_ROUNDS))
    drawn, seen = [], set()
    for step in range(60):
        batch = dataset.next_batch(pool, {"G": graph, "E": effort}, step, 1)
        kinds = [p.record.kind for p in batch]
        assert (kinds.count("G"), kinds.count("E")) == (graph, effort)
        drawn += dict.fromkeys(p.conversation for p in batch)
        seen |= {(*p.conversation, p.record.stage) for p in batch}
        if graph == effort == 3 and step % 2:  # two steps are an epoch
            assert len(set(drawn[-6:])) == 6
    # (a batch that spans the end of an epoch may draw a conversation twice)
    assert len(drawn) == 60 * max(graph, effort) or (graph == 4 and 200 < len(drawn) < 240)
    assert len(seen) == (24 if graph and effort else 12)


def test_data_without_a_kind_of_decision_is_refused_if_it_is_asked_for(policy):
    records = [r for r in simulate_many(1, agents=(3, 3)) if r.kind == "G"]
    with pytest.raises(InputError, match="without effort decisions; set their count in --prompts to 0"):
        prompts_of(policy, records)
    assert len(prompts_of(policy, records, effort=0)) == 3
