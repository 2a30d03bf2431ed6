"""Getting shards from a store, with patience: what passes is tried again for minutes, what does not is told at once.

Anything that fsspec opens is a store: s3://, gs://, https://, a mounted disk.
"""

import errno
import hashlib
import logging
import random
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from vtp.artefact import CHUNK, ArtefactError

if TYPE_CHECKING:
    from vtp.data.shards import Shard

PATIENCE = 600.0  # seconds in which a store may come back
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts; each wait is about twice the one before
SILENCE = 60.0  # seconds without a byte after which a connection over the web counts as dead
DAMAGED = 3  # transfers of other bytes than the manifest's, after which they are taken for what the store holds
BUSY = {408, 425, 429}  # of HTTP: the refusals that pass; 500 and above do too
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of this machine's disk
CLIENTS = {"aiohttp", "botocore", "aiobotocore", "urllib3", "requests", "google", "gcsfs", "azure", "adlfs"}
T = TypeVar("T")


class RemoteError(ValueError):
    """A shard could not be fetched; the message names it and what was tried."""


class _OtherBytes(ValueError):
    """What came is not what the manifest says."""


def fetch(url: str, shard: "Shard", file: BinaryIO, *, patience: float) -> None:
    """Fill an open file, of the size of the shard, with it; the digest is that of the file as it is read again.

    Raises RemoteError at once for a shard that is not there or not ours to read, and for all else after so many seconds of
    patience; OSError where this machine's disk is full.
    """
    persist(url, lambda: _copy(url, shard, file), patience=patience)


def persist(
    what: str,
    attempt: Callable[[], T],
    *,
    patience: float,
    final: tuple[type[Exception], ...] = (ArtefactError,),
    wait: Callable[[float], object] | None = None,
) -> T:
    """What `attempt` gives. It is made again while its error may pass, after waits that grow and are not the same twice.

    Raises RemoteError that begins with `what`, at the latest when the next attempt would come after `patience` seconds;
    errors that are `final` go on as they are, and so does what `wait` raises.
    """
    begin, attempts = time.monotonic(), 0
    while True:
        attempts += 1
        try:
            return attempt()
        except final:
            raise
        except Exception as error:
            if getattr(error, "errno", None) in FULL:
                raise
            spent = time.monotonic() - begin
            pause = uneven(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1)))
            if not _may_pass(error, attempts) or spent + pause > patience:
                raise RemoteError(
                    f"{what}: not fetched in {attempts} attempts within {spent:.0f} s ({_words(error)}); see that it "
                    "exists, that this machine may read it, and that it is what was written there"
                ) from error
            logging.warning("%s: attempt %d failed (%s)", what, attempts, _words(error))
        (wait or time.sleep)(pause)


def uneven(seconds: float) -> float:
    """A wait that is no other process's: seeded alike, all would come back at once. The system draws it."""
    return seconds * random.SystemRandom().uniform(0.5, 1.5)


def _may_pass(error: BaseException, attempts: int) -> bool:
    """Whether another attempt may do better."""
    if (status := _status(error)) is not None:
        return status in BUSY or status >= 500
    if isinstance(error, ValueError):
        return attempts < DAMAGED
    if any(base.__module__.split(".")[0] in CLIENTS for base in type(error).__mro__):
        return "Credential" not in type(error).__name__
    if isinstance(error.__cause__, Exception):  # fsspec says `no such file` of much that a client says more exactly
        return _may_pass(error.__cause__, attempts)
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    return isinstance(error, OSError | EOFError | HTTPException)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of any of the clients, if it has one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = next(
            (v for n in ("status", "status_code", "code") if (v := getattr(error, n, None)) is not None), None
        )
    return int(status) if isinstance(status, int | str) and str(status).isdigit() and int(status) else None


def _words(error: Exception) -> str:
    """An error of a client may have no words."""
    return str(error) or type(error).__name__


def digest_of(file: BinaryIO) -> str:
    """SHA-256 of an open file, as it can be read now."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType] - any binary file


def open_location(location: str) -> tuple[Any, str]:
    """The file system of an fsspec URL, new in this process, and the path in it.

    Raises ArtefactError when no package for such URLs is installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(location, skip_instance_cache=True, **_options(location))
    except (ImportError, ValueError) as error:
        raise ArtefactError(f"{location}: {error}; S3 needs the extra s3: pip install -e '.[s3]'") from None


def is_web(location: str) -> bool:
    """Whether a URL is one of the web, which lists no folders."""
    return location.startswith(("http://", "https://"))


def _options(location: str) -> dict[str, Any]:
    """Without these a transfer over the web ends after five minutes, however well it goes."""
    if not is_web(location):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def _copy(url: str, shard: "Shard", file: BinaryIO) -> None:
    filesystem, path = open_location(url)
    size = 0
    file.seek(0)
    # One request for the whole; by default the web is asked again for every few megabytes.
    options = {"block_size": 0, "size": shard.bytes} if is_web(url) else {}
    with filesystem.open(path, "rb", **options) as source:
        while size <= shard.bytes and (chunk := source.read(CHUNK * 8)):
            size += len(chunk)
            file.write(chunk[: len(chunk) - max(0, size - shard.bytes)])
    file.flush()
    sha256 = digest_of(file)
    if size != shard.bytes or sha256 != shard.sha256:
        more = " at least" if size > shard.bytes else ""
        raise _OtherBytes(f"{size} bytes{more} of sha256 {sha256[:12]}, manifest.json says {shard.bytes} bytes")
