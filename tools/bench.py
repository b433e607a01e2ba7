"""How fast one step is, stage by stage, against what the machine can do and against other software.

    python -m tools.bench                          # 4 prompts of 400 tokens, 8 replies of 48 to each
    python -m tools.bench --peer plain --peer trl  # the same prompts, runs taking turns, ratio of medians
    python -m tools.bench --scaling                # m in 4..32 against prompts of 200..800 tokens
    python -m tools.bench --precision runs/tompo/adapter    # what bf16 does to a policy's log-probabilities

The work is one step of reinforcement fine-tuning: sample m replies of exactly --reply-tokens to each prompt,
score them with the reference, one forward and backward pass, one optimizer step. Prompts are random words
that share no beginning, and at temperature 1 replies to them soon part, so what is measured is the shared
prompt alone. Every run is a process of its own, whose peak memory is its own. Its second step is what counts:
the first also pays for memory and kernels that the process keeps.

The floor of a stage is the time its needed operations take at the best matrix product speed measured in the
same run (for decoding: or the bytes of the weights at the measured copy bandwidth, whichever is more).

Peers:
    plain      our own step by the plain engine (policy.py)
    generate   the rollouts alone, by transformers' generate with num_return_sequences = m
    trl        GRPOTrainer with PEFT on the same prompts, replies of the same length, the same beta
               (pip install -r requirements-bench.txt)
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: it says how idle threads wait)
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import lora
import tompo
from models import pretrained
from models.load import load_policy, put_adapter
from policy import Policy
from prompts import PromptStyle
from run import checkpoint, dataset, training
from run.files import (
    InputError,
    number,
    peak_memory_gib,
    positive_int,
    refuse_existing,
    reports_errors,
    seed_int,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("prompts", "decoding", "reference", "update", "optimizer")


def random_prompts(tokenizer, count: int, tokens: int, seed: int) -> list[str]:
    """Texts of exactly so many tokens: words that are one token each, in random order."""
    decoded = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    words = [i for i, word in enumerate(decoded) if word.startswith(" ") and word[1:].isalpha()]
    generator, texts = checkpoint.seeded(seed, 200), []
    while len(texts) < count:
        text = tokenizer.decode([words[i] for i in torch.randint(len(words), (tokens,), generator=generator)])
        if len(tokenizer.encode(text, add_special_tokens=False)) == tokens:
            texts.append(text)
    return texts


# -------------------- our own step


def step(args, policy: Policy, optimizer, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds by stage of one step. The advantages are random: a step costs the same whatever they are."""
    S, seconds = args.reply_tokens, dict.fromkeys(STAGES, 0.0)

    def timed(stage, function):
        start = time.perf_counter()
        result = function()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] += time.perf_counter() - start
        return result

    def sample(tokens):
        return policy.sample(prompts, args.m, tokens, 1.0, checkpoint.seeded(args.seed, 201))

    def update(part, ref_logp_T):
        old = [o.sampled_logps for row in part for i in row.prompts for o in groups[i]]
        advantage_M = torch.randn(len(old), generator=generator)
        loss, _ = tompo.objective_loss(
            torch.cat(policy.token_logps(part)),
            old_logp_T=torch.tensor(old, device=policy.device).flatten(),
            ref_logp_T=ref_logp_T,
            advantage_T=advantage_M.repeat_interleave(S).to(policy.device),
            weight_T=torch.full((len(old) * S,), 1 / (args.prompts * args.m * S), device=policy.device),
            beta=args.beta,
        )
        loss.backward()

    def step_of_optimizer():
        training.clip_gradient(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed("prompts", lambda: sample(1))
    groups, generator = timed("decoding", lambda: sample(S)), checkpoint.seeded(args.seed, 202)
    seconds["decoding"] -= seconds["prompts"]
    rows = policy.pack(prompts, [[o.reply_ids for o in group] for group in groups])
    for part in training.micro_batches(rows, args.micro_batch):
        ref = timed("reference", lambda: torch.cat(policy.reference_logps(part))) if args.beta else None
        timed("update", lambda: update(part, ref))
    timed("optimizer", step_of_optimizer)
    return seconds


def needed(args, policy: Policy) -> dict[str, dict[str, float]]:
    """The operations a stage needs (2 per multiply-add), and for decoding also the bytes of the weights."""
    config, head_weight = policy.model.config, policy.model.get_output_embeddings().weight
    layers, head = lora.lora_layers(policy.model).values(), head_weight.numel()
    linear = sum(layer.base.weight.numel() for layer in layers)
    adapter = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    P, p, m, s = args.prompts, args.prompt_tokens, args.m, args.reply_tokens
    pair = 4 * config.num_hidden_layers * config.hidden_size  # one query on one key: score and weighted sum
    tokens, targets = P * (p + m * (s - 1)), P * m * s
    reply_pairs = P * m * (s - 1) * (p + s / 2) * pair
    prompt_pairs = P * p**2 / 2 * pair
    rows = 2 * linear * tokens + prompt_pairs + reply_pairs
    decoding = 2 * (linear + head) * P * m * (s - 1) + reply_pairs
    return {
        "prompts": {"flop": 2 * linear * P * p + prompt_pairs + 2 * head * P},
        "decoding": {"flop": decoding, "bytes": (s - 1) * (linear + head) * head_weight.element_size()},
        "reference": {"flop": (rows + 2 * head * targets) if args.beta else 0},
        # Backward takes the gradient of every input, not of frozen weights; A x, B^T g, and those of A and B.
        "update": {"flop": 2 * rows + prompt_pairs + reply_pairs + 4 * adapter * tokens + 4 * head * targets},
        "optimizer": {"flop": 0},
    }


def peaks(policy: Policy) -> dict[str, float]:
    """This machine's best matrix product (operations a second) and copy (bytes a second, read and write)."""
    device, dtype, speeds = policy.device, policy.model.dtype, []

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(function, repeats=5):
        function()
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        return (time.perf_counter() - start) / repeats

    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        speeds.append(2 * n**3 / seconds(lambda: a @ b))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return {"flop": max(speeds), "bytes": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))}


