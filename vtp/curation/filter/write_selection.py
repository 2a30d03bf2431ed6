"""Last pass of a filter: the rows that are left, in files of a fixed number of rows. Equal rows give equal bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.artefact import whole_file
from vtp.curation.filter.spill import load_array, read_spilled_rows

GROUP = 1 << 16  # rows of a row group; fixed, so that bytes are
COMPRESSION, LEVEL = "zstd", 3


class Stretch(NamedTuple):
    """Some of the rows that are left in a part."""

    rows: Path
    kept: Path
    start: int  # among the rows that are left
    stop: int


class WriteJob(NamedTuple):
    """One file of the output."""

    done: Path
    stretches: tuple[Stretch, ...]
    columns: tuple[str, ...]


def plan_files(
    folder: Path, name: str, parts: Sequence[tuple[Path, Path, int]], rows_per_part: int, columns: tuple[str, ...]
) -> list[WriteJob]:
    """The files of the output; a part is (rows, kept, how many are kept)."""
    ends = np.cumsum([left for *_, left in parts])
    jobs = []
    for number, first in enumerate(range(0, int(ends[-1]), rows_per_part)):
        last = min(first + rows_per_part, int(ends[-1]))
        stretches = []
        for part in range(int(np.searchsorted(ends, first, side="right")), len(parts)):
            rows, kept, left = parts[part]
            begin = int(ends[part]) - left
            if begin >= last:
                break
            if left:
                stretches.append(Stretch(rows, kept, max(first - begin, 0), min(last - begin, left)))
        jobs.append(WriteJob(folder / name.format(number), tuple(stretches), columns))
    return jobs


def write_file(job: WriteJob) -> None:
    """One parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[pa.Table] = []
    with whole_file(job.done) as temporary:
        writer = None
        for stretch in job.stretches:
            chosen = np.flatnonzero(load_array(stretch.kept))[stretch.start : stretch.stop]
            table = read_spilled_rows(stretch.rows, job.columns).take(pa.array(chosen))
            writer = writer or pq.ParquetWriter(
                temporary, table.schema, compression=COMPRESSION, compression_level=LEVEL, version="2.6"
            )
            waiting.append(table)
            while sum(map(len, waiting)) >= GROUP:
                # In one chunk, because pages end where chunks do.
                table = pa.concat_tables(waiting)
                writer.write_table(table.slice(0, GROUP).combine_chunks(), row_group_size=GROUP)
                waiting = [table.slice(GROUP)]
        assert writer is not None
        if sum(map(len, waiting)):
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=GROUP)
        writer.close()
