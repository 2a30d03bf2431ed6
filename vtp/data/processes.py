"""Processes for rows and pictures: spawned, without the program's own imports, and gone with their parent."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
SPAWN = get_context("spawn")  # a fork of a process that has threads may hang


class Processes(ProcessPoolExecutor):
    """A pool of `count`; in each, `begin(*arguments)` comes first.

    Ctrl-C reaches the whole group, so processes leave it to their parent. When that is killed they end at once: the
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
    wait([parent.sentinel])
    os._exit(1)
