"""Experts: the players of the other seats and the teachers of the data. Run it to write the expert data set:

    python experts.py --out expert_games.jsonl --games 126

An expert is a function (state, seat, rng, past) -> Decision; `past` is what the agent answered in the stages before,
which only language models look at. The exact ones need no model:

    second-best   the efficient graph at Nash efforts, then Nash efforts on the graph that formed (the default)
    planner       the first best: the efficient graph at planner efforts, then planner efforts
    nash          the greatest equilibrium graph, Nash efforts
    myopic        best response to the last round (to efforts alpha and everybody's consent in the first)
    selfish       the row with the highest own Nash payoff if everybody else were to choose everybody, Nash efforts
    always-link / never-link   everybody / nobody, Nash efforts
    random        a coin for every link, a uniform effort
    openai:MODEL / hf:PATH   a language model on a server, a local one: see llm_experts.py
    noisy:EXPERT:RATE   any of them, with that share of its decisions replaced by `random`

[source] of the paper is GPT-o3 as the expert, 126 games of 4 to 8 agents; the exact experts are a [choice].
"""

import argparse
import copy
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Callable

import numpy as np
from tqdm import tqdm

import games
from teachers import language as llm_experts
from games import Game, State
from world.draws import Family, add_game_arguments, draw_game, families, game_from_json
from teachers.language import Asking, Question, settle
from prompts import EFFORT_DIGITS, Decision, PromptStyle, format_reply, messages, parse_reply
from run.files import InputError, parse_range, positive_int, refuse_existing, reports_errors, seat_choice, seed_int, share
from run.files import write_atomic

Expert = Callable[..., Decision | Question]  # (state, seat, rng, past=()); a Question is for llm_experts.settle


# ---------------------------------------------------------------------------------------------------------------------
# exact experts: each is a rule for the graph and a rule for the efforts, solved for all seats at once


@lru_cache(maxsize=4096)
def _selfish_row(game: Game, seat: int) -> tuple[int, ...]:
    def own_payoff(row_N):
        proposals_NN = games.complete_graph(game.N)
        proposals_NN[seat] = row_N
        links_NN = games.form_links(proposals_NN)
        return game.payoffs(links_NN, game.nash_efforts(links_NN))[seat]

    return tuple(max(games.own_rows(game.N, seat).tolist(), key=own_payoff))


def _myopic_proposals(state: State) -> np.ndarray:
    """Link wherever the other end consented last time and the link pays at the last graph and efforts."""
    game, proposals_NN = state.game, state.last("G")
    x = np.array(game.types) if state.efforts is None else state.efforts
    links_NN = games.complete_graph(game.N) if proposals_NN is None else state.links
    consent_NN = links_NN if proposals_NN is None else proposals_NN.T
    return consent_NN * (game.link_gains(links_NN, x) >= 0)


def _myopic_efforts(state: State) -> np.ndarray:
    x = np.array(state.game.types) if state.efforts is None else state.efforts
    return state.game.best_response(state.links, x)


def _nash(state: State) -> np.ndarray:
    return state.game.nash_efforts(state.links)


# name -> (state -> proposals (N, N), state -> efforts (N,))
RULES = {
    "second-best": (lambda s: s.game.efficient_graph("nash")[0], _nash),
    "planner": (
        lambda s: s.game.efficient_graph("planner")[0],
        lambda s: s.game.planner_efforts(s.links),
    ),
    "nash": (lambda s: s.game.nash_graph(), _nash),
    "myopic": (_myopic_proposals, _myopic_efforts),
    "selfish": (lambda s: np.array([_selfish_row(s.game, i) for i in range(s.game.N)]), _nash),
    "always-link": (lambda s: games.complete_graph(s.game.N), _nash),
    "never-link": (lambda s: games.empty_graph(s.game.N), _nash),
}
NAMES = (*RULES, "random")


