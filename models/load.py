"""From the values of --model, --engine and --dtype to a policy, and adapters onto it."""

import os
import sys
import time
from argparse import ArgumentTypeError
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.utils.rnn import pad_sequence

from models import adapters, pretrained
from models.template import Template
from policy import Policy, Reach
from run import ranks
from run.errors import InputError, one_line, out_of_memory

ENGINES = ("fast", "plain")
DTYPES = ("float32", "bfloat16")
FASTER = 1.3  # from here on a difference in speed is worth a word


def default_device() -> str:
    """CUDA where there is a GPU; CUDA_VISIBLE_DEVICES chooses it, or hides it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def bfloat16_speed() -> float:
    """How many times faster than in float32 this CPU multiplies by a matrix in bfloat16. Many have no
    instructions for it, and take several times as long. All processes have the value of the first one."""
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        x, W = torch.ones(64, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, W)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return ranks.exchange(best[0] / best[1])[0]


def dtype_name(text: str) -> str:
    """For argparse: a value of --dtype. `auto`: bfloat16 on CUDA or where this CPU is faster in it."""
    if text == "auto":
        return "bfloat16" if default_device() == "cuda" or bfloat16_speed() > FASTER else "float32"
    if text not in DTYPES:
        raise ArgumentTypeError(f"{text!r} is not one of {', '.join(DTYPES)}, auto")
    return text


def say_speed(dtype: str) -> None:
    """Prints a line where the other type would be clearly faster on this CPU."""
    speed = bfloat16_speed()
    if dtype == "bfloat16" and speed < 1 / FASTER:
        text = f"this CPU multiplies {1 / speed:.1f} times as fast with --dtype float32"
    elif dtype == "float32" and speed > FASTER:
        text = f"this CPU multiplies {speed:.1f} times as fast with --dtype bfloat16, with other last digits"
    else:
        return
    if ranks.first():
        print(text, file=sys.stderr)


class Uncached(Policy):
    """For models that compute something else with their cache than without it (MiniMax, Bamba)."""

    cached = False


def reach_of(config) -> Reach:
    """How many tokens a model reads, by its config."""
    config, reach = config.get_text_config(), Reach()
    longest = getattr(config, "max_position_embeddings", None) or 0  # some say -1 for "any"
    context = longest if longest > 0 else reach.context
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some have one for each kind
    long = [part for part in parts if part.get("rope_type") == "longrope"]
    change = min((part.get("original_max_position_embeddings") or context for part in long), default=context)
    advice = f"its frequencies change there (longrope), also for what was read; {reach.advice}"
    reach = Reach(change, advice if change < context else reach.advice)
    if set(getattr(config, "layer_types", None) or ["unknown"]) == {"full_attention"}:
        return reach
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return reach._replace(window=min((size for size in windows if size), default=reach.window))


def load_policy(
    name: str, dtype: str = "float32", device: str = "cpu", engine: str = "fast", template: dict | None = None
) -> Policy:
    """The base model as a policy. dtype: of the frozen weights; template: values for the chat template. A
    model that the fast engine does not compute rightly gets the plain one, and one whose cache is wrong goes
    without, which is said. InputError: as in pretrained.load, or that is wrong too."""
    engines = [(Policy, "its own cache", "without one, which is slow"), (Uncached, "", "")]
    if engine == "fast":
        from fast.cpu import prepare_cpu  # here: whoever runs the plain engine needs nothing of fast/
        from fast.engine import FastPolicy

        engines.insert(0, (FastPolicy, "--engine fast", "with plain"))
        if torch.device(device).type == "cpu":
            prepare_cpu()
    model, tokenizer = pretrained.load(name, getattr(torch, dtype), device, template)
    chat = Template(tokenizer, template)
    ends, reach = pretrained.end_token_ids(model, tokenizer, chat), reach_of(model.config)
    attention = model.config._attn_implementation
    for policy_class, what, instead in engines:
        try:
            with pretrained.quiet():
                policy = policy_class(model, tokenizer, name, ends, chat, reach)
            error = deviation(policy, attention)
            if error is None:
                return policy
            why = f"its log-probabilities would be {error:.2g} nats off"
        except Exception as e:
            if out_of_memory(e):  # the plain engine needs more
                raise
            why = one_line(e, 100)
        model.set_attn_implementation(attention)
        if instead and ranks.first():
            print(f"{name} does not fit {what} ({why}): going on {instead}", file=sys.stderr)
    raise InputError(f"{name} cannot be sampled and scored: {why}; choose another --model")


# What rounding may leave of `error_of`; in bf16 it sends some tokens to other experts. A wrong mask may give
# as little as 0.03, so it is found in float32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
LONG = 600  # the largest attention window that the plain engine is tried beyond


def deviation(policy: Policy, attention: str) -> float | None:
    """`error_of` where it is more than rounding leaves; else None. A model in bfloat16 is tried with float32
    copies of its weights first, if there is memory for them, and then as it is."""
    dtype = policy.model.dtype
    if dtype == torch.bfloat16:
        try:
            with pretrained.quiet(), float32_copies(policy.model):
                error = error_of(policy, attention)
            if not error < TOLERANCE[torch.float32]:
                return error
        except Exception as e:
            if not out_of_memory(e):
                raise
            text = "no memory to check it in float32; compare its first step with that of --engine plain"
            if ranks.first():
                print(f"{policy.name}: {text}", file=sys.stderr)
    with pretrained.quiet():
        error = error_of(policy, attention)
    return None if error < TOLERANCE[dtype] else error


@contextmanager
def float32_copies(model):
    """Inside the block the model computes with copies of its bfloat16 weights. Then it has its own again."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.bfloat16]
    own = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.float()
        yield
    finally:
        for t, data in zip(tensors, own, strict=True):
            t.data = data


