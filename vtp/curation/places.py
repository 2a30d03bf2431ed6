"""Files and pieces of files by the paths, offsets and sizes that tables of strangers give, without leaving their folder."""

import os
import stat
from pathlib import Path, PurePosixPath

from vtp.artefact import contains
from vtp.layers.decode import DecodeError

MAX_BYTES = 1 << 28  # a larger file is no picture that anyone trains on
LINKS = "outside_links"  # the parameter of every source that has links
REMEDY = f"put in its place what it leads to, or set `{LINKS}: true` beside the source's name"


def inside(path: str) -> bool:
    """Whether a relative path stays in its folder, by its text."""
    return bool(path) and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def path_problem(path: str) -> str | None:
    """Why a text can be no path of a file, such as `holds NUL`; None when it can."""
    try:
        return "holds NUL" if b"\0" in os.fsencode(path) else None
    except UnicodeEncodeError:
        return "holds half of a character (a lone surrogate)"


def leads_out(root: Path, path: Path) -> bool:
    """Whether a path is outside of `root` once links are followed."""
    return not contains(os.path.realpath(root), os.path.realpath(path))


def open_inside(root: Path, file: str, what: str, *, outside_links: bool) -> int:
    """A descriptor of a regular file below `root`, which messages call `what`.

    Raises DecodeError for what is none or lies outside, by its path or by a link, and OSError for what cannot be opened.
    """
    if (problem := path_problem(file)) is not None:
        raise DecodeError(f"its path {problem}")
    if not inside(file):
        raise DecodeError(f"lies outside of {what}")
    if not outside_links and leads_out(root, root / file):
        raise DecodeError(f"a link leads outside of {what}; {REMEDY}")
    # Not blocking: what looks like a picture may be a pipe.
    descriptor = os.open(root / file, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DecodeError("no file")
    return descriptor


def read_piece(descriptor: int, offset: object, size: object) -> bytes:
    """`size` bytes at `offset` of an open file. Raises DecodeError for what is no number, and bytes that are not there."""
    start, count = _whole_number("offset", offset), _whole_number("size", size)
    total = os.fstat(descriptor).st_size
    if start < 0 or count < 0 or start + count > total:
        raise DecodeError(f"its archive begins after it or ends before it: {count} bytes at byte {start} of {total}")
    if count > MAX_BYTES:
        raise DecodeError(f"{count} bytes, more than {MAX_BYTES}")
    try:
        content = os.pread(descriptor, count, start)
    except OSError as error:
        raise DecodeError(f"cannot be read ({error.strerror})") from None
    if len(content) != count:
        raise DecodeError("its archive ends before it")
    return content


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():  # a column that had nulls in pandas
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DecodeError(f"its {name} is {value!r}, no whole number")
    return value
