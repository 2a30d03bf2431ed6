"""The store: every picture that was ever fetched with the same parameters, and every failure, whatever the list was.

    rows/<name>.parquet  what became of each row of a shard, sorted by `order`
    tars/<name>.tar      img2dataset's tar of it: image, caption, metadata
    incoming/            what is being fetched

A table is written when its tar is in place, so what it tells is there. What a killed run left beside that is deleted by the
next one, which fetches it again. Tables cover ranges of `order`, and a list is
walked in that order: only those that overlap the rows at hand are in memory, be it a billion in all.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.artefact import ArtefactError, remove, sync, whole_file
from vtp.curation.rows import KEY, ORDER, SHA256, URL, parts

if TYPE_CHECKING:
    import pyarrow as pa

SUCCESS, FAILED = "success", "failed"
SHA256_DIFFERS = "sha256 differs"
BATCH = 65_536
SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as Python holds it


class DownloadRecord(NamedTuple):
    """What became of a row in one attempt. `expected` is the sha256 that was asked for, or empty."""

    key: str
    url: str
    order: int
    expected: str
    attempt: int
    status: str
    error: str | None = None
    message: str | None = None
    tar: str | None = None
    offset: int | None = None
    size: int | None = None
    stored_width: int | None = None
    stored_height: int | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None


OUTCOME = DownloadRecord._fields[3:]


def record_schema() -> "pa.Schema":
    """Of `DownloadRecord`."""
    import pyarrow as pa

    types = {"order": pa.uint64(), "attempt": pa.int32(), "offset": pa.int64(), "size": pa.int64()}
    types |= dict.fromkeys(("stored_width", "stored_height", "width", "height"), pa.int32())
    return pa.schema([(name, types.get(name, pa.string())) for name in DownloadRecord._fields])


class _StoreTable:
    """One file of rows, loaded while it is used."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._rows: pa.Table | None = None
        file = pq.ParquetFile(path)
        column = file.schema_arrow.get_field_index(ORDER)
        groups = [file.metadata.row_group(index).column(column).statistics for index in range(file.num_row_groups)]
        self.low, self.high = min(group.min for group in groups), max(group.max for group in groups)

    def rows(self) -> "pa.Table":
        import pyarrow.parquet as pq

        if self._rows is None:
            self._rows = pq.read_table(self.path, schema=record_schema())
        return self._rows

    def drop(self) -> None:
        self._rows = None


