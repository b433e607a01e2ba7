"""The random numbers of a run.

Every generator is seeded by the run's seed, the number of its stream, and what else its use depends on (the
step, the game). No generator outlives a step, so a checkpoint holds none: the number of steps that are done
determines all random numbers that follow. These generators have no stream; they are seeded by

    expert games        seed, 1 for the held-out ones and else 0
    held-out grid       0
    evaluation          seed, game, seat, stage (draws of an expert); seed, 0, 0, 0, 2 (few-shot games);
                        seed, checksum of the game, 0, 0, 1 (random seats)

Zeros at the end count only from the fifth 32-bit word on (a seed from 2**32 on has two words), so two uses
must not differ by them alone.
"""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are for. The values are part of every result and must not change."""

    SFT_ADAPTER = 1
    SFT_ORDER = 2
    RFT_ADAPTER = 3
    RFT_ORDER = 4
    RFT_REPLIES = 6
    RFT_DECISIONS = 7
    CREDIT = 8
    SEATS = 9
    LABEL_NOISE = 10
    PROBE_GAMES = 11
    PROBE_REPLIES = 12
    PARTNERS = 13  # of an instance, whatever the seed of the run
    SELF_PLAY = 14
    OTHERS = 15  # random first rounds in tools/others.py
    PLAYERS = 100  # player k of a table has PLAYERS + k
    BENCH = 200  # to 204


def torch_generator(*numbers: int) -> torch.Generator:
    """A CPU generator that is seeded by several numbers >= 0."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def numpy_generator(*numbers: int) -> np.random.Generator:
    """A generator that is seeded by several numbers >= 0."""
    return np.random.default_rng(list(numbers))


def shuffled(count: int, size: int, step: int, *seeds: int) -> list[int]:
    """The indices of batch number `step`, of `size` items, where every epoch goes through all `count` items
    in an order of its own."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        indices.append(int(numpy_generator(*seeds, epoch).permutation(count)[offset]))
    return indices
