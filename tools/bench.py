"""How fast one step is, stage by stage, against what the machine can do and against other software.

    python -m tools.bench                          # 4 prompts of 400 tokens, 8 replies of 48 to each
    python -m tools.bench --peer plain --peer trl  # the same prompts, runs taking turns, ratio of medians

The work is one step of reinforcement fine-tuning: sample m replies of exactly --reply-tokens to each prompt,
score them with the reference, one forward and backward pass, one optimizer step. Prompts are random words
that share no beginning, and at temperature 1 replies to them soon differ, so only the sharing of the prompt
by its replies is measured. Every run is a process of its own, so that its peak memory is its own. Its second
step counts: the first also pays for memory and kernels that the process keeps.

The floor of a stage is the time its necessary operations take at the best matrix product speed measured in
the same run (for decoding: or the bytes of the weights at the measured copy bandwidth, whichever is more).
The peers are listed in RUNS below; trl needs `pip install -r requirements-bench.txt`.
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: it says how idle threads wait)
import argparse
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from statistics import median

import torch
from torch.utils import benchmark

import lora
import tompo
from models import pretrained
from models.load import default_device, load_policy
from play.report import align
from policy import Policy
from run.errors import InputError, reports_errors
from run.files import Stopwatch, peak_memory_gib
from run.flags import add_flags
from run.seeds import Stream, torch_generator
from run.values import number, positive_int
from settings import Model
from train_sft import clip_gradient, make_optimizer

STAGES = ("prompts", "decoding", "reference", "update", "optimizer")
RANK, BETA, LR = 64, 0.04, 1e-5
MICRO_BATCH = 2  # prompts in a pass of the update
DEVICE = default_device()


def random_prompts(tokenizer, count: int, tokens: int) -> list[str]:
    """Texts of exactly so many tokens: words that are one token each, in random order."""
    decoded = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    words = [i for i, word in enumerate(decoded) if word.startswith(" ") and word[1:].isalpha()]
    generator, texts = torch_generator(0, Stream.BENCH), []
    while len(texts) < count:
        text = tokenizer.decode([words[i] for i in torch.randint(len(words), (tokens,), generator=generator)])
        if len(tokenizer.encode(text, add_special_tokens=False)) == tokens:
            texts.append(text)
    return texts


# -------------------- our own step


def step(work: Namespace, policy: Policy, optimizer, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds by stage of one step of this work, which the flags describe. The advantages are random: a step
    costs the same whatever they are."""
    shape, clock = (work.prompts, work.m, work.reply_tokens), Stopwatch()
    uniforms_PMS = torch.rand(shape, generator=torch_generator(0, Stream.BENCH + 1))
    A_PM = torch.randn(shape[:2], generator=torch_generator(0, Stream.BENCH + 2)).to(DEVICE)

    @contextmanager
    def timed(stage):
        with clock(stage):
            yield
            if DEVICE == "cuda":
                torch.cuda.synchronize()

    with timed("prompts"):
        policy.sample(prompts, uniforms_PMS[..., :1])
    with timed("decoding"):
        groups = policy.sample(prompts, uniforms_PMS)
    replies = [[reply.ids for reply in group] for group in groups]
    for part in policy.batches(prompts, replies, MICRO_BATCH):
        texts = [prompts[i] for i in part], [replies[i] for i in part]
        with timed("reference"):
            ref_T = torch.cat(policy.reference_logps(*texts))
        with timed("update"):
            old_logps = [logp for i in part for reply in groups[i] for logp in reply.logps]
            logp_T, old_T = torch.cat(policy.token_logps(*texts)), torch.tensor(old_logps, device=DEVICE)
            A_T = A_PM[part].flatten().repeat_interleave(work.reply_tokens)
            J_T = tompo.clipped((logp_T - old_T).exp(), A_T, 0.8, 1.2) - BETA * tompo.k3(logp_T, ref_T)
            (-J_T.sum() / uniforms_PMS.numel()).backward()
    with timed("optimizer"):
        clip_gradient(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.seconds | {"decoding": clock.seconds["decoding"] - clock.seconds["prompts"]}


def needed(work: Namespace, policy: Policy) -> dict[str, dict[str, float]]:
    """The operations that a stage needs (2 per multiply-add; few in the optimizer), and for decoding also the
    bytes of the weights."""
    config, head_weight = policy.model.config, policy.model.get_output_embeddings().weight
    layers, head = lora.lora_layers(policy.model).values(), head_weight.numel()
    linear = sum(layer.base.weight.numel() for layer in layers)
    adapter = sum(p.numel() for p in lora.lora_parameters(policy.model))
    P, p, m, s = work.prompts, work.prompt_tokens, work.m, work.reply_tokens
    pair = 4 * config.num_hidden_layers * config.hidden_size  # one query on one key: score and weighted sum
    tokens, targets = P * (p + m * (s - 1)), P * m * s
    reply_pairs = P * m * (s - 1) * (p + s / 2) * pair
    prompt_pairs = P * p**2 / 2 * pair
    rows = 2 * linear * tokens + prompt_pairs + reply_pairs
    decoding = 2 * (linear + head) * P * m * (s - 1) + reply_pairs
    return {
        "prompts": {"flop": 2 * linear * P * p + prompt_pairs + 2 * head * P},
        "decoding": {"flop": decoding, "bytes": (s - 1) * (linear + head) * head_weight.element_size()},
        "reference": {"flop": rows + 2 * head * targets},
        # Backward takes the gradient of every input, not of frozen weights; A x, B^T g, and those of A and B.
        "update": {"flop": 2 * rows + prompt_pairs + reply_pairs + 4 * adapter * tokens + 4 * head * targets},
    }


def peaks(policy: Policy) -> dict[str, float]:
    """This machine's best matrix product (operations a second) and copy (bytes a second, read and write)."""

    def seconds(statement, **tensors):
        threads = torch.get_num_threads()
        return benchmark.Timer(statement, globals=tensors, num_threads=threads).timeit(5).mean

    device, dtype, products = policy.device, policy.model.dtype, []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        products.append(2 * n**3 / seconds("a @ b", a=a, b=b))
    source, target = (torch.ones(2**26, device=device) for _ in range(2))
    copied = 2 * source.numel() * 4 / seconds("target.copy_(source)", target=target, source=source)
    return {"flop": max(products), "bytes": copied}


def run_tompo(work: Namespace) -> dict:
    policy = load_policy(work.model, work.dtype, DEVICE, work.engine)
    config = lora.LoRAConfig(RANK, 2.0 * RANK)
    lora.inject(policy.model, config, torch_generator(0, Stream.BENCH + 3), policy.layer)
    policy.end_ids = ()  # replies of exactly this length
    optimizer = make_optimizer(policy.model)
    optimizer.param_groups[0]["lr"] = LR
    texts = random_prompts(policy.tokenizer, work.prompts, work.prompt_tokens)
    prompts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for _ in range(2):
        seconds = step(work, policy, optimizer, prompts)
    return {"seconds": seconds, "needed": needed(work, policy), "peaks": peaks(policy)}


# -------------------- other software, as its users run it: without the settings of fast/cpu.py


def load_plainly(work: Namespace):
    """(model, tokenizer, texts)."""
    model, tokenizer = pretrained.load(work.model, dtype=getattr(torch, work.dtype), device=DEVICE)
    return model, tokenizer, random_prompts(tokenizer, work.prompts, work.prompt_tokens)


def run_generate(work: Namespace) -> dict:
    model, tokenizer, texts = load_plainly(work)
    ids = torch.tensor([tokenizer.encode(t, add_special_tokens=False) for t in texts], device=DEVICE)
    n = work.reply_tokens
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
    sampling |= dict(attention_mask=torch.ones_like(ids), num_return_sequences=work.m)
    for _ in range(2):
        start = time.perf_counter()
        model.generate(ids, **sampling)
        seconds = time.perf_counter() - start
    return {"seconds": {"rollouts": seconds}}


def run_trl(work: Namespace) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    (model, tokenizer, texts), times, lengths = load_plainly(work), [], []
    size, divisors = work.prompts * work.m, [n for n in range(1, work.prompts + 1) if work.prompts % n == 0]
    passes = next(n for n in divisors if work.prompts // n <= MICRO_BATCH)

    def reward(completions, completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return torch.randn(len(completions)).tolist()

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

        on_step_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=size // passes,
            num_generations=work.m, gradient_accumulation_steps=passes, gradient_checkpointing=False,
            max_completion_length=work.reply_tokens, generation_kwargs={"min_new_tokens": work.reply_tokens},
            beta=BETA, learning_rate=LR, temperature=1.0, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=DEVICE == "cpu", bf16=work.dtype == "bfloat16",
        )  # fmt: skip
        adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(lora.DEFAULT_TARGETS))
        others = dict(processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()])
        GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": texts}), **others).train()
    if lengths != [work.reply_tokens] * 2 * size:
        raise InputError(f"TRL did other work: replies of {sorted(set(lengths))} tokens")
    return {"seconds": {"step": times[-1] - times[-2]}}


