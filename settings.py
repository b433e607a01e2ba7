"""Settings: every flag of the scripts is defined, parsed and checked here, once, before anything is computed.

The result is a few small frozen dataclasses, one for each group of flags, in which names have become what
they stand for: the name of an advantage is the function, the name of an expert is the expert. Functions
below the scripts take one of these groups, or single values; none of them sees the flags again.
RUN/config.json holds the flags as they were given, so that a resumed run passes the same checks.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import lora
import tompo
import variants.objective  # noqa: F401  (its import adds to the tables of tompo)
from experts import Expert, Partners, make_expert
from games import GAMES, KINDS, MAX_AGENTS
from models import adapters
from models.load import ENGINES, default_device, load_policy
from models.pretrained import DEFAULT_MODEL
from play import dataset
from policy import Policy
from prompts import PromptStyle
from rewards import TERMS, WEIGHTS, expert_rewards, graph_likeness, welfare
from run import ranks
from run.errors import InputError
from run.files import argv_of, resumed_flags
from teachers import language
from teachers.asking import asking, with_record
from variants import credit, game, joint
from world.draws import TYPE_PATTERNS, Family, families_of

# -------------------- types of single values, for argparse


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An int or float from low (or, with `above`, larger than low) to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            least = f"{'above' if above else 'at least'} {low}"
            bounds = least if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number {bounds}"
            )
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
seed_int = number(int, 0, 2**32 - 1)  # one word of a random seed, see run/seeds.py
non_negative = number(float, 0)
share = number(float, 0, 1)


def parse_range(text: str) -> tuple[int, int]:
    """`4` -> (4, 4), `4-8` -> (4, 8): numbers of agents."""
    low, dash, high = text.partition("-")
    try:
        a, b = int(low), int(high) if dash else int(low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number such as 4 or a range such as 4-8"
        ) from None
    if not 2 <= a <= b <= MAX_AGENTS:
        raise argparse.ArgumentTypeError(f"{text!r} must rise, and a game needs 2 to {MAX_AGENTS} agents")
    return a, b


def seat_choice(*words: str):
    """A seat, counted from 0, or one of the words."""
    return lambda text: text if text in words else seed_int(text)


def games_or_file(text: str) -> int | str:
    """A number of games, or the whole path of a data set, so that a run can be resumed from another
    folder."""
    return positive_int(text) if text.lstrip("+-").isdigit() else os.path.abspath(text)


def named_numbers(given: Iterable[str] | None, flag: str, known: Iterable[str]) -> dict[str, float]:
    """["delta=0.1", ...] -> {"delta": 0.1, ...}: finite numbers from 0. Raises InputError."""
    numbers = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not name or not 0 <= numbers[name] < math.inf:
            raise InputError(f"{flag} {text}: write NAME=VALUE with a finite number from 0, as in delta=0.1")
        if name not in known:
            raise InputError(f"{flag} {name}: no such name; there are {', '.join(known)}")
    return numbers


# -------------------- model


@dataclass(frozen=True)
class Model:
    """dtype: of the frozen weights, by name; engine: `fast` or `plain`."""

    name: str
    dtype: str
    engine: str
    device: str

    def load(self) -> Policy:
        """The base model as a policy, on this process's device. The first process loads it first, because
        it may have to fetch and convert the default model."""
        with ranks.first_goes_first():
            return load_policy(self.name, self.dtype, ranks.own_device(self.device), self.engine)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model", "Which model, and how it is computed.").add_argument
    add("--model", default=DEFAULT_MODEL, help="Hugging Face id or folder of a causal chat model")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    add("--engine", choices=ENGINES, default="fast", help="plain: policy.py itself, slow and short")


def resolve_model(args: argparse.Namespace) -> Model:
    return Model(args.model, args.dtype, args.engine, default_device())


# -------------------- games


@dataclass(frozen=True)
class Games:
    """Which games are drawn: families of instances, which take turns."""

    families: tuple[Family, ...]


def add_game_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("game", "Which games are drawn. Several games or stages take turns.")
    add = group.add_argument
    add("--game", nargs="+", choices=GAMES, default=["bcz"], help="bcz: network game; pgg: public goods game")
    kinds = ", ".join(f"{kind.letter} {kind.noun}" for kind in KINDS.values())
    add("--stages", nargs="+", default=["GE"], help=f"of a round, such as GE GEE GGE: {kinds}")
    add("--rounds", type=number(int, 1, 100), default=1, help="rounds T of a game")
    patterns = ", ".join(TYPE_PATTERNS)
    types = f"alpha, endowments: {patterns}, or numbers, one for all or one for each seat (else drawn)"
    add("--types", nargs="+", help=types)
    known = "; ".join(f"{name}: {', '.join(game.fixable)}" for name, game in GAMES.items())
    add("--fix", nargs="+", metavar="NAME=VALUE", help=f"parameters that are not drawn ({known}; all: fee)")


def resolve_games(args: argparse.Namespace) -> Games:
    patterns, types = resolve_types(args.types)
    known = [*(p for name in args.game for p in GAMES[name].fixable), "fee"]
    fixed = named_numbers(args.fix, "--fix", known)
    return Games(families_of(args.game, args.stages, args.rounds, patterns, types, fixed))


def resolve_types(given: list[str] | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(patterns of the types that are drawn, the types themselves where they are given)."""
    if not given:
        return TYPE_PATTERNS, ()
    if all(text in TYPE_PATTERNS for text in given):
        return tuple(pattern for pattern in TYPE_PATTERNS if pattern in given), ()
    try:
        types = tuple(float(text) for text in given)
    except ValueError:
        types = (math.nan,)
    # With a third decimal, PGG's cap, which is the type, would be below the effort that an expert writes.
    if not all(math.isfinite(v) and v > 0 and v == round(v, 2) for v in types):
        allowed = f"{', '.join(TYPE_PATTERNS)} or positive numbers with at most two decimals"
        raise InputError(f"--types takes {allowed}, got {' '.join(given)}")
    return TYPE_PATTERNS, types


