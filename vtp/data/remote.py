"""Shards on other machines, read through a bounded folder of whole shards on this one.

All processes of a machine share the folder; a shard is fetched once, verified by its digest, and the ones that were not
used for longest make room. Locks are the kernel's, so two machines must not share one.

    <sha256>.tar        a shard; whoever reads it holds a shared lock on it
    .<sha256>.*.tmp     one that is being fetched, of its full size, locked by its fetcher
    <sha256>.verified   which large file had this digest when it was read: a cached shard, or one that lies here anyway
    <4 letters>.lock    held while a shard, or the room, is seen to
"""

import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple, Self

from vtp.artefact import LARGE, ArtefactError
from vtp.config import did_you_mean
from vtp.data.transfer import (
    LONGEST_WAIT,
    PATIENCE,
    RemoteError,
    digest_of,
    fetch,
    is_web,
    open_location,
    persist,
    uneven,
)
from vtp.host import Host

if TYPE_CHECKING:
    from vtp.data.shards import Shard

POLL = 0.05  # seconds between looks whether others have finished
UNTOUCHED = 3600.0  # seconds for which a shard that was fetched ahead keeps its room, though nobody has read it
# Of fsspec: what lies in one process, or in a URL itself, and what only wraps another place.
PRIVATE = {
    "memory",
    "data",
    "dask",
    "pyscript",
    "asynclocal",
    "async_wrapper",
    "asyncwrapper",
    "generic",
    "dir",
    "reference",
}
PRIVATE |= {"cached", "blockcache", "filecache", "simplecache", "zip", "tar", "libarchive"}


