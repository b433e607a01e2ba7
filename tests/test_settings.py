"""Flags and what becomes of them: every flag is used, a run is resumed with its own, and what makes no sense
is refused in one line before anything is made."""

import argparse
import dataclasses
import json
import math
from functools import cached_property, partial
from importlib.util import find_spec

import pytest
from whole_runs import parsed

import settings
import train_rft
import train_sft
from experts import Expert
from prompts import PromptStyle
from rewards import TERMS, expert_rewards
from run.errors import InputError
from run.values import named_numbers
from variants import objective
from variants.game import welfare
from world.draws import TYPE_PATTERNS, Family

# The fields of settings that are only words, of which a property or another field makes what is used.
WORDS = set("game stages rounds types fix expert_name ask information belief hints max_new_tokens".split())
WORDS |= set("train_on prompt_counts reward_from weights clip_eps objective preset resume".split())


def described(value):
    """A value of which two can be compared: functions by their names, experts by theirs and by how they are
    asked, and settings by what is used of them."""
    if isinstance(value, partial):
        return described([value.func, value.args, value.keywords])
    if isinstance(value, Expert):
        return [value.name, described(getattr(value, "asking", None))]
    if type(value).__module__ == "settings":
        kind = type(value)
        made = [n for n in dir(kind) if isinstance(getattr(kind, n), (property, cached_property))]
        used = [f.name for f in dataclasses.fields(value) if f.name not in WORDS] + made
        return {name: described(getattr(value, name)) for name in used}
    if callable(value):
        return value.__qualname__ + str([described(cell.cell_contents) for cell in value.__closure__ or ()])
    if dataclasses.is_dataclass(value):
        return {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: described(v) for name, v in value.items()}
    return [described(v) for v in value] if isinstance(value, (list, tuple)) else value


def resolved(*argv, script=train_rft):
    """All settings but the flags themselves."""
    return described(dataclasses.replace(parsed(list(argv), script)[1], flags={}))


HAS_OPENAI = find_spec("openai") is not None  # requirements-experts.txt

# -------------------- every flag

# Another value than the default.
OTHER = dict(model="m", dtype="bfloat16", engine="plain", game="pgg", stages="GEE", rounds="2", types="hub")
OTHER |= dict(fix="c=0.2", expert="nash", information="local", belief=None, hints=None, max_new_tokens="9")
OTHER |= dict(games="5", agents="4-6", seat="1", noise="0.2", rank="8", lora_alpha="8", targets="q_proj")
OTHER |= dict(train_on="graph", label_noise="0.1", sft_steps="3", sft_batch="5", sft_lr="0.1", algo="grpo")
OTHER |= dict(sft_adapter="folder", steps="7", prompts="3", m="4", lr="0.1", inner_epochs="2", seed="3")
OTHER |= dict(temperature="0.5", reward_from="welfare", weights="local=0", clip_eps="0.1", beta="0")
OTHER |= dict(objective="loss=cispo", eval_games="9", out="folder", preset="paper", micro_batch="5")
OTHER |= dict(ask="attempts=9", partners="never-link", template="enable_thinking=false", think="40")


@pytest.mark.parametrize("script", [train_rft, train_sft])
def test_every_flag_changes_the_settings(script, monkeypatch, tmp_path):
    """But --resume, which has its own tests."""
    monkeypatch.chdir(tmp_path)  # a language model opens its record there
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    parser, _ = parsed([], script)
    flags = {a.dest: a.option_strings[-1] for a in parser._actions}  # of --belief the last is --no-belief
    flags.pop("help"), flags.pop("resume")
    assert set(flags) == set(OTHER) or (script is train_sft and set(flags) < set(OTHER))
    if not HAS_OPENAI:
        flags.pop("ask")
    for name, flag in flags.items():
        needed = ["--expert", "openai:m"] if name == "ask" else []
        given = [flag] if OTHER[name] is None else [f"{flag}={OTHER[name]}"]
        assert resolved(*needed, *given, script=script) != resolved(*needed, script=script), flag