def _exact(name: str, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
    """Plays its rule, and believes that everybody else plays it too."""
    propose, exert = RULES[name]
    if state.kind == "G":
        proposals_NN = propose(state)
        return Decision("G", proposals_NN[seat], proposals_NN[:, seat])
    efforts_N = np.clip(np.round(exert(state), EFFORT_DIGITS), 0, state.game.caps)
    belief_N = efforts_N.copy()
    belief_N[seat] = 0
    return Decision("E", float(efforts_N[seat]), belief_N)


def _random(state: State, seat: int, rng: np.random.Generator, past=()) -> Decision:
    """Coins and uniform efforts; so are its beliefs."""
    N, caps = state.game.N, state.game.caps
    if state.kind == "G":
        row_N, belief_N = rng.integers(0, 2, (2, N))
        row_N[seat] = belief_N[seat] = 0
        return Decision("G", row_N, belief_N)
    belief_N = np.round(rng.uniform(0, caps), EFFORT_DIGITS)
    belief_N[seat] = 0
    return Decision("E", float(min(caps[seat], round(rng.uniform(0, caps[seat]), EFFORT_DIGITS))), belief_N)


def _noisy(expert: Expert, rate: float, state: State, seat: int, rng: np.random.Generator, past=()) -> Decision | Question:
    return (_random if rng.random() < rate else expert)(state, seat, rng, past)


def make_expert(name: str, asking: Asking = Asking(), stand_in: Expert | None = None) -> Expert:
    """The expert of a name. asking: how language models are asked; stand_in: plays in place of one. Raises InputError
    for a name that is none, or a language model that cannot be had."""
    if name == "random":
        return _random
    if name in RULES:
        return partial(_exact, name)
    if name.startswith("noisy:"):
        inner, _, rate = name[len("noisy:") :].rpartition(":")
        try:
            noise = share(rate)
        except argparse.ArgumentTypeError:
            raise InputError(f"{name!r} is not noisy:EXPERT:RATE, rate 0 to 1, for example noisy:nash:0.15") from None
        return partial(_noisy, make_expert(inner, asking, stand_in), noise)
    if llm_experts.is_language(name):
        llm_experts.check_name(name)
        return stand_in or llm_experts.make(name, asking)
    known = f"{', '.join(NAMES)}, openai:MODEL, hf:PATH or noisy:EXPERT:RATE"
    raise InputError(f"unknown expert {name!r}; choose from {known}")


# ---------------------------------------------------------------------------------------------------------------------
# whole games, and the data set


@dataclass(frozen=True)
class Record:
    """One decision of one agent in an expert game: one line of the data set.

    prompt: the conversation so far; label: the expert's reply to the state that really arose; reply: the reply that
    was played, a random one where `replaced` (a share of all decisions is replaced at random, else an agent could
    learn to copy the last round). proposals and links: the latest ones after this stage; efforts: those played in this
    stage (None in a graph stage); payoffs: of the round that ended with this stage (None if none did).
    """

    game: int
    instance: dict
    round: int
    stage: int  # counted from 0 over the whole game
    kind: str  # G or E
    seat: int
    prompt: list
    reply: str
    label: str
    replaced: bool
    proposals: list
    links: list
    efforts: list | None
    payoffs: list | None


def simulate(
    game: Game, expert: Expert, rng: np.random.Generator, style: PromptStyle, noise: float = 0.0, index: int = 0
) -> list[Record]:
    """Plays one game with the expert in every seat; T * len(stages) * N records, in order of play."""
    return _side_by_side([_stages(game, expert, rng, style, noise, index)])


def _side_by_side(runs: list[Generator]) -> list[Record]:
    """Plays games stage by stage, so that the questions of a stage are asked together; their records, game by game."""
    asked, records = {i: next(run) for i, run in enumerate(runs)}, {}
    while asked:
        settled = iter(settle([d for decisions in asked.values() for d in decisions]))
        asked_next = {}
        for i, decisions in asked.items():
            try:
                asked_next[i] = runs[i].send([next(settled) for _ in decisions])
            except StopIteration as end:
                records[i] = end.value
        asked = asked_next
    return [r for i in range(len(runs)) for r in records[i]]


def _stages(game: Game, expert: Expert, rng: np.random.Generator, style: PromptStyle, noise: float, index: int) -> Generator:
    """One game: yields what the experts answer in a stage, receives it settled, returns the records at the end."""
    state, records = State(game), []
    replies: list[list[str]] = [[] for _ in range(game.N)]
    while not state.done:
        seats = range(game.N)
        labels = yield [expert(state, i, rng, replies[i]) for i in seats]
        replaced = [bool(rng.random() < noise) for _ in seats]
        played = [_random(state, i, rng) if replaced[i] else labels[i] for i in seats]
        after = state.step(np.array([d.action for d in played]))
        round_over = len(after.history) % len(game.stages) == 0
        for i in seats:
            records.append(
                Record(
                    game=index,
                    instance=game.to_json(),
                    round=state.round,
                    stage=len(state.history),
                    kind=state.kind,
                    seat=i,
                    prompt=messages(state, i, replies[i], style),
                    reply=format_reply(played[i], style),
                    label=format_reply(labels[i], style),
                    replaced=replaced[i],
                    proposals=after.last("G").tolist(),
                    links=after.links.tolist(),
                    efforts=after.efforts.tolist() if state.kind == "E" else None,
                    payoffs=after.round_results()[-1][2].round(6).tolist() if round_over else None,
                )
            )
        for i in seats:
            replies[i].append(format_reply(played[i], style))
        state = after
    return records


def simulate_many(
    count: int,
    expert: str,
    seed: int,
    style: PromptStyle,
    agents: tuple[int, int] = (4, 4),
    split: str = "train",
    families: tuple[Family, ...] = (Family(),),
    noise: float = 0.15,
    asking: Asking | None = None,
    stand_in: Expert | None = None,
) -> list[Record]:
    """The records of `count` games on instances drawn from a split, with agents[0] to agents[1] agents. Families take
    turns. asking: how language models are asked (by default: in this style); stand_in: plays in place of one.

    A language model plays all games side by side. It gets the instances and the replaced decisions that an exact
    expert gets: none of them turns on the answers, so each game is first played by an exact expert, to move on the
    random stream, and then in earnest with a copy of the stream from before.
    """
    rng = np.random.default_rng([seed, split == "held-out"])
    player = make_expert(expert, asking or Asking(style), stand_in)
    waits = llm_experts.is_language(expert) and stand_in is None
    rehearsing = make_expert(expert, stand_in=partial(_exact, "second-best")) if waits else None
    records, runs = [], []
    for index in tqdm(range(count), desc="expert games", disable=count < 1000):
        N = int(rng.integers(agents[0], agents[1] + 1))
        game = draw_game(rng, N, split, families[index % len(families)])
        if waits:
            runs.append(_stages(game, player, copy.deepcopy(rng), style, noise, index))
            simulate(game, rehearsing, rng, style, noise, index)
        else:
            records += simulate(game, player, rng, style, noise, index)
    return records + _side_by_side(runs)


def write_records(path: str, records: list[Record]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(r)) + "\n" for r in records).encode())