@torch.no_grad()
def error_of(policy: Policy, attention: str) -> float:
    """In nats, the mean over log pi of a few tokens, as they are sampled and as they are scored: how far they
    are from transformers' own model(ids).logits, with its own attention. Two prompts that begin alike have
    two replies each; one reply of each is compared. A draft is right for the first and wrong for the others:
    it guesses token 0, which the uniform number 0 draws from any distribution."""
    text = policy.tokenizer.encode("Round 1 links. Whom do you choose?", add_special_tokens=False)
    n = policy.reach.window if policy.reach.window < min(LONG, policy.reach.context - 3) else 4
    prompts = [(text * n)[:n] + text[k : k + 1] for k in range(2)]
    uniforms_PMS = torch.tensor([[[0.0, 0.2], [0.3, 0.4]], [[0.5, 0.7], [0.8, 0.9]]])
    ends, policy.end_ids = policy.end_ids, ()  # token 0 may be one
    groups = policy.sample(prompts, uniforms_PMS, 1.0, [[0, 0]])
    policy.end_ids = ends
    scored = policy.token_logps(prompts, [[reply.ids for reply in group] for group in groups])
    compared = [(prompts[k], groups[k][k], scored[3 * k]) for k in range(2)]  # one prompt's first, one's last
    ids_BL = pad_sequence([torch.tensor(prompt + reply.ids) for prompt, reply, _ in compared], True)
    now = policy.model.config._attn_implementation
    policy.model.set_attn_implementation(attention)
    kept = ids_BL.shape[1] - n  # what the model does not keep would take gigabytes behind a window
    logits_BLV = policy.model(ids_BL.to(policy.device), use_cache=False, logits_to_keep=kept).logits[
        :, -kept:
    ]
    policy.model.set_attn_implementation(now)
    errors = []
    for logits_LV, (_, reply, logps_T) in zip(logits_BLV.float().cpu(), compared, strict=True):
        truth_T = logits_LV.log_softmax(-1)[range(len(reply.ids)), reply.ids]
        errors += [torch.tensor(reply.logps) - truth_T, logps_T.cpu() - truth_T]
    return float(torch.cat(errors).abs().mean())


def put_adapter(policy: Policy, name: str | os.PathLike) -> None:
    """Puts the adapter of a folder on the policy's model, or the last one of a chain (FOLDER+FOLDER) after
    the others were merged. InputError: some adapter does not fit."""
    try:
        adapters.load_chain(policy.model, name, policy.layer)
    except (OSError, ValueError) as e:
        raise InputError(one_line(e)) from None
