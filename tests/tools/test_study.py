"""The study: its statistics by hand, what its arms run, and a small one that fails in part and goes on."""

import argparse
import json
import math

import pytest
from whole_runs import lines_of

from prompts import PromptStyle
from run import dataset
from run.rft_flags import check_rft_arguments
from tools import study, study_report
from tools.study import ARMS, Arm, chunks, commands, parsers, part


def test_sign_flips_by_hand():
    assert study_report.sign_flip([0.1, 0.2, 0.3]) == 2 / 8
    assert study_report.sign_flip([-1.0] * 8) == 2 / 256
    assert study_report.sign_flip([1.0, -1.0]) == 1
    # |mean| of (3, -1): 2 is reached by +3 -1, +3 +1 and their mirror images
    assert study_report.sign_flip([3.0, -1.0]) == 1
    assert study_report.sign_flip([3.0, 1.0]) == 0.5


def test_holm_by_hand():
    """Holm 1979: the smallest times 3, the next times 2, the largest times 1, and never falling."""
    assert study_report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study_report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert study_report.holm([]) == []


def test_the_value_of_a_seed():
    values = {"U1": [1, 0.5], "U3": [0.8, 0.4], "row": [1, None], "belief": [None, None]}
    probe = [{"step": step, "row": row} for step, row in ((0, 0.4), (6, 0.8), (24, 0.8))]
    found = study_report.seed_values({"values": values, "probe": probe})
    assert found == pytest.approx({"U1": 0.75, "U3": 0.6, "row": 1, "U1 x U3": 0.45, "speed": 0.75})


def test_differences_are_paired_by_seed():
    values = {"tompo": {0: {"row": 0.5, "U1 x U3": 0.4}, 1: {"row": 0.7, "U1 x U3": 0.5}, 2: {"row": 0.1}}}
    values |= {"a": {0: {"row": 0.6, "U1 x U3": 0.8}, 1: {"row": 0.9, "U1 x U3": 1.0}, 7: {"row": 0.0}}}
    found = study_report.compare(["a", "of no common seed"], "tompo", values | {"of no common seed": {}})
    assert list(found) == ["a"] and found["a"]["row"]["mean"] == pytest.approx(0.15)
    assert found["a"]["row"]["seeds"] == 2 and found["a"]["row"]["p"] == 0.5
    half = 12.7062 * math.sqrt(0.005) / math.sqrt(2)  # t of one degree of freedom
    assert found["a"]["row"]["high"] == pytest.approx(0.15 + half)
    assert found["a"]["ratio"]["mean"] == pytest.approx(2)  # in both seeds


def test_levels_by_hand():
    def reply(game, A_S, A_G, bonus=0.5, compliance=0.5):
        place = {"step": 0, "game": game, "stage": 0, "seat": 0, "kind": "G"}
        return place | {"A_S": A_S, "A_G": A_G, "global": bonus, "compliance": compliance}

    both = [reply(0, 1.0, 1.0), reply(0, -1.0, -1.0), reply(0, 1.0, -1.0), reply(0, -1.0, 1.0, 0, -0.5)]
    graph_idle = [reply(1, 1.0, 0.0), reply(1, -1.0, 0.0, 0.0)]
    idle = [reply(2, 0.0, 0.0), reply(2, 0.0, 0.0)]
    found = study_report.levels_of([*both, *graph_idle, *idle, {"kind": "E"}])
    assert found == {"A_S idle": 0.3333, "A_G idle": 0.6667, "memory the same": 0.6667} | {
        "correlation": 0.0,
        "signs differ": 0.5,
    }
    assert study_report.levels_of(idle)["correlation"] is None and study_report.levels_of([]) is None


def test_a_dozen_groups_by_hand():
    def reply(game, row, A, kind="G", compliance=0.5):
        place = {"step": game, "game": game, "stage": 0, "seat": 0, "kind": kind, "compliance": compliance}
        text = f"Decision: {row}" if compliance > 0 else "I link with all"
        return place | {
            "reply": text,
            "expert": "Decision: [0, 1, 1]",
            "A_S": A,
            "A_G": -A,
            "advantage": A / 2,
        }

    first = [reply(0, [0, 1, 0], -0.5), reply(0, [0, 1, 1], 1.0), reply(0, [0, 1, 0], -0.5)]
    second = [reply(1, "", -1.234, compliance=-0.5), reply(1, [0, 0, 0], 1.0), reply(1, "1.2", 9.0, "E")]
    assert study_report.a_dozen([*first, *second]) == [
        {"step": 0, "expert": "011", "chosen": [["011", 1, 1.0, -1.0, 0.5], ["010", 2, -0.5, 0.5, -0.25]]},
        {"step": 1, "expert": "011", "chosen": [["000", 1, 1.0, -1.0, 0.5], ["", 1, -1.23, 1.23, -0.62]]},
    ]
    many = [reply(game, [0, 1, 1], 0.0) for game in range(100)]
    steps = [group["step"] for group in study_report.a_dozen(many)]
    assert steps == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99] and study_report.a_dozen([]) == []


