"""Duplicates among any number of rows: digests are grouped on disk by their value, each group is compared alone.

A row is (part << 32 | place): its place in the order of the output. The first of equals stays.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.curation.filter.spill import part_of, read_record_spill, save_array, write_record_spill

PAIRS = 1 << 22  # pairs of hashes that are compared at once


class GroupJob(NamedTuple):
    """All values of one part."""

    done: Path  # places [n] of the rows to remove, ascending
    spills: tuple[Path, ...]
    part: int
    parts: int


class FirstsJob(NamedTuple):
    """All hashes of one part; those that differ are kept for the search of near ones."""

    group: GroupJob
    band_spills: tuple[Path, ...]  # of the firsts, by the value of each band


class BandJob(NamedTuple):
    """Hashes that agree in a band of bits and lie in one part."""

    group: GroupJob
    band: int
    max_distance: int


def first_of_equals(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which rows [n] are the first with their value [n, k]."""
    keys = (places, *(values[:, column] for column in reversed(range(values.shape[1]))))
    order = np.lexsort(keys)
    ordered = values[order]
    first = np.empty(len(values), bool)
    first[order] = np.concatenate([[True] * min(1, len(values)), (ordered[1:] != ordered[:-1]).any(1)])
    return first


def group_equals(job: GroupJob) -> None:
    """Remove all but the first of every digest; records are (high, low, place)."""
    records = read_record_spill(job.spills, job.part, job.parts, 3)
    first = first_of_equals(records[:, :2], records[:, 2])
    save_array(job.done, np.sort(records[~first, 2]))


def group_hashes(job: FirstsJob) -> None:
    """Remove all but the first of every perceptual hash, and spill the firsts by band; records are (hash, place)."""
    group = job.group
    records = read_record_spill(group.spills, group.part, group.parts, 2)
    first = first_of_equals(records[:, :1], records[:, 1])
    for number, path in enumerate(job.band_spills):
        bands = band(records[first, 0], number, len(job.band_spills))
        write_record_spill(path, records[first], part_of(mixed(bands), group.parts), group.parts)
    save_array(group.done, np.sort(records[~first, 1]))


def group_near(job: BandJob) -> None:
    """Remove rows that have an earlier one within the distance, among those that agree in this band."""
    group = job.group
    records = read_record_spill(group.spills, group.part, group.parts, 2)
    bands = band(records[:, 0], job.band, job.max_distance + 1)
    order = np.lexsort((records[:, 1], bands))
    bands, records = bands[order], records[order]
    bounds = np.flatnonzero(np.concatenate([[True], bands[1:] != bands[:-1], [True]]))
    removed = [np.empty(0, np.uint64)]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop - start > 1:
            hashes, places = records[start:stop].T
            removed.append(places[has_near_before(hashes, job.max_distance)])
    save_array(group.done, np.unique(np.concatenate(removed)))


def has_near_before(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Which hashes [n] have one before them within the distance; memory is bounded, time is quadratic."""
    near = np.zeros(len(hashes), bool)
    step = max(1, PAIRS // len(hashes))
    for start in range(0, len(hashes), step):
        block = hashes[start : start + step]
        close = np.bitwise_count(block[:, None] ^ hashes[None, : start + len(block)]) <= max_distance
        # Only those before: of a block's own square, what is below the diagonal.
        close[:, start:] = np.tril(close[:, start:], -1)
        near[start : start + step] = close.any(1)
    return near


def band(hashes: np.ndarray, number: int, bands: int) -> np.ndarray:
    """Bits of a hash [n]: of d + 1 bands, two hashes at distance d agree in at least one."""
    first, last = (64 * edge // bands for edge in (number, number + 1))
    return (hashes >> np.uint64(first)) & np.uint64((1 << (last - first)) - 1)


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread values [n] uint64 evenly (the finaliser of SplitMix64), so that parts are of a size."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
