"""Second pass of a filter: rows of one range of `order` from all chunks, sorted, each key once.

From here on a row's place is its range and its place in it, and does not depend on the files that it came from.
"""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.curation.filter.funnel import Tally
from vtp.curation.filter.spill import read_table_spill, save_array, write_rows
from vtp.curation.rows import KEY, ORDER, ROLES

if TYPE_CHECKING:
    import pyarrow as pa


class SortJob(NamedTuple):
    """One range of `order`."""

    done: Path  # its tally
    rows: Path
    kept: Path  # which rows are left; all
    spills: tuple[Path, ...]
    part: int
    line: str  # of duplicate keys


def sort_part(job: SortJob) -> None:
    """Write the range's rows."""
    import pyarrow as pa

    tally = Tally()
    table = read_table_spill(job.spills, job.part).combine_chunks()
    places, repeated = sorted_places(table)
    tally.add(job.line, table, repeated)
    write_rows(job.rows, table.take(pa.array(places)))
    save_array(job.kept, np.ones(len(places), bool))
    tally.left = len(places)
    tally.save(job.done)


def sorted_places(table: "pa.Table") -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows by (order, key), each key once, and the places of the others.

    Of rows with one key that stays whose content has the smallest digest, which no order of files can change.
    """
    orders = table[ORDER].to_numpy()
    places = np.argsort(orders, kind="stable")
    same = np.diff(orders[places]) == 0  # the next has the same order: the same key, or hardly ever another
    if not same.any():
        return places, np.empty(0, np.int64)
    starts = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]]))
    keep = np.ones(len(places), bool)
    for start in starts.tolist():
        stop = start + 1
        while stop <= len(same) and same[stop - 1]:
            stop += 1
        group = places[start:stop]
        rows = table.take(group).to_pylist()
        named = sorted((row[KEY], *_digests(row), int(place)) for row, place in zip(rows, group, strict=True))
        places[start:stop] = [place for *_, place in named]
        keys = [key for key, *_ in named]
        keep[start + 1 : stop] = [key != before for before, key in pairwise(keys)]
    return places[keep], places[~keep]


def _digests(row: dict[str, object]) -> list[bytes]:
    """Of the columns that every row has, so that the choice seldom depends on those that rules read; then of all."""
    roles = {name: row[name] for name in (*ROLES, ORDER)}
    return [hashlib.blake2b(repr(values).encode(), digest_size=16).digest() for values in (roles, row)]
