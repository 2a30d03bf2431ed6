"""Where tars are: in a folder of this machine, or in one elsewhere of which a bounded part is kept here."""

import glob
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from pydantic import Field, field_validator

from vtp.artefact import whole_file
from vtp.config import Config
from vtp.curation.ingest.folders import holds
from vtp.curation.ingest.listing import require_inside
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.places import inside, path_problem
from vtp.data.remote import require_shared
from vtp.data.transfer import RemoteError, is_web, open_location, persist
from vtp.texts import listed, shown

T = TypeVar("T")
CHUNK = 1 << 23
PATIENCE = 120.0  # seconds in which a store may come back
# What stores say of a file that changes when its content does.
VERSION = ("size", "ETag", "etag", "Last-Modified", "LastModified", "mtime", "generation", "blob_id", "content_md5")


class RemoteFolder(Config):
    """A folder elsewhere."""

    url: str = Field(description="for fsspec, such as s3://bucket/folder, gs://.., https://.., hf://datasets/..")
    sha256: str | None = Field(
        pattern="^[0-9a-f]{64}$",
        description="digest of all tars together, as source_sha256 in a run's provenance; others are refused. null: any",
    )

    @field_validator("url")
    @classmethod
    def _is_shared(cls, url: str) -> str:
        require_shared(url)
        return url.rstrip("/")


class Mark(Config):
    """What a file elsewhere was when it was read."""

    bytes: int
    sha256: str
    version: dict[str, str]  # what the store said of it


class LocalTars:
    """A folder of this machine."""

    def __init__(self, root: Path, *, outside_links: bool) -> None:
        self.root, self._outside_links = root, outside_links

    def matching(self, pattern: str) -> list[str]:
        """Names of files, relative to the folder; hidden ones are not meant."""
        return [pattern] if (self.root / pattern).is_file() else glob.glob(pattern, root_dir=self.root, recursive=True)

    def holds(self) -> str:
        """What is there, for messages."""
        return holds(self.root)

    def content(self, name: str, largest: int) -> bytes:
        """All of a file. Raises IngestError when there is none, or a larger one."""
        return _whole(self._file(name), largest)

    @contextmanager
    def tar(self, name: str, stop: Callable[[], bool]) -> Iterator[tuple[Path, None]]:
        """A file of this machine. Raises IngestError."""
        yield self._file(name), None

    def require_same(self, name: str, mark: Mark | None) -> None:
        """A run knows its input by its digest."""

    def _file(self, name: str) -> Path:
        path = self.root / name
        require_inside(None if self._outside_links else self.root, path)
        if not path.is_file():
            raise IngestError(f"{shown(str(path))}: no such file; {self.root} holds {self.holds()}")
        return path


class RemoteTars:
    """A folder elsewhere: tars are fetched one by one, and stay in `root` up to `room` bytes, beside those in work.

    Pieces of the others are read where they are.
    """

    def __init__(self, url: str, root: Path, *, room: float) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.url, self._room = root, url, room
        self._held = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        self._lock = Lock()
        self._gives_pieces = False

    def matching(self, pattern: str) -> list[str]:
        """Names of files, relative to the folder; one without wildcards is taken to be there. Raises IngestError."""
        if not any(letter in pattern for letter in "*?["):
            return [pattern]
        filesystem, root = _filesystem(self.url)
        found = _attempts(f"{self.url}/{pattern}", partial(filesystem.glob, f"{root}/{pattern}"))
        filesystem.invalidate_cache()  # what a listing says of a file may be in other words than what the file does
        names = [name.removeprefix(f"{root}/") for name in map(str, found)]
        names = [name for name in names if not name.rpartition("/")[2].startswith(".")]
        for name in names:
            if path_problem(name) is not None or not inside(name) or "://" in name:
                raise IngestError(
                    f"{self.url}: lists {shown(name)!r}, which is not in it; name the tars without wildcards"
                )
        return names

    def holds(self) -> str:
        """What is there, for messages."""
        filesystem, root = _filesystem(self.url)
        try:
            names = [str(name).rpartition("/")[2] for name in filesystem.ls(root, detail=False)]
        except Exception:  # of any store; the message is about something else
            names = []
        return (
            listed(sorted(map(shown, names)))
            if names
            else "nothing that can be listed: name all tars, without wildcards"
        )

    def content(self, name: str, largest: int) -> bytes:
        """All of a file. Raises IngestError when there is none, or a larger one."""
        with self.tar(name, lambda: False) as (path, _):
            return _whole(path, largest)

    @contextmanager
    def tar(self, name: str, stop: Callable[[], bool]) -> Iterator[tuple[Path, Mark]]:
        """A copy on this machine. Raises IngestError when it cannot be fetched, and Stopped when asked to stop."""
        url, path = f"{self.url}/{name}", self.root / name
        with whole_file(path) as temporary:
            mark = _attempts(url, partial(_copy, self.url, name, temporary, stop), stop)
            logging.info("%s: fetched, %d bytes", url, mark.bytes)
            yield temporary, mark
        with self._lock:
            keep = self._held + mark.bytes <= self._room
            self._held += mark.bytes if keep else 0
        if not keep:
            self._require_pieces(name, mark)
            path.unlink()

    def require_same(self, name: str, mark: Mark | None) -> None:
        """Raises IngestError when the store says something else of a file than it did."""
        assert mark is not None
        url = f"{self.url}/{name}"
        if (now := _attempts(url, partial(_version, self.url, name))) != mark.version:
            raise IngestError(
                f"{url}: changed since it was read: it was {mark.version}, and is {now}; delete {self.root.parent} and "
                "start again"
            )

    def _require_pieces(self, name: str, mark: Mark) -> None:
        if self._gives_pieces:
            return
        try:
            RemotePieces(self.url, {name: mark}).piece(name, mark.bytes - 1, 1)
        except IngestError as error:
            raise IngestError(
                f"{self.url}: more than {self._room:.3g} bytes of tars, and no pieces of files are given there ({error}); "
                "set VTP_CACHE_GIGABYTES to what the tars need, or fetch them and use --source"
            ) from None
        self._gives_pieces = True


