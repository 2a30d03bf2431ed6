"""Jobs as tasks of Spark: of a cluster nothing but the scheduling is used, so results are those of processes here."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from vtp.config import ConfigError
from vtp.processes import WorkerDied, WorkerPool

J = TypeVar("J")
R = TypeVar("R")
TASKS = 1000  # on their way at once, at most; a thread waits for each


class SparkPool(WorkerPool):
    """Executors of a cluster, as long as its `with` block.

    Each job is a Spark job of one task, so that it is told of as soon as it ends; in the task `begin` comes first.
    `conf` are settings of Spark's beside those of `spark-defaults.conf`. The same Python with this package is on every node.
    Raises ConfigError when no session can be had.
    """

    def __init__(
        self, master: str, name: str, conf: Mapping[str, str], begin: Callable[[], object] | None = None
    ) -> None:
        self._begin = begin
        self._executor = ThreadPoolExecutor(TASKS)
        try:
            # Not from the main thread: there Spark would take SIGINT for itself.
            self._context: Any = self._executor.submit(_context, master, name, conf).result()
        except BaseException:
            self._executor.shutdown()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(Exception):  # of a Java process that was killed
            if kind is not None:
                self._context.cancelAllJobs()
        super().__exit__(kind, error, trace)
        with suppress(Exception):
            self._context.stop()

    def room(self) -> int:
        """Twice the cores, which come and go with executors. Raises WorkerDied."""
        with _told("is gone"):
            return min(TASKS, 2 * self._context.defaultParallelism)

    def results(
        self, function: Callable[[J], R], jobs: Iterable[J], *, most: int | None = None
    ) -> Iterator[list[tuple[J, R]]]:
        """As of any pool. Raises WorkerDied when Spark gives a task up, or is gone."""
        return super().results(partial(self._run, function), jobs, most=most)

    def _run(self, function: Callable[[J], R], job: J) -> R:
        task = partial(_result, self._begin, function)
        with _told("gave up a task, most likely because a node or its memory was lost"):
            # Not `first`: it leaves the rest unread, and Spark ends the process that holds it.
            result = self._context.parallelize([job], 1).map(task).collect()[0]
        if isinstance(result, Exception):
            raise result
        return result


def _result(begin: Callable[[], object] | None, function: Callable[[J], R], job: J) -> R | Exception:
    """On an executor. Spark would tell an error as text."""
    try:
        if begin is not None:
            begin()
        return function(job)
    except (ValueError, OSError) as error:  # which say all that there is to say
        return error


def _context(master: str, name: str, conf: Mapping[str, str]) -> object:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError("pyspark is not installed here: pip install -e '.[spark]'") from None
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master(master).appName(name)
    for key, value in conf.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate().sparkContext
    except Exception as error:  # of Spark, of Java, of what is between
        raise ConfigError(f"no session of Spark at {master!r} (it needs Java 17): {_reason(error)}") from None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever Spark or Java raises becomes a WorkerDied in few words."""
    try:
        yield
    except Exception as error:
        raise WorkerDied(f"Spark {what}; finished work is kept, start again. It said: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Java has it in the second line."""
    return " ".join(f"{type(error).__name__}: {str(error).strip()}".splitlines()[:2])[:300]