@pytest.mark.parametrize("script", [train_rft, train_sft])
def test_there_are_few_flags_and_each_says_what_it_does(script):
    parser, _ = parsed([], script)
    own = [g for g in parser._action_groups if g.title not in ("positional arguments", "options")]
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    assert len(actions) <= 48 and all(group.description for group in own) and all(a.help for a in actions)
    assert {id(a) for a in actions} == {id(a) for group in own for a in group._group_actions}
    parser.format_help()  # a % in a help text must be %%


def test_the_defaults():
    _, s = parsed([])
    assert s.games.families == (Family(),) and s.players.style == PromptStyle()
    assert s.data == settings.Data(0, 126, (4, 4), 0, 0.15) and s.rft.counts == {"G": 8, "E": 2}
    assert (s.rft.w_sample, s.rft.w_graph, s.rft.clip, s.rft.beta) == (0.8, 0.2, (0.8, 1.2), 0.04)
    assert s.evaluation == settings.Evaluation(4, 60, 0) and not s.run.resume
    assert s.flags["script"] == "train_rft.py" and parsed([], train_sft)[1].rft is None


def test_what_flags_stand_for():
    argv = "--objective advantage=loo ratio=sequence --algo grpo --clip-eps 0.1 0.3 --seat all"
    _, s = parsed(argv.split())
    assert (s.rft.advantage, s.rft.ratio) == (objective.ADVANTAGES["loo"], objective.RATIOS["sequence"])
    assert (s.rft.w_sample, s.rft.w_graph, s.rft.clip) == (1.0, 0.0, (0.9, 1.3)) and s.evaluation.seat == 0
    assert parsed(["--seat", "random"])[1].evaluation.seat == "random"
    _, s = parsed("--weights A_S=0.5 A_G=2 local=3 --reward-from welfare --prompts 0 4 --agents 2-5".split())
    assert (s.rft.w_sample, s.rft.w_graph, s.rft.counts) == (0.5, 2.0, {"G": 0, "E": 4})
    assert (s.rft.reward.func, s.rft.reward.keywords["score"]) == (expert_rewards, welfare)
    weights = settings.KNOWN_WEIGHTS | {"A_S": 0.5, "A_G": 2.0, "local": 3.0}
    assert s.rft.reward.keywords["weights"] == weights and s.evaluation.agents == 2
    _, s = parsed("--expert nash --train-on effort --reward-from credit --seed 5".split())
    assert s.sft.kinds == ("E",) and s.rft.reward.keywords["expert"].name == "nash"
    assert s.players.make_expert("noisy:random:0.5").name == "noisy:random:0.5"


def test_a_reward_term_of_ones_own_has_a_weight_unless_the_logs_use_its_name(monkeypatch):
    monkeypatch.setitem(TERMS, "length", lambda sample, target: 1.0)
    rft = parsed(["--weights", "length=0.5"])[1].rft
    assert rft.reward.keywords["weights"]["length"] == 0.5
    monkeypatch.setitem(TERMS, "r_S", TERMS["length"])
    with pytest.raises(SystemExit):
        parsed([])


# -------------------- NAME=VALUE and types


def test_named_numbers():
    known = ("delta", "c")
    given = ["delta=0.1", "c=2e-3", "delta=.5"]  # the last one counts
    assert named_numbers(given, "--fix", known) == {"delta": 0.5, "c": 0.002}
    assert named_numbers(None, "--fix", known) == {}
    for bad in ("delta", "delta=", "c=x", "c=-1", "c=nan", "c=inf", "=1", "c=1=2"):
        with pytest.raises(InputError, match="^--fix .* write NAME=VALUE with a finite number from 0"):
            named_numbers(["delta=1", bad], "--fix", known)
    with pytest.raises(InputError, match="^--fix gamma: no such name; there are delta, c$"):
        named_numbers(["gamma=1"], "--fix", known)


