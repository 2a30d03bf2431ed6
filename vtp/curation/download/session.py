"""The processes that fetch shards, on this machine or on Spark's, and how they get on."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vtp.curation.download.shard import Fetched
from vtp.processes import WorkerDied, WorkerPool, follow_parent
from vtp.spark import SparkPool
from vtp.texts import shown, write_csv

J = TypeVar("J")
R = TypeVar("R")
COLUMNS = ("seconds", "rows", "successes", "share", "images_per_second", "commonest_cause")
SHARDS_OF_A_PROCESS = 20  # then another takes its place: decoders leak


class Live:
    """How the download goes: a bar, and a table that grows."""

    def __init__(self, bar: Any, path: Path) -> None:  # noqa: ANN401 - tqdm
        self._bar = bar
        self._path = path
        self._start = time.monotonic()
        self._causes: Counter[str] = Counter()
        self.rows = self._successes = 0
        with path.open("w", newline="", encoding="utf-8") as file:
            write_csv(file, [COLUMNS])

    def note(self, fetched: Fetched) -> None:
        """A shard is in the store."""
        causes = [record.error for record in fetched.records if record.error]
        self.rows += len(fetched.records)
        self._successes += len(fetched.records) - len(causes)
        self._causes.update(causes)
        self._bar.update(len(fetched.records))
        seconds = time.monotonic() - self._start
        share, cause = self._successes / max(1, self.rows), next(iter(self._causes.most_common(1)), ("", 0))[0]
        others = f", most others: {shown(cause)}" if cause else ""
        self._bar.set_postfix_str(f"{share:.1%} of these with a picture{others}")
        values = (f"{seconds:.1f}", self.rows, self._successes, f"{share:.4f}", f"{self.rows / seconds:.1f}", cause)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            write_csv(file, [values])

    def log(self) -> None:
        """The whole run, into its log."""
        seconds = time.monotonic() - self._start
        rate = self.rows / seconds
        logging.info("%d rows in %.0f s, %.1f a second; %d with a picture", self.rows, seconds, rate, self._successes)


class LocalPool(WorkerPool):
    """Processes of this machine; what they print goes to a log."""

    def __init__(self, processes: int, log: Path) -> None:
        self._processes = processes
        self._log = log
        super().__init__(processes, _begin, log)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:  # nobody waits for shards that take minutes
            for process in active_children():
                process.kill()
        super().__exit__(kind, error, trace)

    def results(
        self, function: Callable[[J], R], jobs: Iterable[J], *, most: int | None = None
    ) -> Iterator[list[tuple[J, R]]]:
        """As of any pool, in processes that are replaced now and then."""
        waiting, size = iter(jobs), self._processes * SHARDS_OF_A_PROCESS
        try:
            while batch := list(islice(waiting, size)):
                yield from super().results(function, batch, most=most)
                if len(batch) == size:
                    self._executor.shutdown()
                    super().__init__(self._processes, _begin, self._log)
        except WorkerDied:
            raise WorkerDied(
                "a process that fetches was killed, most likely because memory ran out: set "
                "download.distributor.processes lower and start again; finished shards are kept"
            ) from None


def spark_pool(master: str, conf: dict[str, str], log: Path) -> SparkPool:
    """Executors of a cluster; the Java process and those that it starts print to a log. Raises ConfigError."""
    with _printing_to(log):
        return SparkPool(master, "download", conf)


def _begin(log: Path) -> None:
    """In a new process. The kernel ends it with the stage: the next start must not meet it."""
    follow_parent()
    _print_to(log)


def _print_to(log: Path) -> None:
    """Have this process and its children print to a log: what libraries print may be texts of strangers."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Children that are started meanwhile print to a log, to their end."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        _print_to(log)
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
