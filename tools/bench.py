"""How fast one step is, stage by stage, against what the machine can do and against other software.

    python bench.py                                    # the reference work: 4 prompts of 400 tokens, 8 replies of 48
    python bench.py --peer trl --peer generate         # the same prompts, runs taking turns, ratio of medians
    python bench.py --scaling                          # m in 4..32 against prompts of 200..800 tokens
    python bench.py --precision runs/tompo/adapter     # what bf16 does to the log-probabilities of a trained policy

The work is one step of reinforcement fine-tuning: sample m replies of exactly --reply-tokens to each prompt, score
them with the reference, one forward and backward pass, one optimizer step. Prompts are random words that share no
beginning, and at temperature 1 replies to them soon part, so what is measured is the shared prompt and nothing else.
Every run is a process of its own, whose peak memory is its own. Its second step is what counts: the first also pays
for memory and kernels that the process keeps.

The floor of a stage is the time its needed operations take at the best matrix product speed measured in the same run
(for decoding: or the bytes of the weights at the measured copy bandwidth, whichever is more).

Peers (pip install -r requirements-bench.txt):
    trl        GRPOTrainer with PEFT on the same prompts, replies of the same length, the same beta
    generate   the rollouts alone, by transformers' generate with num_return_sequences = m
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import experts
import lora
import tompo
from fast.shared_prefix import pack
from models import pretrained
from models.pretrained import DEFAULT_MODEL
from policy import Policy, load_policy, put_adapter
from prompts import PromptStyle
from run import checkpoint
from run.files import InputError, number, positive_int, refuse_existing, reports_errors, seed_int, write_json
from train_rft import peak_memory_gib
from train_sft import make_optimizer, micro_batches, optimizer_step

STAGES = ("prompts", "decoding", "reference", "update", "optimizer")


def random_prompts(tokenizer, count: int, tokens: int, seed: int) -> list[str]:
    """Texts of exactly so many tokens: words that are one token each, in random order."""
    words = [
        i for i in range(len(tokenizer)) if (w := tokenizer.decode([i])).startswith(" ") and w[1:].isalpha()
    ]
    generator, texts = checkpoint.seeded(seed, 200), []
    while len(texts) < count:
        text = tokenizer.decode([words[i] for i in torch.randint(len(words), (tokens,), generator=generator)])
        if len(tokenizer.encode(text, add_special_tokens=False)) == tokens:
            texts.append(text)
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# our own step


def step(
    args, policy: Policy, optimizer, prompts: list[list[int]], m: int, reply_tokens: int
) -> dict[str, float]:
    """Seconds by stage of one step. The advantages are random: a step costs the same whatever they are."""
    seconds, clock = {}, time.perf_counter

    def synchronized():
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    start = synchronized()
    policy.sample(prompts, m, 1, 1.0, checkpoint.seeded(args.seed, 201))
    seconds["prompts"] = synchronized() - start
    start = synchronized()
    groups = policy.sample(prompts, m, reply_tokens, 1.0, checkpoint.seeded(args.seed, 201))
    seconds["decoding"] = synchronized() - start - seconds["prompts"]
    rows = pack(prompts, [[o.reply_ids for o in group] for group in groups])
    generator, weight = checkpoint.seeded(args.seed, 202), 1 / (len(prompts) * m * reply_tokens)
    seconds["reference"] = seconds["update"] = 0.0
    for part in micro_batches(rows, args.micro_batch):
        old = torch.tensor([v for r in part for i in r.prompts for o in groups[i] for v in o.sampled_logps])
        old = old.to(policy.device)
        start = synchronized()
        ref = torch.cat(policy.reference_logps(part)) if args.beta else None
        seconds["reference"] += synchronized() - start
        start = synchronized()
        advantages = torch.randn(len(old) // reply_tokens, generator=generator).repeat_interleave(
            reply_tokens
        )
        logp = torch.cat(policy.token_logps(part))
        weights = torch.full_like(logp, weight)
        tompo.objective_loss(logp, old, ref, advantages.to(policy.device), weights, 0.2, args.beta).backward()
        seconds["update"] += synchronized() - start
    start = synchronized()
    optimizer_step(optimizer, 1e-5, 1.0)
    seconds["optimizer"] = synchronized() - start
    return seconds


def needed(args, policy: Policy) -> dict[str, dict[str, float]]:
    """The operations each stage cannot do without (2 per multiply-add), and for decoding the bytes of the weights."""
    config, head = policy.model.config, policy.model.get_output_embeddings().weight.numel()
    layers = lora.lora_layers(policy.model).values()
    linear = sum(layer.base.weight.numel() for layer in layers)
    adapter = sum(layer.A.numel() + layer.B.numel() for layer in layers)
    P, p, m, s = args.prompts, args.prompt_tokens, args.m, args.reply_tokens
    pair = 4 * config.num_hidden_layers * config.hidden_size  # one query on one key: score and weighted sum
    tokens, targets = P * (p + m * (s - 1)), P * m * s
    reply_pairs = P * m * (s - 1) * (p + s / 2) * pair
    prompt_pairs = P * p**2 / 2 * pair
    rows = 2 * linear * tokens + prompt_pairs + reply_pairs
    size = policy.model.get_output_embeddings().weight.element_size()
    return {
        "prompts": {"flop": 2 * linear * P * p + prompt_pairs + 2 * head * P},
        "decoding": {
            "flop": 2 * (linear + head) * P * m * (s - 1) + reply_pairs,
            "bytes": (s - 1) * (linear + head) * size,
        },
        "reference": {"flop": (rows + 2 * head * targets) if args.beta else 0},
        # backward: the gradient of every input, not of frozen weights; A x and B^T g, and with them those of A and B
        "update": {"flop": 2 * rows + prompt_pairs + reply_pairs + 4 * adapter * tokens + 4 * head * targets},
        "optimizer": {"flop": 0},
    }


def peaks(policy: Policy) -> dict[str, float]:
    """The best matrix product (operations per second) and copy (bytes per second, read and write) of this machine."""
    device, dtype, best = policy.device, policy.model.dtype, {"flop": 0.0, "bytes": 0.0}

    def timed(function, repeats):
        function()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        best["flop"] = max(best["flop"], 2 * n**3 / timed(lambda: a @ b, 5))
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best["bytes"] = 2 * source.numel() * 4 / timed(lambda: target.copy_(source), 5)
    return best


def worker_tompo(args) -> dict:
    policy = load_policy(args.model, args.cache, getattr(torch, args.dtype), args.device)
    config = lora.LoRAConfig(args.rank, 2.0 * args.rank, lora.DEFAULT_TARGETS, policy.name)
    lora.inject(policy.model, config, checkpoint.seeded(args.seed, 203))
    policy.end_ids = []  # replies of exactly this length
    optimizer = make_optimizer(policy)
    texts = random_prompts(policy.tokenizer, args.prompts, args.prompt_tokens, args.seed)
    prompts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for _ in range(2):
        seconds = step(args, policy, optimizer, prompts, args.m, args.reply_tokens)
    return {"seconds": seconds, "needed": needed(args, policy), "peaks": peaks(policy)}


# ---------------------------------------------------------------------------------------------------------------------
# peers, as their users run them: without the settings of policy.prepare_cpu


def worker_generate(args) -> dict:
    model, tokenizer = pretrained.load(args.model, args.cache, getattr(torch, args.dtype), args.device)
    texts = random_prompts(tokenizer, args.prompts, args.prompt_tokens, args.seed)
    ids = torch.tensor(
        [tokenizer.encode(text, add_special_tokens=False) for text in texts], device=args.device
    )

    def run(ids, m, n):
        limits = dict(
            do_sample=True, min_new_tokens=n, max_new_tokens=n, num_return_sequences=m, top_k=0, top_p=1.0
        )
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
        assert out.shape == (len(ids) * m, ids.shape[1] + n)
        return time.perf_counter() - start

    run(ids, args.m, args.reply_tokens)
    return {"seconds": {"rollouts": run(ids, args.m, args.reply_tokens)}}


def worker_trl(args) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = pretrained.load(args.model, args.cache, getattr(torch, args.dtype), args.device)
    texts = random_prompts(tokenizer, args.prompts, args.prompt_tokens, args.seed)
    size, lengths, clock = args.prompts * args.m, [], {}
    passes = next(
        n
        for n in range(1, args.prompts + 1)
        if args.prompts % n == 0 and args.prompts // n <= args.micro_batch
    )

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
            output_dir=folder, max_steps=2, per_device_train_batch_size=size // passes, num_generations=args.m,
            gradient_accumulation_steps=passes,
            max_completion_length=args.reply_tokens, generation_kwargs={"min_new_tokens": args.reply_tokens},
            beta=args.beta, learning_rate=1e-5, temperature=1.0, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16", gradient_checkpointing=False, seed=args.seed,
        )  # fmt: skip
        adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=list(lora.DEFAULT_TARGETS))
        trainer = GRPOTrainer(
            model, reward, config, Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
            peft_config=adapter, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    if lengths != [args.reply_tokens] * 2 * size:
        raise InputError(f"TRL did other work: replies of {sorted(set(lengths))} tokens")
    return {"seconds": {"step": clock["end"] - clock["start"]}}


WORKERS = {"tompo": worker_tompo, "generate": worker_generate, "trl": worker_trl}


# ---------------------------------------------------------------------------------------------------------------------
# precision


def precision_table(args) -> str:
    """Log-probabilities of sampled replies (8 to each decision of seat 0 in 20 expert games): bf16 against fp32 on
    fp32's replies, and in each dtype the scored ones against those of sampling. Nats per token."""
    records = experts.simulate_many(20, "second-best", args.seed, PromptStyle(), (4, 4))
    chats, theirs = [r.prompt for r in records if r.seat == 0], None
    lines = [f"{'':12}{'law against fp32':>34}{'scored against sampled':>40}"]
    lines += [
        f"{'':12}{'mean |d|':>12}{'largest':>10}{'KL':>12}{'mean |d|':>16}{'largest':>10}{'off by 5 %':>14}"
    ]
    for name in ("float32", "bfloat16"):
        policy = load_policy(args.model, args.cache, getattr(torch, name), args.device)
        put_adapter(policy, args.precision)
        prompts = [policy.encode_prompt(chat) for chat in chats]

        def scored(groups):
            rows = pack(prompts, [[o.reply_ids for o in group] for group in groups])
            with torch.no_grad():
                logps = torch.cat([p for part in micro_batches(rows, 4) for p in policy.token_logps(part)])
            sampled = [v for row in rows for i in row.prompts for o in groups[i] for v in o.sampled_logps]
            return logps.cpu(), torch.tensor(sampled)

        groups = policy.sample(prompts, 8, 48, 1.0, checkpoint.seeded(args.seed, 204))
        logps, sampled = scored(groups)
        apart = (logps - sampled).abs()
        off = (apart.exp() > 1.05).float().mean()
        theirs = theirs or (groups, logps)
        on_theirs = logps if theirs[0] is groups else scored(theirs[0])[0]
        d, kl = on_theirs - theirs[1], tompo.k3(theirs[1], on_theirs).mean()
        lines.append(
            f"{name:12}{d.abs().mean():>12.1e}{d.abs().max():>10.2f}{kl:>12.1e}{apart.mean():>16.1e}{apart.max():>10.2f}{off:>14.2%}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# runs and tables


def run(args, worker: str, **changes) -> dict:
    """One run in a process of its own: what the worker returns, and its peak memory in GiB."""
    values = vars(args) | changes | {"worker": worker}
    flags = []
    for name in ("model", "cache", "device", "dtype", "rank", "prompts", "prompt_tokens", "m", "reply_tokens", "beta",
                 "micro_batch", "seed", "worker"):  # fmt: skip
        if values[name] is not None:
            flags += [f"--{name.replace('_', '-')}", str(values[name])]
    done = subprocess.run([sys.executable, "-m", "tools.bench", *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"the {worker} run failed; what it said stands above")
    return json.loads(done.stdout.splitlines()[-1])


def stage_table(args, runs: list[dict]) -> str:
    median = {s: statistics.median(r["seconds"][s] for r in runs) for s in STAGES}
    tokens = {
        "prompts": args.prompts * args.prompt_tokens,
        "decoding": args.prompts * args.m * (args.reply_tokens - 1),
    }
    tokens["reference"] = tokens["update"] = sum(tokens.values())
    lines = [f"{'stage':12}{'seconds':>9}{'share':>8}{'tokens/s':>10}{'floor s':>9}{'of floor':>10}"]
    for s in STAGES:
        floors = [max(r["needed"][s][k] / r["peaks"][k] for k in r["needed"][s]) for r in runs]
        reached = statistics.median(
            floor / r["seconds"][s] if r["seconds"][s] else 0 for floor, r in zip(floors, runs)
        )
        speed = f"{tokens[s] / median[s]:.0f}" if s in tokens and median[s] else "-"
        floor = f"{statistics.median(floors):>9.2f}{reached:>10.0%}" if any(floors) else f"{'-':>9}{'-':>10}"
        lines.append(f"{s:12}{median[s]:>9.2f}{median[s] / sum(median.values()):>8.0%}{speed:>10}{floor}")
    whole = statistics.median(sum(r["seconds"].values()) for r in runs)
    memory = statistics.median(r["peak_memory_gib"] for r in runs)
    peak = {k: statistics.median(r["peaks"][k] for r in runs) / 1e9 for k in ("flop", "bytes")}
    lines.append(f"{'step':12}{whole:>9.2f}   peak memory {memory:.1f} GiB")
    lines.append(f"measured peaks: {peak['flop']:.0f} GFLOP/s, {peak['bytes']:.1f} GB/s")
    return "\n".join(lines)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Time one step of reinforcement fine-tuning, beside its peers."
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="Hugging Face id or folder of a causal chat model"
    )
    parser.add_argument("--cache", help="folder for the default model (else $TOMPO_CACHE or ~/.cache/tompo)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights"
    )
    parser.add_argument("--rank", type=positive_int, default=64, help="LoRA rank")
    parser.add_argument("--prompts", type=positive_int, default=4, help="prompts per step")
    parser.add_argument("--prompt-tokens", type=positive_int, default=400, help="tokens of each prompt")
    parser.add_argument("--m", type=positive_int, default=8, help="replies per prompt")
    parser.add_argument("--reply-tokens", type=number(int, 2), default=48, help="tokens of each reply")
    parser.add_argument(
        "--beta", type=number(float, 0), default=0.04, help="weight of the KL term; 0 skips the reference"
    )
    parser.add_argument(
        "--micro-batch", type=positive_int, default=2, help="prompts per forward pass of the update"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="runs of each, taking turns")
    parser.add_argument(
        "--peer", action="append", choices=("trl", "generate"), default=[], help="also run this"
    )
    parser.add_argument(
        "--peer-dtype", choices=("float32", "bfloat16"), help="the peers' dtype (else --dtype)"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="the table of m against prompt lengths instead"
    )
    parser.add_argument(
        "--precision", metavar="ADAPTER", help="what bf16 does to this policy's log-probabilities instead"
    )
    parser.add_argument("--seed", type=seed_int, default=0, help="of prompts and sampling")
    parser.add_argument("--json", metavar="FILE", help="write every run to a new file")
    parser.add_argument(
        "--worker", choices=WORKERS, help=argparse.SUPPRESS
    )  # one run, as a process of its own
    args = parser.parse_args(argv)
    if args.worker:
        result = WORKERS[args.worker](args)
        on_gpu = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else None
        print(
            "\n" + json.dumps(result | {"peak_memory_gib": peak_memory_gib() if on_gpu is None else on_gpu})
        )
        return
    if args.precision:
        if args.peer or args.scaling or args.json:
            raise InputError("--precision times nothing: it takes no --peer, --scaling or --json")
        print(precision_table(args))
        return
    if args.json:
        refuse_existing(args.json)
    results: dict[str, list[dict]] = {}
    if args.scaling:
        print(
            f"seconds of a step (medians of {args.repeats}), {args.prompts} prompts, replies of {args.reply_tokens} tokens"
        )
        print(f"{'prompt tokens':14}" + "".join(f"{f'm = {m}':>10}" for m in (4, 8, 16, 32)))
        for p in (200, 400, 800):
            print(f"{p:<14}", end="", flush=True)
            for m in (4, 8, 16, 32):
                runs = [run(args, "tompo", prompt_tokens=p, m=m) for _ in range(args.repeats)]
                results[f"p={p} m={m}"] = runs
                print(
                    f"{statistics.median(sum(r['seconds'].values()) for r in runs):>10.2f}",
                    end="",
                    flush=True,
                )
            print()
    else:
        for _ in range(args.repeats):
            results.setdefault("tompo", []).append(run(args, "tompo"))
            for peer in dict.fromkeys(args.peer):
                results.setdefault(peer, []).append(run(args, peer, dtype=args.peer_dtype or args.dtype))
        print(stage_table(args, results["tompo"]))
        for peer in dict.fromkeys(args.peer):
            ours = STAGES[:2] if peer == "generate" else STAGES
            own = statistics.median(sum(r["seconds"][s] for s in ours) for r in results["tompo"])
            other = statistics.median(sum(r["seconds"].values()) for r in results[peer])
            memory = statistics.median(r["peak_memory_gib"] for r in results[peer])
            what = "rollouts" if peer == "generate" else "whole step"
            print(f"{peer} ({args.peer_dtype or args.dtype}): {what} {other:.2f} s, ours {own:.2f} s, ratio of medians "
                  f"{other / own:.1f}; its peak memory {memory:.1f} GiB")  # fmt: skip
    if args.json:
        write_json(args.json, {"arguments": vars(args), "runs": results})


if __name__ == "__main__":
    main()
