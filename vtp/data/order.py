"""The order of training samples: position k of an endless stream is a function of (seed, sizes of the shards, k).

So any rank and any worker finds its samples without talking to another, and a resumed run goes on at the exact next
one, whatever the number of ranks and workers is then. Every epoch holds every sample once.

The positions may be dealt to groups, in turn: position k belongs to group k % groups. Then every group has shards of its own
in an epoch, and the same number of samples; a batch whose stretches are groups (`of_batch`) is read by machines that share
no shard. The number of groups is part of the order. The number of machines is not.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vtp.draws import numpy_draws

BLOCK = 1024  # positions of a mixture, or of a group of it, that hold every source in exact proportion


def sample_indices(start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Samples at positions `start` to `start + count` of a stream: epochs of `size`, each in its own order."""
    return epochs(np.arange(start, start + count), (size,), seed, window=None)


def of_batch(places: np.ndarray, batch: int, groups: int) -> np.ndarray:
    """Positions in the stream of places that are counted through batches: each stretch of a batch is one group's.

    Raises ValueError for a batch that has no equal stretches.
    """
    if batch % groups:
        raise ValueError(f"a batch of {batch} samples has no {groups} equal stretches; change data.stream.groups")
    step, within = np.divmod(places, batch)
    group, turn = np.divmod(within, batch // groups)
    return step * batch + turn * groups + group


def epochs(
    positions: np.ndarray, shards: Sequence[int], seed: int, *, window: int | None, groups: int = 1
) -> np.ndarray:
    """Samples at `positions` of a stream, numbered through shards of so many samples.

    `window`: so many shards are open at a time, over all `groups`. Shards come in random order, and samples are shuffled
    within each group's part of a window; None shuffles everything at once.
    """
    indices = np.empty(len(positions), dtype=np.int64)
    of_epoch = positions // sum(shards)
    for epoch in np.unique(of_epoch).tolist():
        chosen = of_epoch == epoch
        if _is_whole(len(shards), window, groups):
            indices[chosen] = epoch_order(sum(shards), seed, epoch)[positions[chosen] % sum(shards)]
            continue
        plan = _plan(tuple(shards), seed, epoch, window or len(shards), groups)
        at = plan.find(positions[chosen])
        drawn = np.empty(len(at.group), dtype=np.int64)
        for number in np.unique(at.window).tolist():
            orders = _window_orders(tuple(shards), seed, epoch, window or len(shards), groups, number)
            for group in np.unique(at.group[at.window == number]).tolist():
                here = (at.window == number) & (at.group == group)
                drawn[here] = orders[group][at.place[here]]
        indices[chosen] = drawn
    return indices


def shards_around(
    positions: np.ndarray, shards: Sequence[int], seed: int, *, window: int | None, groups: int
) -> tuple[list[int], list[int]]:
    """The shards of the windows in which `positions` lie, and those that come with the windows after them."""
    if _is_whole(len(shards), window, groups):
        return list(range(len(shards))), []
    size, span = sum(shards), window or len(shards)
    now: dict[int, None] = {}
    later: dict[int, None] = {}
    of_epoch = positions // size
    for epoch in np.unique(of_epoch).tolist():
        plan = _plan(tuple(shards), seed, epoch, span, groups)
        at = plan.find(positions[of_epoch == epoch])
        for group, number in np.unique(np.stack([at.group, at.window]), axis=1).T.tolist():
            now |= dict.fromkeys(plan.members(group, number))
            if number + 1 < plan.windows(group):
                following = plan.members(group, number + 1)
            else:
                following = _plan(tuple(shards), seed, epoch + 1, span, groups).members(group, 0)
            later |= dict.fromkeys(following)
    return list(now), [shard for shard in later if shard not in now]


def _is_whole(shards: int, window: int | None, groups: int) -> bool:
    """Whether all samples of an epoch are shuffled together."""
    return window is None or (groups == 1 and window >= shards)


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation of range(size). Kept: a step asks for it again and may touch two epochs."""
    return numpy_draws(seed, "epoch", epoch).permutation(size)


class _Found(NamedTuple):
    """Where positions of an epoch lie."""

    group: np.ndarray
    window: np.ndarray  # number among those of its group
    place: np.ndarray  # in the window, before it is shuffled


class _Plan:
    """An epoch: shards in random order, one after the other, cut into groups of equal size, and those into windows.

    A cut may go through a shard. Which of the groups have a sample more, where they cannot be equal, goes by the epoch.
    """

    def __init__(self, shards: tuple[int, ...], seed: int, epoch: int, window: int, groups: int) -> None:
        self._order = numpy_draws(seed, "shards", epoch).permutation(len(shards))
        self._first = np.concatenate([[0], np.cumsum(shards)])[self._order]  # samples at which shards begin
        sizes = np.array(shards)[self._order]
        self._ends = sizes.cumsum()
        self._starts = self._ends - sizes
        self._groups = groups
        first, stop = epoch * sum(shards), (epoch + 1) * sum(shards)
        begins, stops = (-((np.arange(groups) - position) // groups) for position in (first, stop))
        self._begins = begins  # turns before this epoch, by group
        cuts = np.concatenate([[0], np.cumsum(stops - begins)])
        self._edges = [self._windows(low, high, window) for low, high in pairwise(cuts.tolist())]

    def _windows(self, low: int, high: int, window: int) -> np.ndarray:
        """The places at which windows begin, and the end of the last."""
        first = int(np.searchsorted(self._ends, low, side="right")) if low else 0
        beyond = int(np.searchsorted(self._starts, high, side="left"))
        return np.concatenate([[low], self._starts[first + window : beyond : window], [high]])

    def find(self, positions: np.ndarray) -> _Found:
        turns, group = np.divmod(positions, self._groups)
        turns = turns - self._begins[group]
        number, place = np.empty_like(turns), np.empty_like(turns)
        for each in np.unique(group).tolist():
            chosen, edges = group == each, self._edges[each]
            along = edges[0] + turns[chosen]
            number[chosen] = np.searchsorted(edges, along, side="right") - 1
            place[chosen] = along - edges[number[chosen]]
        return _Found(group, number, place)

    def windows(self, group: int) -> int:
        return len(self._edges[group]) - 1

    def members(self, group: int, number: int) -> list[int]:
        """The shards of a window."""
        low, high = self._edges[group][number : number + 2]
        here = slice(int(self._shard_at(low)), int(self._shard_at(high - 1)) + 1)
        return self._order[here][self._starts[here] < self._ends[here]].tolist()

    def samples(self, group: int, number: int) -> np.ndarray:
        """The samples of a window, as they lie in its shards."""
        low, high = self._edges[group][number : number + 2]
        along = np.arange(low, high)
        shard = self._shard_at(along)
        return along - self._starts[shard] + self._first[shard]

    def _shard_at(self, along: np.ndarray) -> np.ndarray:
        """Which of the shards in their order hold these places."""
        return np.searchsorted(self._ends, along, side="right")


@lru_cache(maxsize=8)
def _plan(shards: tuple[int, ...], seed: int, epoch: int, window: int, groups: int) -> _Plan:
    return _Plan(shards, seed, epoch, window // groups, groups)


@lru_cache(maxsize=4)
def _window_orders(
    shards: tuple[int, ...], seed: int, epoch: int, window: int, groups: int, number: int
) -> list[np.ndarray]:
    """The samples of a window in their order, by group."""
    plan = _plan(shards, seed, epoch, window, groups)
    return [
        numpy_draws(seed, "window", epoch, number * groups + group).permutation(plan.samples(group, number))
        if number < plan.windows(group)
        else np.empty(0, dtype=np.int64)
        for group in range(groups)
    ]


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

    def of(self, positions: np.ndarray, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Source and place in that source's own stream, of every position; the place is of the position's group."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        turns, group = np.divmod(positions, groups)
        blocks, within = np.divmod(turns, BLOCK)
        blocks = blocks * groups + group
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            order = numpy_draws(self._seed, "mixture", block).permutation(
                np.repeat(np.arange(len(self._counts)), self._counts)
            )
            rank = np.empty(BLOCK, dtype=np.int64)
            for source, count in enumerate(self._counts.tolist()):
                rank[order == source] = np.arange(count)
            sources[chosen] = order[within[chosen]]
            turn = block // groups * self._counts[sources[chosen]] + rank[within[chosen]]
            places[chosen] = turn * groups + block % groups
        return sources, places
