"""Work that does not fit into memory: jobs on processes, and rows that are written by source and read by part.

A spill is a file of rows grouped by part; many writers leave one each, and a reader collects its part from all of them.
Memory is that of one part, whatever the number of rows. Every file appears whole, so what an interrupted run left is used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np

from vtp.artefact import ArtefactError, whole_file
from vtp.data.processes import Processes

if TYPE_CHECKING:
    import pyarrow as pa

J = TypeVar("J")
R = TypeVar("R")
LEAST_SPAN = 1 << 17
BATCH = 1 << 14  # rows of a batch in files of sorted rows


def span_of(rows: int) -> int:
    """How many rows a process holds at once: as many as there are parts, so both grow with the root of `rows`."""
    return max(LEAST_SPAN, 32 * math.isqrt(rows))


class Pace(NamedTuple):
    """How work tells of itself and learns that it must end."""

    progress: Callable[[int, str, str, int], AbstractContextManager[Any]]  # total, description, unit, done
    stop_if_asked: Callable[[], None]  # raises when the run is to end


class Workforce:
    """Spawned processes that live as long as the `with` block; 0: jobs run here."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: Processes | None = None

    def __enter__(self) -> Self:
        if self._processes:
            self._pool = Processes(self._processes, _begin)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        """Every job with its result, as they end. Raises ArtefactError when a process was killed."""
        if self._pool is None:
            for job in jobs:
                yield job, function(job)
            return
        waiting, running = iter(jobs), dict[Future[R], J]()
        try:
            for job in waiting:
                running[self._pool.submit(function, job)] = job
                if len(running) > 2 * self._processes:
                    yield from _ended(running)
            while running:
                yield from _ended(running)
        except BrokenProcessPool:
            raise ArtefactError(
                "a process of this stage was killed, most likely because memory ran out: set VTP_PROCESSES lower and "
                "start again; finished work is kept"
            ) from None
        finally:
            for future in running:
                future.cancel()


def _ended(running: dict[Future[R], J]) -> Iterator[tuple[J, R]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _begin() -> None:
    """A process leaves other cores alone, and gives memory back, where other allocators keep what they once had."""
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


def read_rows(path: Path, columns: Sequence[str]) -> "pa.Table":
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
    found = [np.empty((0, width), np.uint64)]
    for path in paths:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        start, stop = (parts + 1 + width * int(values[part + side]) for side in (0, 1))
        found.append(np.array(values[start:stop]).reshape(-1, width))
    return np.concatenate(found)


def save_array(path: Path, values: np.ndarray) -> None:
    """A whole .npy file."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """What `save_array` wrote."""
    return np.load(path, allow_pickle=False)
