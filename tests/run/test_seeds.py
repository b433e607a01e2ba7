"""The random numbers of a run: all results so far were made with them, so the first ones are fixed here."""

import numpy as np
import pytest

from run.seeds import Stream, numpy_generator, shuffled, torch_generator


def test_generators_give_the_numbers_that_they_always_gave():
    assert torch_generator(3, Stream.RFT_REPLIES, 2, 0).initial_seed() == 5998601184144491268
    rng = numpy_generator(3, Stream.RFT_DECISIONS, 2, 0)
    assert rng.integers(1000, size=4).tolist() == [892, 423, 405, 835]
    epoch = [i for step in range(5) for i in shuffled(10, 2, step, 4, Stream.SFT_ORDER)]
    assert epoch == [8, 9, 4, 0, 2, 5, 3, 1, 6, 7]
    for value in (3, np.int64(3), True):  # True: as in seed, split == "held-out"
        assert numpy_generator(5, value).random() == np.random.default_rng([5, int(value)]).random()


@pytest.mark.parametrize(("seed", "same"), [(0, True), (2**32 - 1, True), (2**32, False)])
def test_a_fourth_number_that_is_0_counts_beside_a_seed_of_two_words(seed, same):
    with_0 = torch_generator(seed, Stream.RFT_REPLIES, 5, 0).initial_seed()
    assert (torch_generator(seed, Stream.RFT_REPLIES, 5).initial_seed() == with_0) is same


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 7), (4, 4), (1, 2)])
def test_shuffled_goes_through_everything_once_an_epoch(count, size):
    def indices(seed):
        steps = range(3 * count)  # that is 3 * size epochs
        return [i for step in steps for i in shuffled(count, size, step, seed, Stream.SFT_ORDER)]

    epochs = [indices(0)[k : k + count] for k in range(0, 3 * count * size, count)]
    assert len(epochs) == 3 * size and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count != 7 or (len({tuple(epoch) for epoch in epochs}) > 1 and indices(0) != indices(1))
