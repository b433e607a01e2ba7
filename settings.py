"""Settings: the flags of training, and those that scripts share, are defined, parsed and checked here, once,
before anything is computed. (eval.py and the tools add a few of their own.)

The result is a small frozen dataclass for each group of flags. A flag is a field with its type, default and
meaning (run/flags.py; docs/settings.md explains all of them). If a flag is a name (--expert), a property or
another field holds what it names (Players.expert). Functions below the scripts take one of these groups or
single values; none of them reads flags. RUN/config.json holds the flags as they were given, so that a
resumed run passes the same checks.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import lora
from experts import Expert
from games import GAMES, KINDS, MAX_AGENTS
from models import adapters
from models.load import DTYPES, ENGINES, default_device, dtype_name, load_policy, say_speed
from models.pretrained import DEFAULT_MODEL
from play import dataset
from play.cast import Partners, make_expert
from play.records import check_games, check_seats, check_style, read_records
from play.rft_log import LOGGED
from policy import Policy
from prompts import PromptStyle
from rewards import TERMS, WEIGHTS, expert_rewards, graph_likeness
from run import ranks, values
from run.errors import one_line, refuse
from run.flags import add_flags, flag, from_flags, parse_run
from teachers import language
from teachers.asking import asking, with_record
from variants import credit, game, joint
from variants.objective import TABLES, choose
from world.draws import TYPE_PATTERNS, Family
from world.families import families_of, patterns_and_types

Words = tuple[str, ...]  # of a flag that takes several
Counts = tuple[int, ...]
YES_NO = argparse.BooleanOptionalAction
# What --help says of tables to which a file of your own may add: functions, called when a parser is made.
kind_names = lambda: [kind.name for kind in KINDS.values()]
nouns = lambda: " and ".join(kind.noun for kind in KINDS.values())
kind_letters = lambda: ", ".join(f"{kind.letter} {kind.noun}" for kind in KINDS.values())
fixable = lambda: "; ".join(f"{name}: {', '.join(game.fixable)}" for name, game in GAMES.items())
table_names = lambda: "; ".join(f"{name}: {', '.join(table)}" for name, table in TABLES.items())


@dataclass(frozen=True)
class Model:
    """Which model, and how it is computed."""

    title = "model"
    name: str = flag("--model", DEFAULT_MODEL, "Hugging Face id or folder of a causal chat model")
    dtype: str = flag(
        "--dtype DTYPE", "float32", f"of frozen weights: {', '.join(DTYPES)}; auto: see docs", dtype_name
    )
    engine: str = flag("--engine", "fast", "plain: policy.py itself, slow and short", choices=ENGINES)
    template: tuple[str, ...] | None = flag(
        "--template NAME=VALUE ...", None, "what the chat template is given, such as enable_thinking=false"
    )

    @cached_property
    def template_values(self) -> dict[str, Any]:
        return values.named_values(self.template, "--template")

    def load(self) -> Policy:
        """The base model as a policy, on this process's device. The first process loads it first, because
        it may have to fetch and convert the default model."""
        device = ranks.own_device(default_device())
        if device == "cpu":
            say_speed(self.dtype)
        with ranks.first_goes_first():
            return load_policy(self.name, self.dtype, device, self.engine, self.template_values)


@dataclass(frozen=True)
class Games:
    """Which games are drawn. Several games or stages take turns."""

    title = "game"
    game: Words = flag("--game ...", ("bcz",), "bcz: network game; pgg: public goods game", choices=GAMES)
    stages: Words = flag("--stages ...", ("GE",), lambda: f"such as GE GEE: {kind_letters()}")
    rounds: int = flag("--rounds", 1, "rounds T of a game", values.number(int, 1, 100))
    types: Words | None = flag("--types ...", None, f"{', '.join(TYPE_PATTERNS)} or numbers (else drawn)")
    fix: Words | None = flag("--fix NAME=VALUE ...", None, lambda: f"not drawn: {fixable()}; all: fee")

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The families of instances, which take turns."""
        patterns, types = patterns_and_types(self.types)
        known = [*(parameter for name in self.game for parameter in GAMES[name].fixable), "fee"]
        fixed = values.named_numbers(self.fix, "--fix", known)
        return families_of(self.game, self.stages, self.rounds, patterns, types, fixed)