def read_records(path: str) -> list[Record]:
    """Reads and checks a data set. Raises InputError that names the file, the line and what is wrong with it."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the data set {path}: {e}; write one with: python experts.py --out FILE") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
            game = game_from_json(record.instance)
            if record.kind not in ("G", "E") or record.seat not in range(game.N):
                raise ValueError("`kind` must be G or E and `seat` one of the game's seats")
            if not all(type(v) is int for v in (record.game, record.seat, record.stage, record.round)):
                raise ValueError("`game`, `seat`, `stage` and `round` must be whole numbers")
            for field in ("reply", "label"):
                if parse_reply(getattr(record, field), record.kind, record.seat, game.N, game.caps[record.seat]) is None:
                    raise ValueError(f"`{field}` is not a compliant reply: {getattr(record, field)!r}")
            said = [isinstance(m["content"], str) and isinstance(m["role"], str) for m in record.prompt]
            if not said or not all(said):
                raise ValueError("`prompt` must be a list of chat messages")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise InputError(f"{path} line {number} is not a valid record: {' '.join(str(e).split())}") from None
        records.append(record)
    if not records:
        raise InputError(f"the data set {path} is empty; write one with: python experts.py --out FILE")
    return records


def label_decision(record: Record) -> Decision:
    """The expert's decision, as written in the label."""
    game = game_from_json(record.instance)
    return parse_reply(record.label, record.kind, record.seat, game.N, game.caps[record.seat])


