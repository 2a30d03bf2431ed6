"""The order of batches of one picture size each: batch k of an endless stream is a function of (seed, buckets, k).

An epoch permutes the shards and cuts them into windows. In a window the samples of a bucket (a ratio, and how many short
edges its pictures are large enough for) are permuted and cut into whole batches; what is left over joins those of the same
ratio with an edge less. So of every ratio less than a batch is left out of a window, and others are in the next epoch:
that shuffles anew. The batches of all buckets come in random order, and each has one of its edges by chance. Any step is
found by counts alone, and the samples of no window but its own are looked at.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vtp.config import ConfigError
from vtp.data.dataset import LruCache
from vtp.draws import numpy_draws

WINDOWS, EPOCHS = 2, 4  # of whose samples, and of whose windows a process keeps the order


class SampleBuckets(NamedTuple):
    """Which samples there are of every ratio and number of edges, by shard."""

    counts: np.ndarray  # [S, R, E]; at place e of the last axis are those for which e + 1 edges are small enough
    of_shard: Callable[[int], np.ndarray]  # places in the last two axes, flattened; negative: it takes no part
    sizes: Sequence[int]  # all samples of each shard
    ratios: Sequence[float]  # width over height


class SizedBatch(NamedTuple):
    """What a step trains on."""

    numbers: np.ndarray  # [B], samples, numbered through the shards
    ratio: int  # places in lists of ratios and of ascending edges
    edge: int


class _StepPlace(NamedTuple):
    """Where a step lies."""

    epoch: int
    window: int
    batch: int  # in the window


class _Epoch(NamedTuple):
    """An epoch."""

    shards: np.ndarray  # [S], in their order
    ends: np.ndarray  # [W], batches up to the end of each window


class SizeOrder:
    """Batches of `batch_size` samples; `window`: shards that are shuffled together, None: all.

    Raises ConfigError for a ratio whose samples are too few for a batch in any window: they would never be seen.
    """

    def __init__(self, buckets: SampleBuckets, *, batch_size: int, seed: int, window: int | None) -> None:
        self.batch_size = batch_size
        self._buckets, self._counts, self._seed = buckets, buckets.counts, seed
        self._first = np.concatenate([[0], np.cumsum(buckets.sizes, dtype=np.int64)])
        self._span = len(buckets.sizes) if window is None else min(window, len(buckets.sizes))
        self._require_batches()
        self._ends: list[int] = []  # steps at which epochs end
        self._plans, self._windows = LruCache[_Epoch](EPOCHS), LruCache[list[SizedBatch]](WINDOWS)

    def __len__(self) -> int:
        """Samples that take part."""
        return int(self._counts.sum())

    def __getstate__(self) -> dict[str, object]:
        # A worker keeps windows of its own.
        return self.__dict__ | {"_plans": LruCache[_Epoch](EPOCHS), "_windows": LruCache[list[SizedBatch]](WINDOWS)}

    def batch(self, step: int) -> SizedBatch:
        """The samples of a step, their ratio, and one of the edges for which all of them are large enough."""
        place = self._find(step)
        drawn = self._batches(place.epoch, place.window)[place.batch]
        return drawn._replace(edge=int(numpy_draws(self._seed, "edge", step).integers(drawn.edge + 1)))

    def shards_around(self, step: int) -> tuple[list[int], list[int]]:
        """The shards of the window of a step, and those that come with the next one."""
        epoch, number, _ = self._find(step)
        now = self._members(epoch, number)
        last = (number + 1) * self._span >= len(self._counts)
        following = self._members(epoch + 1, 0) if last else self._members(epoch, number + 1)
        return now, [shard for shard in following if shard not in now]

    def left_out(self, epoch: int) -> int:
        """Samples that an epoch does not show."""
        return len(self) - int(self._plan(epoch).ends[-1]) * self.batch_size

    @property
    def shares(self) -> np.ndarray:
        """Expected shares of steps by ratio and edge [R, E], but for what is left out."""
        samples = self._counts.sum(axis=0)  # [R, E]
        edges = samples.shape[1]
        each = samples / np.arange(1, edges + 1)  # of each edge that a bucket is for
        return each[:, ::-1].cumsum(axis=1)[:, ::-1] / samples.sum()

    def _require_batches(self) -> None:
        of_ratio = self._counts.sum(axis=2)  # [S, R]
        most = np.sort(of_ratio, axis=0)[-self._span :].sum(axis=0)
        if never := [
            f"{ratio:g} has {found}"
            for ratio, found, together in zip(self._buckets.ratios, of_ratio.sum(axis=0), most, strict=True)
            if found and together < self.batch_size
        ]:
            raise ConfigError(
                f"a batch takes {self.batch_size} pictures of one ratio, and of some ratios never so many come together: "
                f"{', '.join(never)}; leave these out, whose pictures then are of the nearest, or choose a smaller batch or "
                "a larger window"
            )
        if not len(self):
            raise ConfigError("no sample takes part in the training; see the classes of the data")

    def _plan(self, epoch: int) -> _Epoch:
        if (kept := self._plans.get(epoch)) is not None:
            return kept
        shards = numpy_draws(self._seed, "shards", epoch).permutation(len(self._counts))
        samples = np.add.reduceat(self._counts[shards], np.arange(0, len(shards), self._span), axis=0)  # [W, R, E]
        batches, left = np.zeros(len(samples), dtype=np.int64), np.zeros_like(samples[:, :, 0])
        for edge in reversed(range(samples.shape[2])):
            whole, left = np.divmod(samples[:, :, edge] + left, self.batch_size)
            batches += whole.sum(axis=1)
        plan = _Epoch(shards, batches.cumsum())
        self._plans.put(epoch, plan, 1)
        return plan

    def _members(self, epoch: int, number: int) -> list[int]:
        """The shards of a window."""
        return self._plan(epoch).shards[number * self._span : (number + 1) * self._span].tolist()

    def _find(self, step: int) -> _StepPlace:
        while not self._ends or step >= self._ends[-1]:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + int(self._plan(len(self._ends)).ends[-1]))
        epoch = bisect_right(self._ends, step)
        within = step - (self._ends[epoch - 1] if epoch else 0)
        ends = self._plan(epoch).ends
        number = int(np.searchsorted(ends, within, side="right"))
        return _StepPlace(epoch, number, within - int(ends[number - 1] if number else 0))

    def _batches(self, epoch: int, number: int) -> list[SizedBatch]:
        """All batches of a window in their order, each with the largest of its edges."""
        key = epoch * len(self._counts) + number
        if (kept := self._windows.get(key)) is not None:
            return kept
        members = sorted(self._members(epoch, number))
        buckets = np.concatenate([self._buckets.of_shard(shard) for shard in members])
        numbers = np.concatenate([np.arange(*self._first[shard : shard + 2]) for shard in members])
        ratios, edges = self._counts.shape[1:]
        batches: list[SizedBatch] = []
        for ratio in range(ratios):
            left = numbers[:0]
            for edge in reversed(range(edges)):
                bucket = ratio * edges + edge
                pool = np.concatenate([left, numbers[buckets == bucket]])
                pool = numpy_draws(self._seed, "bucket", epoch, number, bucket).permutation(pool)
                whole = len(pool) // self.batch_size * self.batch_size
                left = pool[whole:]
                batches += [SizedBatch(part, ratio, edge) for part in pool[:whole].reshape(-1, self.batch_size)]
        order = numpy_draws(self._seed, "batches", epoch, number).permutation(len(batches))
        batches = [batches[place] for place in order.tolist()]
        self._windows.put(key, batches, 1)
        return batches
