"""Batches of one size: every sample at most once an epoch, whoever asks and in whatever order, and few shards at a time."""

from itertools import pairwise

import numpy as np
import pytest

from vtp.config import ConfigError
from vtp.data.size_order import SampleBuckets, SizeOrder

RATIOS, EDGES = (1.0, 0.5, 2.0), 3
BATCH = 4


def data_of(sizes, *, seed=0, absent=0.1):
    """Buckets of the samples of every shard, some of none, and what they count."""
    draws, count = np.random.default_rng(seed), len(RATIOS) * EDGES
    buckets = [np.where(draws.random(n) < absent, -1, draws.integers(0, count, n)) for n in sizes]
    counts = [np.bincount(b[b >= 0], minlength=count).reshape(len(RATIOS), EDGES) for b in buckets]
    return SampleBuckets(np.array(counts), buckets.__getitem__, sizes, RATIOS), np.concatenate(buckets)


def order_of(sizes, *, window=None, seed=0, batch_size=BATCH, **data):
    samples, buckets = data_of(sizes, **data)
    return SizeOrder(samples, batch_size=batch_size, seed=seed, window=window), buckets


def epochs_of(order, count):
    """The steps of the first epochs."""
    ends, step = [0], 0
    while len(ends) <= count:
        while order._find(step).epoch == len(ends) - 1:
            step += 1
        ends.append(step)
    return [range(*ends) for ends in pairwise(ends)]


SIZES = (37, 0, 53, 21, 60, 45)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_an_epoch_shows_a_sample_at_most_once(window):
    order, buckets = order_of(SIZES, window=window)
    shown = []
    for epoch, steps in enumerate(epochs_of(order, 3)):
        numbers = np.concatenate([order.batch(step).numbers for step in steps])
        assert len(set(numbers)) == len(numbers) == len(order) - order.left_out(epoch)
        assert (buckets[numbers] >= 0).all()
        # Of every ratio less than a batch is left out of a window.
        windows = -(-len(SIZES) // (window or len(SIZES)))
        left = np.setdiff1d(np.flatnonzero(buckets >= 0), numbers)
        assert (np.bincount(buckets[left] // EDGES, minlength=len(RATIOS)) < BATCH * windows).all()
        shown.append(set(numbers.tolist()))
    assert shown[0] != shown[1]  # others are left out
    assert len(set.union(*shown)) > max(map(len, shown))


def test_pictures_of_a_batch_have_its_ratio_and_are_large_enough():
    order, buckets = order_of(SIZES, window=3)
    edges = np.zeros((EDGES, EDGES))
    for step in range(400):
        batch = order.batch(step)
        assert set(buckets[batch.numbers] // EDGES) == {batch.ratio}
        most = int((buckets[batch.numbers] % EDGES).min())
        assert batch.edge <= most
        edges[most, batch.edge] += 1
    assert (edges[np.tril_indices(EDGES)] > 10).all()  # each of the edges comes


def test_a_step_does_not_depend_on_what_was_asked_before():
    order, _ = order_of(SIZES, window=2)
    known = [order.batch(step) for step in range(100)]
    for step in np.random.default_rng(0).permutation(100).tolist():
        fresh, _ = order_of(SIZES, window=2)
        for asked in (order, fresh):
            assert np.array_equal(asked.batch(step).numbers, known[step].numbers)
            assert asked.batch(step)[1:] == known[step][1:]
    other, _ = order_of(SIZES, window=2, seed=1)
    assert not all(np.array_equal(other.batch(step).numbers, known[step].numbers) for step in range(20))


def test_a_window_opens_few_shards_and_the_next_ones_are_known():
    sizes = [50] * 12
    order, _ = order_of(sizes, window=3)
    shards = [set((order.batch(step).numbers // 50).tolist()) for step in range(300)]
    around = [order.shards_around(step) for step in range(300)]
    for opened, (now, _) in zip(shards, around, strict=True):
        assert opened <= set(now)
        assert len(now) == 3
    for (now, later), (following, _) in pairwise(around):
        assert set(now) == set(following) or set(following) - set(now) == set(later)
    first = epochs_of(order, 1)[0]
    assert {shard for step in first for shard in around[step][0]} == set(range(12))


def test_no_window_but_that_of_the_step_is_looked_at():
    samples, asked = data_of([50] * 12)[0], []
    noted = samples._replace(of_shard=lambda shard: asked.append(shard) or samples.of_shard(shard))
    order = SizeOrder(noted, batch_size=BATCH, seed=0, window=3)
    order.batch(1000)
    assert len(asked) == len(set(asked)) == 3


def test_expected_shares_of_sizes_are_those_that_come():
    """Two samples in three of a ratio are large enough for both edges; what is left out is little."""
    buckets = np.array([0] * 400 + [1] * 800 + [3] * 1200)  # ratio * 2 + edges - 1
    counts = np.bincount(buckets, minlength=4).reshape(1, 2, 2)
    samples = SampleBuckets(counts, lambda _: buckets, [2400], (1.0, 2.0))
    order = SizeOrder(samples, batch_size=8, seed=0, window=None)
    assert order.shares == pytest.approx(np.array([[800, 400], [600, 600]]) / 2400)
    found = np.zeros((2, 2))
    for step in range(3000):
        batch = order.batch(step)
        found[batch.ratio, batch.edge] += 1 / 3000
    assert found == pytest.approx(order.shares, abs=0.02)


def test_rests_join_those_of_a_smaller_edge():
    """Three and three of one ratio are a batch of four, at the edge that all are large enough for."""
    buckets = np.array([0, 1, 0, 1, 0, 1])
    samples = SampleBuckets(np.array([[[3, 3]]]), lambda _: buckets, [6], (1.0,))
    order = SizeOrder(samples, batch_size=4, seed=0, window=None)
    assert order.left_out(0) == 2
    drawn = [order.batch(step) for step in range(40)]
    assert all(batch.edge == 0 and (buckets[batch.numbers] == 0).any() for batch in drawn)
    assert set(np.concatenate([batch.numbers for batch in drawn])) == set(range(6))


def test_samples_that_would_never_be_seen_are_told():
    counts = np.array([[[9, 0], [1, 2], [0, 0]], [[9, 0], [0, 1], [0, 0]]])
    samples = SampleBuckets(counts, lambda _: np.zeros(0), [12, 10], RATIOS)
    SizeOrder(samples, batch_size=4, seed=0, window=None)
    with pytest.raises(ConfigError, match=r"takes 4 pictures of one ratio.*: 0\.5 has 4; leave these out"):
        SizeOrder(samples, batch_size=4, seed=0, window=1)
    with pytest.raises(ConfigError, match="no sample takes part"):
        SizeOrder(samples._replace(counts=0 * counts), batch_size=4, seed=0, window=None)
