"""Held-out games: which are played, who sits where, and the rows of a training run. Their flags are
evaluation's.

Every policy plays the same instances (the fixed held-out grid), in the same seat, against the same draws of
the experts, so rows can be compared game by game.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np

import games
import lora
from experts import make_expert
from games import Game
from play import human
from play.expert_games import simulate
from play.metrics import Played, summarise
from play.players import expert_player, play, policy_player
from policy import Policy
from prompts import reply_tokens
from run import dataset, ranks, training
from run.files import InputError, number, positive_int, seat_choice, seed_int, write_json
from world.draws import families, held_out_grid

EVAL_SEED = 0

# -------------------- games and seats


def add_eval_arguments(parser: argparse.ArgumentParser, seat: bool = True, fewest: int = 1) -> None:
    """seat: with --seat, which a training script has of its own; fewest: 0 where evaluation may be left
    out."""
    group = parser.add_argument_group("evaluation", "Held-out games, the same for all policies.")
    add = group.add_argument
    add("--eval-agents", type=positive_int, default=4, help="agents of the evaluation games")
    told = "games of the grid (evenly spread; 60 = all" + (")" if fewest else "; 0: no evaluation)")
    add("--eval-games", type=number(int, fewest), default=60, help=told)
    add("--max-new-tokens", type=positive_int, help="longest reply (default: 20 + 7 N)")
    if seat:
        told = "the policy's seat, from 0 [source: 0]; random: one drawn for each game; all: self-play"
        choice = seat_choice("random", "all")
        add("--seat", type=choice, metavar="SEAT|random|all", default=0, help=told)


def seed_of(args) -> int:
    """Of sampling and expert draws: the same for all training runs, so that they meet the same games and
    experts."""
    return getattr(args, "eval_seed", EVAL_SEED)


def temperature_of(args) -> float:
    """Of sampling: that of the law that is trained, unless a script has the flag."""
    return getattr(args, "eval_temperature", 1.0)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What evaluation alone can change; in training it is fixed."""
    add, kind = parser.add_argument, number(float, 0)
    add("--eval-seed", type=seed_int, default=EVAL_SEED, help="of sampling and expert draws")
    add("--eval-temperature", type=kind, default=1.0, help="0 is greedy; 1 is the law that is trained")


def held_out_instances(args) -> list[Game]:
    seat = args.seat
    if not 3 <= args.eval_agents <= games.MAX_AGENTS:
        raise InputError(f"--eval-agents must be 3 to {games.MAX_AGENTS}, got {args.eval_agents}")
    if isinstance(seat, int) and not 0 <= seat < args.eval_agents:
        raise InputError(
            f"the evaluated seat must be one of 0 to {args.eval_agents - 1} (--eval-agents - 1), got {seat}"
        )
    grid = [game for family in families(args) for game in held_out_grid(args.eval_agents, family)]
    chosen = np.linspace(0, len(grid) - 1, min(args.eval_games, len(grid))).round().astype(int)
    return [grid[i] for i in chosen]


def check_lengths(args, policy: Policy) -> None:
    """Raises InputError where the last question of some game, after the longest replies, could outgrow the
    model's context: to be found before training. The games are played by an exact expert."""
    style, expert = dataset.style_of(args), make_expert(dataset.exact_stand_in(args.expert))
    for game in held_out_instances(args):
        limit, stages = args.max_new_tokens or reply_tokens(game.N), game.rounds * len(game.stages)
        last = simulate([(0, game, np.random.default_rng(0))], expert, style)[-1]
        said = sum(len(policy.encode_reply(m["content"])) for m in last.prompt if m["role"] == "assistant")
        policy.check_length(len(policy.encode_prompt(last.prompt)) - said + (stages - 1) * limit, limit)


def seats_in(instances: list[Game], seat: int | str, seed: int) -> list[tuple[int, ...]]:
    """The policy's seats in each game. A random one belongs to the seed and the game, so it is the same for
    all policies, however many games are played."""
    if seat == "all":
        return [tuple(range(g.N)) for g in instances]
    if seat == "random":
        rngs = [np.random.default_rng([seed, zlib.crc32(g.key.encode()), 0, 0, 1]) for g in instances]
        return [(int(rng.integers(g.N)),) for rng, g in zip(rngs, instances)]
    return [(seat,)] * len(instances)


def by_stages(instances: list[Game], play_part, one_by_one: bool = False) -> list[Played]:
    """Plays together the games that have the same stages and rounds. play_part: (their indices, the number of
    the first in its kind) -> their games played. one_by_one: each game for itself, as people play, who may
    leave after any; then the games that were over are returned."""
    played: dict[int, Played] = {}
    for stages in dict.fromkeys((g.stages, g.rounds) for g in instances):
        part = [i for i, g in enumerate(instances) if (g.stages, g.rounds) == stages]
        try:
            for first in range(len(part)) if one_by_one else (0,):
                now = part[first : first + 1] if one_by_one else part
                played |= zip(now, play_part(now, first), strict=True)
        except human.Left:
            if not played:
                raise
            break
    return [played[i] for i in sorted(played)]


def play_held_out(
    args, make_player, label: str, seat: int | str | None = None, repair: bool = False, person: bool = False
) -> list[Played]:
    """One kind of player on the held-out games of these arguments, in its seat or seats and experts in the
    others. person: it is one."""
    instances = held_out_instances(args)
    seats = seats_in(instances, args.seat if seat is None else seat, seed_of(args))

    def play_part(part, first):
        of_part = [instances[i] for i in part], make_player(), [seats[i] for i in part]
        return play(*of_part, dataset.expert_of(args), seed_of(args), label, repair, first)

    return by_stages(instances, play_part, person)


def evaluate_run(args, policy: Policy, folder: Path) -> dict[str, dict]:
    """The rows of a training run, written to FOLDER/eval.json: the trained policy, its SFT stage, the base
    model, the other seats' expert and random play, on the same games. Takes the policy's adapter off. A run
    that trains on every seat is evaluated in the first."""
    seat, results = 0 if args.seat == "all" else args.seat, {}

    def row(make_player, label):
        results[label] = summarise(play_held_out(args, make_player, label, seat))

    def policy_row(policy, label):
        settings = dataset.style_of(args), args.max_new_tokens, temperature_of(args), seed_of(args)
        row(lambda: policy_player(policy, *settings), label)

    policy_row(policy, args.algo)
    lora.remove(policy.model)  # what is left is the SFT policy
    policy_row(policy, "sft")
    policy_row(training.load_policy_of_rank(args), "base")
    for name in (args.expert, "random"):
        settings = dataset.expert_of(args, name), dataset.style_of(args), seed_of(args)
        row(lambda settings=settings: expert_player(*settings), f"expert:{name}")
    if ranks.first():
        write_json(folder / "eval.json", {"arguments": vars(args), "results": results})
    return results