class Store:
    """A folder of rows and tars. One process at a time may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tars, self._rows, self.incoming = folder / "tars", folder / "rows", folder / "incoming"
        for part in (self.tars, self._rows):
            part.mkdir(parents=True, exist_ok=True)
        self._tables = [_StoreTable(path) for path in sorted(self._rows.glob("*.parquet"))]

    def next_delivery(self) -> str:
        """A number that no shard's name begins with yet."""
        names = [path.name for folder in (self.tars, self._rows) for path in folder.iterdir()]
        return f"{1 + max((int(name.partition('-')[0]) for name in names), default=0):05d}"

    def sweep(self) -> None:
        """Delete what is no shard of the store."""
        # Executors of a run that was killed may still write, into folders that nobody else has.
        shutil.rmtree(self.incoming, ignore_errors=True)
        for path in [*self.tars.iterdir(), *self._rows.iterdir()]:
            if not (self._rows / f"{path.stem}.parquet").exists():  # a tar of no rows, or half a table
                remove(path)

    def adopt(self, name: str, tar: Path | None, records: list[DownloadRecord]) -> None:
        """Take a shard over: its tar, if it has one, and its rows."""
        if tar is not None:
            tar.rename(self.tars / f"{name}.tar")
            sync(self.tars)
        self.add(name, records)

    def add(self, name: str, records: list[DownloadRecord]) -> None:
        """Record the rows of a shard; its tar, if it has one, is in `tars` already."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not records:
            return
        records = sorted(records, key=lambda record: (record.order, record.key))
        columns = dict(zip(DownloadRecord._fields, zip(*records, strict=True), strict=True))
        path = self._rows / f"{name}.parquet"
        with whole_file(path) as temporary:
            pq.write_table(pa.table(columns, schema=record_schema()), temporary)
        self._tables.append(_StoreTable(path))

    def lookup(self, rows: "pa.Table", *, verify: bool) -> "pa.Table":
        """What became of rows: the columns of `OUTCOME`, null for a row of which nothing valid is known.

        `rows` hold key, url, sha256 and order. With `verify`, a picture of another sha256 than the row's is not valid,
        and neither is the refusal of one that another sha256 was asked of. `attempt` counts in any case.
        """
        import pyarrow as pa

        keys, here = [KEY, URL], np.arange(len(rows))
        known = self._overlapping(rows[ORDER].to_numpy())
        asked = pa.table({name: rows[name] for name in keys}).append_column("at", pa.array(here))
        joined = asked.join(known.drop_columns([ORDER]), keys, join_type="left outer").sort_by("at")
        if len(joined) != len(rows):
            raise ArtefactError(f"{self.folder}: rows are recorded twice; delete this folder to fetch all again")
        status, error, sha256, once = (texts(joined[name]) for name in ("status", "error", "sha256", "expected"))
        expected = expected_sha256(rows, verify=verify)
        stale = (status == SUCCESS) & (expected != "") & (sha256 != expected)
        stale |= (error == SHA256_DIFFERS) & (once != expected)
        valid = joined.select(OUTCOME).take(pa.array(here, mask=stale))
        return valid.set_column(valid.schema.get_field_index("attempt"), "attempt", joined["attempt"])

    def _overlapping(self, order: np.ndarray) -> "pa.Table":
        """The latest record of every row in the range of `order`."""
        import pyarrow as pa

        near = []
        for table in self._tables:
            if order.min() <= table.high and table.low <= order.max():
                near.append(table.rows())
            else:
                table.drop()
        known = pa.concat_tables([record_schema().empty_table(), *near])
        if known["attempt"].to_numpy().max(initial=1) == 1:
            return known
        last = known.group_by([KEY, URL]).aggregate([("attempt", "max")]).rename_columns([KEY, URL, "attempt"])
        return known.join(last, [KEY, URL, "attempt"], join_type="inner")


def selected(selection: Path) -> Iterator[tuple[Path, "pa.Table"]]:
    """The rows of a selection in order, some at a time, with the part they come from.

    Bytes of a URL that are not UTF-8 are quoted as in any URL. Raises ArtefactError for files and rows of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in parts(selection):
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if missing := {KEY, URL, ORDER} - names:
            raise ArtefactError(f"{path}: no column {', '.join(sorted(missing))}; expected rows of the stage filter")
        for batch in file.iter_batches(BATCH):
            rows = pa.Table.from_batches([batch])
            for name in (KEY, URL, SHA256):
                column = readable(rows[name]) if name in names else pa.nulls(len(rows), pa.string())
                rows = _with(rows, name, column.fill_null("") if name == URL else column)
            if rows[KEY].null_count or rows[ORDER].null_count or rows.schema.field(ORDER).type != pa.uint64():
                raise ArtefactError(
                    f"{path}: a row has no key or no order of uint64; expected rows of the stage filter"
                )
            yield path, rows


def readable(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Texts; bytes that are not UTF-8 stand in them as `%XX`."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values = column.to_pylist()
    texts = [None if value is None else SURROGATE.sub(_quoted, os.fsdecode(value)) for value in values]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _quoted(match: re.Match[str]) -> str:
    return f"%{ord(match[0]) - 0xDC00:02X}"


def fetchable(rows: "pa.Table") -> np.ndarray:
    """Which rows [n] have an http or https URL; no other is ever asked for."""
    starts = [url.lstrip()[:8].lower() for url in rows[URL].to_pylist()]
    return np.array([start.startswith(("http://", "https://")) for start in starts], dtype=bool)


def expected_sha256(rows: "pa.Table", *, verify: bool) -> np.ndarray:
    """The sha256 that each row asks for, lower case; empty where there is none or it is not verified."""
    values = [(text or "").lower() if verify else "" for text in rows[SHA256].to_pylist()]
    return np.array(values, dtype=object)


def texts(column: "pa.ChunkedArray") -> np.ndarray:
    """Strings, empty where there is none."""
    return column.fill_null("").to_numpy()


def _with(rows: "pa.Table", name: str, column: "pa.ChunkedArray") -> "pa.Table":
    index = rows.schema.get_field_index(name)
    return rows.append_column(name, column) if index < 0 else rows.set_column(index, name, column)
