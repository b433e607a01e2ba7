"""Settings: every flag of the scripts is defined, parsed and checked here, once, before anything is computed.

The result is a few small frozen dataclasses, one for each group of flags. A flag is a field: it says its
type, its default and what it means (run/flags.py). The title and the docstring of the class stand above its
flags in --help. Where flags are names or texts, a property or another field holds what they stand for: the
expert and not its name, the functions of the objective and not theirs. Functions below the scripts take one
of these groups, or single values; none of them sees the flags again.

RUN/config.json holds the flags as they were given, so that a resumed run passes the same checks.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import lora
import tompo
from experts import Expert, Partners, make_expert
from games import GAMES, KINDS, MAX_AGENTS
from models import adapters
from models.load import ENGINES, default_device, load_policy
from models.pretrained import DEFAULT_MODEL
from play import dataset
from play.rft_log import LOGGED
from policy import Policy
from prompts import PromptStyle
from rewards import TERMS, WEIGHTS, expert_rewards, graph_likeness, welfare
from run import ranks, values
from run.errors import InputError
from run.flags import add_flags, flag, from_flags, parse_run
from teachers import language
from teachers.asking import asking, with_record
from variants import credit, game, joint
from variants.objective import choose
from world.draws import TYPE_PATTERNS, Family, families_of, patterns_and_types

YES_NO = argparse.BooleanOptionalAction
# What --help says of tables to which a file of your own may add: functions, called when a parser is made.
kind_names = lambda: [kind.name for kind in KINDS.values()]
kind_letters = lambda: ", ".join(f"{kind.letter} {kind.noun}" for kind in KINDS.values())
fixable = lambda: "; ".join(f"{name}: {', '.join(game.fixable)}" for name, game in GAMES.items())
table_names = lambda: "; ".join(f"{name}: {', '.join(table)}" for name, table in tompo.TABLES.items())


@dataclass(frozen=True)
class Model:
    """Which model, and how it is computed."""

    title = "model"
    name: str = flag("--model", DEFAULT_MODEL, "Hugging Face id or folder of a causal chat model")
    dtype: str = flag("--dtype", "float32", "of the frozen weights", choices=("float32", "bfloat16"))
    engine: str = flag("--engine", "fast", "plain: policy.py itself, slow and short", choices=ENGINES)
    template: tuple[str, ...] | None = flag(
        "--template NAME=VALUE ...", None, "what the chat template is given, such as enable_thinking=false"
    )

    @property
    def device(self) -> str:
        return default_device()

    def load(self) -> Policy:
        """The base model as a policy, on this process's device. The first process loads it first, because
        it may have to fetch and convert the default model."""
        with ranks.first_goes_first():
            device, template = ranks.own_device(self.device), values.named_values(self.template)
            return load_policy(self.name, self.dtype, device, self.engine, template)


@dataclass(frozen=True)
class Games:
    """Which games are drawn. Several games or stages take turns."""

    title = "game"
    game: tuple[str, ...] = flag(
        "--game ...", ("bcz",), "bcz: network game; pgg: public goods game", choices=GAMES
    )
    stages: tuple[str, ...] = flag(
        "--stages ...", ("GE",), lambda: f"of a round, such as GE GEE GGE: {kind_letters()}"
    )
    rounds: int = flag("--rounds", 1, "rounds T of a game", values.number(int, 1, 100))
    types: tuple[str, ...] | None = flag(
        "--types ...",
        None,
        f"alpha, endowments: {', '.join(TYPE_PATTERNS)}, or numbers, one for all or one for each seat "
        "(else drawn)",
    )
    fix: tuple[str, ...] | None = flag(
        "--fix NAME=VALUE ...", None, lambda: f"parameters that are not drawn ({fixable()}; all: fee)"
    )

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
    partner_names: tuple[str, ...] | None = flag(
        "--partners EXPERT ...",
        None,
        "rules, from which that of each other seat is drawn (default: the expert); self: the policy",
    )
    ask: tuple[str, ...] | None = flag(
        "--ask NAME=VALUE ...",
        None,
        "how a language model is asked, such as attempts=3 budget=20 (docs/language-model-experts.md)",
    )
    information: str = flag("--information", "full", "whose types an agent knows", choices=("full", "local"))
    belief: bool = flag("--belief", True, "ask for a Belief line", action=YES_NO)
    hints: bool = flag("--hints", True, "worked numbers in prompts", action=YES_NO)
    max_new_tokens: int | None = flag(
        "--max-new-tokens", None, "longest reply (default: 20 + 7 N)", values.positive_int
    )

    @cached_property
    def style(self) -> PromptStyle:
        return PromptStyle(self.information, self.belief, self.hints, self.max_new_tokens)

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
        if any({"openai", "hf"} & set(name.split(":")) for name in self.partner_names):
            raise InputError("--partners takes exact experts (see experts.py)")
        return Partners([self.make_expert(name) for name in self.partner_names])

    @property
    def others(self) -> Expert:
        """Who plays the seats that are not the policy's."""
        return self.partners or self.expert

    def make_expert(self, name: str) -> Expert:
        """The expert of this name."""
        make_language_expert = partial(language.make, asking=asking(self.ask, self.style))
        return make_expert(name, make_language_expert)


