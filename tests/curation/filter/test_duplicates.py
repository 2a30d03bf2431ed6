"""Selection and comparison on disk against all pairs in memory."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from vtp.curation.filter.digests import digests
from vtp.curation.filter.duplicates import (
    BandJob,
    FirstsJob,
    GroupJob,
    band,
    first_of_equals,
    group_hashes,
    group_near,
    has_near_before,
    mixed,
)
from vtp.curation.filter.image_rules import sortable
from vtp.curation.filter.set_rules import best_codes
from vtp.curation.filter.spill import load_array, part_of, save_array, write_record_spill

PARTS = 5


def near_hashes(count, seed):
    """Clusters of hashes that differ in a few bits."""
    draws = np.random.default_rng(seed)
    centres = draws.integers(0, 2**64, 40, dtype=np.uint64)
    hashes = centres[draws.integers(0, 40, count)]
    for _ in range(6):
        flips = np.uint64(1) << draws.integers(0, 64, count, dtype=np.uint64)
        hashes = np.where(draws.random(count) < 0.4, hashes ^ flips, hashes)
    return hashes


def grouped(hashes, places, distance, folder):
    """Places that the passes on disk remove."""
    spills = []
    for number in range(3):  # three parts of the rows emitted them
        mine = slice(number, None, 3)
        spills.append(folder / f"emitted-{number}.npy")
        records = np.stack([hashes[mine], places[mine]], axis=1)
        write_record_spill(spills[-1], records, part_of(mixed(hashes[mine]), PARTS), PARTS)
    bands = range(distance + 1 if distance else 0)
    gone, firsts = [], []
    for part in range(PARTS):
        group = GroupJob(folder / f"equal-{part}.npy", tuple(spills), part, PARTS)
        firsts.append(FirstsJob(group, tuple(folder / f"band-{b}-{part}.npy" for b in bands)))
        group_hashes(firsts[-1])
        gone.append(load_array(group.done))
    for number in bands:
        for part in range(PARTS):
            of_band = tuple(job.band_spills[number] for job in firsts)
            group = GroupJob(folder / f"near-{number}-{part}.npy", of_band, part, PARTS)
            group_near(BandJob(group, number, distance))
            gone.append(load_array(group.done))
    assert all((np.diff(places.astype(np.int64)) > 0).all() for places in gone)
    return set(np.concatenate(gone).tolist())


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 12])
def test_near_hashes(tmp_path, distance):
    hashes = near_hashes(1500, seed=distance)
    places = np.random.default_rng(1).permutation(1500).astype(np.uint64) + np.uint64(3 << 32)
    ordered = hashes[np.argsort(places)]
    bits = np.bitwise_count(ordered[:, None] ^ ordered[None])
    expected = np.tril(bits <= distance, -1).any(1)
    assert 50 < expected.sum() < 1490
    assert grouped(hashes, places, distance, tmp_path) == set(np.sort(places)[expected].tolist())


def test_blocks_of_pairs_agree(monkeypatch):
    hashes = near_hashes(700, seed=2)
    whole = has_near_before(hashes, 4)
    monkeypatch.setattr("vtp.curation.filter.duplicates.PAIRS", 7 * 700)
    assert np.array_equal(has_near_before(hashes, 4), whole)


def test_bands_cover_all_bits_once():
    every = np.array([2**64 - 1], np.uint64)
    for bands in range(1, 14):
        assert sum(int(np.bitwise_count(band(every, n, bands))[0]) for n in range(bands)) == 64


def test_first_of_equals():
    values = np.array([[1, 2], [1, 3], [1, 2], [0, 2], [1, 3]], np.uint64)
    assert first_of_equals(values, np.array([4, 3, 2, 1, 0])).tolist() == [False, False, True, True, True]
    assert first_of_equals(np.empty((0, 2), np.uint64), np.empty(0)).tolist() == []


def test_codes_sort_as_numbers():
    draws = np.random.default_rng(0)
    numbers = np.concatenate([draws.normal(size=500), draws.normal(size=500) * 1e300, [0.0, -np.inf, np.inf, 5e-324]])
    assert np.array_equal(np.argsort(sortable(numbers), kind="stable"), np.argsort(numbers, kind="stable"))
    assert sortable(np.array([-0.0])) == sortable(np.array([0.0]))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["floats", "few values", "extreme"])
def test_best_share(tmp_path, fraction, kind):
    draws = np.random.default_rng(0)
    codes = {
        "floats": sortable(draws.normal(size=1000)),
        "few values": sortable(draws.integers(0, 4, 1000)),
        "extreme": np.where(draws.random(1000) < 0.5, np.uint64(0), np.uint64(2**64 - 1)),
    }[kind]
    pieces = np.split(codes, [100, 100, 600])
    for number, piece in enumerate(pieces):
        save_array(tmp_path / f"{number}.npy", np.stack([piece, np.arange(len(piece), dtype=np.uint64)]))
    threshold, ties = best_codes([tmp_path / f"{n}.npy" for n in range(4)], fraction)
    kept = [
        np.concatenate([np.flatnonzero(p > threshold), np.flatnonzero(p == threshold)[:t]])
        for p, t in zip(pieces, ties, strict=True)
    ]
    starts = [0, 100, 100, 600]
    found = sorted(int(start + place) for start, places in zip(starts, kept, strict=True) for place in places)
    best = sorted(range(1000), key=lambda index: (-int(codes[index]), index))
    assert found == sorted(best[: int(Fraction(str(fraction)) * 1000)])


def test_bytes_that_are_no_text_are_compared_as_they_are():
    found = digests(pa.array([b"\xff\x00", b"caf\xe9", b"\xff\x00", b"text"], pa.binary()))
    assert found.shape == (4, 2)
    assert len(np.unique(found, axis=0)) == 3
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[3:], digests(pa.array(["text"])))