@dataclass(frozen=True)
class Players:
    """Who sits in the other seats, and what agents read and answer."""

    title = "players"
    expert_name: str = flag("--expert", "second-best", "the teacher and the other seats (see experts.py)")
    partner_names: Words | None = flag(
        "--partners EXPERT ...", None, "rules in other seats; self: the policy"
    )
    ask: Words | None = flag("--ask NAME=VALUE ...", None, "see docs/language-model-experts.md")
    information: str = flag("--information", "full", "whose types an agent knows", choices=("full", "local"))
    belief: bool = flag("--belief", True, "ask for a Belief line", action=YES_NO)
    hints: bool = flag("--hints", True, "worked numbers in prompts", action=YES_NO)
    max_new_tokens: int | None = flag(
        "--max-new-tokens", None, "default: 20 + 7 N + --think", values.positive_int
    )
    think: int = flag("--think TOKENS", 0, "more, for free text before the two lines", values.count)

    @cached_property
    def style(self) -> PromptStyle:
        return PromptStyle(self.information, self.belief, self.hints, self.max_new_tokens, self.think)

    @cached_property
    def expert(self) -> Expert:
        """The teacher, and the player of the other seats where there are no partners."""
        return self.make_expert(self.expert_name)

    @property
    def self_play(self) -> bool:
        """Whether RFT takes its prompts from games of the policy with itself (play/self_play.py)."""
        return self.partner_names == ("self",)

    @cached_property
    def partners(self) -> Partners | None:
        """Who sits in the other seats instead of the expert."""
        if not self.partner_names or self.self_play:
            return None
        words = {word for name in self.partner_names for word in name.split(":")}
        refuse(words & {"openai", "hf"}, "--partners takes exact experts (see experts.py)")
        return Partners([self.make_expert(name) for name in self.partner_names])

    def check_seat(self, seat: int | str) -> None:
        """Raises InputError if the partners do not go with this seat of the policy."""
        text = "--partners self goes with --seat all, and other --partners with a seat or random"
        refuse(self.partner_names and self.self_play != (seat == "all"), text)

    @property
    def others(self) -> Expert:
        """Who plays the seats that are not the policy's."""
        return self.partners or self.expert

    def make_expert(self, name: str) -> Expert:
        """The expert of this name."""
        return make_expert(name, partial(language.make, asking=asking(self.ask, self.style)))


@dataclass(frozen=True)
class Data:
    """What SFT imitates, and the prompts of RFT."""

    title = "expert games"
    seed: int  # of the run
    games: int | str = flag(
        "--games N|FILE",
        126,
        "how many [source: 126], or a file of tools.expert_games",
        values.number_or_path,
    )
    agents: tuple[int, int] = flag("--agents N|A-B", (4, 4), "a game", values.number_or_range(2, MAX_AGENTS))
    seat: int | str = flag(
        "--seat SEAT|random|all",
        0,
        "the policy's, from 0 [source: 0]; random: one drawn for each game; all: every seat",
        values.number_or_word("random", "all"),
    )
    noise: float = flag("--noise", 0.15, "share of random decisions (without partners)", values.share)

    def __post_init__(self):
        too_high, fewest = isinstance(self.seat, int) and self.seat >= self.agents[0], self.agents[0]
        refuse(too_high, f"--seat {self.seat} must be below the number of agents, {fewest} in some games")

    def load(self, games: Games, players: Players) -> list[dataset.Record]:
        """The records of all seats."""
        if isinstance(self.games, str):
            records = read_records(self.games)
            check_seats(self.games, records, players.partners is not None, self.seat, self.seed)
            check_games(self.games, records, games.families)
            check_style(self.games, records, players.style, players.partners)
            return records
        return self.simulate(games, players, self.games)

    def simulate(self, games: Games, players: Players, count: int, split: str = "train"):
        """`count` games of a split."""
        players.check_seat(self.seat)
        drawn = self.agents, split, games.families, self.noise, players.partners, self.seat
        return dataset.simulate_many(count, players.expert, self.seed, players.style, *drawn)


@dataclass(frozen=True)
class LoRA:
    """The adapter of each stage: h = W x + (alpha / r) B A x."""

    title = "LoRA"
    rank: int = flag("--rank", 32, "LoRA rank r", values.number(int, 1, 4096))
    alpha: float = flag("--lora-alpha", 64.0, "LoRA alpha; the scaling is alpha / r", values.positive)
    targets: Words = flag("--targets ...", lora.DEFAULT_TARGETS, "names of the adapted layers")