def test_belief_followed_by_hand():
    def reply(step, belief, decision, kind="G", compliance=0.5):
        text = f"Belief: {belief}\nDecision: {decision}" if belief else f"Decision: {decision}"
        return {"step": step, "kind": kind, "compliance": compliance, "reply": text}

    a, b = "[0, 1, 0]", "[0, 1, 1]"
    first = [reply(0, a, a), reply(1, a, b), reply(1, a, b), reply(1, b, a), reply(0, a, a, compliance=-0.5)]
    last = [reply(6, b, b), reply(7, b, b), reply(7, "[1]", "1.2", "E"), reply(7, "", a)]
    assert study_report.belief_followed([*first, reply(3, a, b), *last]) == [0.25, 1.0]
    assert study_report.belief_followed([reply(0, "", a)]) == [None, None]


def test_links_chosen_by_hand():
    def reply(step, row, expert="[0, 1, 0]", kind="G", compliance=0.5):
        texts = {"reply": f"Belief: [0, 1, 1]\nDecision: {row}", "expert": f"Decision: {expert}"}
        return {"step": step, "kind": kind, "compliance": compliance} | texts

    first = [reply(0, "[0, 1, 0]"), reply(1, "[0, 0, 0]"), reply(0, "all", compliance=-0.5)]
    last = [reply(6, "[1, 0, 1]"), reply(7, "[0, 1, 0]", "[0, 1, 1]"), reply(7, "1.2", kind="E")]
    assert study_report.links_chosen([*first, reply(3, "[0, 1, 1]"), *last]) == [0.25, 0.75, 0.75]
    assert study_report.links_chosen(last[2:]) == [None, None, None]


def test_threshold_rules_by_hand():
    worth = {(0, 0, 0): [0, 0.5, 1.5, 2.5], (1, 0, 1): [0.9, 0, 1.1, 3.0]}

    def reply(game, seat, row, kind="G", compliance=0.5):
        place = {"game": game, "stage": 0, "seat": seat, "kind": kind, "compliance": compliance}
        return place | {"reply": f"Decision: {row}"}

    clean = [reply(0, 0, [0, 0, 1, 1]), reply(1, 1, [0, 0, 1, 1]), reply(1, 1, "all", compliance=-0.5)]
    assert study_report.threshold_rule(clean, worth) == [1.1, 1.0]
    odd = [*clean, reply(0, 0, [0, 1, 1, 1])]  # one of nine choices that the rule does not explain
    assert study_report.threshold_rule(odd, worth) == [1.1, pytest.approx(8 / 9, abs=1e-4)]
    nobody = [reply(0, 0, [0, 0, 0, 0])]
    assert study_report.threshold_rule(nobody, worth) == [2.51, 1.0]
    assert study_report.threshold_rule(clean, {}) is None


def test_worked_numbers_are_those_of_the_prompts():
    records = dataset.simulate_many(3, "second-best", 0, PromptStyle())
    found = study_report.worked_numbers(records)
    assert len(found) == 3 * 4
    for r in records:
        if r.kind == "G":
            numbers = found[r.game, r.stage, r.seat]
            assert len(numbers) == 4 and numbers[r.seat] == 0
            assert all(f"{x:.2f}" in r.prompt[-1]["content"] for x in numbers if x)
    assert (
        study_report.worked_numbers(dataset.simulate_many(3, "second-best", 0, PromptStyle(hints=False)))
        == {}
    )


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_something_that_the_scripts_take(arm, tmp_path):
    arms = {a.name: a for a in ARMS}
    assert len(arms) == len(ARMS) and (arm.of is None or arms[arm.of].of is None)
    for left, command in commands(arm, 3, arms, "--rank 4", tmp_path):
        script = {"train_sft.py": "sft", "train_rft.py": "rft", "eval.py": "eval"}[command[0]]
        parser = parsers()[script]
        for flag in ("--policy", "--json"):
            if script == "eval":
                parser.add_argument(flag)
        args = parser.parse_args(command[1:])
        if script == "rft":
            check_rft_arguments(args)
        given = (args.seed, args.rank) if script != "eval" else (args.json,)
        assert given == ((3, 4) if script != "eval" else (str(left),))
    known = {flag for script in parsers().values() for flag in script._option_string_actions}
    assert {chunk[0] for text in (arm.flags, arm.evaluation) for chunk in chunks(text or "")} <= known


