"""A web server of the files of a folder that has so many bytes a second for all who ask, and counts what it sends."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

PIECE = 1 << 14  # bytes that are sent at a time


class SlowStore(ThreadingHTTPServer):
    """Serves `folder`; `sent` counts bytes by name, `failures` has answers to give first, by name.

    A failure is an HTTP status, or "reset": the connection ends after half of the file.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.rate = rate  # bytes a second
        self.sent: Counter[str] = Counter()
        self.failures: dict[str, list[int | str]] = {}
        self._lock = threading.Lock()
        self._free = 0.0  # when the line has sent what it was given

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, name: str, count: int) -> None:
        """Wait for a turn on the line."""
        with self._lock:
            self.sent[name] += count
            self._free = max(self._free, time.monotonic()) + count / self.rate
            wait = self._free - time.monotonic()
        time.sleep(max(0.0, wait))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go when they like."""


class _Handler(BaseHTTPRequestHandler):
    server: SlowStore  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = unquote(self.path).strip("/")
        path = self.server.folder / name
        failures = self.server.failures.get(name, [])
        failure = failures.pop(0) if failures and body else None
        status = failure if isinstance(failure, int) else 200 if path.is_file() else 404
        size = path.stat().st_size if status == 200 else 0
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if not body or status != 200:
            return
        left = size // 2 if failure == "reset" else size
        with path.open("rb") as file:
            while left > 0:
                piece = file.read(min(PIECE, left))
                self.server.take(name, len(piece))
                self.wfile.write(piece)
                left -= len(piece)


@contextmanager
def slow_store(folder: Path, *, rate: float = float("inf")) -> Iterator[SlowStore]:
    """Serve a folder in a thread."""
    server = SlowStore(folder, rate)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
