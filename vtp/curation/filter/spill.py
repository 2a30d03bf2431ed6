"""Rows that do not fit into memory: written by source, and read by part.

A spill is a file of rows grouped by part; many writers leave one each, and a reader collects its part from all of them.
Memory is that of one part, whatever the number of rows. Every file appears whole, so what an interrupted run left is used.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtp.artefact import ArtefactError, whole_file

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_SPAN = 1 << 17
BATCH = 1 << 14  # rows of a batch in files of sorted rows


def span_of(rows: int) -> int:
    """How many rows a process holds at once: as many as there are parts, so both grow with the root of `rows`."""
    return max(LEAST_SPAN, 32 * math.isqrt(rows))


def begin_process() -> None:
    """A worker process leaves other cores alone, and gives memory back, where other allocators keep what they once had."""
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())


def part_of(hashes: np.ndarray, parts: int) -> np.ndarray:
    """The part of each hash [n] uint64: equal ranges of its upper half, so parts are in the order of the hashes."""
    return ((hashes >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)


def write_table_spill(path: Path, table: "pa.Table", part: np.ndarray, parts: int) -> None:
    """Rows in ascending order of `part` [n]; batch p of the file is part p."""
    import pyarrow as pa

    bounds = np.searchsorted(part, np.arange(parts + 1))
    table = table.combine_chunks()
    with whole_file(path) as temporary, _writer(temporary, table.schema) as writer:
        empty = pa.RecordBatch.from_pylist([], schema=table.schema)
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            # Combined once more: texts of 2 GB and more stay in several chunks.
            batches = table.slice(start, stop - start).combine_chunks().to_batches()
            if len(batches) > 1:
                raise ArtefactError(f"{path}: {stop - start} rows have texts of more than 2 GB; keep fewer columns")
            writer.write_batch(batches[0] if batches else empty)


def read_table_spill(paths: Sequence[Path], part: int) -> "pa.Table":
    """The rows of a part in all files."""
    import pyarrow as pa

    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as source:
            batches.append(pa.ipc.open_file(source).get_batch(part))
    return pa.Table.from_batches(batches)


def write_rows(path: Path, table: "pa.Table") -> None:
    """Rows to be read by column, or a few at a time."""
    with whole_file(path) as temporary, _writer(temporary, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=BATCH)


def read_spilled_rows(path: Path, columns: Sequence[str]) -> "pa.Table":
    """Some columns of all rows that `write_rows` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return _reader(source, columns).read_all().select(list(columns))


def pick_rows(path: Path, columns: Sequence[str], indices: np.ndarray) -> "pa.Table":
    """Some columns of a few rows, given by ascending place; only the batches that hold them are read."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        reader = _reader(source, columns)
        batches = [
            reader.get_batch(int(batch)).take(pa.array(indices[indices // BATCH == batch] % BATCH))
            for batch in np.unique(indices // BATCH)
        ]
        return pa.Table.from_batches(batches, reader.schema).select(list(columns))


def _writer(path: Path, schema: "pa.Schema") -> "pa.ipc.RecordBatchFileWriter":
    import pyarrow as pa

    return pa.ipc.new_file(str(path), schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))


def _reader(source: "pa.MemoryMappedFile", columns: Sequence[str]) -> "pa.ipc.RecordBatchFileReader":
    import pyarrow as pa

    names = pa.ipc.open_file(source).schema.names
    fields = sorted(names.index(name) for name in columns)
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))


def write_record_spill(path: Path, records: np.ndarray, part: np.ndarray, parts: int) -> None:
    """Records [n, k] uint64 and their parts [n], in any order."""
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(parts + 1)).astype(np.uint64)
    # One file: the bounds come first, so that a reader touches what it needs.
    save_array(path, np.concatenate([bounds, records[order].reshape(-1)]))


def read_record_spill(paths: Sequence[Path], part: int, parts: int, width: int) -> np.ndarray:
    """The records [n, width] of a part in all files."""
    slices = [np.empty((0, width), np.uint64)]
    for path in paths:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        start, stop = (parts + 1 + width * int(values[part + side]) for side in (0, 1))
        slices.append(np.array(values[start:stop]).reshape(-1, width))
    return np.concatenate(slices)


def save_array(path: Path, values: np.ndarray) -> None:
    """A whole .npy file."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """What `save_array` wrote."""
    return np.load(path, allow_pickle=False)