def test_arms_share_the_sft_stage_that_they_do_not_change(tmp_path):
    arms = {a.name: a for a in ARMS}

    def stages(name, seed=0):
        return [left for left, _ in commands(arms[name], seed, arms, "", tmp_path)]

    tompo, grpo, sft = stages("tompo"), stages("grpo"), stages("sft")
    assert tompo[0] == grpo[0] == sft[0] and len(tompo) == 3 and len(sft) == 2 and tompo[1] != grpo[1]
    assert stages("label noise 0.9")[0] != tompo[0] != stages("tompo", 1)[0]
    on_pgg = commands(arms["tompo on PGG"], 0, arms, "", tmp_path)
    assert [left for left, _ in on_pgg[:2]] == tompo[:2]  # the same policy, on other games
    assert on_pgg[2][1][:5] == ["eval.py", "--game", "pgg", "--expert", "planner"]
    assert part("--no-hints --algo grpo --steps 3", "sft") == ["--no-hints"]


def test_a_small_study_fails_in_part_and_goes_on(model_dir, tmp_path, monkeypatch, capsys):
    tiny = (
        f"--model {model_dir} --games 4 --sft-steps 2 --steps 2 --eval-games 2 --probes 1 --max-new-tokens 14"
    )
    broken = Arm("broken", "algorithm", "--objective loss=none", 2)
    monkeypatch.setattr(study, "ARMS", [ARMS[0], broken, ARMS[2]])
    argv = ["--flags", tiny, "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "study.jsonl")]
    with pytest.raises(SystemExit) as stop:
        study.main([*argv, "--seeds", "5-5", "--all-seeds"])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "failed: broken, seed 5: error: --objective loss=none" in said
    lines = lines_of(tmp_path / "study.jsonl")
    assert sorted((line["arm"], line["seed"]) for line in lines) == [("sft", 5), ("tompo", 5)]
    tompo = next(line for line in lines if line["arm"] == "tompo")
    assert [e["step"] for e in tompo["probe"]] == [0, 2] and len(tompo["values"]["row"]) == 2
    config = json.loads((tmp_path / "runs" / "tompo" / "seed5" / "config.json").read_text())
    assert config["seed"] == 5 and config["sft_adapter"].endswith("seed5/adapter")

    # what is finished is not done again: with its files gone, the line is enough
    monkeypatch.setattr(study, "ARMS", [ARMS[0], ARMS[2]])
    monkeypatch.setattr(study.subprocess, "run", None)
    study.main([*argv, "--seeds", "5-5", "--all-seeds"])
    assert lines_of(tmp_path / "study.jsonl") == lines

    study.main([*argv, "--report", str(tmp_path)])
    report = (tmp_path / "study.md").read_text()
    assert report.count("| tompo |") == 4 and "| sft | SFT alone | 1 |" in report
    before, after = (next(line for line in lines if line["arm"] == arm) for arm in ("sft", "tompo"))
    gain = study_report.seed_values(after)["U2"] - study_report.seed_values(before)["U2"]
    added = report.split("## What RFT adds")[1].splitlines()[4]
    assert added.startswith("| tompo | 1 | ") and f", {gain:+.3f} |" in added
    assert "tompo (7), sft (7)." in report  # what the plan still lacks
    for name in ("study-forest.png", "study-curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_unit_says_where_it_was_run(tmp_path, monkeypatch):
    of = study.Study(argparse.Namespace(folder=tmp_path, results=tmp_path / "study.jsonl"))
    head = study.subprocess.run(["git", "rev-parse", "HEAD"], cwd=study.ROOT, capture_output=True, text=True)
    commit = of.machine["commit"]
    assert head.stdout.startswith(commit) if head.returncode == 0 else commit == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git: no unit is lost to that
    assert of.machine["commit"] == "unknown" and of.machine["machine"].startswith(study.cpu_name())


def test_an_unknown_arm_is_refused(refused, tmp_path):
    argv = ["--arms", "tompoo", "--results", tmp_path / "none.jsonl"]
    assert "--arms tompoo" in refused(study.main, argv)
    assert "no results yet" in refused(
        study.main, ["--report", tmp_path, "--results", tmp_path / "none.jsonl"]
    )


def test_seeds():
    assert study.parse_seeds("0-3") == [0, 1, 2, 3] and study.parse_seeds("5") == [5]
    with pytest.raises(argparse.ArgumentTypeError):
        study.parse_seeds("a-b")