class ShardCache:
    """A folder of at most `capacity` bytes, those on their way included, beside the shards that are being read now."""

    def __init__(self, folder: Path, *, capacity: float) -> None:
        self.folder = folder
        self.capacity = capacity

    @classmethod
    def of(cls, host: Host) -> Self:
        """The folder of a machine."""
        return cls(host.shard_cache, capacity=host.shard_cache_bytes)

    def open(self, location: str, shard: "Shard") -> BinaryIO:
        """The shard as a local file; fetched if it is not there. Raises RemoteError."""
        with self._locked(shard.sha256), self._explained(shard):
            file = self._held(shard) or self._fetched(location, shard, self._reserve(shard), PATIENCE)
            file.seek(0)
            return file

    def fetch_ahead(self, location: str, shard: "Shard") -> bool:
        """Have the shard here before it is needed; False where only what others need could make room.

        Leaves one that another process is fetching, and makes one attempt. Raises RemoteError.
        """
        if self.has(shard):
            return True
        with self._locked(shard.sha256, wait=False) as alone, self._explained(shard):
            if not alone or self.has(shard):
                return True
            with self._locked("room"):
                file = self._create(shard) if self._make_room(shard.bytes, urgent=False) else None
            if file is None:
                return False
            self._fetched(location, shard, file, patience=0).close()
        return True

    def has(self, shard: "Shard") -> bool:
        """Whether the shard is here now."""
        return self._path(shard).exists()

    def verified(self, path: Path, sha256: str) -> bool:
        """Whether a file has the digest. That of a large one is taken once on this machine."""
        with self._locked(sha256), path.open("rb") as file:
            return self._verified(file, sha256)

    def _path(self, shard: "Shard") -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _held(self, shard: "Shard") -> BinaryIO | None:
        """The shard, if it is there and undamaged; locked against those who make room for as long as it is open."""
        while True:
            try:
                file = self._path(shard).open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            if status.st_nlink and status.st_size == shard.bytes and self._verified(file, shard.sha256):
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # the time of its last use
                return file
            file.close()
            if status.st_nlink:  # else another process has just made room
                logging.warning("%s was damaged, and is fetched again", self._path(shard))
                self._path(shard).unlink(missing_ok=True)

    def _fetched(self, location: str, shard: "Shard", file: BinaryIO, patience: float) -> BinaryIO:
        """The shard, of which `file` is the place."""
        try:
            fetch(f"{location.rstrip('/')}/{shard.name}", shard, file, patience=patience)
            os.fsync(file.fileno())
            now = time.time_ns()
            os.utime(file.fileno(), ns=(now, now))
            self._remember(file, shard.sha256)
            with self._locked("room"):  # who looks there meanwhile would see neither name
                Path(file.name).replace(self._path(shard))
            fcntl.flock(file, fcntl.LOCK_SH)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise
        return file

    @contextmanager
    def _explained(self, shard: "Shard") -> Iterator[None]:
        """What this machine's disk refuses, with what can be done about it."""
        try:
            yield
        except OSError as error:
            raise RemoteError(
                f"{self.folder}: {shard.name} cannot be kept there ({error.strerror or error}); make room, or set "
                "VTP_CACHE to a folder on another disk, or VTP_CACHE_GIGABYTES to what this one holds"
            ) from error

    def _verified(self, file: BinaryIO, sha256: str) -> bool:
        mark = self.folder / f"{sha256}.verified"
        if mark.exists() and mark.read_text() == _identity(file):
            return True
        if digest_of(file) != sha256:
            return False
        self._remember(file, sha256)
        return True

    def _remember(self, file: BinaryIO, sha256: str) -> None:
        if os.fstat(file.fileno()).st_size >= LARGE:
            (self.folder / f"{sha256}.verified").write_text(_identity(file))

    def _reserve(self, shard: "Shard") -> BinaryIO:
        """A place for a shard that is needed now; waits while all room is taken by shards on their way."""
        while True:
            with self._locked("room"):
                if self._make_room(shard.bytes, urgent=True):
                    return self._create(shard)
            time.sleep(POLL)

    def _create(self, shard: "Shard") -> BinaryIO:
        """A locked file of the size of the shard, which takes its room from now on."""
        name = f".{shard.sha256[:16]}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        file = (self.folder / name).open("xb+")
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            file.truncate(shard.bytes)
        except OSError:
            file.close()
            (self.folder / name).unlink()
            raise
        return file

    def _make_room(self, needed: int, *, urgent: bool) -> bool:
        """Whether so many bytes fit now. What was used longest ago is deleted for them, and what fetchers left that died.

        Only for an urgent need also what is read now, which stays readable there, and what was fetched ahead.
        """
        held, coming = self._look()
        total = sum(each.size for each in held) + coming
        for each in sorted(held, key=lambda each: (each.in_use, each.untouched, each.used)):
            if total + needed <= self.capacity:
                return True
            if each.in_use or (each.untouched and time.time() - each.used < UNTOUCHED):
                if not urgent:
                    return False
                if each.in_use and coming:
                    return False
            each.path.unlink(missing_ok=True)
            each.path.with_suffix(".verified").unlink(missing_ok=True)
            total -= each.size
        return total + needed <= self.capacity or (urgent and not coming)

    def _look(self) -> "tuple[list[_Held], int]":
        """The shards in the folder, and the bytes that are on their way."""
        held, coming = [], 0
        for path in self.folder.iterdir():
            if path.suffix not in (".tar", ".tmp"):
                continue
            try:
                with path.open("rb") as file:
                    status, in_use = os.fstat(file.fileno()), not _is_free(file)
            except FileNotFoundError:  # another process was quicker
                continue
            if path.suffix == ".tar":
                untouched = status.st_atime_ns <= status.st_mtime_ns
                held.append(_Held(path, status.st_size, status.st_atime, in_use, untouched))
            elif in_use:
                coming += status.st_size
            else:
                path.unlink(missing_ok=True)
        return held, coming

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Whether this process has the lock of a name; without `wait` another may have it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / f"{name[:4]}.lock").open("a") as lock:  # they stay: a deleted lock locks nobody out
            if wait:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield wait or _is_free(lock)


