"""The benchmark counts the right work, and runs from end to end on the tiny model. It is never timed here."""

import os
import re
from argparse import Namespace

import pytest
import torch
from tiny import make_tiny_model

import lora
from models.load import load_policy
from tools import bench

SMALL = "--prompts 2 --prompt-tokens 12 --m 3 --reply-tokens 4 --repeats 1".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with a vocabulary that knows some words as one token each."""
    words = "the payoff round neighbour cooperate Decision Belief player network effort"
    texts = [f" {w}" * 40 for w in words.split()]
    return str(make_tiny_model(tmp_path_factory.mktemp("words") / "model", extra_texts=texts))


def work(model, **changes):
    values = dict(engine="fast", dtype="float32", prompts=2, prompt_tokens=12, m=3, reply_tokens=4)
    return Namespace(model=model, **values | changes)


def test_prompts_are_random_words_of_exactly_the_asked_length(model):
    tokenizer = load_policy(model).tokenizer
    texts = bench.random_prompts(tokenizer, 5, 12)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [len(x) for x in ids] == [12] * 5 and len(set(map(tuple, ids))) == 5
    assert bench.random_prompts(tokenizer, 5, 12) == texts


def test_the_floor_counts_what_a_forward_pass_multiplies(model):
    """Against a count of every product of the plain model's own forward pass."""
    policy = load_policy(model)
    lora.inject(policy.model, lora.LoRAConfig(4, 8.0), torch.Generator().manual_seed(0))
    flop = {stage: counts["flop"] for stage, counts in bench.needed(work(model), policy).items()}
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)  # two layers
    head = 64 * policy.model.config.vocab_size
    pair = 4 * 2 * 64
    prompts = 2 * linear * 24 + 2 * 12**2 / 2 * pair
    replies = 2 * linear * 18 + 18 * 14 * pair
    assert flop["prompts"] == prompts + 2 * head * 2
    assert flop["decoding"] == replies + 2 * head * 18
    assert flop["reference"] == prompts + replies + 2 * head * 24
    adapter = sum(p.numel() for p in lora.lora_parameters(policy.model))
    backward = 2 * linear * 42 + 2 * (2 * 12**2 / 2 + 18 * 14) * pair
    assert flop["update"] == prompts + replies + backward + 4 * adapter * 42 + 4 * head * 24


def process_of(work):
    return {"pid": os.getpid()}


def test_a_run_is_a_process_of_its_own():
    alone, here = (run(process_of, Namespace()) for run in (bench.run_alone, bench.with_memory))
    assert alone["pid"] != here["pid"] == os.getpid() and 0.1 < alone["peak_memory_gib"]


def test_it_runs_beside_its_peers(model, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run_alone", bench.with_memory)  # to save time
    bench.main(["--model", model, *SMALL, "--peer", "plain", "--peer", "generate", "--peer", "plain"])
    printed = capsys.readouterr().out
    for stage in bench.STAGES:
        assert re.search(rf"^{stage} +-?\d+\.\d\d", printed, re.M)  # decoding is a difference of two times
    assert "GFLOP/s" in printed and printed.count("ratio of medians") == 2
    assert re.search(r"^plain: whole step \d+\.\d\d s, ours \d", printed, re.M)
    assert re.search(r"^generate: rollouts \d+\.\d\d s, ours", printed, re.M)


def test_what_is_timed_is_a_whole_step_the_same_in_both_engines(model, monkeypatch):
    """Every stage takes its time, and both engines step with the same gradient."""
    monkeypatch.setattr(bench, "peaks", lambda policy: {})
    gradients = {"fast": [], "plain": []}
    for engine, steps in gradients.items():

        def step(self, steps=steps):
            steps.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        seconds = bench.run_tompo(work(model, engine=engine))["seconds"]
        assert list(seconds) == list(bench.STAGES) and seconds["reference"] > 0 and seconds["update"] > 0
    assert [len(steps) for steps in gradients.values()] == [2, 2]
    for fast, plain in zip(*gradients.values(), strict=True):
        assert fast.abs().max() > 1e-6
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-6)


def test_a_run_that_fails_is_one_line(refused, tmp_path):
    assert f"could not load {tmp_path}" in refused(bench.main, ["--model", tmp_path, *SMALL])
