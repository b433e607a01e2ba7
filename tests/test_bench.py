"""The benchmark counts the right work, and runs from end to end on the tiny model. It is never timed here."""

import argparse
import json
import re

import pytest
import torch

from tools import bench
import lora
from policy import load_policy

SMALL = ["--rank", "4", "--prompts", "2", "--prompt-tokens", "12", "--m", "3", "--reply-tokens", "4", "--repeats", "1"]


@pytest.fixture
def model(tmp_path):
    """The tiny model with a vocabulary that knows some words as one token each."""
    from tiny import make_tiny_model

    words = "the payoff round neighbour cooperate Decision Belief player network effort"
    return str(make_tiny_model(tmp_path / "model", extra_texts=[f" {w}" * 40 for w in words.split()]))


def test_prompts_are_random_words_of_exactly_the_asked_length(model):
    tokenizer = load_policy(model).tokenizer
    texts = bench.random_prompts(tokenizer, 5, 12, 0)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [len(x) for x in ids] == [12] * 5 and len(set(map(tuple, ids))) == 5
    assert bench.random_prompts(tokenizer, 5, 12, 0) == texts != bench.random_prompts(tokenizer, 5, 12, 1)


def test_the_floor_counts_what_a_forward_pass_multiplies(model):
    """Against a count of every product of the plain model's own forward pass."""
    policy = load_policy(model)
    lora.inject(policy.model, lora.LoRAConfig(4, 8.0), torch.Generator().manual_seed(0))
    args = argparse.Namespace(prompts=2, prompt_tokens=12, m=3, reply_tokens=4, beta=0.1)
    flop = {stage: counts["flop"] for stage, counts in bench.needed(args, policy).items()}
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
    args.beta = 0
    assert bench.needed(args, policy)["reference"]["flop"] == 0


def test_it_runs_beside_a_peer_and_writes_every_run(model, tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["--model", model, "--device", "cpu", *SMALL, "--peer", "generate", "--json", str(out)])
    printed = capsys.readouterr().out
    for stage in bench.STAGES:
        assert re.search(rf"^{stage} +\d+\.\d\d", printed, re.M)
    assert "ratio of medians" in printed and "GFLOP/s" in printed
    runs = json.loads(out.read_text())["runs"]
    assert set(runs["tompo"][0]["seconds"]) == set(bench.STAGES) and runs["generate"][0]["seconds"]["rollouts"] > 0
    assert runs["tompo"][0]["peak_memory_gib"] > 0.1


def test_the_precision_of_bf16_beside_that_of_fp32(model_dir, sft_adapter, capsys):
    """fp32 scores what it samples, up to rounding, and is its own reference; bf16 is neither exact nor another policy."""
    bench.main(["--model", model_dir, "--device", "cpu", "--precision", sft_adapter])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    against, largest, kl, apart, _, off = (float(x.rstrip("%")) for x in rows["float32"])
    assert (against, largest, kl, off) == (0, 0, 0, 0) and apart < 1e-5
    against, largest, kl, apart, _, off = (float(x.rstrip("%")) for x in rows["bfloat16"])
    assert 1e-4 < against < 0.1 and against < largest and 1e-6 < kl < 0.01 and 1e-4 < apart < 0.1 and 0 < off < 50


def test_a_run_that_fails_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--model", str(tmp_path), "--device", "cpu", *SMALL])
    assert stop.value.code == 2 and "the tompo run failed" in capsys.readouterr().err
