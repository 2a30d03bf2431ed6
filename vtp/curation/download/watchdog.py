"""A total time for what is done over sockets: their own timeouts begin anew with every byte that comes."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread

TICK = 0.1  # seconds between two looks at who is late


class Attempt:
    """Some work that has `seconds` for all of it, and the one connection that it has at a time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._lock = Lock()
        self._connection: socket.socket | None = None

    @property
    def left(self) -> float:
        """Seconds; none or fewer when the time is over."""
        return self._end - time.monotonic()

    def hold(self, connection: socket.socket) -> None:
        """Have this connection, and no earlier one, end with the time.

        A duplicate is held: whoever reads may wrap or close the socket meanwhile, and its number may be another's then.
        """
        self.release()
        with self._lock:
            self._connection = connection.dup()

    def release(self) -> None:
        """Let go of the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def cut(self) -> None:
        """Shut the connection, which wakes whoever waits for it."""
        with self._lock, suppress(OSError):
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)


class Watchdog:
    """Cuts the connections of attempts whose time is over, from one thread."""

    def __init__(self) -> None:
        self._attempts: set[Attempt] = set()
        Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def attempt(self, seconds: float) -> Iterator[Attempt]:
        """An attempt that is watched while the block runs."""
        attempt = Attempt(seconds)
        self._attempts.add(attempt)
        try:
            yield attempt
        finally:
            self._attempts.discard(attempt)
            attempt.release()

    def _watch(self) -> None:
        while True:
            time.sleep(TICK)
            for attempt in list(self._attempts):
                if attempt.left <= 0:
                    attempt.cut()