def worker_tompo(args) -> dict:
    policy = load_policy(args.model, args.dtype, args.device, args.engine)
    config = lora.LoRAConfig(args.rank, 2.0 * args.rank, lora.DEFAULT_TARGETS, policy.name)
    lora.inject(policy.model, config, checkpoint.seeded(args.seed, 203), policy.layer)
    policy.end_ids = ()  # replies of exactly this length
    optimizer = training.make_optimizer(policy)
    optimizer.param_groups[0]["lr"] = 1e-5
    texts = random_prompts(policy.tokenizer, args.prompts, args.prompt_tokens, args.seed)
    prompts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for _ in range(2):
        seconds = step(args, policy, optimizer, prompts)
    return {"seconds": seconds, "needed": needed(args, policy), "peaks": peaks(policy)}


# -------------------- other software, as its users run it: without the settings of fast/cpu.py


def load_plainly(args):
    """(model, tokenizer, texts)."""
    model, tokenizer = pretrained.load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    return model, tokenizer, random_prompts(tokenizer, args.prompts, args.prompt_tokens, args.seed)


def worker_generate(args) -> dict:
    model, tokenizer, texts = load_plainly(args)
    ids = torch.tensor([tokenizer.encode(t, add_special_tokens=False) for t in texts], device=args.device)
    n = args.reply_tokens
    how = dict(do_sample=True, top_k=0, top_p=1.0, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
    for _ in range(2):
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=args.m, **how)
        seconds = time.perf_counter() - start
    if out.shape != (len(ids) * args.m, ids.shape[1] + n):
        raise InputError(f"generate did other work: an answer of shape {tuple(out.shape)}")
    return {"seconds": {"rollouts": seconds}}


def worker_trl(args) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, texts = load_plainly(args)
    size, lengths, clock = args.prompts * args.m, [], {}
    fits = [n for n in range(1, args.prompts + 1) if args.prompts % n == 0]
    passes = next(n for n in fits if args.prompts // n <= args.micro_batch)

    def reward(completions, completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return torch.randn(len(completions)).tolist()

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            clock["end"] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=size // passes, seed=args.seed,
            num_generations=args.m, gradient_accumulation_steps=passes, gradient_checkpointing=False,
            max_completion_length=args.reply_tokens, generation_kwargs={"min_new_tokens": args.reply_tokens},
            beta=args.beta, learning_rate=1e-5, temperature=1.0, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16",
        )  # fmt: skip
        adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=list(lora.DEFAULT_TARGETS))
        data, told = Dataset.from_dict({"prompt": texts}), dict(peft_config=adapter, callbacks=[Clock()])
        trainer = GRPOTrainer(model, reward, config, data, processing_class=tokenizer, **told)
        trainer.train()
    if lengths != [args.reply_tokens] * 2 * size:
        raise InputError(f"TRL did other work: replies of {sorted(set(lengths))} tokens")
    return {"seconds": {"step": clock["end"] - clock["start"]}}


