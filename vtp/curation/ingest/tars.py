"""Members of tars by where their contents lie, so that nothing is unpacked."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vtp.curation.ingest.shard_workers import IngestError
from vtp.texts import shown

LARGEST_HEADER = 1 << 20  # bytes; PAX and GNU headers are read into memory whole
CHUNK = 1 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def members(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Regular members of a tar between two bytes of a file, with the offsets of their contents in the file.

    Raises IngestError when it is compressed, damaged or cut off, and when there is more behind its end.
    """
    _require_plain(path, file, start)
    position = start
    try:
        file.seek(start)
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            while (member := tar.next()) is not None and member.offset < end:
                if member.size < 0 or member.offset_data + member.size > end:
                    raise IngestError(
                        f"{path}: ends at byte {end}, within {shown(member.name)} from byte {member.offset}; fetch it again"
                    )
                position = tar.offset
                tar.members.clear()  # else all stay in memory
                if member.isreg() and not member.issparse():
                    yield member, member.offset_data
            position = tar.offset
    except IngestError:
        raise
    except Exception as error:  # tarfile has one of its own for few of its faults
        raise IngestError(
            f"{path}: no whole tar, damaged or cut off at byte {position} ({error}); fetch it again"
        ) from None
    # tarfile takes a damaged header for the end.
    file.seek(position)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise IngestError(f"{path}: damaged or cut off at byte {position}; fetch it again")
    _require_end(path, file, end)


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def _require_plain(path: Path, file: BinaryIO, start: int) -> None:
    file.seek(start)
    first = file.read(8)
    for magic, name in COMPRESSED.items():
        if first.startswith(magic):
            raise IngestError(
                f"{path}: compressed with {name}, and no picture in it can be read alone; decompress it to a plain .tar"
            )


def _require_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raises IngestError for a second tar behind the first, as `cat` makes them: readers stop before it without a word."""
    while (left := end - file.tell()) > 0 and (chunk := file.read(min(CHUNK, left))):
        if chunk.strip(b"\0"):
            raise IngestError(
                f"{path}: goes on behind the end of its tar, before byte {file.tell()}; were several joined? Split them, or "
                "unpack it with `tar --ignore-zeros` and pack it again"
            )


class _Headers:
    """A file as tarfile reads one: for headers alone, and none of strangers fills memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)
