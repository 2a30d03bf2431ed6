"""First pass of a filter: the source's files, a chunk at a time, to rows by role that the leading row rules let through.

A chunk's rows are sorted by `order` and spilled by ranges of it, so that the second pass sorts range by range.
"""
# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported.)

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.artefact import ArtefactError
from vtp.curation.filter.columns import Layout, MetadataFile, MetadataSource
from vtp.curation.filter.funnel import Tally
from vtp.curation.filter.row_rules import stays
from vtp.curation.filter.rules import RowRule, needs
from vtp.curation.filter.sort_rows import sorted_places
from vtp.curation.filter.spill import part_of, write_table_spill
from vtp.curation.filter.values import UnsafeKey, floats, keys, texts
from vtp.curation.rows import CAPTION, HEIGHT, KEY, ORDER, SHA256, URL, WIDTH, order_of

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1 << 16  # rows that are decoded at once


class Ruled(NamedTuple):
    """A row rule and its line in the funnel."""

    line: str
    rule: RowRule


class Piece(NamedTuple):
    """Row groups of one file, one after another."""

    file: MetadataFile
    groups: tuple[int, ...]


class Batch(NamedTuple):
    """Rows as they stand in a file, one after another."""

    file: Path
    start: int  # the first one's place in the file
    rows: "pa.Table"


class Lines(NamedTuple):
    """Names of the lines of the funnel that no rule stands for."""

    unreadable_text: str
    no_key: str
    duplicate_key: str


class ReadJob(NamedTuple):
    """A chunk of the source."""

    done: Path  # its tally; the spills lie beside it
    pieces: tuple[Piece, ...]
    layout: Layout
    schema: "pa.Schema"
    rules: tuple[Ruled, ...]
    lists: Path
    lines: Lines
    span: int
    parts: int

    @property
    def spills(self) -> list[Path]:
        """What the finished job left."""
        return sorted(self.done.parent.glob(f"{self.done.stem}-*.arrow"))


def chunks(source: MetadataSource, span: int) -> Iterator[tuple[tuple[Piece, ...], int]]:
    """Row groups of all files, about `span` rows together, and how many rows; a row group is never cut."""
    pieces: list[Piece] = []
    rows = 0
    for file in source.files:
        groups: list[int] = []
        for index, count in enumerate(file.group_rows):
            if rows and rows + count > span:
                yield (*pieces, *([Piece(file, tuple(groups))] if groups else [])), rows
                pieces, groups, rows = [], [], 0
            groups.append(index)
            rows += count
        if groups:
            pieces.append(Piece(file, tuple(groups)))
    if pieces:
        yield tuple(pieces), rows


def read_chunk(job: ReadJob) -> None:
    """Filter and spill a chunk. Raises ArtefactError for a file that cannot be read."""
    import pyarrow as pa

    for left in job.spills:  # by a run that was interrupted
        left.unlink()
    tally, seen, flushes = Tally(), 0, 0
    waiting: list[pa.Table] = []
    for batch in _batches(job):
        seen += len(batch.rows)
        waiting.append(_filter(by_role(batch, job, tally), job, tally))
        if sum(map(len, waiting)) >= job.span:
            flushes += _flush(waiting, job, flushes, tally)
            waiting = []
    _flush(waiting, job, flushes, tally)
    tally.left = seen - sum(tally.removed.values())
    tally.save(job.done)


def _batches(job: ReadJob) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for (path, group_rows, partitions), groups in job.pieces:
        start = sum(group_rows[: groups[0]])
        added = {name: value for name, value in partitions.items() if name in job.layout.wanted}
        own = [name for name in job.layout.wanted if name not in added]
        try:
            with pq.ParquetFile(path, buffer_size=1 << 20) as reader:
                for batch in reader.iter_batches(
                    min(BATCH, job.span), row_groups=list(groups), columns=own, use_threads=False
                ):
                    rows = pa.Table.from_batches([batch])
                    for name, value in added.items():
                        rows = rows.append_column(name, pa.repeat(pa.scalar(value), len(batch)))
                    yield Batch(path, start, rows)
                    start += len(batch)
        except (OSError, pa.ArrowException) as error:
            place = f"row groups {groups[0]} to {groups[-1]}"
            raise ArtefactError(f"{path}, {place}: cannot be read ({error}); fetch it again or take it out") from None