# -------------------- players


@dataclass(frozen=True)
class Players:
    """expert: the teacher, and the player of the other seats where there are no partners; partners: who plays
    there in its stead; self_play: whether RFT plays its games with the policy in all seats, see
    play/self_play.py; make_expert: the expert of another name."""

    expert: Expert
    partners: Partners | None
    self_play: bool
    style: PromptStyle
    make_expert: Callable[[str], Expert]

    @property
    def others(self) -> Expert:
        """Who plays the seats that are not the policy's."""
        return self.partners or self.expert


def add_player_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "players", "Who sits in the other seats, and what agents read and answer."
    )
    add = group.add_argument
    add("--expert", default="second-best", help="the teacher and the other seats (see experts.py)")
    partners = "rules, from which that of each other seat is drawn (default: the expert); self: the policy"
    add("--partners", nargs="+", metavar="EXPERT", help=partners)
    asking = "how a language model is asked, such as attempts=3 budget=20 (docs/language-model-experts.md)"
    add("--ask", nargs="+", metavar="NAME=VALUE", help=asking)
    add("--information", choices=("full", "local"), default="full", help="whose types an agent knows")
    add("--belief", action=argparse.BooleanOptionalAction, default=True, help="ask for a Belief line")
    add("--hints", action=argparse.BooleanOptionalAction, default=True, help="worked numbers in prompts")
    add("--max-new-tokens", type=positive_int, help="longest reply (default: 20 + 7 N)")


def resolve_players(args: argparse.Namespace) -> Players:
    style = PromptStyle(args.information, args.belief, args.hints, args.max_new_tokens)
    asking(args.ask, style)  # complains about --ask before a language model is asked for
    make = partial(make_expert, language=partial(make_language_expert, args.ask, style))
    self_play = args.partners == ["self"]
    partners = Partners([make(name) for name in args.partners]) if args.partners and not self_play else None
    if partners and any(rule.language for rule in partners.rules):
        raise InputError("--partners takes exact experts (see experts.py)")
    return Players(make(args.expert), partners, self_play, style, make)


def make_language_expert(ask: list[str] | None, style: PromptStyle, name: str) -> Expert:
    return language.make(name, asking(ask, style))


# -------------------- expert games


