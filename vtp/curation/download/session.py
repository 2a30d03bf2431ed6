"""What `download` runs beside itself: proxies, and the process that calls img2dataset. Watched, and never left over.

stage                holds the lock of the store, adopts shards as they are finished
|- vtp.curation.download.egress_proxy    one or more on one port; they end when their stdin does, however the stage ends
`- vtp.curation.download.worker     likewise, in a process group of its own, with img2dataset's processes or Spark's driver
"""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vtp.artefact import write_json
from vtp.curation.download.deliveries import Adopted, adopt
from vtp.curation.download.policy import Policy
from vtp.curation.download.store import Store
from vtp.curation.download.worker import FetchJob
from vtp.texts import shown, write_csv

POLL_SECONDS = 0.3
COLUMNS = ("seconds", "rows", "successes", "share", "images_per_second", "commonest_cause")
DISK_FULL = "No space left on device"
TAIL = 20_000  # bytes of the log


class Proxies(NamedTuple):
    """The proxies of a run."""

    address: str
    processes: list[subprocess.Popen]

    @property
    def gone(self) -> bool:
        return any(process.poll() is not None for process in self.processes)


@contextmanager
def proxies(policy: Policy, *, given: str | None, count: int, folder: Path) -> Iterator[Proxies]:
    """`count` proxies on one port of loopback, or those that run at the address `given`."""
    if given is not None:
        yield Proxies(given, [])
        return
    parameters = folder / "proxy.json"
    write_json(parameters, {"download": {"policy": policy.model_dump()}})
    running: list[subprocess.Popen] = []
    try:
        address = "127.0.0.1:0"
        for _ in range(count):
            process = _start_proxy(f"{parameters}:download", address)
            running.append(process)
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the proxy did not start; its error stands above")
        yield Proxies(address, running)
    finally:
        for process in running:
            end(process)


def _start_proxy(parameters: str, address: str) -> subprocess.Popen:
    from vtp.curation.download import egress_proxy

    command = [sys.executable, "-m", egress_proxy.__name__, parameters, "--listen", address, "--follow"]
    # In a session of its own: Ctrl-C is for the stage, which ends the proxy last.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True)


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

    def note(self, adopted: Adopted) -> None:
        """A shard is in the store."""
        self.rows += adopted.rows
        self._successes += adopted.successes
        self._causes.update(adopted.causes)
        self._bar.update(adopted.rows)
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


class Round(NamedTuple):
    """One call of img2dataset."""

    job: FetchJob
    delivery: Path
    log: Path
    lock: int  # file descriptor; the next run waits until all who hold it are gone

    def run(
        self, store: Store, *, proxies: Proxies, note: Callable[[Adopted], None], stopped: Callable[[], bool]
    ) -> int:
        """Fetch, and adopt shards as they are finished, until the end, a request to stop or the end of a proxy.

        How many rows were adopted. Raises OSError when the disk is full.
        """
        rows = 0
        process = self._start()
        try:
            while process.poll() is None and not stopped() and not proxies.gone:
                rows += self._adopt(store, note)
                time.sleep(POLL_SECONDS)
        finally:
            end(process)
        rows += self._adopt(store, note)
        if not rows and DISK_FULL in self.tail():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder))
        return rows

    def tail(self) -> str:
        """The end of img2dataset's log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            return file.read().decode(errors="replace")

    def _adopt(self, store: Store, note: Callable[[Adopted], None]) -> int:
        rows = 0
        for adopted in adopt(self.delivery, store):
            note(adopted)
            rows += adopted.rows
        return rows

    def _start(self) -> subprocess.Popen:
        path = self.delivery / "job.json"
        write_json(path, self.job.model_dump())
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "vtp.curation.download.worker", str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self.job.proxy, self.delivery),
                start_new_session=True,
                pass_fds=(self.lock,),
            )


def _environment(proxy: str, delivery: Path) -> dict[str, str]:
    """Whatever connects in there by the usual ways meets the proxy, and nothing calls home."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy"):
        environment |= {name: f"http://{proxy}", name.upper(): f"http://{proxy}"}
    environment |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "WANDB_DISABLED": "true"}
    own = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_DIRS": str(delivery / "spark")}
    return own | environment


def end(process: subprocess.Popen) -> None:
    """End a process and all of its group."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
