"""The order of the stream: exact epochs, exact shares, and no memory of what came before."""

import numpy as np
import pytest

from vtp.data.order import BLOCK, Mixture, epoch_order, epochs, of_batch, sample_indices, shards_around

SIZES = (7, 0, 13, 1, 30, 5)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 6, 100])
def test_every_epoch_holds_every_sample_once(window):
    size = sum(SIZES)
    drawn = epochs(np.arange(3 * size), SIZES, 0, window=window).reshape(3, size)
    assert (np.sort(drawn, axis=1) == np.arange(size)).all()
    assert not np.array_equal(drawn[0], drawn[1])
    # Any stretch, in any order of asking, gives the same.
    places = np.random.default_rng(0).permutation(3 * size)
    assert np.array_equal(epochs(places, SIZES, 0, window=window), drawn.ravel()[places])
    assert not np.array_equal(epochs(np.arange(size), SIZES, 1, window=window), drawn[0])


def test_a_window_opens_few_shards_at_a_time():
    """And within it samples of different shards alternate."""
    sizes, window = [50] * 40, 4
    drawn = epochs(np.arange(2000), sizes, 0, window=window) // 50
    for start in range(0, 2000, 200):
        assert len(set(drawn[start : start + 200])) == 4
    assert np.count_nonzero(np.diff(drawn)) > 1000
    assert list(dict.fromkeys(drawn)) != sorted(set(drawn))


def test_without_a_window_shards_do_not_matter():
    assert np.array_equal(epochs(np.arange(56), SIZES, 3, window=None), epoch_order(56, 3, 0))
    assert np.array_equal(sample_indices(10, 50, 56, 3), epochs(np.arange(10, 60), SIZES, 3, window=9))


def test_a_mixture_follows_its_weights():
    """Exactly in every block; each source runs through its own stream without gaps."""
    mixture = Mixture([0.7, 0.2, 0.1], seed=0)
    sources, places = mixture.of(np.arange(5 * BLOCK))
    for block in sources.reshape(5, BLOCK):
        assert np.abs(np.bincount(block) - BLOCK * np.array([0.7, 0.2, 0.1])).max() < 1
    for source in range(3):
        assert np.array_equal(np.sort(places[sources == source]), np.arange((sources == source).sum()))
    asked = np.random.default_rng(0).permutation(5 * BLOCK)[:100]
    again, there = mixture.of(asked)
    assert np.array_equal(again, sources[asked])
    assert np.array_equal(there, places[asked])
    assert not np.array_equal(sources[:BLOCK], sources[BLOCK : 2 * BLOCK])


def test_a_source_that_would_never_come_is_refused():
    with pytest.raises(ValueError, match="below 1/1024"):
        Mixture([1.0, 1e-5], seed=0)


@pytest.mark.parametrize("sizes", [SIZES, (10,) * 12, (0, 0, 4, 0, 9, 0), (5,)])
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_groups_share_an_epoch_exactly(sizes, groups):
    """Whatever the sizes; each group has the same share, to a sample, in whatever order it is asked for."""
    size = sum(sizes)
    drawn = epochs(np.arange(7 * size), sizes, 0, window=2 * groups, groups=groups)
    assert (np.sort(drawn.reshape(7, size), axis=1) == np.arange(size)).all()
    asked = np.random.default_rng(0).permutation(7 * size)
    assert np.array_equal(epochs(asked, sizes, 0, window=2 * groups, groups=groups), drawn[asked])


def test_a_stretch_of_a_batch_has_shards_of_its_own():
    """And the batch holds as many samples of each group; both are the same for any number of machines."""
    sizes, batch, groups = [50] * 40, 40, 4
    for epoch in range(2):
        seen = [set() for _ in range(groups)]
        for step in range(epoch * 50, epoch * 50 + 50):
            positions = of_batch(np.arange(step * batch, (step + 1) * batch), batch, groups)
            assert sorted(positions) == [*range(step * batch, (step + 1) * batch)]
            drawn = epochs(positions, sizes, 0, window=8, groups=groups) // 50
            assert len(set(drawn)) <= 8
            for group, stretch in enumerate(drawn.reshape(groups, -1)):
                seen[group] |= set(stretch.tolist())
        assert sum(map(len, seen)) == len(set.union(*seen)) == 40
    with pytest.raises(ValueError, match="a batch of 10 samples has no 4 equal stretches"):
        of_batch(np.arange(10), 10, 4)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_shards_of_the_next_windows_are_known(groups):
    """Also those with which the next epoch begins."""
    sizes, window = [50] * 40, 8
    for start in range(0, 4000, 400):
        now, later = shards_around(np.arange(start, start + 400), sizes, 0, window=window, groups=groups)
        assert set(now) == set(epochs(np.arange(start, start + 400), sizes, 0, window=window, groups=groups) // 50)
        following = epochs(np.arange(start + 400, start + 800), sizes, 0, window=window, groups=groups) // 50
        assert set(later) == set(following) - set(now)


def test_groups_of_a_mixture_stay_groups():
    """Each has its sources in proportion, and runs through its own part of each of them."""
    mixture = Mixture([0.75, 0.25], seed=0)
    positions = np.arange(2 * 4 * BLOCK)
    sources, places = mixture.of(positions, 4)
    assert np.array_equal(places % 4, positions % 4)
    for source, share in enumerate((0.75, 0.25)):
        assert np.array_equal(np.sort(places[sources == source]), np.arange(share * len(positions)))
    assert not np.array_equal(sources[0::4], sources[1::4])