@dataclass(frozen=True)
class Data:
    """games: how many; file: a data set that is read instead; agents: fewest and most; seat: the seat that is
    trained, `random` or `all`; noise: the share of the played decisions that are replaced at random."""

    games: int
    file: str | None
    agents: tuple[int, int]
    seat: int | str
    noise: float
    seed: int

    def load(self, games: Games, players: Players) -> list[dataset.Record]:
        """The records of all seats."""
        return dataset.read_records(self.file) if self.file else self.simulate(games, players, self.games)

    def simulate(self, games: Games, players: Players, count: int, split: str = "train"):
        """`count` games of a split."""
        drawn = self.agents, split, games.families, self.noise, players.partners, self.seat
        return dataset.simulate_many(count, players.expert, self.seed, players.style, *drawn)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("expert games", "What SFT imitates, and the prompts of RFT.")
    add = group.add_argument
    games = "number of expert games [source: 126], or a file of tools.expert_games"
    add("--games", type=games_or_file, default=126, metavar="N|FILE", help=games)
    add("--agents", type=parse_range, default=(4, 4), metavar="N|A-B", help="agents per game, 4 or 4-8")
    seat = (
        "the policy's seat, from 0 [source: 0]; random: one drawn for each game; all: decisions of every seat"
    )
    add("--seat", type=seat_choice("random", "all"), metavar="SEAT|random|all", default=0, help=seat)
    add("--noise", type=share, default=0.15, help="share of decisions replaced at random in the data")


def resolve_data(args: argparse.Namespace) -> Data:
    if isinstance(args.seat, int) and args.seat >= args.agents[0]:
        agents = f"the number of agents, which is {args.agents[0]} in some games"
        raise InputError(f"--seat {args.seat} must be below {agents}")
    games, file = (0, args.games) if isinstance(args.games, str) else (args.games, None)
    if args.partners and (args.partners == ["self"]) != (args.seat == "all"):
        raise InputError("--partners self goes with --seat all, and other --partners with a seat or random")
    return Data(games, file, tuple(args.agents), args.seat, args.noise, args.seed)


# -------------------- LoRA and SFT


@dataclass(frozen=True)
class LoRA:
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class SFT:
    """kinds: the letters of the decisions that are imitated; format_only: whether what is decided is left out
    of the loss (train_sft.token_weights); label_noise: see dataset.with_label_noise;
    batch: conversations per step; lr: the peak learning rate."""

    kinds: tuple[str, ...]
    format_only: bool
    label_noise: float
    steps: int
    batch: int
    lr: float


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA", "The adapter of each stage: h = W x + (alpha / r) B A x.")
    add = group.add_argument
    add("--rank", type=number(int, 1, 4096), default=32, help="LoRA rank r")
    above_0 = number(float, 0, above=True)
    add("--lora-alpha", type=above_0, default=64.0, help="LoRA alpha; the scaling is alpha / r")
    add("--targets", nargs="+", default=list(lora.DEFAULT_TARGETS), help="names of the adapted layers")


def add_sft_flags(parser: argparse.ArgumentParser) -> None:
    text = "The first stage: imitate the expert's replies."
    add = parser.add_argument_group("supervised fine-tuning", text).add_argument
    kinds = [kind.name for kind in KINDS.values()]
    imitated = "which decisions are imitated; format: both, without what is decided"
    add("--train-on", choices=(*kinds, "both", "format"), default="both", help=imitated)
    noise = "share of the labels of links whose decision is random"
    add("--label-noise", type=share, default=0.5, metavar="RATE", help=noise)
    add("--sft-steps", type=positive_int, default=40, help="optimizer steps")
    add("--sft-batch", type=positive_int, default=4, help="conversations per step")
    add("--sft-lr", type=non_negative, default=1e-3, help="peak learning rate (warm-up, then cosine to 0)")


def resolve_sft(args: argparse.Namespace) -> SFT:
    kinds = tuple(k.letter for k in KINDS.values() if args.train_on in (k.name, "both", "format"))
    return SFT(
        kinds, args.train_on == "format", args.label_noise, args.sft_steps, args.sft_batch, args.sft_lr
    )


# -------------------- RFT