def add_style_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is played and how it is told; training and evaluation share them."""
    add_game_arguments(parser)
    group = parser.add_argument_group("players")
    group.add_argument("--expert", default="second-best", help="the teacher and the other seats (see experts.py)")
    group.add_argument("--information", choices=("full", "local"), default="full", help="whose alpha an agent knows")
    group.add_argument("--belief", action=argparse.BooleanOptionalAction, default=True, help="ask for a Belief line")
    group.add_argument("--hints", action=argparse.BooleanOptionalAction, default=True, help="worked numbers in prompts")
    llm_experts.add_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which expert games there are."""
    add_style_arguments(parser)
    group = parser.add_argument_group("expert games")
    group.add_argument("--games", type=positive_int, default=126, help="number of expert games [source: 126]")
    group.add_argument("--agents", type=parse_range, default=(4, 4), metavar="N|A-B", help="agents per game, 4 or 4-8")
    told = "the policy's seat, from 0 [source: 0]; random: one drawn for each game"
    group.add_argument("--seat", type=seat_choice("random"), metavar="SEAT|random", default=0, help=told)
    group.add_argument("--all-seats", action="store_true", help="train on the decisions of every seat, not of --seat alone")
    group.add_argument("--noise", type=share, default=0.15, help="share of decisions replaced at random in the data")


def style_of(args: argparse.Namespace) -> PromptStyle:
    return PromptStyle(args.information, args.belief, args.hints)


def asking_of(args: argparse.Namespace, name: str) -> Asking:
    """How the expert of this name is asked; exact ones are not, so runs from before language models need no flags."""
    return llm_experts.asking_of(args, style_of(args)) if llm_experts.is_language(name) else Asking()


def expert_of(args: argparse.Namespace, name: str | None = None) -> Expert:
    """The expert of the flags of `add_style_arguments`, or the one of this name. Raises InputError."""
    name = args.expert if name is None else name
    return make_expert(name, asking_of(args, name))


def simulate_args(args: argparse.Namespace, count: int, seed: int, split: str = "train", stand_in=None) -> list[Record]:
    """`simulate_many` with the flags of `add_data_arguments`."""
    settings = style_of(args), args.agents, split, families(args), args.noise, asking_of(args, args.expert), stand_in
    return simulate_many(count, args.expert, seed, *settings)


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write the expert data set: one decision per line, as JSON.")
    add_data_arguments(parser)
    parser.add_argument("--out", default="expert_games.jsonl", help="the file to write")
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of instances and noise")
    parser.add_argument("--split", choices=("train", "held-out"), default="train", help="which instances are drawn")
    parser.add_argument("--dry-run", action="store_true", help="only estimate what a language model would be asked")
    args = parser.parse_args(argv)
    if args.dry_run:
        if not llm_experts.is_language(args.expert):
            raise InputError(f"--dry-run is for experts that are language models; {args.expert} costs nothing")
        rehearsal = llm_experts.Rehearsal(partial(_exact, "second-best"), asking_of(args, args.expert))
        simulate_args(args, args.games, args.seed, args.split, rehearsal)
        print(rehearsal.report(args.expert))
        return
    refuse_existing(args.out)
    records = simulate_args(args, args.games, args.seed, args.split)
    write_records(args.out, records)
    print(f"{args.out}: {len(records)} decisions of {args.games} games by {args.expert}")
    llm_experts.print_report()


if __name__ == "__main__":
    main()