# name -> (its run, what it does, those of our stages that do the same, changes of the flags)
RUNS = {
    "tompo": (run_tompo, "whole step", STAGES, {}),
    "plain": (run_tompo, "whole step", STAGES, {"engine": "plain"}),  # policy.py
    "generate": (run_generate, "rollouts", STAGES[:2], {}),  # transformers, with num_return_sequences = m
    "trl": (run_trl, "whole step", STAGES, {}),  # GRPOTrainer with PEFT, the same beta
}

# -------------------- runs and tables


def with_memory(run, work: Namespace) -> dict:
    """What a run returns, and the peak memory of this process in GiB."""
    with redirect_stdout(sys.stderr):  # TRL prints a log of its own
        result = run(work)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else peak_memory_gib()
    return result | {"peak_memory_gib": memory}


def run_alone(run, work: Namespace) -> dict:
    """The same, in a process of its own. InputError: the process was killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(with_memory, run, work).result()
        except BrokenProcessPool:
            raise InputError("the process of a run was killed: is there enough memory?") from None


def seconds_of(runs: list[dict], stages: tuple[str, ...] | None = None) -> float:
    """Median over runs, of these stages or of all that a run has."""
    return median(sum(r["seconds"][s] for s in stages or r["seconds"]) for r in runs)


def stage_table(work: Namespace, runs: list[dict]) -> str:
    seconds = {s: seconds_of(runs, (s,)) for s in STAGES}
    tokens = {"prompts": work.prompts * work.prompt_tokens}
    tokens["decoding"] = work.prompts * work.m * (work.reply_tokens - 1)
    tokens["reference"] = tokens["update"] = sum(tokens.values())
    rows = [["stage", "seconds", "share", "tokens/s", "floor s", "of floor"]]
    for s in STAGES:
        rows.append([s, f"{seconds[s]:.2f}", f"{seconds[s] / sum(seconds.values()):.0%}", "-", "-", "-"])
        if s in tokens:  # all but the optimizer
            floors = [max(r["needed"][s][k] / r["peaks"][k] for k in r["needed"][s]) for r in runs]
            reached = median(floor / r["seconds"][s] for floor, r in zip(floors, runs, strict=True))
            rows[-1][3:] = f"{tokens[s] / seconds[s]:.0f}", f"{median(floors):.2f}", f"{reached:.0%}"
    memory = median(r["peak_memory_gib"] for r in runs)
    flop, copied = (median(r["peaks"][k] for r in runs) / 1e9 for k in ("flop", "bytes"))
    total = f"step: {seconds_of(runs):.2f} s, peak memory {memory:.1f} GiB"
    return f"{align(rows)}\n{total}\nmeasured peaks: {flop:.0f} GFLOP/s, {copied:.1f} GB/s"


def beside_peers(work: Namespace) -> dict[str, list[dict]]:
    """Our step and its peers, taking turns. Prints the tables and returns every run."""
    results = {name: [] for name in ("tompo", *work.peer)}
    for _ in range(work.repeats):
        for name, runs in results.items():
            run, _, _, changes = RUNS[name]
            runs.append(run_alone(run, Namespace(**vars(work) | changes)))
    own = results["tompo"]
    print(stage_table(work, own))
    for peer, runs in list(results.items())[1:]:
        _, what, stages, _ = RUNS[peer]
        ours, other = seconds_of(own, stages), seconds_of(runs)
        memory = median(r["peak_memory_gib"] for r in runs)
        print(f"{peer}: {what} {other:.2f} s, ours {ours:.2f} s, ", end="")
        print(f"ratio of medians {other / ours:.1f}; its peak memory {memory:.1f} GiB")
    return results


@reports_errors
def main(argv=None) -> None:
    text = "Time one step of reinforcement fine-tuning, beside its peers."
    parser = argparse.ArgumentParser(description=text)
    add_flags(parser, Model)
    add = parser.add_argument
    add("--prompts", type=positive_int, default=4, help="prompts per step")
    add("--prompt-tokens", type=positive_int, default=400, help="tokens of each prompt")
    add("--m", type=positive_int, default=8, help="replies per prompt")
    add("--reply-tokens", type=number(int, 2), default=48, help="tokens of each reply")
    add("--repeats", type=positive_int, default=3, help="runs of each, taking turns")
    add("--peer", action="append", choices=list(RUNS)[1:], default=[], help="also run this")
    beside_peers(parser.parse_args(argv))


if __name__ == "__main__":
    main()