@dataclass(frozen=True)
class RFT:
    """prompts: decisions per step by the letter of their kind; m: replies to each; reward: writes r^S and
    R^G into the rollouts of a step; next_batch: the prompts of a step; advantage, aggregation, loss, ratio,
    kl: functions of tompo.TABLES; w_sample, w_graph: the weights of A^S and A^G; clip: the range of rho."""

    algo: str
    sft_adapter: str | None
    steps: int
    prompts: dict[str, int]
    m: int
    lr: float
    inner_epochs: int
    temperature: float
    reward: Callable
    next_batch: Callable
    advantage: Callable
    aggregation: Callable
    loss: Callable
    ratio: Callable
    kl: Callable
    w_sample: float
    w_graph: float
    clip: tuple[float, float]
    beta: float


LEVELS = {"A_S": 0.8, "A_G": 0.2}  # the weights of the two levels of advantage [source]
KNOWN_WEIGHTS = {**WEIGHTS, **LEVELS, **credit.WEIGHTS}
REWARDS_FROM = ("expert", "welfare", "game", "credit", "joint")
# Names that a new reward term must not take, because samples.jsonl or metrics.jsonl has them.
RESERVED = set(
    "compliance sample r_S s local global R_G A_S A_G step game stage kind seat reply expert broken advantage"
    " reward gamma zeta".split()
)


def add_rft_flags(parser: argparse.ArgumentParser) -> None:
    text = "The second stage: sample, reward, compare within groups, step."
    add = parser.add_argument_group("reinforcement", text).add_argument
    add("--algo", choices=tompo.ALGORITHMS, default="tompo", help="grpo is the sample level alone")
    adapter = "start from this SFT adapter (FOLDER+FOLDER: a chain), not from a new one"
    add("--sft-adapter", metavar="FOLDER", help=adapter)
    add("--steps", type=positive_int, default=20, help="optimizer steps (sampling rounds)")
    kinds = ", ".join(kind.name for kind in KINDS.values())
    add(
        "--prompts",
        nargs="+",
        type=count,
        default=(8, 2),
        metavar="N",
        help=f"per step: {kinds} decisions",
    )
    add("--m", type=number(int, 2), default=8, help="replies per prompt: the group")
    add("--lr", type=non_negative, default=2e-4, help="peak learning rate (warm-up, then cosine to 0)")
    add("--inner-epochs", type=positive_int, default=1, help="optimizer steps on the same samples")
    temperature = number(float, 0, above=True)
    add("--temperature", type=temperature, default=1.0, help="of sampling and of every log-probability")
    group = parser.add_argument_group("reward and objective", "See rewards.py and tompo.py.")
    add = group.add_argument
    source = (
        "likeness to the expert; s by welfare; game: payoffs; credit: returns; joint: one graph (variants/)"
    )
    add("--reward-from", choices=REWARDS_FROM, default="expert", help=source)
    known = {**KNOWN_WEIGHTS, **{name: 0 for name in TERMS if name not in KNOWN_WEIGHTS}}
    names = ", ".join(f"{name}={value:g}" for name, value in known.items())
    add("--weights", nargs="+", metavar="NAME=NUMBER", help=f"of reward terms and levels ({names})")
    clip = "how far the ratio may go below and above 1; one number for both"
    add("--clip-eps", nargs="+", type=non_negative, default=[0.2], help=clip)
    add("--beta", type=non_negative, default=0.04, help="weight of KL(pi, pi_ref); 0 skips the reference")
    tables = "; ".join(f"{name}: {', '.join(table)}" for name, table in tompo.TABLES.items())
    objective = f"variants, the first by default ({tables})"
    add("--objective", nargs="+", metavar="NAME=CHOICE", help=objective)


