"""Rules that look at all rows together, part by part: say what matters about each row, compare, drop.

`emit` reads a part and writes what the rule compares; the comparison is in `vtp.curation.filter.duplicates` or
`best_codes` or a mere count; `drop_rows` removes a part's rows and applies the row rules that follow.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.curation.filter.digests import digests
from vtp.curation.filter.duplicates import first_of_equals, mixed
from vtp.curation.filter.funnel import EXAMPLES, Tally
from vtp.curation.filter.image_rules import NO_CAPTION, UNREADABLE, sortable
from vtp.curation.filter.read_source import Ruled, apply_rules
from vtp.curation.filter.rules import (
    ClipScore,
    Duplicates,
    Minimum,
    PerceptualDuplicates,
    SetRule,
    Subset,
    TopFraction,
    needs,
)
from vtp.curation.filter.spill import load_array, part_of, pick_rows, read_spilled_rows, save_array, write_record_spill
from vtp.curation.filter.values import numbers
from vtp.curation.rows import CAPTION, KEY, ORDER, URL

LARGEST = (1 << 64) - 1
DIGITS = 16  # bits that one round of the selection fixes


class EmitJob(NamedTuple):
    """One part."""

    done: Path  # places [n] that go, whatever the other parts hold
    unreadable: Path  # places [n] of images that cannot be read
    emitted: Path  # a spill of records, or (code, place) [2, n]
    rows: Path
    kept: Path
    pieces: tuple[Path, ...]  # what was measured about the images of the rows that are left
    rule: SetRule
    part: int
    parts: int


class Listed(NamedTuple):
    """Rows that the comparison listed, as (part << 32 | place) in ascending order."""

    files: tuple[Path, ...]


class Best(NamedTuple):
    """Codes above the threshold stay, and so many of those on it."""

    emitted: Path
    threshold: int
    ties: int


class First(NamedTuple):
    """So many rows stay."""

    number: int


class DropJob(NamedTuple):
    """One part."""

    done: Path  # its tally
    kept_after: Path
    emit: EmitJob
    verdict: Listed | Best | First | None
    line: str
    image_line: str
    following: tuple[Ruled, ...]
    lists: Path


def emit(job: EmitJob) -> None:
    """Write what the rule compares."""
    places = np.flatnonzero(load_array(job.kept))
    state = np.ones(len(places), np.uint64)
    values = np.empty(0, np.uint64)
    if job.pieces:
        values, state = np.concatenate([load_array(path) for path in job.pieces]).T
    readable = state != UNREADABLE
    rule, gone = job.rule, np.zeros(len(places), bool)
    match rule:
        case Duplicates():
            column = read_spilled_rows(job.rows, [rule.by])[rule.by].combine_chunks().take(places)
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            gone |= ~valid & (rule.missing == "drop")
            gone[valid] = _emit_records(job, digests(column.drop_null()), places[valid])
        case PerceptualDuplicates():
            gone[readable] = _emit_records(job, values[readable, None], places[readable])
        case TopFraction():
            scores = numbers(read_spilled_rows(job.rows, [rule.column])[rule.column].combine_chunks().take(places))
            valid = scores.is_valid().to_numpy(zero_copy_only=False)
            codes = sortable(scores.drop_null().to_numpy())
            gone |= ~valid & (rule.missing == "drop")
            codes = codes if rule.best == "highest" else ~codes
            save_array(job.emitted, np.stack([codes, places[valid].astype(np.uint64)]))
        case ClipScore():
            gone |= (state == NO_CAPTION) & (rule.missing == "drop")
            scored = readable & (state != NO_CAPTION)
            if isinstance(rule.keep, Minimum):
                gone |= scored & (values < sortable(np.array([rule.keep.value])))
            save_array(job.emitted, np.stack([values[scored], places[scored].astype(np.uint64)]))
        case Subset():
            pass
    save_array(job.unreadable, places[~readable])
    save_array(job.done, places[gone])


def _emit_records(job: EmitJob, values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Spill (value, row) of the first of every value [n, k]; which rows [n] are not."""
    first = first_of_equals(values, places)
    rows = np.uint64(job.part << 32) | places[first].astype(np.uint64)
    part = part_of(mixed(values[first, 0]), job.parts)
    write_record_spill(job.emitted, np.concatenate([values[first], rows[:, None]], axis=1), part, job.parts)
    return ~first


def best_codes(emitted: Sequence[Path], fraction: float) -> tuple[int, list[int]]:
    """The least code of the best `fraction` of all, and how many rows of each part with just this code belong to it.

    Four rounds over the files fix 16 bits each, so memory does not depend on the number of rows.
    """
    codes = [np.load(path, mmap_mode="r", allow_pickle=False)[0] for path in emitted]
    keep = int(Fraction(str(fraction)) * sum(map(len, codes)))
    if keep == 0:
        return LARGEST, [0] * len(emitted)
    threshold, above = 0, 0
    for shift in range(64 - DIGITS, -1, -DIGITS):
        counts = np.zeros(1 << DIGITS, np.int64)
        for values in codes:
            # Twice, because a shift by 64 is undefined.
            near = values[values >> np.uint64(shift) >> np.uint64(DIGITS) == threshold >> shift >> DIGITS]
            digits = (near >> np.uint64(shift)) & np.uint64((1 << DIGITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << DIGITS)
        from_top = above + np.cumsum(counts[::-1])
        digit = len(counts) - 1 - int(np.searchsorted(from_top, keep))
        above += int(counts[digit + 1 :].sum())
        threshold |= digit << shift
    ties, left = [], keep - above
    for values in codes:
        ties.append(min(left, int(np.count_nonzero(values == threshold))))
        left -= ties[-1]
    return threshold, ties


def drop_rows(job: DropJob) -> None:
    """Remove the part's rows, and those that the following row rules remove."""
    emitted, tally = job.emit, Tally()
    kept = load_array(emitted.kept)
    unreadable, gone = load_array(emitted.unreadable), np.zeros(len(kept), bool)

    def report(line: str, places: np.ndarray) -> None:
        few = pick_rows(emitted.rows, (ORDER, KEY, URL, CAPTION), places[:EXAMPLES]) if len(places) else None
        if few is not None:
            tally.add(line, few, np.arange(len(few)))
            tally.removed[line] += len(places) - len(few)

    if len(unreadable):
        report(job.image_line, unreadable)
        kept[unreadable] = False
    gone[load_array(emitted.done)] = True
    match job.verdict:
        case Listed(files):
            for path in files:
                gone[_listed(path, emitted.part)] = True
        case Best(path, threshold, ties):
            codes, places = load_array(path)
            gone[places[codes < threshold].astype(np.int64)] = True
            gone[places[codes == threshold][ties:].astype(np.int64)] = True
        case First(number):
            gone[np.flatnonzero(kept)[number:]] = True
        case None:
            pass
    gone &= kept
    report(job.line, np.flatnonzero(gone))
    kept &= ~gone
    if job.following:
        columns = {need.column for ruled in job.following for need in needs(ruled.rule)}
        kept = apply_rules(read_spilled_rows(emitted.rows, sorted(columns)), kept, job.following, job.lists, report)
    save_array(job.kept_after, kept)
    tally.left = int(kept.sum())
    tally.save(job.done)


def _listed(path: Path, part: int) -> np.ndarray:
    """Places of the rows of this part in a list."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    first, last = np.searchsorted(rows, np.array([part << 32, (part + 1) << 32], np.uint64))
    return (np.array(rows[first:last]) & np.uint64(0xFFFFFFFF)).astype(np.int64)