WORKERS = {"tompo": worker_tompo, "generate": worker_generate, "trl": worker_trl}
# peer -> (worker, what it does, those of our stages that do the same, flags of its own)
PEERS = {
    "plain": ("tompo", "whole step", STAGES, {"engine": "plain"}),
    "generate": ("generate", "rollouts", STAGES[:2], {}),
    "trl": ("trl", "whole step", STAGES, {}),
}

# -------------------- precision


def precision_table(args) -> str:
    """Log-probabilities of sampled replies (8 to each decision of seat 0 in 20 expert games): bf16, by both
    engines, against fp32 on fp32's replies; and each one's scored against its sampled. Nats per token."""
    records = dataset.simulate_many(20, "second-best", args.seed, PromptStyle())
    chats, first = [r.prompt for r in records if r.seat == 0], None
    lines = [f"{'':16}{'law against fp32':>34}{'scored against sampled':>40}"]
    lines += [
        f"{'':16}{'mean |d|':>12}{'largest':>10}{'KL':>12}{'mean |d|':>16}{'largest':>10}{'off by 5 %':>14}"
    ]
    for engine, dtype in (("fast", "float32"), ("fast", "bfloat16"), ("plain", "bfloat16")):
        policy = load_policy(args.model, dtype, args.device, engine)
        put_adapter(policy, args.precision)
        prompts = [policy.encode_prompt(chat) for chat in chats]

        @torch.no_grad()
        def scored(groups):  # prompt by prompt, since engines pack several in orders of their own
            rows = [policy.pack([p], [[o.reply_ids for o in g]]) for p, g in zip(prompts, groups)]
            return torch.cat([logp_T for of_one in rows for logp_T in policy.token_logps(of_one)]).cpu()

        groups = policy.sample(prompts, 8, 48, 1.0, checkpoint.seeded(args.seed, 204))
        own = scored(groups)
        first_groups, theirs = first = first or (groups, own)
        on_theirs = own if first_groups is groups else scored(first_groups)
        d, kl = (on_theirs - theirs).abs(), tompo.k3(theirs, on_theirs).mean()
        apart = (own - torch.tensor([v for g in groups for o in g for v in o.sampled_logps])).abs()
        off = (apart.exp() > 1.05).float().mean()
        line = f"{f'{engine} {dtype}':16}{d.mean():>12.1e}{d.max():>10.2f}{kl:>12.1e}"
        lines.append(f"{line}{apart.mean():>16.1e}{apart.max():>10.2f}{off:>14.2%}")
    return "\n".join(lines)


# -------------------- runs and tables


