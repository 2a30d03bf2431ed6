"""Worker processes for rows and pictures: spawned, without the program's own imports, and gone with their parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for_connections
from threading import Thread
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
J = TypeVar("J")
R = TypeVar("R")
KILLED = (
    "a worker process was killed, most likely because memory ran out: set VTP_PROCESSES lower and start again; finished "
    "work is kept"
)
SPAWN = get_context("spawn")  # a fork of a process that has threads may hang
POLL_SECONDS = 0.2  # at most, between two answers of `WorkerPool.results`
PR_SET_PDEATHSIG = 1


class WorkerDied(ValueError):
    """A process was killed from outside; finished work is kept."""


class WorkerPool:
    """Runs jobs in `processes` others or, for 0, in a thread of this one, as long as its `with` block.

    In each, `begin(*arguments)` comes first. Few jobs are handed out ahead, so that a long list costs no memory.
    """

    def __init__(self, processes: int, begin: Callable[..., object], *arguments: object) -> None:
        self._ahead = 2 * max(1, processes)
        self._executor: Executor
        if processes:
            self._executor = _Processes(processes, begin, *arguments)
        else:
            self._executor = ThreadPoolExecutor(1, initializer=begin, initargs=arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(cancel_futures=True)

    def room(self) -> int:
        """Jobs that are handed out at once."""
        return self._ahead

    def results(
        self, function: Callable[[J], R], jobs: Iterable[J], *, most: int | None = None
    ) -> Iterator[list[tuple[J, R]]]:
        """What has ended since the last time, each job with its result; at least every POLL_SECONDS, and may be empty.

        A job is taken from `jobs` when there is room for it; at `most` so many are taken at a time. Raises WorkerDied when
        a process was killed.
        """
        running: dict[Future[R], J] = {}
        waiting = iter(jobs)
        try:
            while True:
                room = self.room() if most is None else most
                for job in islice(waiting, max(0, room - len(running))):
                    running[self._executor.submit(function, job)] = job
                if not running:
                    return
                ended, _ = wait(running, POLL_SECONDS, return_when=FIRST_COMPLETED)
                yield [(running.pop(future), future.result()) for future in ended]
        except BrokenProcessPool:
            raise WorkerDied(KILLED) from None
        finally:
            for future in running:
                future.cancel()


class _Processes(ProcessPoolExecutor):
    """Ctrl-C reaches the whole group, so processes leave it to their parent. When that is killed they end at once: the
    next start must not meet them.
    """

    def __init__(self, count: int, begin: Callable[..., object], *arguments: object) -> None:
        super().__init__(count, SPAWN, initializer=_enlist, initargs=(begin, *arguments))

    def submit(self, function: Callable[P, R], /, *arguments: P.args, **more: P.kwargs) -> Future[R]:
        """A job; starts a process for it while there are fewer than `count`."""
        with _hidden_main():
            return super().submit(function, *arguments, **more)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """A process that starts meanwhile does not import the program: a stage brings torch, which is 0.3 GB in each."""
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _enlist(begin: Callable[..., object], *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait_for_connections([parent.sentinel])
    os._exit(1)


def follow_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
