"""Self-play: the prompts of a step come from fresh games that the current policy plays in all seats.

[choice] `--partners self --seat all`. With fixed expert games a policy answers others that never change; here
the others are the policy itself, as it is in this step. The games of a step are played to their end with one
reply to every question, and then decisions of one seat of each are drawn, which become prompts like any
others: m replies are sampled to each, and rewarded by what the others did in that game.
"""

from dataclasses import dataclass

import torch

from experts import Expert
from games import Decision
from play import dataset
from play.dataset import Prompt, make_prompts
from play.expert_games import simulate
from play.sampling import random_guesses, sample_texts
from policy import Policy
from prompts import PromptStyle, messages, parse_reply
from run.seeds import Stream, numpy_generator, torch_generator
from world.draws import Family, draw_game


class Itself(Expert):
    """The policy as a player of expert games. A reply that is not compliant plays no links or effort 0, and
    the others read it so."""

    name = "self"

    def __init__(self, policy: Policy, style: PromptStyle, temperature: float, generator: torch.Generator):
        self.policy, self.style, self.temperature, self.generator = policy, style, temperature, generator

    def decide_all(self, calls: list[tuple]) -> list[Decision]:
        chats = [messages(state, seat, past, self.style) for state, seat, _, past in calls]
        prompts = [self.policy.encode_prompt(chat) for chat in chats]
        limit = self.style.reply_limit(max(state.game.N for state, *_ in calls))
        places = [(state, seat) for state, seat, *_ in calls]
        guesses = random_guesses(self.policy, places, self.style)
        texts = sample_texts(self.policy, prompts, guesses, limit, self.temperature, self.generator)
        return [
            parse_reply(text, state, seat) or state.kind.fallback(state.game.N)
            for text, (state, seat) in zip(texts, places, strict=True)
        ]


@dataclass
class SelfPlay:
    """Where the prompts of self-play come from. families, agents: of the games, see dataset.simulate_many."""

    policy: Policy
    style: PromptStyle
    temperature: float
    families: tuple[Family, ...]
    agents: tuple[int, int]

    def next_batch(
        self, pool: list[list[Prompt]], counts: dict[str, int], step: int, seed: int
    ) -> list[Prompt]:
        """As dataset.next_batch, but from new games, one seat of each, so that a step meets as many different
        games as with expert games. The pool is not used."""
        rng, plays = numpy_generator(seed, Stream.SELF_PLAY, step), []
        while len(plays) < max(counts.values()):
            N = int(rng.integers(self.agents[0], self.agents[1] + 1))
            game = draw_game(rng, N, "train", self.families[(step + len(plays)) % len(self.families)])
            plays.append((step * max(counts.values()) + len(plays), game, rng))
        generator = torch_generator(seed, Stream.SELF_PLAY, step)
        player = Itself(self.policy, self.style, self.temperature, generator)
        records = simulate(plays, player, self.style)
        fresh = make_prompts(self.policy, records, records, counts, self.style)
        seats: dict[int, list[int]] = {}  # by game, the numbers of its conversations
        for k, (q, *_) in enumerate(fresh):
            seats.setdefault(q.target.game_index, []).append(k)
        order = [int(rng.choice(seats[game])) for game in rng.permutation(list(seats)).tolist()]
        return dataset.next_batch(fresh, counts, step, seed, order)
