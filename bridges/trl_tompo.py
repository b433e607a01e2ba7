"""ToMPO's prompts and rewards in TRL's GRPOTrainer, for those who outgrow one machine (docs/cluster.md).

    pip install -r requirements-bench.txt
    python -m tools.merge runs/tompo/sft/adapter --out merged           # the SFT policy: start, and pi_ref
    python -m bridges.trl_tompo --model merged --out runs/trl
    python eval.py --model merged --policy base runs/trl/adapter

The flags are those of train_rft.py, and --trl NAME=VALUE sets any field of TRL's GRPOConfig. The prompts of
every step, parser, rewards, memory, learning rates, clipping and KL are ours. The differences are:
1. TRL's advantage is a A. A is ours, a = w sqrt((m - 1) / m) / (std of these weighted sums over the step).
   w is 1 in graph decisions; effort decisions have no R^G, so w is the weight of r^S alone, 0.8.
2. Groups without variance stay in the step: they lower that std, and their KL counts.
3. There is no resume, no probe and no samples.jsonl. Replies are drawn with TRL's random numbers.
"""

import os
import sys
from itertools import chain

from fast.cpu import prepare_cpu
from models.load import default_device, load_policy
from play.dataset import Prompt, make_prompts, trained_seats
from policy import Policy
from prompts import Reply, parse_reply
from rewards import Memory, Sample, Target
from run import ranks
from run.errors import InputError, library_errors, reports_errors
from run.files import run_folder
from run.values import named_values
from settings import RFT, Settings, parse_training, training_parser
from train_sft import MAX_GRAD_NORM, learning_rate

try:
    from datasets import Dataset
    from peft import LoraConfig
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import GenerationConfig
    from trl import GRPOConfig, GRPOTrainer
except ImportError as missing:
    print(f"error: {missing}; pip install -r requirements-bench.txt", file=sys.stderr)
    raise SystemExit(2) from None

FIXED = {"engine": ("fast",), "algo": ("tompo",), "sft_adapter": (None,), "inner_epochs": (1,)}
FIXED |= {"objective": (None,), "reward_from": ("expert", "welfare")}


class Rewards:
    """r^S and R^G as reward functions, and the memory of the game instances.

    TRL calls each of the two once per step, in every process with that process's replies: whole groups, side
    by side. After R^G the processes exchange their scores, so that all have the same memory."""

    def __init__(self, rft: RFT, policy: Policy, prompts: list[Prompt]):
        self.reward, self.m, self.memory = rft.reward, rft.m, Memory()
        self.targets = [prompt.target for prompt in prompts]
        self.decode, self.end_ids = policy.tokenizer.decode, policy.end_ids

    def rewarded(self, completion_ids, prompt_index) -> tuple[list[Target], list[list[Sample]]]:
        """The targets of all groups and their m replies with all terms. TRL's texts lack special tokens, so
        the replies are decoded here, as in policy.py."""
        targets, groups = [], []
        for i in range(0, len(prompt_index), self.m):
            (index,) = set(prompt_index[i : i + self.m])  # an error if TRL has split a group
            targets.append(self.targets[index])
            groups.append([self.sample(ids, targets[-1]) for ids in completion_ids[i : i + self.m]])
        self.reward(targets, groups, self.memory)
        return targets, groups

    def sample(self, ids: list[int], target: Target) -> Sample:
        ended = ids[-1] in self.end_ids
        text = self.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        return Sample(Reply(text, ids, [], ended), parse_reply(text, target.state, target.seat))

    def r_S(self, completion_ids, prompt_index, log_metric, **_) -> list[float]:
        targets, groups = self.rewarded(completion_ids, prompt_index)
        for target, group in zip(targets, groups, strict=True):
            for o in group:  # TRL logs the mean over replies and processes
                log_metric(f"reward_{target.kind.name}", o.rewards["r_S"])
                log_metric("U1", float(o.decision is not None))
        return [o.rewards["r_S"] for o in chain(*groups)]

    def R_G(self, completion_ids, prompt_index, log_metric, **_) -> list[float | None]:
        """None for effort decisions: TRL leaves it out of the weighted sum."""
        targets, groups = self.rewarded(completion_ids, prompt_index)
        for part in ranks.exchange((targets, groups)):  # only now: all groups of a step see the same memory
            self.memory.update(*part)
        for o in chain(*groups):
            if "s" in o.rewards:
                log_metric("s", o.rewards["s"])
        return [o.rewards.get("R_G") for o in chain(*groups)]


