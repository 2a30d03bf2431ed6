"""Pictures of a list as a source of shards: read from files and archives, checked, stored."""

import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vtp.artefact import contains
from vtp.curation.ingest.encode import ImageConfig, store
from vtp.curation.ingest.listing import WHOLE, Listing, safe_key
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description, Rejected
from vtp.curation.ingest.tar_places import RemotePieces
from vtp.curation.places import MAX_BYTES, open_inside, read_piece
from vtp.curation.rows import CAPTION, KEY, ORDER
from vtp.data.shards import NO_LABEL, SampleRecord
from vtp.layers.decode import DecodeError
from vtp.texts import shown, text_problem

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_FILES = 64


class Columns(NamedTuple):
    """What the columns of a list are called."""

    file: str
    problem: str
    label: str | None
    whole: bool  # a size of WHOLE stands for a file of its own; foreign lists have no such sign


LISTED = Columns("file", "problem", "label", whole=True)


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
        *,
        outside_links: bool = False,
        roots: Sequence[str] = (),
        elsewhere: RemotePieces | None = None,
    ) -> None:
        self.description, self._elsewhere = description, elsewhere
        self._outside_links, self._roots = outside_links, roots
        self._root, self._splits, self._image, self._columns = root, splits, image, columns

    @classmethod
    def of_folder(
        cls,
        root: Path,
        folder: Path,
        listing: Listing,
        description: Description,
        image: ImageConfig,
        *,
        outside_links: bool,
        roots: Sequence[str] = (),
        elsewhere: RemotePieces | None = None,
    ) -> "ListedPictures":
        """From what `list_pictures` wrote to `folder`.

        Absolute paths of files lie in one of `roots`; files that are not below `root` are `elsewhere`.
        """
        rows = {
            name: Rows((folder / f"{name}-rows.parquet",), (count,), 0, count) for name, count in listing.splits.items()
        }
        return cls(root, rows, description, image, outside_links=outside_links, roots=roots, elsewhere=elsewhere)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {name: rows.stop - rows.start for name, rows in self._splits.items()}

    def records(self, split: str, rows: range) -> Iterator[SampleRecord | Rejected]:
        """Read, checked and stored one by one."""
        part = self._splits[split]
        files = _Files(self._root, self._roots, outside_links=self._outside_links, elsewhere=self._elsewhere)
        before = (-1, "")
        for row in read_listed_rows(part, range(part.start + rows.start, part.start + rows.stop), self._columns):
            here = (row[ORDER], row[KEY])
            if not isinstance(row[ORDER], int) or not isinstance(row[KEY], str):
                raise IngestError(
                    f"{part.files[0].parent}: a row has order {row[ORDER]!r} and key {row[KEY]!r}; run the filter again"
                )
            if here <= before:
                raise IngestError(
                    f"{part.files[0].parent}: rows are not sorted by (order, key), or a key comes twice: {here[1]!r}"
                )
            before = here
            yield self._record(row, files)

    def _record(self, row: dict[str, Any], files: "_Files") -> SampleRecord | Rejected:
        key, file, problem = safe_key(row[KEY]), row[self._columns.file], row[self._columns.problem]
        if problem is not None or file is None:
            return Rejected(key, file or row[KEY], problem or "not downloaded")
        offset, size, caption = row["offset"], row["size"], row[CAPTION] or ""
        whole = self._columns.whole and size == WHOLE
        try:
            if (unusable := text_problem(caption)) is not None:
                raise DecodeError(f"caption {unusable}")
            stored = store(files.whole(file) if whole else files.piece(file, offset, size), self._image)
        except DecodeError as error:
            return Rejected(key, file if whole else f"{file} at byte {offset}", str(error))
        label = NO_LABEL if self._columns.label is None else row[self._columns.label]
        return SampleRecord(key, *stored, caption, label, NO_LABEL, "image")


class _Files:
    """Reads files and pieces of them under a folder; the archives used last stay open."""

    def __init__(
        self, root: Path, roots: Sequence[str], *, outside_links: bool, elsewhere: RemotePieces | None
    ) -> None:
        self._root, self._roots, self._outside_links, self._elsewhere = root, roots, outside_links, elsewhere
        self._open: OrderedDict[str, int] = OrderedDict()

    def piece(self, file: str, offset: object, size: object) -> bytes:
        """`size` bytes at `offset`. Raises DecodeError for what can be left out, IngestError for an archive that is gone."""
        if self._elsewhere is not None and not (self._root / file).exists():
            return self._elsewhere.piece(file, offset, size)
        if file not in self._open:
            try:
                self._open[file] = self._opened(file)
            except OSError as error:
                place = shown(str(self._root / file))
                raise IngestError(f"{place}: {error.strerror}; it is in the list of pictures") from None
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        return read_piece(self._open[file], offset, size)

    def whole(self, file: str) -> bytes:
        """All of a file. Raises DecodeError."""
        try:
            with open(self._opened(file), "rb") as opened:
                if (size := os.fstat(opened.fileno()).st_size) > MAX_BYTES:
                    raise DecodeError(f"{size} bytes, more than {MAX_BYTES}")
                return opened.read()
        except OSError as error:
            raise DecodeError(f"cannot be read ({error.strerror})") from None

    def _opened(self, file: str) -> int:
        # An absolute path is within a root, or is refused as outside of the source.
        for root in self._roots:
            if contains(root, file):
                return open_inside(Path(root), os.path.relpath(file, root), root, outside_links=self._outside_links)
        return open_inside(self._root, file, "the source", outside_links=self._outside_links)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def read_listed_rows(part: Rows, wanted: range, columns: Columns) -> Iterator[dict[str, Any]]:
    """Rows with these numbers of the files; only the files and row groups that hold some are read.

    Bytes of texts that are not UTF-8 come as surrogates, as in names of files.
    """
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
                        texts = [_values(column) for column in batch.columns]
                        yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*texts, strict=True))
                first += count


def _values(column: "pa.Array") -> list[Any]:
    import pyarrow as pa
    from pyarrow import types

    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(pa.binary() if types.is_string(column.type) else pa.large_binary())
    return [os.fsdecode(value) if isinstance(value, bytes) else value for value in column.to_pylist()]
