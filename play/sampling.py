"""Sampling by several processes, which share the prompts. Every token of every reply has a random number of
its own, so the replies do not depend on who samples them."""

from collections.abc import Sequence

import numpy as np
import torch

from games import State
from policy import Policy
from prompts import PromptStyle, Reply, format_reply
from run import ranks


def random_guesses(policy: Policy, places: list[tuple[State, int]], style: PromptStyle) -> list[list[int]]:
    """For Policy.sample: of each (state, seat) a reply of the right form whose decision means nothing. The
    same calls return the same."""
    rng = np.random.default_rng(0)
    random = [state.kind.random(state.game, seat, rng) for state, seat in places]
    return [policy.encode_reply(format_reply(decision, style)) for decision in random]


def sample_replies(
    policy,
    prompts: list[list[int]],
    guesses: list[list[int]],
    M: int,
    S: int,
    temperature: float,
    generator,
    keys: Sequence | None = None,
) -> list[list[Reply]]:
    """M replies of up to S tokens to every prompt, [P][M]. policy: a Policy, or a session of one; guesses: a
    text of the form of each prompt's replies (see Policy.sample); keys: of the prompts; one process samples
    all that have the same (see ranks.share)."""
    uniforms_PMS = torch.rand(len(prompts), M, S, generator=generator)

    def sample_own(indices: list[int]) -> list[list[Reply]]:
        own, forms = ([texts[i] for i in indices] for texts in (prompts, guesses))
        return policy.sample(own, uniforms_PMS[indices], temperature, forms)

    return ranks.split(keys or range(len(prompts)), sample_own)


def sample_texts(
    policy, prompts: list[list[int]], guesses: list[list[int]], S: int, temperature: float, generator
) -> list[str]:
    """The text of one reply to every prompt, [P]."""
    groups = sample_replies(policy, prompts, guesses, 1, S, temperature, generator)
    return [reply.text for (reply,) in groups]