def resolve_rft(args: argparse.Namespace, players: Players) -> RFT:
    weights = KNOWN_WEIGHTS | named_numbers(args.weights, "--weights", {**KNOWN_WEIGHTS, **TERMS})
    if taken := [name for name in TERMS if name in RESERVED]:
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
    w_sample, w_graph = (1.0, 0.0) if args.algo == "grpo" else (weights["A_S"], weights["A_G"])
    return RFT(
        algo=args.algo,
        sft_adapter=args.sft_adapter and "+".join(map(os.path.abspath, adapters.chain(args.sft_adapter))),
        steps=args.steps,
        prompts=dict(zip(KINDS, args.prompts, strict=False)),
        m=args.m,
        lr=args.lr,
        inner_epochs=args.inner_epochs,
        temperature=args.temperature,
        reward=resolve_reward(args, weights, players.expert),
        next_batch=joint.next_batch if args.reward_from == "joint" else dataset.next_batch,
        w_sample=w_sample,
        w_graph=w_graph,
        clip=(1 - args.clip_eps[0], 1 + args.clip_eps[-1]),
        beta=args.beta,
        **resolve_objective(args.objective),
    )


def resolve_reward(args: argparse.Namespace, weights: dict[str, float], expert: Expert) -> Callable:
    if args.reward_from in ("expert", "welfare"):
        score = welfare if args.reward_from == "welfare" else graph_likeness
        return partial(expert_rewards, weights=weights, score=score)
    if args.reward_from == "game":
        return partial(game.game_rewards, weights=weights)
    if args.partners and args.reward_from == "credit":
        raise InputError("--reward-from credit plays on with the expert in all seats: leave out --partners")
    if args.reward_from == "joint":
        return partial(joint.joint_rewards, weights=weights)
    if expert.language:
        raise InputError(
            "--reward-from credit plays every game to its end with the expert: choose an exact one"
        )
    return partial(credit.credit_rewards, weights=weights, expert=expert, seed=args.seed)


def resolve_objective(given: list[str] | None) -> dict[str, Callable]:
    """The function of every table of tompo.py, by the table's name."""
    chosen = {name: next(iter(table.values())) for name, table in tompo.TABLES.items()}
    for text in given or ():
        name, _, choice = text.partition("=")
        if choice not in tompo.TABLES.get(name, ()):
            known = "; ".join(f"{name}={'|'.join(table)}" for name, table in tompo.TABLES.items())
            raise InputError(f"--objective {text}: write NAME=CHOICE, of {known}")
        chosen[name] = tompo.TABLES[name][choice]
    return chosen


# -------------------- evaluation


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
    add("--eval-games", type=number(int, fewest), default=60, help=games)


def add_seating_flags(parser: argparse.ArgumentParser, *words: str) -> None:
    """What only evaluation can change; a training run is evaluated as it was trained. words: for --seat."""
    add = parser.add_argument
    add("--agents", type=number(int, 3, MAX_AGENTS), default=4, help="agents of the games")
    kinds = {"random": "one drawn for each game", "all": "self-play", "rotate": "0, 1, ... over the games"}
    seat = "; ".join(["the policy's seat, from 0 [source: 0]", *(f"{word}: {kinds[word]}" for word in words)])
    add("--seat", type=seat_choice(*words), metavar="|".join(("SEAT", *words)), default=0, help=seat)
    add("--eval-seed", type=seed_int, default=0, help="of sampling and of the experts' draws")
    add(
        "--eval-temperature",
        type=non_negative,
        default=1.0,
        help="0 is greedy; 1 is the distribution that is trained",
    )


def resolve_evaluation(args: argparse.Namespace) -> Evaluation:
    """Of a script with the seating flags, or of a training run, which is evaluated with the fewest agents
    that it trains with; a run that trains on every seat is evaluated in the first, or in self-play if it was
    trained so."""
    if not hasattr(args, "eval_seed"):
        seat = 0 if args.seat == "all" and args.partners != ["self"] else args.seat
        return Evaluation(max(3, args.agents[0]), args.eval_games, seat)
    if isinstance(args.seat, int) and args.seat >= args.agents:
        raise InputError(f"--seat {args.seat} must be below --agents, which is {args.agents}")
    return Evaluation(args.agents, args.eval_games, args.seat, args.eval_temperature, args.eval_seed)


def playing_parser(description: str, *words: str) -> argparse.ArgumentParser:
    """The flags that the scripts which only play games share. words: for --seat."""
    parser = argparse.ArgumentParser(description=description)
    for add_flags in (add_model_flags, add_game_flags, add_player_flags, add_evaluation_flags):
        add_flags(parser)
    add_seating_flags(parser, *words)
    return parser