@dataclass(frozen=True)
class Data:
    """What SFT imitates, and the prompts of RFT."""

    title = "expert games"
    seed: int  # of the run
    games: int | str = flag(
        "--games N|FILE",
        126,
        "number of expert games [source: 126], or a file of tools.expert_games",
        values.number_or_path,
    )
    agents: tuple[int, int] = flag(
        "--agents N|A-B", (4, 4), "agents per game, 4 or 4-8", values.number_or_range(2, MAX_AGENTS)
    )
    seat: int | str = flag(
        "--seat SEAT|random|all",
        0,
        "the policy's seat, from 0 [source: 0]; random: one drawn for each game; "
        "all: decisions of every seat",
        values.number_or_word("random", "all"),
    )
    noise: float = flag(
        "--noise", 0.15, "share of decisions replaced at random in the data (without partners)", values.share
    )

    def __post_init__(self):
        if isinstance(self.seat, int) and self.seat >= self.agents[0]:
            fewest = f"the number of agents, which is {self.agents[0]} in some games"
            raise InputError(f"--seat {self.seat} must be below {fewest}")

    def load(self, games: Games, players: Players) -> list[dataset.Record]:
        """The records of all seats."""
        if isinstance(self.games, str):
            records, with_partners = dataset.read_records(self.games), players.partners is not None
            dataset.check_seats(self.games, records, with_partners, self.seat, self.seed)
            return records
        return self.simulate(games, players, self.games)

    def simulate(self, games: Games, players: Players, count: int, split: str = "train"):
        """`count` games of a split."""
        if players.partners and self.seat == "all":
            raise InputError("--partners sit in all seats but one: --seat is a number or random")
        drawn = self.agents, split, games.families, self.noise, players.partners, self.seat
        return dataset.simulate_many(count, players.expert, self.seed, players.style, *drawn)


@dataclass(frozen=True)
class LoRA:
    """The adapter of each stage: h = W x + (alpha / r) B A x."""

    title = "LoRA"
    rank: int = flag("--rank", 32, "LoRA rank r", values.number(int, 1, 4096))
    alpha: float = flag("--lora-alpha", 64.0, "LoRA alpha; the scaling is alpha / r", values.positive)
    targets: tuple[str, ...] = flag("--targets ...", lora.DEFAULT_TARGETS, "names of the adapted layers")


