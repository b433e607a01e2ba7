"""ToMPO's prompts and rewards in TRL's GRPOTrainer, for those who outgrow one machine (docs/cluster.md).

    pip install -r requirements-bench.txt
    python -m tools.merge runs/tompo/sft/adapter --out merged           # the SFT policy: start, and pi_ref
    python -m bridges.trl_tompo --model merged --out runs/trl
    python eval.py --model merged --policy base runs/trl/adapter

Flags are those of train_rft.py, and --trl NAME=VALUE sets any field of TRL's GRPOConfig. The prompts of every
step, parser, rewards, memory, learning rates, clipping and KL are ours. What differs:
1. TRL's advantage is a A. A is ours, a = w sqrt((m - 1) / m) / (std of these weighted sums over the step).
   w is 1 in graph decisions; effort decisions have no R^G, so w is the weight of r^S alone, 0.8.
2. Groups without variance stay in the step (--idle-groups keep): they lower that std, and their KL counts.
3. No resume, no probe, no samples.jsonl. Replies are drawn with TRL's random numbers.
"""

import argparse
import json
import os
import sys

from fast.cpu import prepare_cpu
from models.load import load_policy
from policy import Policy
from prompts import parse_reply
from rewards import WEIGHTS, Memory, group_rewards
from run import ranks, training
from run.files import InputError, library_errors, positive_int, reports_errors
from run.rft_flags import add_rft_arguments, check_rft_arguments
from train_rft import Prompt, make_prompts, next_batch, reply_limit
from world.draws import named_numbers

try:
    from datasets import Dataset
    from peft import LoraConfig
    from torch.optim.lr_scheduler import LambdaLR
    from trl import GRPOConfig, GRPOTrainer
except ImportError as missing:
    print(f"error: {missing}; pip install -r requirements-bench.txt", file=sys.stderr)
    raise SystemExit(2) from None

OURS_ALONE = ("engine", "resume", "sft_adapter", "algo", "inner_epochs", "idle_groups", "credit", "objective")


class Rewards:
    """r^S and R^G as reward functions, and the memory of the game instances.

    TRL calls each of the two once per step, in every process with that process's replies: whole groups, side
    by side. After R^G the processes exchange their scores, so that all have one memory."""

    def __init__(self, args, policy: Policy, prompts: list[Prompt]):
        self.args, self.prompts, self.memory = args, prompts, Memory()
        self.decode, self.end_ids = policy.tokenizer.decode, policy.end_ids
        self.weights = WEIGHTS | named_numbers(args.reward, "--reward")

    def judged(self, completion_ids: list[list[int]], prompt_index: list[int]) -> list[tuple]:
        """(target, the terms of its m replies) of every group. TRL's texts lack special tokens, so replies
        are decoded here, as policy.py does."""
        m, found = self.args.m, []
        for i in range(0, len(prompt_index), m):
            (index,) = set(prompt_index[i : i + m])  # an error if TRL has split a group
            target, decisions = self.prompts[index].target, []
            for ids in completion_ids[i : i + m]:
                text = self.decode(ids[: -1 if ids[-1] in self.end_ids else None], skip_special_tokens=False)
                decisions.append(parse_reply(text, *target.place))
            best = self.memory.get(target.game.key)
            settings = dict(memory_best=best, weights=self.weights, score=self.args.graph_score)
            found.append((target, group_rewards(decisions, target, **settings)))
        return found

    def r_S(self, completion_ids, prompt_index, log_metric, **_) -> list[float]:
        judged = self.judged(completion_ids, prompt_index)
        for target, group in judged:
            for terms in group:  # TRL logs the mean of what it is told, over replies and processes
                log_metric("reward_graph" if target.kind == "G" else "reward_effort", terms["r_S"])
                log_metric("U1", float(terms["compliance"] > 0))
        return [terms["r_S"] for _, group in judged for terms in group]

    def R_G(self, completion_ids, prompt_index, log_metric, **_) -> list[float | None]:
        """None for effort decisions: TRL leaves it out of the weighted sum."""
        judged = self.judged(completion_ids, prompt_index)
        scores = [(t.game.key, [terms["s"] for terms in group]) for t, group in judged if t.kind == "G"]
        for key, of_group in sum(ranks.exchange(scores), []):  # only now: all groups of a step see the same
            self.memory.update(key, of_group)
        for s in sum((of_group for _, of_group in scores), []):
            log_metric("s", s)
        return [terms.get("R_G") for _, group in judged for terms in group]


