"""The order of training samples: position k of an endless stream is a function of (seed, sizes of the shards, k).

So any rank and any worker finds its samples without talking to another, and a resumed run goes on at the exact next
one, whatever the number of ranks and workers is then. Every epoch holds every sample once.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from vtp.draws import numpy_draws

BLOCK = 1024  # positions of a mixture that hold every source in exact proportion


def sample_indices(start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Samples at positions `start` to `start + count` of a stream: epochs of `size`, each in its own order."""
    return epochs(np.arange(start, start + count), (size,), seed, window=None)


def epochs(positions: np.ndarray, shards: Sequence[int], seed: int, *, window: int | None) -> np.ndarray:
    """Samples at `positions` of a stream, numbered through shards of so many samples.

    `window`: so many shards are open at a time. Shards come in random order, and samples are shuffled within each
    window of them; None shuffles everything at once.
    """
    size = sum(shards)
    indices = np.empty(len(positions), dtype=np.int64)
    of_epoch = positions // size
    for epoch in np.unique(of_epoch).tolist():
        chosen = of_epoch == epoch
        places = positions[chosen] % size
        indices[chosen] = (
            epoch_order(size, seed, epoch)[places]
            if window is None or window >= len(shards)
            else _windowed(places, tuple(shards), seed, epoch, window)
        )
    return indices


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation of range(size). Kept: a step asks for it again and may touch two epochs."""
    return numpy_draws(seed, "epoch", epoch).permutation(size)


def _windowed(places: np.ndarray, shards: tuple[int, ...], seed: int, epoch: int, window: int) -> np.ndarray:
    starts = _window_starts(shards, seed, epoch, window)
    numbers = np.searchsorted(starts, places, side="right") - 1
    indices = np.empty(len(places), dtype=np.int64)
    for number in np.unique(numbers).tolist():
        chosen = numbers == number
        order = _window_order(shards, seed, epoch, window, number)
        indices[chosen] = order[places[chosen] - starts[number]]
    return indices


@lru_cache(maxsize=2)
def _shard_order(shards: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return numpy_draws(seed, "shards", epoch).permutation(len(shards))


@lru_cache(maxsize=2)
def _window_starts(shards: tuple[int, ...], seed: int, epoch: int, window: int) -> np.ndarray:
    """The place in the epoch at which each window begins."""
    sizes = np.array(shards)[_shard_order(shards, seed, epoch)]
    return np.concatenate([[0], np.add.reduceat(sizes, np.arange(0, len(sizes), window)).cumsum()[:-1]])


@lru_cache(maxsize=4)
def _window_order(shards: tuple[int, ...], seed: int, epoch: int, window: int, number: int) -> np.ndarray:
    """The samples of a window in their order."""
    first = [0, *accumulate(shards)]
    members = _shard_order(shards, seed, epoch)[number * window : (number + 1) * window]
    samples = np.concatenate([np.arange(first[shard], first[shard + 1]) for shard in members.tolist()])
    return numpy_draws(seed, "window", epoch, number).permutation(samples)


class Mixture:
    """Which of several streams each position of their mixture is taken from, and which place it has there.

    Every block of 1,024 positions holds the sources in proportion to their weights, within one position. Raises
    ValueError for a weight too small for that.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = BLOCK * np.array(weights) / sum(weights)
        self._counts = np.floor(shares).astype(np.int64)
        # What rounding down left over goes to those who lost most.
        for source in np.argsort(self._counts - shares, kind="stable")[: BLOCK - self._counts.sum()]:
            self._counts[source] += 1
        if not self._counts.all():
            raise ValueError(
                f"a weight of the mixture is below 1/{BLOCK} of their sum, so its source would never be seen"
            )
        self._seed = seed

    def of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and place in that source's own stream, of every position."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        blocks, within = np.divmod(positions, BLOCK)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            order = numpy_draws(self._seed, "mixture", block).permutation(
                np.repeat(np.arange(len(self._counts)), self._counts)
            )
            rank = np.empty(BLOCK, dtype=np.int64)
            for source, count in enumerate(self._counts.tolist()):
                rank[order == source] = np.arange(count)
            sources[chosen] = order[within[chosen]]
            places[chosen] = block * self._counts[sources[chosen]] + rank[within[chosen]]
        return sources, places