def test_families_of_flags():
    def families(argv):
        return parsed(argv.split())[1].games.families

    bcz, pgg = families("--game bcz pgg --fix c=0.3 b=0.7 --types hub linear --rounds 2")
    assert (bcz.fixed, pgg.fixed) == ((("c", 0.3),), (("b", 0.7), ("c", 0.3)))
    assert bcz.patterns == pgg.patterns == ("linear", "hub") and bcz.rounds == 2
    (family,) = families("--types 1 2.5 0.33")
    assert family.types == (1.0, 2.5, 0.33) and family.patterns == TYPE_PATTERNS


# -------------------- a run is resumed with its own flags

ODD = "--agents 3-5 --seat random --no-belief --no-hints --label-noise 1 --types 1 2.5 --preset paper"
ODD += " --sft-lr 1e-300 --games games.jsonl --fix c=0.2 --seed 4294967295"
ODD_RFT = ODD + " --reward-from credit --weights local=0 gamma=0.30000000000000004 --sft-adapter a+b --m 4"
ODD_RFT += " --clip-eps 0.1 0.30000000000000004 --objective kl=k2"


@pytest.mark.parametrize("script, argv", [(train_rft, ""), (train_rft, ODD_RFT), (train_sft, ODD)])
def test_a_resumed_run_has_its_own_settings(script, argv, tmp_path, monkeypatch, capsys):
    """From its config.json, whatever else is given, and from another working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    _, first = parsed([*argv.split(), "--out", str(tmp_path)], script)
    (tmp_path / "config.json").write_text(json.dumps(first.flags))
    monkeypatch.chdir(tmp_path / "elsewhere")
    other = ["--seed", "99", "--sft-lr", "0.5", "--preset", "paper", "--no-belief"]
    _, again = parsed([*other, "--resume", str(tmp_path)], script)
    assert again.run == dataclasses.replace(first.run, resume=str(tmp_path))
    assert again.run.resume and not first.run.resume
    a, b = (described(dataclasses.replace(s, run=None, flags={})) for s in (first, again))
    assert a == b and json.dumps(first.flags) == json.dumps(again.flags)
    newer = {"engine", "temperature", "micro_batch"}  # the run does not know them: they have their defaults
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in first.flags.items() if k not in newer})
    )
    assert parsed(["--engine", "plain", "--resume", str(tmp_path)], script)[1].flags == again.flags
    said = f"continuing {tmp_path} with the settings in its config.json (other flags do not count)\n"
    assert capsys.readouterr().out == 2 * said


def test_paths_are_whole(tmp_path, monkeypatch):
    """Of every adapter of a chain. A folder with a + in its name is none."""
    (tmp_path / "one+two").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    if HAS_OPENAI:
        asking = parsed(["--expert", "openai:m", "--ask", "record=answers.jsonl", "attempts=2"])[1].flags[
            "ask"
        ]
        assert asking == [f"record={tmp_path}/answers.jsonl", "attempts=2"]
    for given, whole in (("a+b", f"{tmp_path}/a+{tmp_path}/b"), ("one+two", f"{tmp_path}/one+two")):
        s = parsed(["--sft-adapter", given, "--games", "games.jsonl"])[1]
        assert s.rft.sft_adapter == s.flags["sft_adapter"] == whole
        assert s.data.games == s.flags["games"] == f"{tmp_path}/games.jsonl"


# -------------------- presets


def test_the_papers_values_are_defaults_that_flags_change():
    paper = parsed(["--preset", "paper"])[1]
    assert (paper.model.name, paper.model.dtype) == ("Qwen/Qwen2.5-7B-Instruct", "bfloat16")
    assert (paper.lora.rank, paper.lora.alpha, paper.data.games, paper.data.agents) == (64, 32.0, 126, (4, 8))
    assert (paper.sft.kinds, paper.sft.label_noise, paper.sft.batch, paper.sft.lr) == (("E",), 0.0, 16, 5e-5)
    assert paper.rft.lr == 1e-5 and resolved("--preset", "small") == resolved()
    changed = parsed(["--rank", "8", "--preset", "paper", "--model", "m"])[1]
    assert (changed.lora.rank, changed.lora.alpha, changed.model.name) == (8, 32.0, "m")
    assert parsed(["--preset", "paper"], train_sft)[1].sft == paper.sft


# -------------------- what is refused

# Values of one flag, which an edited config.json may hold too.
BAD = [("sft_lr", v) for v in (math.nan, math.inf, -1, "x", None)] + [("lr", v) for v in (math.nan, -1)]
BAD += [("lora_alpha", v) for v in (0, -1, math.nan)] + [("m", v) for v in (1, 0, 2.5)]
BAD += [("temperature", v) for v in (0, -1, math.nan)] + [("rank", v) for v in (0, 5000, "x")]
BAD += [("rounds", 101), ("agents", 4.5), ("agents", "5-4"), ("agents", "4-99"), ("seat", "x"), ("beta", -1)]
BAD += [("games", 0), ("noise", 1.5), ("label_noise", math.nan), ("eval_games", -1), ("max_new_tokens", 0)]
BAD += [("seed", -1), ("seed", 2**32)]
EDITED = [("dtype", "foo"), ("seed", None), ("belief", "no"), ("agents", [5, 4]), ("targets", [])]
EDITED += [("seed", {"a": 1}), ("preset", 7), ("games", -1), ("prompts", ["x"])]


@pytest.mark.parametrize("name, value", BAD + EDITED, ids=str)
def test_a_bad_value_is_refused_as_a_flag_and_in_a_config(name, value, tmp_path, refused):
    config, flag = parsed([])[1].flags | {name: value}, "--" + name.replace("_", "-")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert flag in refused(train_rft.main, ["--resume", tmp_path])
    if (name, value) in BAD:
        assert f"argument {flag}:" in refused(train_rft.main, [f"{flag}={value}"])


REFUSED = """
--fix r=1.2                             | --fix r: no such name; there are delta, c
--game pgg --fix delta=0.1              | --fix delta: no such name
--fix delta                             | --fix delta: write NAME=VALUE
--types ring                            | --types takes homogeneous, linear, half, hub or positive numbers
--types 1 hub                           | --types takes
--types=-1                              | --types takes
--types nan                             | --types takes
--game pgg --types 2.678                | at most two decimals
--game pgg --types 12345.67             | and six digits
--fix fee=0.1234567                     | --fix fee=0.1234567: agents would read 0.123457
--stages GX                             | stages must be a string of G (links), E (efforts)
--stages G                              | stages must be a string
--weights fame=1                        | --weights fame: no such name; there are local, global, belief, A_S
--weights belief                        | --weights belief: write NAME=VALUE
--weights A_S=-1                        | --weights A_S=-1: write
--weights belief=0.5 --no-belief        | --no-belief
--prompts 0 0                           | --prompts
--prompts 1 1 1                         | --prompts takes a number for links and efforts
--prompts -1 2                          | --prompts
--clip-eps 0.1 0.2 0.3                  | --clip-eps takes one number, or two
--reward-from credit --expert openai:m  | --reward-from credit
--reward-from joint                     | --reward-from joint asks all seats of a game at once
--objective loss=none                   | --objective loss=none: write NAME=CHOICE
--expert nobody                         | unknown expert 'nobody'
--expert noisy:nash:2                   | noisy:nash:2
--expert openai:m --ask x=1             | x=1
--partners self                         | --seat all
--partners nash --seat all              | --seat all
--partners nobody                       | choose from
--partners noisy:hf:m:0.5               | exact experts
--partners nash --reward-from credit    | leave out --partners
--fix fee=-1                            | from 0
--seat 4                                | --seat 4 must be below the number of agents
--agents 3-6 --seat 3                   | --seat 3
"""
REFUSED = [tuple(part.strip() for part in line.split("|")) for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_flags_that_make_no_sense_are_refused(flags, words, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    if not HAS_OPENAI and flags.startswith("--reward-from credit"):
        pytest.skip("no openai: pip install -r requirements-experts.txt")
    assert words in refused(train_rft.main, ["--out", tmp_path / "run", *flags.split()])
    assert not (tmp_path / "run").exists()
