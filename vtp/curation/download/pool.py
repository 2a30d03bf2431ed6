"""The pool: what became of every row of a selection, with the tars that hold its pictures.

    part-00000.parquet   the selection's rows and columns, in its order, with status, error and where the picture lies
    tars/<name>.tar      img2dataset's, as fetched; they may hold pictures of other selections too

`open(pool / tar).seek(offset).read(size)` is a picture.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.artefact import whole_file, whole_folder, write_json
from vtp.curation.download.store import FAILED, SUCCESS, Store, fetchable, selected, texts
from vtp.curation.rows import HEIGHT, SHA256, URL, WIDTH
from vtp.texts import write_csv

if TYPE_CHECKING:
    import pyarrow as pa

SCHEME_REFUSED = "scheme refused"
# The roles that a download answers, and what it adds; a pool that is fetched again has them already.
ANSWERS = (WIDTH, HEIGHT, SHA256)
ADDED = ("status", "error", "tar", "offset", "size", "stored_width", "stored_height")


class FailedRow(NamedTuple):
    """The first row of a cause."""

    url: str
    message: str


class DownloadReport:
    """Counts over a pool; nothing in it depends on time."""

    def __init__(self) -> None:
        self.rows = self.successes = self.bytes = 0
        self.tars: set[str] = set()
        self.causes: Counter[str] = Counter()
        self.examples: dict[str, FailedRow] = {}

    @property
    def share(self) -> float:
        """Of the rows, those with a picture."""
        return self.successes / self.rows if self.rows else 0.0

    def add(self, rows: "pa.Table", outcome: "pa.Table") -> None:
        """Count some rows."""
        good = texts(outcome["status"]) == SUCCESS
        self.rows += len(rows)
        self.successes += int(good.sum())
        self.bytes += int(outcome["size"].fill_null(0).to_numpy().sum())
        self.tars |= set(outcome["tar"].drop_null().to_pylist())
        errors, messages = texts(outcome["error"]), texts(outcome["message"])
        for index in np.flatnonzero(~good).tolist():
            cause = errors[index]
            self.causes[cause] += 1
            if cause not in self.examples:
                self.examples[cause] = FailedRow(rows[URL][index].as_py(), messages[index])

    def table(self) -> list[tuple[str, int]]:
        """Causes and their rows, the commonest first."""
        return sorted(self.causes.items(), key=lambda item: (-item[1], item[0]))

    def save(self, path: Path) -> None:
        """As metrics: JSON under `download`."""
        counts = {"rows": self.rows, "success": self.successes, "share": round(self.share, 6), "tars": len(self.tars)}
        sizes = {"bytes": self.bytes, "mean_bytes": round(self.bytes / max(1, self.successes))}
        write_json(path, {"download": counts | sizes | {"causes": dict(sorted(self.causes.items()))}})

    def save_errors(self, path: Path) -> None:
        """As CSV: a cause, its rows, their share of all, and the first row that it met."""
        with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            write_csv(file, [["cause", "rows", "share", "example", "message"]])
            for cause, rows in self.table():
                url, message = self.examples[cause]
                write_csv(file, [[cause, rows, f"{rows / self.rows:.6f}", url, " ".join(message.split())]])


def write_pool(selection: Path, store: Store, folder: Path, *, verify: bool) -> DownloadReport:
    """The pool of a selection; every row of it is a success or a failure.

    Tars are hard links into the store where the disk allows it. The store never changes a tar.
    """
    report = DownloadReport()
    with whole_folder(folder) as temporary:
        outcomes = _outcomes(selection, store, report, verify=verify)
        for path, group in groupby(outcomes, key=lambda item: item[0]):
            _write(temporary / path.name, (table for _, table in group))
        (temporary / "tars").mkdir()
        for tar in sorted(report.tars):
            _link(store.folder / tar, temporary / tar)
    return report


def outcome_of(rows: "pa.Table", store: Store, *, verify: bool) -> "pa.Table":
    """What became of rows; a URL that was never asked for is a failure too."""
    import pyarrow as pa

    known = store.lookup(rows, verify=verify)
    asked = fetchable(rows)
    for name, value in (("status", FAILED), ("error", SCHEME_REFUSED)):
        column = np.where(asked, texts(known[name]), value)
        known = known.set_column(
            known.schema.get_field_index(name), name, pa.array(column, pa.string(), mask=column == "")
        )
    return known


def _outcomes(
    selection: Path, store: Store, report: DownloadReport, *, verify: bool
) -> Iterator[tuple[Path, "pa.Table"]]:
    import pyarrow as pa

    for path, rows in selected(selection):
        outcome = outcome_of(rows, store, verify=verify)
        report.add(rows, outcome)
        columns = {name: rows[name] for name in rows.column_names if name not in ADDED}
        yield path, pa.table(columns | {name: outcome[name] for name in (*ANSWERS, *ADDED)})


def _write(path: Path, tables: Iterator["pa.Table"]) -> None:
    """A parquet file, one row group per table."""
    import pyarrow.parquet as pq

    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, destination)
