"""Pictures of a list as a source of shards: read from files and archives, checked, stored."""

import os
import stat
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vtp.curation.ingest.encode import ImageConfig, store
from vtp.curation.ingest.listing import WHOLE, Listing, inside, safe_key
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description, Rejected
from vtp.curation.rows import CAPTION, KEY, ORDER
from vtp.data.shards import NO_LABEL, SampleRecord
from vtp.layers.decode import DecodeError

MAX_BYTES = 1 << 28  # a larger file is no picture that anyone trains on
OPEN_FILES = 64


class Columns(NamedTuple):
    """What the columns of a list are called."""

    file: str
    problem: str
    label: str | None


LISTED = Columns("file", "problem", "label")


class Rows(NamedTuple):
    """Rows `start` to `stop` of parquet files laid end to end."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]  # rows up to the end of each file: a billion rows lie in thousands of them
    start: int
    stop: int


class ListedPictures:
    """The pictures of a list as a source of shards; each is decoded once to see that it can be."""

    def __init__(
        self,
        root: Path,
        splits: dict[str, Rows],
        description: Description,
        image: ImageConfig,
        columns: Columns = LISTED,
    ) -> None:
        self.description = description
        self._root, self._splits, self._image, self._columns = root, splits, image, columns

    @classmethod
    def of_folder(
        cls, root: Path, folder: Path, listing: Listing, description: Description, image: ImageConfig
    ) -> "ListedPictures":
        """From what `list_pictures` wrote to `folder`."""
        rows = {
            name: Rows((folder / f"{name}-rows.parquet",), (count,), 0, count) for name, count in listing.splits.items()
        }
        return cls(root, rows, description, image)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {name: rows.stop - rows.start for name, rows in self._splits.items()}

    def records(self, split: str, rows: range) -> Iterator[SampleRecord | Rejected]:
        """Read, checked and stored one by one."""
        part = self._splits[split]
        files = _Files(self._root)
        before = (-1, "")
        for row in read_listed_rows(part, range(part.start + rows.start, part.start + rows.stop), self._columns):
            here = (row[ORDER], row[KEY])
            if here <= before:
                raise IngestError(
                    f"{part.files[0].parent}: rows are not sorted by (order, key), or a key comes twice: {here[1]!r}"
                )
            before = here
            yield self._record(row, files)

    def _record(self, row: dict[str, Any], files: "_Files") -> SampleRecord | Rejected:
        key, file = safe_key(row[KEY]), row[self._columns.file]
        if row[self._columns.problem] is not None or file is None:
            place = os.fsdecode(file) if file is not None else row[KEY]
            return Rejected(key, place, row[self._columns.problem] or "not downloaded")
        name, offset, size = os.fsdecode(file), row["offset"], row["size"]
        try:
            stored = store(files.read(name, offset, size), self._image)
        except DecodeError as error:
            return Rejected(key, name if size == WHOLE else f"{name} at byte {offset}", str(error))
        label = NO_LABEL if self._columns.label is None else row[self._columns.label]
        return SampleRecord(key, *stored, row[CAPTION] or "", label, NO_LABEL, "image")


class _Files:
    """Reads pieces of files under a folder; the archives used last stay open."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, file: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, or the whole file. Raises DecodeError for what can be left out, IngestError else."""
        if not inside(file):
            raise IngestError(f"{file}: leaves the folder {self._root}")
        if size == WHOLE:
            return self._whole(self._root / file)
        if size > MAX_BYTES:
            raise DecodeError(f"{size} bytes")
        if file not in self._open:
            try:
                self._open[file] = os.open(self._root / file, os.O_RDONLY)
            except OSError as error:
                raise IngestError(f"{self._root / file}: {error.strerror}; it is in the list of pictures") from None
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        content = os.pread(self._open[file], size, offset)
        if len(content) != size:
            raise DecodeError("the archive ends before it")
        return content

    def _whole(self, path: Path) -> bytes:
        try:
            # Not blocking: what looks like a picture may be a pipe.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                    raise DecodeError("no file" if not stat.S_ISREG(status.st_mode) else f"{status.st_size} bytes")
                return file.read()
        except OSError as error:
            raise DecodeError(f"cannot be read ({error.strerror})") from None

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def read_listed_rows(part: Rows, wanted: range, columns: Columns) -> Iterator[dict[str, Any]]:
    """Rows with these numbers of the files; only the files and row groups that hold some are read."""
    import pyarrow.parquet as pq

    names = [KEY, ORDER, CAPTION, columns.file, "offset", "size", columns.problem, columns.label]
    for number in range(bisect_right(part.ends, wanted.start), bisect_left(part.ends, wanted.stop) + 1):
        first = part.ends[number - 1] if number else 0
        with pq.ParquetFile(part.files[number]) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                low, high = max(wanted.start - first, 0), min(wanted.stop - first, count)
                if low < high:
                    table = file.read_row_group(group, columns=[name for name in names if name is not None])
                    for batch in table.slice(low, high - low).to_batches(max_chunksize=1024):
                        yield from batch.to_pylist()
                first += count