def by_role(batch: Batch, job: ReadJob, tally: Tally) -> "pa.Table":
    """A table of `job.schema`, without the rows that have no key or no readable text.

    Raises ArtefactError for a value that the type of its column over all files does not hold, and for an unsafe key.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    roles, count = job.layout.roles, len(batch.rows)
    readable = np.ones(count, bool)
    columns: dict[str, pa.Array] = {}
    for field in job.schema:
        source = roles.get(field.name, field.name)
        if field.name == ORDER or (source is None and field.name != KEY):
            columns[field.name] = pa.nulls(count, field.type)
        elif source is not None:
            columns[field.name], unreadable = _converted(batch, source, field)
            readable &= ~unreadable
    given = columns[KEY] if roles[KEY] else _derived_keys(columns[URL], columns[CAPTION])
    columns[KEY] = given.fill_null("")
    columns[ORDER] = pa.array(order_of(columns[KEY].to_pylist()))
    columns[SHA256] = pc.utf8_lower(columns[SHA256])
    table = pa.table(columns, schema=job.schema)
    no_key = pc.equal(columns[KEY], "").to_numpy(zero_copy_only=False) & readable
    tally.add(job.lines.unreadable_text, table, np.flatnonzero(~readable))
    tally.add(job.lines.no_key, table, np.flatnonzero(no_key))
    keep = readable & ~no_key
    return table if keep.all() else table.filter(pa.array(keep))


def _converted(batch: Batch, source: str, field: "pa.Field") -> tuple["pa.Array", np.ndarray]:
    """A column in its type, and which rows [n] have bytes in it that are no text; those are null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = batch.rows[source].combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    try:
        if field.name == KEY:
            return keys(values)
        if pa.types.is_string(field.type):
            return texts(values)
        if field.name in (WIDTH, HEIGHT):
            sides = floats(values)
            fits = pc.and_(pc.greater_equal(sides, 0), pc.less(sides, 2.0**31))  # a side of NaN or -1 is none
            converted = pc.if_else(fits, sides, None).cast(pa.int32(), safe=False)
        elif pa.types.is_decimal(values.type) and pa.types.is_floating(field.type):
            converted = floats(values)
        else:
            converted = values.cast(field.type)
        return converted, np.zeros(len(values), bool)
    except UnsafeKey as error:
        raise ArtefactError(
            f"{batch.file}, row {batch.start + error.place}: the key {error} in column {source!r}, which holds "
            f"{values.type}: other keys may have become the same; write them as integers or texts, or choose no key column"
        ) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtefactError(
            f"{batch.file}: column {source!r} holds {values.type}, and with the other files {field.type} ({error}); make "
            "the files agree"
        ) from None


def _derived_keys(urls: "pa.Array", captions: "pa.Array") -> "pa.Array":
    """A digest of URL and caption, null without URL."""
    import pyarrow as pa

    pairs = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    return pa.array(
        [
            None if not url else hashlib.blake2b(f"{url}\n{caption or ''}".encode(), digest_size=16).hexdigest()
            for url, caption in pairs
        ],
        pa.string(),
    )


def _filter(table: "pa.Table", job: ReadJob, tally: Tally) -> "pa.Table":
    import pyarrow as pa

    def report(line: str, indices: np.ndarray) -> None:
        tally.add(line, table, indices)

    kept = apply_rules(table, np.ones(len(table), bool), job.rules, job.lists, report)
    return table if kept.all() else table.filter(pa.array(kept))


def apply_rules(
    table: "pa.Table",
    kept: np.ndarray,
    rules: Sequence[Ruled],
    lists: Path,
    report: Callable[[str, np.ndarray], None],
) -> np.ndarray:
    """Which rows [n] stay after the rules, of those `kept` before; each looks at what the ones before it left.

    `report` is given each rule's line and the places of the rows that it removed.
    """
    import pyarrow as pa

    kept = kept.copy()
    for line, rule in rules:
        columns = table.select([need.column for need in needs(rule)])
        if not kept.all():
            columns = columns.filter(pa.array(kept))
        dropped = np.flatnonzero(kept)[~stays(rule, columns, lists)]
        report(line, dropped)
        kept[dropped] = False
    return kept


def _flush(waiting: list["pa.Table"], job: ReadJob, number: int, tally: Tally) -> int:
    import pyarrow as pa

    if not sum(map(len, waiting)):
        return 0
    table = pa.concat_tables(waiting).combine_chunks()
    # Repeated keys go here already: a key that fills a source must not fill its part.
    places, repeated = sorted_places(table)
    tally.add(job.lines.duplicate_key, table, repeated)
    table = table.take(pa.array(places))
    part = part_of(table[ORDER].to_numpy(), job.parts)
    write_table_spill(job.done.with_name(f"{job.done.stem}-{number:03d}.arrow"), table, part, job.parts)
    return 1