# -------------------- a run


@dataclass(frozen=True)
class Run:
    """out: the run folder; micro_batch: conversations (rows) per pass; resumed: whether the run goes on."""

    out: str
    seed: int
    micro_batch: int
    resumed: bool


# The defaults are for SmolLM2-135M on two CPU cores. The paper's values:
PAPER = dict(model="Qwen/Qwen2.5-7B-Instruct", rank=64, lora_alpha=32.0, sft_lr=5e-5, sft_batch=16, games=126)
PAPER |= dict(agents=(4, 8), train_on="effort", label_noise=0.0)
PAPER |= dict(lr=1e-5)  # [choice]: the paper leaves the learning rate of RFT open
PAPER |= dict(dtype="bfloat16")  # [choice]: so that the 7B model fits into one GPU of 80 GB


def add_run_flags(parser: argparse.ArgumentParser, out: str) -> None:
    text = "Seeds, memory, saving. None of these changes the method."
    add = parser.add_argument_group("run", text).add_argument
    add("--out", default=out, help="the run folder")
    add("--preset", choices=("small", "paper"), default="small", help="defaults: small, or the paper's")
    add("--resume", metavar="RUN", help="continue this run with its own settings")
    add("--seed", type=seed_int, default=0, help="of data, adapters, order and sampling")
    add("--micro-batch", type=positive_int, default=2, help="rows per forward pass (memory, not maths)")


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


def training_parser(description: str, out: str) -> argparse.ArgumentParser:
    """The flags that train_sft.py and train_rft.py share. out: the default run folder."""
    parser = argparse.ArgumentParser(description=description)
    for add_flags in (add_model_flags, add_game_flags, add_player_flags, add_data_flags):
        add_flags(parser)
    add_lora_flags(parser)
    add_sft_flags(parser)
    add_run_flags(parser, out)
    return parser


def parse_training(parser: argparse.ArgumentParser, script: str, argv=None) -> Settings:
    """The settings of a training script: with --preset paper the paper's values are defaults; with --resume
    all flags are those of the run, and one that is newer than the run has its default."""
    known, _ = parser.parse_known_args(argv)
    folder, names = known.resume, {action.dest for action in parser._actions}
    if folder:
        print(f"continuing {folder} with the settings in its config.json (other flags do not count)")
        flags = resumed_flags(folder, script) | {"out": folder}
        if gone := sorted(set(flags) - names - {"script"}):
            advice = "continue it with the version of the code that it was made with"
            raise InputError(f"{folder} was made with settings that are gone ({', '.join(gone)}); {advice}")
        argv = argv_of(parser, flags)
        known, _ = parser.parse_known_args(argv)
    if known.preset == "paper":
        parser.set_defaults(**{name: value for name, value in PAPER.items() if name in names})
    args = parser.parse_args(argv)
    return resolve(args, script, resumed=bool(folder))


def resolve(args: argparse.Namespace, script: str = "", resumed: bool = False) -> Settings:
    """The settings of any script, from the groups of flags that it has. Raises InputError for flags that do
    not go together."""
    groups: dict[str, Any] = dict.fromkeys(field.name for field in fields(Settings))
    players = groups["players"] = resolve_players(args)
    groups |= {"model": resolve_model(args), "games": resolve_games(args)}
    if hasattr(args, "eval_games"):
        groups["evaluation"] = resolve_evaluation(args)
    if hasattr(args, "noise"):
        groups["data"] = resolve_data(args)
    if hasattr(args, "train_on"):
        groups["lora"] = LoRA(args.rank, args.lora_alpha, tuple(args.targets))
        groups["sft"] = resolve_sft(args)
        groups["run"] = Run(args.out, args.seed, args.micro_batch, resumed)
    if hasattr(args, "algo"):
        rft = groups["rft"] = resolve_rft(args, players)
        args.sft_adapter = rft.sft_adapter
    if players.expert.language:  # the path of its record must hold in another folder, too
        args.ask = with_record(args.ask)
    return Settings(**groups | {"flags": vars(args) | ({"script": script} if script else {})})