class _Held(NamedTuple):
    """A shard in the folder."""

    path: Path
    size: int
    used: float  # time of its last use
    in_use: bool
    untouched: bool  # nobody has read it since it was fetched


class Prefetcher:
    """Fetches shards before they are needed, in a thread of the process that asks, and leaves what does not fit."""

    def __init__(self, cache: ShardCache, location: str) -> None:
        self._cache = cache
        self._location = location
        self._wanted: list[Shard] = []
        self._thread: tuple[int, Thread] | None = None  # and the process in which it runs
        self._pause = 0.0  # until when a store that failed is left alone

    def want(self, shards: "Sequence[Shard]") -> None:
        """These are needed soon, the first ones first."""
        self._wanted = [shard for shard in shards if not self._cache.has(shard)]
        running = self._thread is not None and self._thread[0] == os.getpid() and self._thread[1].is_alive()
        if self._wanted and not running and time.monotonic() >= self._pause:
            thread = Thread(target=self._run, name="shards ahead", daemon=True)
            self._thread = os.getpid(), thread
            thread.start()

    def _run(self) -> None:
        while self._wanted:
            shard, *self._wanted = self._wanted
            try:
                if not self._cache.fetch_ahead(self._location, shard):
                    return
            except (ValueError, OSError) as error:  # whoever needs it meets the error again, and tells
                logging.warning("%s was not fetched ahead: %s", shard.name, error)
                self._pause = time.monotonic() + uneven(LONGEST_WAIT)
                return

    def __getstate__(self) -> dict[str, object]:
        # Another process has a thread of its own.
        return self.__dict__ | {"_thread": None, "_wanted": []}


def _is_free(file: IO) -> bool:
    """Whether nobody else has a lock on an open file; whoever asked holds it until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(file: BinaryIO) -> str:
    """A file is the same while this is; the time of its last use is no part of it."""
    status = os.fstat(file.fileno())
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def verify_remote(location: str, shards: "Sequence[Shard]") -> None:
    """See that all shards are there with the right sizes. Raises ArtefactError that names the first that is not.

    The web has no listings with sizes: there the first shard is asked for alone.
    """
    filesystem, root = open_location(location)
    asked = shards[:1] if is_web(location) else shards
    try:
        listed = persist(
            location,
            lambda: (
                [filesystem.info(f"{root}/{shard.name}") for shard in asked]
                if is_web(location)
                else filesystem.ls(root, detail=True)
            ),
            patience=PATIENCE,
        )
    except RemoteError as error:
        raise ArtefactError(
            f"{location}: nothing to be found there ({error.__cause__}); see manifest.json's location"
        ) from None
    sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}
    for shard in asked:
        if sizes.get(shard.name) != shard.bytes:
            actual = f"{sizes[shard.name]} bytes" if shard.name in sizes else "nothing"
            raise ArtefactError(
                f"{location}/{shard.name}: manifest.json says {shard.bytes} bytes, found {actual}; upload it again"
            )


def require_shared(location: str) -> None:
    """See that a URL names a place that other processes and machines can read, by its protocol alone.

    Raises ValueError for what is no URL of fsspec, for what one process keeps to itself (memory://), and for places in
    places (zip://, simplecache::).
    """
    from fsspec import available_protocols

    protocol, separator, _ = location.partition("://")
    if not separator:
        raise ValueError("no URL; give one such as s3://bucket/folder, or null")
    if "::" in location or protocol in PRIVATE:
        raise ValueError(
            f"what {protocol}:// holds is not shared by processes and machines, and each must read it; give the URL of a "
            "store, such as s3://bucket/folder, or null"
        )
    if protocol not in (known := set(available_protocols()) - PRIVATE):
        hint = did_you_mean(protocol, known) or "; s3, gs, https and file are some"
        raise ValueError(f"fsspec has no protocol {protocol!r}{hint}")