class Trainer(GRPOTrainer):
    """With our learning rates: the warm-up of transformers begins with a step at rate 0."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rates)
        return self.lr_scheduler


def read(value: str):
    """true, 0.5, [1, 2] or null as JSON; anything else is a word."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def config_of(args) -> GRPOConfig:
    """Our objective in TRL's words, and then --trl. Every process gets whole groups. Raises InputError."""
    groups, world = sum(args.prompts), int(os.environ.get("WORLD_SIZE", 1))
    if groups % (world * args.micro_batch):
        split = f"{world} processes with --micro-batch {args.micro_batch}"
        raise InputError(f"--prompts: the {groups} groups of a step cannot be shared evenly by {split}")
    named = {name: value for name, _, value in (text.partition("=") for text in args.trl or ())}
    told = {name: read(value) for name, value in named.items()}
    with library_errors("--trl"):
        return GRPOConfig(**dict(
            output_dir=args.out, seed=args.seed, use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16",
            max_steps=min(args.steps, args.max_steps or args.steps), shuffle_dataset=False,
            per_device_train_batch_size=args.m * args.micro_batch, num_generations=args.m,
            gradient_accumulation_steps=groups // (world * args.micro_batch),
            multi_objective_aggregation="normalize_then_sum", reward_weights=list(args.level_weights),
            loss_type="grpo", beta=args.beta, epsilon=args.clip_eps[0], epsilon_high=args.clip_eps[-1],
            learning_rate=args.lr, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=training.MAX_GRAD_NORM,
            temperature=args.temperature, logging_steps=1, save_strategy="no", report_to="none",
        ) | told)  # fmt: skip


def make_trainer(args) -> tuple[Trainer, Rewards]:
    config = config_of(args)  # before the model, which DeepSpeed and FSDP want to know of while it is loaded
    if args.device == "cpu":
        prepare_cpu()  # TRL frees and asks for its activations at every step, as our fast engine does
    policy = load_policy(args.model, engine="plain")
    conversations = make_prompts(policy, training.load_records(args), args)
    config.max_completion_length = reply_limit(args, sum(conversations, []))
    steps = range(config.max_steps)
    prompts = [p for step in steps for p in next_batch(conversations, args.prompts, step, args.seed)]
    chats, rewards = [p.record.prompt for p in prompts], Rewards(args, policy, prompts)
    data = Dataset.from_dict({"prompt": chats, "prompt_index": range(len(prompts))})
    adapter = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=args.targets)
    functions, told = [rewards.r_S, rewards.R_G], dict(processing_class=policy.tokenizer, peft_config=adapter)
    trainer = Trainer(policy.model, functions, config, data, **told)
    trainer.rates = lambda step: training.learning_rate(step, args.steps, 1.0)
    return trainer, rewards


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="ToMPO's prompts and rewards in TRL's GRPOTrainer.")
    training.add_training_arguments(parser, "runs/trl")
    add_rft_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, help="longest reply (default: 20 + 7 N)")
    parser.add_argument("--trl", nargs="+", metavar="NAME=VALUE", help="fields of TRL's GRPOConfig")
    args = training.parse(parser, "bridges.trl_tompo", argv)
    check_rft_arguments(args)
    for name in OURS_ALONE:
        if getattr(args, name) != parser.get_default(name):
            advice = "merge it (tools.merge)" if name == "sft_adapter" else "it is train_rft.py's alone"
            raise InputError(f"the bridge has no --{name.replace('_', '-')}: {advice}")
    if args.graph_score == "joint":
        raise InputError("the bridge has no --graph-score joint: it is train_rft.py's alone")
    return args


@reports_errors
def main(argv=None) -> None:
    args = parse(argv)
    trainer, _ = make_trainer(args)
    with training.run_folder(args) as folder:
        trainer.train()
        trainer.save_state()
        trainer.save_model(str(folder / "adapter"))
    if ranks.first():
        print(f"adapter: {folder / 'adapter'}\nits steps: {folder / 'trainer_state.json'}")
        print(f"next: python eval.py --model {args.model} --policy base {folder / 'adapter'}")


if __name__ == "__main__":
    main()