class RemotePieces:
    """Reads pieces of files elsewhere; copies of it work in other processes."""

    def __init__(self, url: str, marks: dict[str, Mark]) -> None:
        self._url, self._marks = url, marks
        self._open: dict[str, Any] = {}

    def piece(self, name: str, offset: object, size: object) -> bytes:
        """`size` bytes at `offset` of a file. Raises IngestError for one that is gone, or is no longer what it was."""
        assert isinstance(offset, int)
        assert isinstance(size, int)
        return _attempts(f"{self._url}/{name}", partial(self._read, name, offset, size))

    def _read(self, name: str, offset: int, size: int) -> bytes:
        file = self._open.pop(name, None) or self._opened(name)
        file.seek(offset)
        content = file.read(size)
        if len(content) != size:
            raise OSError(f"{len(content)} bytes of {size} at byte {offset}")
        self._open[name] = file  # one that failed is opened again
        return content

    def _opened(self, name: str) -> Any:  # noqa: ANN401 - fsspec has no types
        mark, (filesystem, root) = self._marks[name], _filesystem(self._url)
        if (now := _version(self._url, name)) != mark.version:
            raise IngestError(
                f"{self._url}/{name}: changed since it was read: it was {mark.version}, and is {now}; start again"
            )
        known = {"size": mark.bytes} if is_web(self._url) else {}
        return filesystem.open(f"{root}/{name}", "rb", cache_type="none", **known)


def _whole(path: Path, largest: int) -> bytes:
    if (size := path.stat().st_size) > largest:
        raise IngestError(f"{shown(str(path))}: {size} bytes; expected a text of at most {largest}")
    return path.read_bytes()


def _attempts(url: str, action: Callable[[], T], stop: Callable[[], bool] = lambda: False) -> T:
    """What `action` gives, which reads a URL. Raises IngestError, and Stopped when asked to stop."""

    def wait(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if stop():
                raise Stopped
            time.sleep(0.1)

    try:
        return persist(shown(url), action, patience=PATIENCE, final=(IngestError, Stopped), wait=wait)
    except RemoteError as error:
        raise IngestError(str(error)) from error


@lru_cache(maxsize=64)
def _filesystem(folder: str) -> tuple[Any, str]:
    """The file system of a URL, one in each process, and the path in it."""
    return open_location(folder)


def _version(folder: str, name: str) -> dict[str, str]:
    filesystem, root = _filesystem(folder)
    info = filesystem.info(f"{root}/{name}")
    return {name: str(info[name]) for name in VERSION if info.get(name) is not None}


def _copy(folder: str, name: str, target: Path, stop: Callable[[], bool]) -> Mark:
    filesystem, root = _filesystem(folder)
    version = _version(folder, name)
    # Of the web as one stream: not every server gives pieces.
    how: dict[str, Any] = {"block_size": CHUNK}
    if is_web(folder):
        how = {"block_size": 0, "headers": {"Accept-Encoding": "identity"}}
    state, count = hashlib.sha256(), 0
    with filesystem.open(f"{root}/{name}", "rb", **how) as source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            if stop():
                raise Stopped
            count += len(chunk)
            state.update(chunk)
            file.write(chunk)
    if str(count) != version.get("size", str(count)):
        raise OSError(f"{count} bytes, and the store says {version['size']}")
    return Mark(bytes=count, sha256=state.hexdigest(), version=version)
