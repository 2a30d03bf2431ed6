"""The order of the stream: exact epochs, exact shares, and no memory of what came before."""

import numpy as np
import pytest

from vtp.data.order import BLOCK, Mixture, epoch_order, epochs, sample_indices

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