class Trainer(GRPOTrainer):
    """With our learning rates: the warm-up of transformers begins with a step at rate 0."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rates)
        return self.lr_scheduler


def make_config(settings: Settings) -> GRPOConfig:
    """Our objective as TRL names it, changed by --trl. Every process gets whole groups. Raises InputError."""
    rft, micro_batch, flags = settings.rft, settings.run.micro_batch, settings.flags
    groups, world = sum(rft.counts.values()), int(os.environ.get("WORLD_SIZE", 1))
    if groups % (world * micro_batch):
        split = f"{world} processes with --micro-batch {micro_batch}"
        raise InputError(f"--prompts: the {groups} groups of a step cannot be shared evenly by {split}")
    with library_errors("--trl"):
        return GRPOConfig(**dict(
            output_dir=settings.run.out, seed=settings.run.seed, use_cpu=default_device() == "cpu",
            bf16=settings.model.dtype == "bfloat16", max_steps=rft.steps, shuffle_dataset=False,
            per_device_train_batch_size=rft.m * micro_batch, num_generations=rft.m,
            gradient_accumulation_steps=groups // (world * micro_batch),
            multi_objective_aggregation="normalize_then_sum", reward_weights=[rft.w_sample, rft.w_graph],
            loss_type="grpo", beta=rft.beta, epsilon=flags["clip_eps"][0], epsilon_high=flags["clip_eps"][-1],
            learning_rate=rft.lr, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
            temperature=rft.temperature, logging_steps=1, save_strategy="no", report_to="none",
        ) | named_values(flags["trl"], "--trl"))  # fmt: skip


def make_trainer(settings: Settings) -> tuple[Trainer, Rewards]:
    config = make_config(settings)  # before the model, whose loading DeepSpeed and FSDP change
    if default_device() == "cpu":
        prepare_cpu()  # TRL frees and asks for its activations at every step, as our fast engine does
    rft, data, players, seed = settings.rft, settings.data, settings.players, settings.run.seed
    policy = load_policy(settings.model.name, engine="plain", template=settings.model.template_values)
    records = data.load(settings.games, players)
    trained = trained_seats(records, data.seat, seed)
    pool = make_prompts(policy, records, trained, rft.counts, players.style)
    steps = range(config.max_steps)
    prompts = [p for step in steps for p in rft.next_batch(pool, rft.counts, step, seed)]
    N = max(p.target.game.N for p in chain(*pool))
    config.max_completion_length = players.style.reply_limit(N)
    # Nothing of the model's own generation config (min_p, ...) may change what is sampled but its ends.
    names = {name: getattr(policy.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    policy.model.generation_config = GenerationConfig(eos_token_id=list(policy.end_ids), **names)
    config.chat_template_kwargs = policy.template.values | (config.chat_template_kwargs or {})
    chats = [policy.template.folded(p.record.prompt) for p in prompts]
    rewards = Rewards(rft, policy, prompts)
    table = Dataset.from_dict({"prompt": chats, "prompt_index": range(len(prompts))})
    rank, alpha, targets = settings.lora.rank, settings.lora.alpha, list(settings.lora.targets)
    others = dict(peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    others |= dict(processing_class=policy.tokenizer)
    trainer = Trainer(policy.model, [rewards.r_S, rewards.R_G], config, table, **others)
    trainer.rates = lambda step: learning_rate(step, rft.steps, 1.0)
    return trainer, rewards


def parse(argv=None) -> Settings:
    """Raises InputError for flags that the bridge cannot follow."""
    text = "ToMPO's prompts and rewards in TRL's GRPOTrainer."
    parser = training_parser(text, "runs/trl", RFT)
    parser.add_argument("--trl", nargs="+", metavar="NAME=VALUE", help="fields of TRL's GRPOConfig")
    settings = parse_training(parser, "bridges.trl_tompo", argv)
    if settings.run.resume:
        raise InputError("the bridge has no --resume: it is train_rft.py's alone")
    for name, values in FIXED.items():
        value = settings.flags[name]
        if value not in values:
            advice = "merge it (tools.merge)" if name == "sft_adapter" else "it is train_rft.py's alone"
            raise InputError(f"the bridge has no --{name.replace('_', '-')} {value}: {advice}")
    return settings


@reports_errors
def main(argv=None) -> None:
    settings = parse(argv)
    trainer, _ = make_trainer(settings)
    with run_folder(settings.run.out, settings.flags) as folder:
        trainer.train()
        trainer.save_state()
        trainer.save_model(str(folder / "adapter"))
    if ranks.first():
        print(f"adapter: {folder / 'adapter'}\nits steps: {folder / 'trainer_state.json'}")
        print(f"next: python eval.py --model {settings.model.name} --policy base {folder / 'adapter'}")


if __name__ == "__main__":
    main()
