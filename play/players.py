"""Who sits at a table, and games played at tables.

A player answers a list of `Ask`s, all of one stage, with one answer each: a reply's text, which is parsed as
strictly as the policy's in training, or a Decision (experts in seats that are not measured). A table names a
player for every seat of a game; a player in several seats, or in several games, is asked once per stage for
all of them.

Players have names: `base` (the model without an adapter), `few-shot:K` (the same after K expert games in the
prompt), an adapter folder (or one with two adapters, graph/adapter and effort/adapter, that take turns),
`expert:NAME`, `human`. All that need the model share one.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import experts
import lora
from games import Game, State
from models import adapters as adapters_on_disk
from models.load import put_adapter
from play import expert_games, human
from play.metrics import Played, Turn, measured
from play.repair import repair_reply
from policy import Policy
from prompts import Decision, PromptStyle, fallback, format_reply, messages, parse_reply, reply_tokens
from run import dataset, ranks
from run.checkpoint import seeded
from run.files import InputError, one_line
from run.training import load_policy_of_rank
from world.draws import Family, draw_game, families, split_of


@dataclass(frozen=True, eq=False)
class Ask:
    """One decision that is asked for. game: which of the games that are played; replies: what this seat has
    answered in the stages before."""

    game: int
    state: State
    seat: int
    replies: list[str | Decision]

    @property
    def stage(self) -> int:
        return len(self.replies)


Player = Callable[[list[Ask]], list[str | Decision]]

# -------------------- players


def policy_player(
    policy: Policy,
    style: PromptStyle,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    batch: int = 64,
    adapters: dict[str, tuple[dict, lora.LoRAConfig]] | None = None,
    examples: dict[str, list[list[dict]]] | None = None,
    stream: int = 100,
) -> Player:
    """A player that answers with the policy. It is for one play of games: of the conversations of its first
    two batches it keeps the keys and values from one decision to the next.

    adapters: by kind of decision, G and E; is put on the model for every answer, so that players can share
    the model; examples: conversations that stand before every prompt, by game label; stream: players at one
    table must not have the same random numbers."""
    histories = defaultdict(policy.new_history)  # each adapter reads conversations for itself

    def prompt(ask: Ask) -> list[int]:
        chat = messages(ask.state, ask.seat, ask.replies, style)
        return policy.encode_prompt(with_examples(examples[ask.state.game.label], chat) if examples else chat)

    def answer(asks):
        prompts = [prompt(ask) for ask in asks]
        limit = max_new_tokens or reply_tokens(max(ask.state.game.N for ask in asks))
        texts, adapter = [], adapters[asks[0].state.kind] if adapters else None
        with adapter_on(policy, *adapter) if adapter else nullcontext():
            for start in range(0, len(prompts), batch):
                generator = seeded(seed, stream, asks[0].stage, start)
                part = prompts[start : start + batch]
                mine = ranks.share(range(len(part)))
                # What was read takes 46 KB a token in the default model: later batches read their
                # conversations again.
                history = histories[id(adapter), start] if start < 2 * batch else None
                groups = policy.sample(part, 1, limit, temperature, generator, history, mine)
                texts += ranks.whole(mine, [group[0].text for group in groups])
        return texts

    return answer


@contextmanager
def adapter_on(policy: Policy, state: dict, config: lora.LoRAConfig):
    lora.inject(policy.model, config, torch.Generator(), policy.layer)
    try:
        adapters_on_disk.load_adapter_state(policy.model, state)
        yield
    finally:
        lora.remove(policy.model)


def expert_decider(expert: str | experts.Expert, seed: int) -> Player:
    """The expert's decisions. Its draws belong to (seed, game, seat, stage): they depend on no other
    player."""
    expert = experts.make_expert(expert) if isinstance(expert, str) else expert

    def decide(asks):
        rngs = [np.random.default_rng([seed, a.game, a.seat, a.stage]) for a in asks]
        return experts.decide(expert, [(a.state, a.seat, rng, a.replies) for a, rng in zip(asks, rngs)])

    return decide


def expert_player(expert: str | experts.Expert, style: PromptStyle, seed: int) -> Player:
    """The same in the words of a policy."""
    decide = expert_decider(expert, seed)
    return lambda asks: [format_reply(decision, style) for decision in decide(asks)]


def with_examples(examples: list[list[dict]], chat: list[dict]) -> list[dict]:
    """The conversation `chat` after other, finished ones, as one conversation. Many chat templates take one
    system message, and take it first: each later conversation has its own at the head of its first user
    message."""
    first, *rest = [*examples, chat]
    joined = list(first)
    for system, question, *more in rest:
        joined += [
            {"role": "user", "content": f"A new game. {system['content']}\n{question['content']}"},
            *more,
        ]
    return joined


# -------------------- players by name

MAX_SHOTS = 1000  # of few-shot:K; no context holds them, and each game is played first


def expert_examples(
    count: int, family: Family, N: int, expert: experts.Expert, style: PromptStyle, seed: int
) -> list[list[dict]]:
    """`count` expert games of the training split, each as the conversation of a random seat."""
    rng = np.random.default_rng([seed, 0, 0, 0, 2])
    chats = []
    for _ in range(count):
        game = draw_game(rng, N, "train", family)
        if split_of(game) != "train":
            raise InputError(
                "few-shot examples would be the evaluated game itself: the game flags leave but one instance"
            )
        seat = int(rng.integers(N))
        *_, last = (r for r in expert_games.simulate([(0, game, rng)], expert, style) if r.seat == seat)
        chats.append([*last.prompt, {"role": "assistant", "content": last.label}])
    return chats


def check_names(args, names: list[str], flag: str) -> None:
    for name in names:
        kind, _, rest = name.partition(":")
        if kind == "expert":
            dataset.expert_of(args, rest)
        elif kind == "few-shot":
            if not (rest.isascii() and rest.isdecimal() and 1 <= int(rest[:9]) <= MAX_SHOTS):
                told = f"a whole number of expert games from 1 to {MAX_SHOTS}, as in few-shot:3"
                raise InputError(f"{flag} {name}: few-shot:K needs {told}")
        elif name not in ("base", human.NAME) and not all(
            Path(folder).is_dir() for folder in adapters_on_disk.chain(name)
        ):
            raise InputError(
                f"{flag} {name}: neither base, human, few-shot:K or expert:NAME, nor an adapter folder"
            )


def adapter_folders(name: str) -> dict[str, str]:
    """The adapter for each kind of decision: the folder itself, or the two that `--train-on separate` leaves
    in it."""
    separate = {"G": str(Path(name, "graph", "adapter")), "E": str(Path(name, "effort", "adapter"))}
    return separate if any(Path(folder).is_dir() for folder in separate.values()) else {"G": name, "E": name}


def fitting_adapter(policy: Policy, name: str) -> tuple[dict, lora.LoRAConfig]:
    """The adapter of a folder, or a chain as one. Raises InputError for one that does not fit the policy's
    model. (Of a chain only the first was trained on this model, so it alone is held against its base.)"""
    put_adapter(policy, adapters_on_disk.chain(name)[0])
    lora.remove(policy.model)
    try:
        stacked = adapters_on_disk.read_chain(name)
        with adapter_on(policy, *stacked):
            return stacked
    except (OSError, ValueError) as e:
        raise InputError(f"{name}: {one_line(e)}") from None


def make_cast(args, names: list[str], seed: int, flag: str = "--policy") -> dict[str, Callable[..., Player]]:
    """{name: a function that makes the player for one play}; it takes the `stream` of `policy_player`. The
    model is loaded once, and a wrong adapter is found before the first game, not after the last."""
    check_names(args, names, flag)
    style, cast = dataset.style_of(args), {}
    without_model = [name for name in names if name == human.NAME or name.startswith("expert:")]
    policy = load_policy_of_rank(args) if len(without_model) < len(names) else None

    def model_player(stream=100, batch=64, **how):
        settings = style, args.max_new_tokens, args.eval_temperature, seed
        return policy_player(policy, *settings, batch=batch, stream=stream, **how)

    for name in names:
        kind, _, rest = name.partition(":")
        if kind == "expert":
            expert = dataset.expert_of(args, rest)
            cast[name] = lambda stream=100, expert=expert: expert_player(expert, style, seed)
        elif kind == "few-shot":
            settings = args.eval_agents, dataset.expert_of(args), style, seed
            examples = {f.label: expert_examples(int(rest), f, *settings) for f in families(args)}
            # Since every conversation keeps a copy of what it has read
            smaller = max(1, 64 // (int(rest) + 1))
            cast[name] = lambda stream=100, e=examples, b=smaller: model_player(stream, b, examples=e)
        elif name == "base":
            cast[name] = model_player
        elif name == human.NAME:
            cast[name] = lambda stream=100: human.Human(style)
        else:
            both = adapter_folders(name)
            read = {folder: fitting_adapter(policy, folder) for folder in set(both.values())}
            adapters = {kind: read[folder] for kind, folder in both.items()}
            cast[name] = lambda stream=100, adapters=adapters: model_player(stream, adapters=adapters)
    return cast


# -------------------- games at tables


def play(
    instances: list[Game],
    player: Player,
    seat: int | list[tuple[int, ...]],
    expert: str | experts.Expert,
    seed: int,
    label: str = "",
    repair: bool = False,
    first: int = 0,
) -> list[Played]:
    """The player in one seat, or in each game in the seats that the list names, and the expert in the
    others."""
    seats = [(seat,)] * len(instances) if isinstance(seat, int) else seat
    others = expert_decider(expert, seed)
    tables = [[player if j in own else others for j in range(g.N)] for g, own in zip(instances, seats)]
    return play_tables(instances, tables, seats, expert, seed, label, repair, first)


def play_tables(
    instances: list[Game],
    tables: list[list[Player]],
    watched: list[tuple[int, ...]],
    expert: str | experts.Expert,
    seed: int,
    label: str = "",
    repair: bool = False,
    first: int = 0,
) -> list[Played]:
    """All games side by side, stage by stage; they must have the same stages and rounds. tables: of each game
    the player in each seat; watched: of each game the seats whose turns are recorded; expert: whose decisions
    in all seats a graph decision is compared with (as in training: its row among the expert's others);
    repair: of replies that are not compliant, play what can be read in them; first: the number of the first
    game, to which experts' draws belong. A player that has a `game_over` is told how each game ended."""
    reference = expert_decider(expert, seed)
    players = list({id(p): p for table in tables for p in table}.values())
    states = [State(g) for g in instances]
    replies: list[list[list[str]]] = [[[] for _ in table] for table in tables]
    turns: list[list[Turn]] = [[] for _ in instances]
    stages = len(instances[0].stages) * instances[0].rounds
    told_at_end = [tell for player in players if (tell := getattr(player, "game_over", None))]
    # No progress bar in a person's dialogue
    hidden = bool(told_at_end) or not ranks.first()
    for _ in tqdm(range(stages), desc=f"playing {label}", unit="stage", leave=False, disable=hidden):
        asked = [[Ask(first + i, s, j, replies[i][j]) for j in range(s.game.N)] for i, s in enumerate(states)]
        answers = {}
        for player in players:
            asks = [
                ask for of_game in asked for ask in of_game if tables[ask.game - first][ask.seat] is player
            ]
            answers |= {(ask.game, ask.seat): a for ask, a in zip(asks, player(asks), strict=True)}
        graph = states[0].kind == "G"
        of_reference = iter(reference([ask for of_game in asked for ask in of_game]) if graph else ())
        for i, state in enumerate(states):
            N, caps, kind = state.game.N, state.game.caps, state.kind
            of_game = [answers[first + i, j] for j in range(N)]
            strict = [
                a if isinstance(a, Decision) else parse_reply(a, kind, j, N, caps[j])
                for j, a in enumerate(of_game)
            ]
            meant = [
                d or (repair_reply(of_game[j], kind, j, N, caps[j]) if repair else None)
                for j, d in enumerate(strict)
            ]
            actions = np.array([(d or fallback(kind, N)).action for d in meant])
            expert_NN = np.array([next(of_reference).action for _ in range(N)]) if kind == "G" else None
            for j in watched[i]:
                turns[i].append(_turn(state, j, of_game[j], strict[j], meant[j], actions, expert_NN))
            for of_seat, a in zip(replies[i], of_game):
                of_seat.append(a)
            states[i] = state.step(actions)
    for tell in told_at_end:
        for state in states:
            tell(state)
    welfares = [[float(pay.sum()) for _, _, pay in s.round_results()] for s in states]
    return [Played(g, t, w, s.history) for g, t, w, s in zip(instances, turns, welfares, states)]


def _turn(
    state: State, seat: int, reply, strict, meant, actions: np.ndarray, expert_NN: np.ndarray | None
) -> Turn:
    """strict: the decision of the reply as it is; meant: after repair, where there is one; expert_NN: (N, N)
    or None."""
    values = measured(meant, state, seat, actions, expert_NN)
    text, repaired = reply if isinstance(reply, str) else "", strict is None and meant is not None
    return Turn(state.round, state.kind, text, strict, **values, seat=seat, repaired=repaired)
