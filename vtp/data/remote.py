"""Shards on other machines, read through a bounded folder of whole shards on this one.

Anything that fsspec opens is a place for shards: s3://, gs://, https://, a mounted disk. All processes of a machine
share the folder; a shard is fetched once, verified by its digest, and the ones that were not used for longest make room.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from vtp.artefact import CHUNK, ArtefactError, whole_file
from vtp.config import did_you_mean
from vtp.host import Host

if TYPE_CHECKING:
    from vtp.data.shards import Shard

ATTEMPTS = 4
FIRST_WAIT = 0.5  # seconds before the second attempt; each further one waits twice as long
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


class RemoteError(ValueError):
    """A shard could not be fetched; the message names it and what was tried."""


class ShardCache:
    """A folder of at most `capacity` bytes, beside the shards that are being read now."""

    def __init__(self, folder: Path, *, capacity: float) -> None:
        self.folder = folder
        self.capacity = capacity

    @classmethod
    def of(cls, host: Host) -> Self:
        """The folder of a machine."""
        return cls(host.shard_cache, capacity=host.shard_cache_bytes)

    def open(self, location: str, shard: "Shard") -> BinaryIO:
        """The shard as a local file; fetched if it is not there. Raises RemoteError."""
        path = self.folder / f"{shard.sha256}.tar"
        fetched = False
        with self._locked(shard.sha256):
            while True:
                try:
                    file = path.open("rb")
                except FileNotFoundError:  # not yet, or another process has just made room
                    self._make_room(shard.bytes)
                    self._fetch(f"{location.rstrip('/')}/{shard.name}", shard, path)
                    fetched = True
                    continue
                os.utime(file.fileno())  # the time of its last use
                if fetched:
                    self._make_room(0)  # others have fetched meanwhile, into the same room
                return file

    def _fetch(self, url: str, shard: "Shard", path: Path) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with whole_file(path) as temporary:
                    _copy(url, shard, temporary)
                return
            except (OSError, ValueError) as error:
                if attempt == ATTEMPTS:
                    raise RemoteError(
                        f"{url}: not fetched in {ATTEMPTS} attempts ({error}); see that it exists, that this machine may "
                        "read it, and that the shards are those of manifest.json"
                    ) from error
                logging.warning("%s: attempt %d failed (%s)", url, attempt, error)
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    def _make_room(self, needed: int) -> None:
        """Delete what was used longest ago. A shard that is open somewhere stays readable there."""
        with self._locked("room"):  # one at a time
            held = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*.tar"))
            total = sum(size for _, size, _ in held)
            for _, size, path in held:
                if total + needed <= self.capacity:
                    return
                total -= size
                path.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name[:4]}.lock").open("a") as lock:  # they stay: a deleted lock locks nobody out
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def verify_remote(location: str, shards: "Sequence[Shard]") -> None:
    """See that all shards are there with the right sizes. Raises ArtefactError that names the first that is not.

    The web has no listings with sizes: there the first shard is asked for alone.
    """
    filesystem, root = open_location(location)
    web = location.startswith("http")
    try:
        asked = shards[:1] if web else shards
        listed = (
            [filesystem.info(f"{root}/{shard.name}") for shard in asked] if web else filesystem.ls(root, detail=True)
        )
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{location}: nothing to be found there ({error}); see manifest.json's location") from None
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


def open_location(location: str) -> tuple[Any, str]:
    """The file system of an fsspec URL, new in this process, and the path in it.

    Raises ArtefactError when no package for such URLs is installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(location, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise ArtefactError(f"{location}: {error}; S3 needs the extra s3: pip install -e '.[s3]'") from None


def _copy(url: str, shard: "Shard", destination: Path) -> None:
    filesystem, path = open_location(url)
    state, size = hashlib.sha256(), 0
    with filesystem.open(path, "rb") as source, destination.open("wb") as file:
        while chunk := source.read(CHUNK * 8):
            size += len(chunk)
            state.update(chunk)
            file.write(chunk)
    if size != shard.bytes or state.hexdigest() != shard.sha256:
        raise ValueError(f"{size} bytes of sha256 {state.hexdigest()[:12]}, manifest.json says {shard.bytes} bytes")