def run(args, worker: str, **changes) -> dict:
    """One run in a process of its own: what the worker returns, and its peak memory in GiB."""
    values = vars(args) | changes | {"worker": worker}
    if os.path.isdir(args.model):
        values["model"] = os.path.abspath(args.model)
    names = ("model", "engine", "device", "dtype", "rank", "prompts", "prompt_tokens", "m", "reply_tokens")
    names += ("beta", "micro_batch", "seed", "worker")
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", str(values[name]))]
    command = [sys.executable, "-m", "tools.bench", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise InputError(f"the {worker} run failed; what it said stands above")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(runs: list[dict], stages: tuple[str, ...] | None = None) -> float:
    """Median over runs, of these stages or of all that a run has."""
    return median(sum(r["seconds"][s] for s in stages or r["seconds"]) for r in runs)


def stage_table(args, runs: list[dict]) -> str:
    seconds = {s: seconds_of(runs, (s,)) for s in STAGES}
    reply_tokens = args.prompts * args.m * (args.reply_tokens - 1)
    tokens = {"prompts": args.prompts * args.prompt_tokens, "decoding": reply_tokens}
    tokens["reference"] = tokens["update"] = sum(tokens.values())
    lines = [f"{'stage':12}{'seconds':>9}{'share':>8}{'tokens/s':>10}{'floor s':>9}{'of floor':>10}"]
    for s in STAGES:
        floors = [max(r["needed"][s][k] / r["peaks"][k] for k in r["needed"][s]) for r in runs]
        floor = f"{'-':>9}{'-':>10}"
        if any(floors):
            reached = median(floor / r["seconds"][s] for floor, r in zip(floors, runs))
            floor = f"{median(floors):>9.2f}{reached:>10.0%}"
        speed = f"{tokens[s] / seconds[s]:.0f}" if s in tokens and seconds[s] else "-"
        lines.append(f"{s:12}{seconds[s]:>9.2f}{seconds[s] / sum(seconds.values()):>8.0%}{speed:>10}{floor}")
    memory = median(r["peak_memory_gib"] for r in runs)
    flop, copied = (median(r["peaks"][k] for r in runs) / 1e9 for k in ("flop", "bytes"))
    lines.append(f"{'step':12}{seconds_of(runs):>9.2f}   peak memory {memory:.1f} GiB")
    lines.append(f"measured peaks: {flop:.0f} GFLOP/s, {copied:.1f} GB/s")
    return "\n".join(lines)


def beside_peers(args) -> dict[str, list[dict]]:
    """Our step and its peers, taking turns. Prints the tables and returns every run."""
    results, dtype = {name: [] for name in ("tompo", *args.peer)}, args.peer_dtype or args.dtype
    for _ in range(args.repeats):
        results["tompo"].append(run(args, "tompo"))
        for peer in args.peer:
            worker, _, _, flags = PEERS[peer]
            results[peer].append(run(args, worker, dtype=dtype, **flags))
    print(stage_table(args, results["tompo"]))
    for peer in args.peer:
        _, what, stages, _ = PEERS[peer]
        own, other = seconds_of(results["tompo"], stages), seconds_of(results[peer])
        memory = median(r["peak_memory_gib"] for r in results[peer])
        print(f"{peer} ({dtype}): {what} {other:.2f} s, ours {own:.2f} s, ", end="")
        print(f"ratio of medians {other / own:.1f}; its peak memory {memory:.1f} GiB")
    return results


def scaling(args) -> dict[str, list[dict]]:
    """Our step by number of replies and length of prompts. Prints the table and returns every run."""
    results, counts = {}, (4, 8, 16, 32)
    print(f"seconds of a step (medians of {args.repeats}), {args.prompts} prompts, ", end="")
    print(f"replies of {args.reply_tokens} tokens\n{'prompt tokens':14}", end="")
    print("".join(f"{f'm = {m}':>10}" for m in counts))
    for p in (200, 400, 800):
        print(f"{p:<14}", end="", flush=True)
        for m in counts:
            runs = [run(args, "tompo", prompt_tokens=p, m=m) for _ in range(args.repeats)]
            results[f"p={p} m={m}"] = runs
            print(f"{seconds_of(runs):>10.2f}", end="", flush=True)
        print()
    return results


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Time one step of reinforcement fine-tuning, beside its peers."
    )
    training.add_model_arguments(parser)
    add, dtypes = parser.add_argument, ("float32", "bfloat16")
    add("--rank", type=positive_int, default=64, help="LoRA rank")
    add("--prompts", type=positive_int, default=4, help="prompts per step")
    add("--prompt-tokens", type=positive_int, default=400, help="tokens of each prompt")
    add("--m", type=positive_int, default=8, help="replies per prompt")
    add("--reply-tokens", type=number(int, 2), default=48, help="tokens of each reply")
    add("--beta", type=number(float, 0), default=0.04, help="weight of the KL term; 0 skips the reference")
    add("--micro-batch", type=positive_int, default=2, help="prompts per forward pass of the update")
    add("--repeats", type=positive_int, default=3, help="runs of each, taking turns")
    add("--peer", action="append", choices=PEERS, default=[], help="also run this")
    add("--peer-dtype", choices=dtypes, help="the peers' dtype (else --dtype)")
    add("--scaling", action="store_true", help="the table of m against prompt lengths instead")
    add("--precision", metavar="ADAPTER", help="what bf16 does to this policy's log-probabilities instead")
    add("--seed", type=seed_int, default=0, help="of prompts and sampling")
    add("--json", metavar="FILE", help="write every run to a new file")
    add("--worker", choices=WORKERS, help=argparse.SUPPRESS)  # one run, as a process of its own
    args = parser.parse_args(argv)
    args.peer = list(dict.fromkeys(args.peer))
    if args.worker:
        result = WORKERS[args.worker](args)
        on_gpu = torch.device(args.device).type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_memory_gib()
        print("\n" + json.dumps(result | {"peak_memory_gib": memory}))
        return
    if args.precision:
        if args.peer or args.scaling or args.json:
            raise InputError("--precision times nothing: it takes no --peer, --scaling or --json")
        print(precision_table(args))
        return
    if args.json:
        refuse_existing(args.json)
    results = scaling(args) if args.scaling else beside_peers(args)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "runs": results})


if __name__ == "__main__":
    main()