BOTH = "both", "format"  # values of --train-on for both kinds of decision


@dataclass(frozen=True)
class SFT:
    """The first stage: imitate the expert's replies."""

    title = "supervised fine-tuning"
    train_on: str = flag(
        "--train-on", "both", "format: both, without what is decided", choices=lambda: (*kind_names(), *BOTH)
    )
    label_noise: float = flag("--label-noise RATE", 0.5, "share of random labels of links", values.share)
    steps: int = flag("--sft-steps", 40, "optimizer steps", values.positive_int)
    batch: int = flag("--sft-batch", 4, "conversations per step", values.positive_int)
    lr: float = flag("--sft-lr", 1e-3, "peak learning rate (warm-up, then cosine to 0)", values.non_negative)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The letters of the decisions that are imitated."""
        return tuple(kind.letter for kind in KINDS.values() if self.train_on in (kind.name, *BOTH))


LEVELS = {"A_S": 0.8, "A_G": 0.2}  # the weights of the two levels of advantage [source]
KNOWN_WEIGHTS = {**WEIGHTS, **LEVELS, **credit.WEIGHTS}
all_weights = lambda: ", ".join(f"{w}={KNOWN_WEIGHTS.get(w, 0):g}" for w in {**KNOWN_WEIGHTS, **TERMS})


@dataclass(frozen=True)
class RFT:
    """The second stage: sample, reward, compare within groups, step. See rewards.py and tompo.py."""

    title = "reinforcement"
    reward: Callable  # writes r^S and R^G into the samples of a step
    next_batch: Callable  # the prompts of a step
    advantage: Callable  # this and the next four are functions of variants/objective.py
    aggregation: Callable
    loss: Callable
    ratio: Callable
    kl: Callable
    w_sample: float  # the weight of A^S where a decision has an R^G
    w_graph: float  # the weight of A^G
    seed: int  # this and the next are those of the run
    micro_batch: int
    reward_from: str = flag(
        "--reward-from",
        "expert",
        "likeness to the expert; s by welfare; game: payoffs; credit: returns; joint: one graph (variants/)",
        choices=("expert", "welfare", "game", "credit", "joint"),
    )
    weights: Words | None = flag("--weights NAME=NUMBER ...", None, lambda: f"of rewards: {all_weights()}")
    clip_eps: tuple[float, ...] = flag(
        "--clip-eps ...", (0.2,), "how far rho may leave 1", values.non_negative
    )
    beta: float = flag("--beta", 0.04, "weight of KL(pi, pi_ref); 0 skips the reference", values.non_negative)
    objective: Words | None = flag("--objective NAME=CHOICE ...", None, lambda: f"variants: {table_names()}")
    algo: str = flag("--algo", "tompo", "grpo is the sample level alone", choices=("tompo", "grpo"))
    sft_adapter: str | None = flag(
        "--sft-adapter FOLDER", None, "to start from, not from a new one (A+B: a chain)", adapters.whole_paths
    )
    steps: int = flag("--steps", 20, "optimizer steps (sampling rounds)", values.positive_int)
    prompt_counts: Counts = flag("--prompts N ...", (8, 2), lambda: f"per step: {nouns()}", values.count)
    m: int = flag("--m", 8, "replies per prompt: the group", values.number(int, 2))
    lr: float = flag("--lr", 2e-4, "peak learning rate (warm-up, then cosine to 0)", values.non_negative)
    inner_epochs: int = flag("--inner-epochs", 1, "optimizer steps on the same samples", values.positive_int)
    temperature: float = flag("--temperature", 1.0, "of sampling and every log-probability", values.positive)

    @property
    def clip(self) -> tuple[float, float]:
        """The range of rho."""
        return 1 - self.clip_eps[0], 1 + self.clip_eps[-1]

    @property
    def counts(self) -> dict[str, int]:
        """Prompts per step, by the letter of their kind."""
        return dict(zip(KINDS, self.prompt_counts, strict=False))


def resolve_rft(args: argparse.Namespace, players: Players) -> RFT:
    """The flags of RFT and the functions that they name. Raises InputError for what does not go together."""
    given = values.named_numbers(args.weights, "--weights", {**KNOWN_WEIGHTS, **TERMS})
    weights, source = KNOWN_WEIGHTS | given, args.reward_from
    for term in TERMS:
        refuse(term in LOGGED, f"the reward term {term} has a name that the logs use; give it another")
    refuse(weights["belief"] and not args.belief, "--weights belief and --no-belief do not go together")
    wrong = len(args.prompts) > len(KINDS) or not any(args.prompts)
    refuse(wrong, f"--prompts takes a number for {nouns()}, at least one of them above 0")
    refuse(
        len(args.clip_eps) > 2, "--clip-eps takes one number, or two: how far rho may go below 1 and above"
    )
    both_levels = args.algo == "grpo" and given.keys() & LEVELS.keys()
    refuse(both_levels, "--algo grpo is --weights A_S=1 A_G=0: give neither")
    unused = source != "credit" and given.keys() & credit.WEIGHTS.keys()
    refuse(unused, f"--weights {' '.join(credit.WEIGHTS)} go with --reward-from credit")
    one_graph = "--reward-from joint asks all seats of a game at once: give --seat all"
    refuse(source == "joint" and args.seat != "all", one_graph)
    refuse(source != "game" and players.self_play, "--partners self has no expert: give --reward-from game")
    if source == "credit":
        refuse(players.expert.language, "--reward-from credit plays to the end: choose an exact --expert")
        refuse(
            args.partners, "--reward-from credit plays on with the expert in all seats: leave out --partners"
        )
    rewards: dict[str, Callable] = {
        "expert": partial(expert_rewards, score=graph_likeness),
        "welfare": partial(expert_rewards, score=game.welfare),
        "game": game.game_rewards,
        "credit": partial(credit.credit_rewards, expert=players.expert, seed=args.seed),
        "joint": joint.joint_rewards,
    }
    made: dict[str, Any] = choose(args.objective) | {"reward": partial(rewards[source], weights=weights)}
    made["next_batch"] = joint.next_batch if source == "joint" else dataset.next_batch
    levels = (1.0, 0.0) if args.algo == "grpo" else (weights["A_S"], weights["A_G"])
    made |= {"w_sample": levels[0], "w_graph": levels[1], "seed": args.seed, "micro_batch": args.micro_batch}
    return from_flags(RFT, args, **made)


@dataclass(frozen=True)
class Evaluation:
    """Held-out games, the same for all policies."""

    title = "evaluation"
    agents: int = 4  # of each game
    games: int = flag("--eval-games", 60, "games of the grid (evenly spread; 0: none)", values.count)
    seat: int | str = 0  # the policy's, `random` or `all`
    temperature: float = 1.0
    seed: int = 0  # of the experts' draws, the same for all training runs


@dataclass(frozen=True)
class Playing(Evaluation):
    """Held-out games, the same for all policies."""

    agents: int = flag("--agents", 4, "agents of the games", values.number(int, 2, MAX_AGENTS))
    games: int = flag("--eval-games", 60, "games of the grid (evenly spread; 60 = all)", values.positive_int)
    temperature: float = flag("--eval-temperature", 1.0, "0 is greedy; 1 as in training", values.non_negative)
    seed: int = flag("--eval-seed", 0, "of sampling and of the experts' draws", values.seed_int)

    def __post_init__(self):
        too_high = isinstance(self.seat, int) and self.seat >= self.agents
        refuse(too_high, f"--seat {self.seat} must be below --agents, which is {self.agents}")


@dataclass(frozen=True)
class Run:
    """Folder, preset, resuming, seed and memory."""

    title = "run"
    out: str = flag("--out", "runs/tompo", "the run folder")
    preset: str = flag("--preset", "small", "defaults (docs/settings.md)", choices=lambda: list(PRESETS))
    resume: str | None = flag("--resume RUN", None, "continue this run with its own settings")
    seed: int = flag("--seed", 0, "of data, adapters, order and sampling", values.seed_int)
    micro_batch: int = flag("--micro-batch", 2, "prompts or packs a pass (for memory)", values.positive_int)


# The defaults, those of `small`, are for SmolLM2-135M on two CPU cores. The paper's values:
PAPER = dict(model="Qwen/Qwen2.5-7B-Instruct", rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, games=126)
PAPER |= dict(agents=(4, 8), train_on="effort", label_noise=0.0)
# [choice]: the paper leaves the learning rate of RFT open; in bfloat16 the model fits into a GPU of 80 GB.
PAPER |= dict(lr=1e-5, dtype="bfloat16")
# Partners whom it pays to read, and rewards from the game alone (docs/others.md), on two CPU cores:
OTHERS = dict(partners=["second-best", "always-link", "never-link", "selfish"], rounds=3)
OTHERS |= dict(fix=["c=0.12", "fee=1"], expert="random", label_noise=0.0)
OTHERS |= dict(sft_steps=16, steps=12, reward_from="game", dtype="auto")  # the last for time
PRESETS: dict[str, dict[str, Any]] = {"small": {}, "paper": PAPER, "others": OTHERS}


@dataclass(frozen=True)
class Settings:
    """All groups; those that a script has no flags for are None. flags: what config.json holds."""

    model: Model
    games: Games
    players: Players
    evaluation: Evaluation
    data: Data
    lora: LoRA
    sft: SFT
    rft: RFT
    run: Run
    flags: dict

    def load_model(self) -> Policy:
        """The model that a run trains. InputError: as in `keep`, of its chat template."""
        policy = self.model.load()
        self.keep("chat_template_sha256", policy.template.checksum, "chat template, --template or date in it")
        return policy

    def load_data(self) -> list[dataset.Record]:
        """The records of the expert games. InputError: as in `keep`."""
        records = self.data.load(self.games, self.players)
        read = json.dumps([[r.prompt, r.label] for r in records]).encode()
        self.keep("expert_games_sha256", hashlib.sha256(read).hexdigest(), "expert games")
        return records

    def keep(self, name: str, now: str, what: str) -> None:
        """Keeps the checksum of what a run reads with its flags. InputError: a run that is resumed began with
        another one."""
        then = self.flags.setdefault(name, now)
        advice = f"take those of that time, or remove {name} from its config.json to go on all the same"
        refuse(then != now, f"{self.run.resume} began with another {what}; {advice}")


def training_parser(description: str, out: str, *more: type) -> argparse.ArgumentParser:
    """The flags that all training scripts share, and those of more groups. out: the default run folder."""
    parser = argparse.ArgumentParser(description=description)
    add_flags(parser, Model, Games, Players, Data, LoRA, SFT, Run, *more)
    parser.set_defaults(out=out)
    return parser


def parse_training(parser: argparse.ArgumentParser, script: str, argv=None) -> Settings:
    """The settings of a training script, whether it starts a run or resumes one."""
    args, resume = parse_run(parser, script, PRESETS, argv)
    then = getattr(args, "versions", versions())
    if then != versions():
        began = f"{resume} began with {one_line(then, 100)} and goes on with {versions()}"
        print(f"warning: {began}; it may end in other numbers than without the stop")
    return resolve(args, script, resume)


def resolve(args: argparse.Namespace, script: str = "", resume: str | None = None) -> Settings:
    """The settings of any script, from the groups of flags that it has. Raises InputError for flags that do
    not go together."""
    groups: dict[str, Any] = dict.fromkeys(field.name for field in fields(Settings))
    players = groups["players"] = from_flags(Players, args)
    groups |= {"model": from_flags(Model, args), "games": from_flags(Games, args)}
    # These complain of their flags now, and not in use.
    _ = players.expert, players.partners, groups["games"].families, groups["model"].template_values
    if hasattr(args, "eval_games"):
        players.check_seat(args.seat)
    if hasattr(args, "eval_seed"):
        groups["evaluation"] = from_flags(Playing, args, seat=args.seat)
    elif hasattr(args, "eval_games"):  # with the fewest agents that the run trains with, and in its seat
        seat = 0 if args.seat == "all" and not players.self_play else args.seat
        groups["evaluation"] = from_flags(Evaluation, args, agents=args.agents[0], seat=seat)
    if hasattr(args, "train_on"):
        groups |= {"data": from_flags(Data, args, seed=args.seed), "lora": from_flags(LoRA, args)}
        groups |= {"sft": from_flags(SFT, args), "run": from_flags(Run, args, resume=resume)}
    if hasattr(args, "algo"):
        groups["rft"] = resolve_rft(args, players)
    if players.expert.language:  # the path of its record must hold in another folder, too
        args.ask = with_record(args.ask)
    run = {"script": script, "versions": versions()} if script else {}
    return Settings(**groups | {"flags": vars(args) | run})


def versions() -> str:
    """Of the libraries whose numbers may differ from version to version."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