@dataclass(frozen=True)
class SFT:
    """The first stage: imitate the expert's replies."""

    title = "supervised fine-tuning"
    train_on: str = flag(
        "--train-on",
        "both",
        "which decisions are imitated; format: both, without what is decided",
        choices=lambda: (*kind_names(), "both", "format"),
    )
    label_noise: float = flag(  # see dataset.with_label_noise
        "--label-noise RATE", 0.5, "share of the labels of links whose decision is random", values.share
    )
    steps: int = flag("--sft-steps", 40, "optimizer steps", values.positive_int)
    batch: int = flag("--sft-batch", 4, "conversations per step", values.positive_int)
    lr: float = flag("--sft-lr", 1e-3, "peak learning rate (warm-up, then cosine to 0)", values.non_negative)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The letters of the decisions that are imitated."""
        words = "both", "format"
        return tuple(kind.letter for kind in KINDS.values() if self.train_on in (kind.name, *words))

    @property
    def format_only(self) -> bool:
        """Whether what is decided is left out of the loss, see train_sft.token_weights."""
        return self.train_on == "format"


LEVELS = {"A_S": 0.8, "A_G": 0.2}  # the weights of the two levels of advantage [source]
KNOWN_WEIGHTS = {**WEIGHTS, **LEVELS, **credit.WEIGHTS}
all_weights = lambda: ", ".join(f"{w}={KNOWN_WEIGHTS.get(w, 0):g}" for w in {**KNOWN_WEIGHTS, **TERMS})


@dataclass(frozen=True)
class Objective:
    """See rewards.py and tompo.py."""

    title = "reward and objective"
    reward: Callable  # writes r^S and R^G into the rollouts of a step
    next_batch: Callable  # the prompts of a step
    advantage: Callable  # this and the next four are functions of tompo.TABLES
    aggregation: Callable
    loss: Callable
    ratio: Callable
    kl: Callable
    w_sample: float  # the weight of A^S
    w_graph: float  # the weight of A^G
    reward_from: str = flag(
        "--reward-from",
        "expert",
        "likeness to the expert; s by welfare; game: payoffs; credit: returns; joint: one graph (variants/)",
        choices=("expert", "welfare", "game", "credit", "joint"),
    )
    weights: tuple[str, ...] | None = flag(
        "--weights NAME=NUMBER ...", None, lambda: f"of reward terms and levels ({all_weights()})"
    )
    clip_eps: tuple[float, ...] = flag(
        "--clip-eps ...",
        (0.2,),
        "how far the ratio may go below and above 1; one number for both",
        values.non_negative,
    )
    beta: float = flag("--beta", 0.04, "weight of KL(pi, pi_ref); 0 skips the reference", values.non_negative)
    objective: tuple[str, ...] | None = flag(
        "--objective NAME=CHOICE ...", None, lambda: f"variants, the first by default ({table_names()})"
    )

    @property
    def clip(self) -> tuple[float, float]:
        """The range of rho."""
        return 1 - self.clip_eps[0], 1 + self.clip_eps[-1]


@dataclass(frozen=True)
class RFT(Objective):
    """The second stage: sample, reward, compare within groups, step."""

    title = "reinforcement"
    algo: str = flag("--algo", "tompo", "grpo is the sample level alone", choices=tompo.ALGORITHMS)
    sft_adapter: str | None = flag(
        "--sft-adapter FOLDER",
        None,
        "start from this SFT adapter (FOLDER+FOLDER: a chain), not from a new one",
        adapters.whole_paths,
    )
    steps: int = flag("--steps", 20, "optimizer steps (sampling rounds)", values.positive_int)
    prompt_counts: tuple[int, ...] = flag(
        "--prompts N ...", (8, 2), lambda: f"per step: {', '.join(kind_names())} decisions", values.count
    )
    m: int = flag("--m", 8, "replies per prompt: the group", values.number(int, 2))
    lr: float = flag("--lr", 2e-4, "peak learning rate (warm-up, then cosine to 0)", values.non_negative)
    inner_epochs: int = flag("--inner-epochs", 1, "optimizer steps on the same samples", values.positive_int)
    temperature: float = flag(
        "--temperature", 1.0, "of sampling and of every log-probability", values.positive
    )

    @property
    def prompts(self) -> dict[str, int]:
        """Decisions per step, by the letter of their kind."""
        return dict(zip(KINDS, self.prompt_counts, strict=False))


def resolve_rft(args: argparse.Namespace, players: Players) -> RFT:
    weights = KNOWN_WEIGHTS | values.named_numbers(args.weights, "--weights", {**KNOWN_WEIGHTS, **TERMS})
    if taken := [name for name in TERMS if name in LOGGED]:
        raise InputError(f"the reward term {taken[0]} has a name that the logs use; give it another")
    if weights["belief"] and not args.belief:
        raise InputError("--weights belief is for the Belief line, which --no-belief switches off")
    if len(args.prompts) > len(KINDS) or not any(args.prompts):
        nouns = " and ".join(kind.noun for kind in KINDS.values())
        raise InputError(f"--prompts takes a number for {nouns}, at least one of them above 0")
    if len(args.clip_eps) > 2:
        raise InputError("--clip-eps takes one number, or two: how far the ratio may go below and above 1")
    if args.reward_from == "joint" and args.seat != "all":
        raise InputError("--reward-from joint asks all seats of a game at once: give --seat all")
    if args.reward_from == "credit" and players.expert.language:
        raise InputError("--reward-from credit plays every game to its end: choose an exact --expert")
    if args.reward_from != "game" and args.partners == ["self"]:
        raise InputError(
            "in self-play there is no expert to be like: --partners self needs --reward-from game"
        )
    if args.reward_from == "credit" and args.partners:
        raise InputError("--reward-from credit plays on with the expert in all seats: leave out --partners")
    rewards: dict[str, Callable] = {
        "expert": partial(expert_rewards, score=graph_likeness),
        "welfare": partial(expert_rewards, score=welfare),
        "game": game.game_rewards,
        "credit": partial(credit.credit_rewards, expert=players.expert, seed=args.seed),
        "joint": joint.joint_rewards,
    }
    w_sample, w_graph = (1.0, 0.0) if args.algo == "grpo" else (weights["A_S"], weights["A_G"])
    return from_flags(
        RFT,
        args,
        reward=partial(rewards[args.reward_from], weights=weights),
        next_batch=joint.next_batch if args.reward_from == "joint" else dataset.next_batch,
        w_sample=w_sample,
        w_graph=w_graph,
        **choose(args.objective),
    )


@dataclass(frozen=True)
class Evaluation:
    """Held-out games. agents: of each game; games: how many of the grid; seat: the policy's, `random` or
    `all`; seed: of sampling and of the experts' draws, the same for all training runs, so that they meet
    the same games and experts."""

    agents: int
    games: int
    seat: int | str
    temperature: float = 1.0
    seed: int = 0


def add_evaluation_flags(parser: argparse.ArgumentParser, fewest: int = 1) -> None:
    """fewest: 0 where evaluation may be left out."""
    add = parser.add_argument_group("evaluation", "Held-out games, the same for all policies.").add_argument
    games = "games of the grid (evenly spread; 60 = all" + (")" if fewest else "; 0: no evaluation)")
    add("--eval-games", type=values.number(int, fewest), default=60, help=games)


def playing_parser(description: str, *words: str) -> argparse.ArgumentParser:
    """The flags that the scripts which only play games share. Seats are theirs alone, since a training run is
    evaluated as it was trained. words: for --seat."""
    parser = argparse.ArgumentParser(description=description)
    add_flags(parser, Model, Games, Players)
    add_evaluation_flags(parser)
    add = parser.add_argument
    add("--agents", type=values.number(int, 3, MAX_AGENTS), default=4, help="agents of the games")
    kinds = {"random": "one drawn for each game", "all": "self-play", "rotate": "0, 1, ... over the games"}
    text = "; ".join(["the policy's seat, from 0 [source: 0]", *(f"{word}: {kinds[word]}" for word in words)])
    seat, metavar = values.number_or_word(*words), "|".join(["SEAT", *words])
    add("--seat", type=seat, metavar=metavar, default=0, help=text)
    add("--eval-seed", type=values.seed_int, default=0, help="of sampling and of the experts' draws")
    temperature = "0 is greedy; 1 is the distribution that is trained"
    add("--eval-temperature", type=values.non_negative, default=1.0, help=temperature)
    return parser


def resolve_evaluation(args: argparse.Namespace) -> Evaluation:
    """Of a script with the flags of playing_parser, or of a training run, which is evaluated with the fewest
    agents that it trains with; a run that trains on every seat is evaluated in the first, or in self-play if
    it was trained so."""
    if args.partners and (args.partners == ["self"]) != (args.seat == "all"):
        raise InputError("--partners self goes with --seat all, and other --partners with a seat or random")
    if not hasattr(args, "eval_seed"):
        seat = 0 if args.seat == "all" and not args.partners else args.seat
        return Evaluation(max(3, args.agents[0]), args.eval_games, seat)
    if isinstance(args.seat, int) and args.seat >= args.agents:
        raise InputError(f"--seat {args.seat} must be below --agents, which is {args.agents}")
    return Evaluation(args.agents, args.eval_games, args.seat, args.eval_temperature, args.eval_seed)


@dataclass(frozen=True)
class Run:
    """Seeds, memory, saving. None of these changes the method."""

    title = "run"
    out: str = flag("--out", "runs/tompo", "the run folder")
    preset: str = flag(
        "--preset", "small", "which defaults (docs/settings.md)", choices=lambda: list(PRESETS)
    )
    resume: str | None = flag("--resume RUN", None, "continue this run with its own settings")
    seed: int = flag("--seed", 0, "of data, adapters, order and sampling", values.seed_int)
    micro_batch: int = flag(
        "--micro-batch", 2, "rows per forward pass (memory, not maths)", values.positive_int
    )

    @property
    def resumed(self) -> bool:
        return bool(self.resume)


# The defaults, those of `small`, are for SmolLM2-135M on two CPU cores. The paper's values:
PAPER = dict(model="Qwen/Qwen2.5-7B-Instruct", rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, games=126)
PAPER |= dict(agents=(4, 8), train_on="effort", label_noise=0.0)
PAPER |= dict(lr=1e-5)  # [choice]: the paper leaves the learning rate of RFT open
PAPER |= dict(dtype="bfloat16")  # [choice]: so that the 7B model fits into one GPU of 80 GB
# Partners whom it pays to read, and rewards from the game alone (docs/others.md), on two CPU cores:
OTHERS = dict(partners=["second-best", "always-link", "never-link", "selfish"], rounds=3, fix=["fee=0.05"])
OTHERS |= dict(expert="random", train_on="format", label_noise=0.0, sft_steps=16, reward_from="game")
OTHERS |= dict(dtype="bfloat16")  # for time
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


def training_parser(description: str, out: str, *more: type) -> argparse.ArgumentParser:
    """The flags that all training scripts share, and those of more groups. out: the default run folder."""
    parser = argparse.ArgumentParser(description=description)
    add_flags(parser, Model, Games, Players, Data, LoRA, SFT, Run, *more)
    parser.set_defaults(out=out)
    return parser


def parse_training(parser: argparse.ArgumentParser, script: str, argv=None) -> Settings:
    """The settings of a training script, whether it starts a run or resumes one."""
    args, resume = parse_run(parser, script, PRESETS, argv)
    return resolve(args, script, resume)


def resolve(args: argparse.Namespace, script: str = "", resume: str | None = None) -> Settings:
    """The settings of any script, from the groups of flags that it has. Raises InputError for flags that do
    not go together."""
    groups: dict[str, Any] = dict.fromkeys(field.name for field in fields(Settings))
    players = groups["players"] = from_flags(Players, args)
    groups |= {"model": from_flags(Model, args), "games": from_flags(Games, args)}
    (
        players.expert,
        players.partners,
        groups["games"].families,
    )  # these complain about their flags now, and not in use
    if hasattr(args, "eval_games"):
        groups["evaluation"] = resolve_evaluation(args)
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
