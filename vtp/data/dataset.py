"""Reading shards: the samples of a split in any order, through the table beside each tar.

Nothing is loaded before it is asked for: table and tar of a shard are opened at its first sample, and the ones used
longest ago are closed. So it does not matter how many shards there are.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from os import pread
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import LARGE, ArtefactError, verify_files
from vtp.data.remote import Prefetcher, ShardCache, verify_remote
from vtp.data.shards import NO_LABEL, Manifest, Shard
from vtp.distributed import is_first_of_machine, ranks
from vtp.layers.decode import DecodeError, decode_rgb
from vtp.layers.images import cover_crop
from vtp.texts import shown

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

TABLES, FILES = 1 << 28, 128  # bytes of tables and number of tars that a process keeps
REMEDY = "fetch the folder again (dvc checkout), or write the shards again with prepare_data"
T = TypeVar("T")


class DataError(ValueError):
    """A sample or a shard cannot be read; the message names it."""


class SampleError(DataError):
    """A sample cannot be used, and its shard is in order."""


class ShardDataset:
    """Random access to the samples of a split.

    Opening it checks that there are samples, and that every shard is there with its size: one rank of a machine asks the
    disk, one rank of all asks a store. Bytes are compared with their digest when a shard or its table is first read.
    """

    def __init__(self, folder: Path, split: str, *, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        if split not in self.manifest.splits:
            raise ArtefactError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self.name_of_split = split
        self.split = self.manifest.splits[split]
        self.shards = self.split.shards
        self.sizes = [shard.samples for shard in self.shards]
        self._first = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        self._cache = cache
        self._tables, self._files = LruCache[_SampleTable](TABLES), LruCache[BinaryIO](FILES)
        if not len(self):
            raise ArtefactError(f"{folder}: split {split!r} has no samples; write the shards again with prepare_data")
        self._ahead = None
        if self.manifest.location is None:
            for shard in self.shards if is_first_of_machine() else ():
                _verify(folder / shard.name, shard)
        else:
            if ranks().first:
                verify_remote(self.manifest.location, self.shards)
            if cache is not None:
                self._ahead = Prefetcher(cache, self.manifest.location)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens its own files.
        return self.__dict__ | {"_tables": LruCache[_SampleTable](TABLES), "_files": LruCache[BinaryIO](FILES)}

    def singles(self, most: int | None = None) -> "LabelledSamples":
        """The samples that have a class: all, or the first `most`, whose shards alone are looked at.

        Where the data have no classes these are all samples, of the class 0. Raises ArtefactError where the data have
        classes, and no sample of the split has one.
        """
        if not self.manifest.classes:
            rows = np.arange(len(self), dtype=np.int64)[:most]
            return LabelledSamples(rows, np.zeros_like(rows))
        rows, labels, seen = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        known = sum(self.split.class_counts)
        wanted = known if most is None else min(most, known)
        if not known:
            raise ArtefactError(
                f"{self.folder}: {len(self.manifest.classes)} classes, and none of the {len(self)} samples of split "
                f"{self.name_of_split!r} has one; give the source labels for some, or for none at all"
            )
        for shard, first in zip(self.shards, self._first[:-1].tolist(), strict=True):
            if seen >= wanted:
                break
            classes = _read_beside(self.folder, shard, ["label"])["label"].to_numpy()
            singles = np.flatnonzero(classes != NO_LABEL)
            rows.append(first + singles)
            labels.append(classes[singles])
            seen += len(singles)
        return LabelledSamples(np.concatenate(rows)[:wanted], np.concatenate(labels)[:wanted])

    def learnt(self, most: int | None = None) -> "LabelledSamples":
        """The samples of `singles`, with the labels that a generator learns: their classes, or the categories of those."""
        rows, labels = self.singles(most)
        return LabelledSamples(rows, self.manifest.learnt_labels(labels))

    def captioned(self, most: int | None = None) -> "LabelledSamples":
        """The samples that have a caption, all or the first `most`, of no class but the one of all.

        Raises ArtefactError where none has one.
        """
        rows, seen = [np.empty(0, np.int64)], 0
        for first, texts in self._by_shard():
            rows.append(first + np.flatnonzero([bool(text.strip()) for text in texts]))
            seen += len(rows[-1])
            if most is not None and seen >= most:
                break
        found = np.concatenate(rows)[:most]
        if not len(found):
            raise ArtefactError(
                f"{self.folder}: none of the {len(self)} samples of split {self.name_of_split!r} has a caption; give the "
                "source captions, or train a generator on classes"
            )
        return LabelledSamples(found, np.zeros_like(found))

    def captions_of(self, indices: np.ndarray) -> list[str]:
        """Captions of some samples; empty where there is none, or one that is not UTF-8."""
        found = []
        for index in indices:
            table, row = self._place(int(index))
            found.append(_text(bytes(table.captions[row].as_buffer())))
        return found

    def captions(self) -> Iterator[list[str]]:
        """Of all samples, shard by shard; empty where there is none, or one that is not UTF-8."""
        return (texts for _, texts in self._by_shard())

    def _by_shard(self) -> Iterator[tuple[int, list[str]]]:
        """The number of its first sample and its captions, of every shard."""
        for shard, first in zip(self.shards, self._first[:-1].tolist(), strict=True):
            column = _read_beside(self.folder, shard, ["caption"])["caption"].cast("binary")
            yield first, [_text(content.as_py()) for content in column]

    def sides(self, shard: int) -> "SampleSides":
        """Width and height of every picture of a shard, and whether it has a class, from the table alone."""
        table = _read_beside(self.folder, self.shards[shard], ["width", "height", "label"])
        widths, heights, classes = (table[name].to_numpy() for name in ("width", "height", "label"))
        return SampleSides(widths, heights, (classes != NO_LABEL) | (not self.manifest.classes))

    def learnt_label(self, index: int) -> int:
        """The label that a generator learns; NO_LABEL for a sample without a class, 0 where the data have no classes."""
        table, row = self._place(index)
        if not self.manifest.classes:
            return 0
        label = table.labels[row : row + 1]
        return int(label[0] if label[0] == NO_LABEL else self.manifest.learnt_labels(label)[0])

    def key(self, index: int) -> str:
        """Name of a sample in its tar."""
        table, row = self._place(index)
        return shown(bytes(table.keys[row].as_buffer()).decode(errors="surrogateescape"))

    def caption(self, index: int) -> str:
        """Caption of a sample; may be empty. Raises SampleError when it is not UTF-8."""
        table, row = self._place(index)
        try:
            return table.captions[row].as_py()
        except UnicodeDecodeError as error:
            raise SampleError(f"the caption of {self.name(index)} is not UTF-8 ({error.reason})") from None

    def content(self, index: int) -> bytes:
        """The image file of a sample. Raises DataError when its shard cannot be read to there."""
        table, row = self._place(index)
        offset, size = int(table.offsets[row]), int(table.sizes[row])
        content = pread(self._file(self.shard_of(index)).fileno(), size, offset)
        if len(content) != size:
            raise DataError(f"{self.name(index)}: the shard ends before it; fetch it again (dvc checkout)")
        return content

    def image(self, index: int) -> "Image":
        """The picture, RGB. Raises SampleError naming shard and key when it cannot be decoded."""
        try:
            return decode_rgb(self.content(index))
        except DecodeError as error:
            raise SampleError(f"{self.name(index)}: {error}") from None

    def images(self, indices: Sequence[int] | np.ndarray | Tensor, size: int | tuple[int, int]) -> Tensor:
        """Pictures [n, 3, height, width] uint8, centre-cropped as ADM does; `size`: both, or a side of squares.

        Raises SampleError for one that cannot be read.
        """
        height, width = (size, size) if isinstance(size, int) else size
        pixels = [np.asarray(cover_crop(self.image(int(index)), height, width)) for index in indices]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def settle(self, now: Collection[int], later: Sequence[int]) -> None:
        """Of shards from elsewhere, keep those with the numbers `now` open alone, and have them and `later` fetched."""
        if self._ahead is not None:
            self._files.keep(now)
            self._ahead.want([self.shards[number] for number in (*now, *later)])

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def neighbours(self, index: int) -> range:
        """The samples of the same shard."""
        shard = self.shard_of(index)
        return range(int(self._first[shard]), int(self._first[shard + 1]))

    def name(self, index: int) -> str:
        """Shard and key, for messages."""
        return f"{self.folder / self.shards[self.shard_of(index)].name}, {self.key(index)}"

    def _place(self, index: int) -> "tuple[_SampleTable, int]":
        shard = self.shard_of(index)
        table = self._tables.get(shard)
        if table is None:
            table = _SampleTable.read(self.folder, self.shards[shard])
            self._tables.put(shard, table, table.bytes)
        return table, index - int(self._first[shard])

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.get(shard)
        if file is None:
            file = self._open(self.shards[shard])
            self._files.put(shard, file, 1)
        return file

    def _open(self, shard: Shard) -> BinaryIO:
        if self.manifest.location is None:
            path = self.folder / shard.name
            _verify(path, shard)
            # What the processes of this machine know of a large shard spares each of them to read it whole.
            known = self._cache is not None and shard.bytes >= LARGE and self._cache.verified(path, shard.sha256)
            if not known:
                verify_files(self.folder, {shard.name: shard.sha256}, remedy=REMEDY)
            return path.open("rb")
        if self._cache is None:
            raise DataError(f"{self.folder}: its shards are at {self.manifest.location}, and no cache folder was given")
        return self._cache.open(self.manifest.location, shard)

    @property
    def cache(self) -> ShardCache | None:
        """Where shards from elsewhere are kept; None for shards that are here."""
        return None if self.manifest.location is None else self._cache


class LabelledSamples(NamedTuple):
    """Samples that have a class."""

    rows: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int64, their classes, or what else a generator learns


class SampleSides(NamedTuple):
    """Of the pictures of a shard, [n] each."""

    widths: np.ndarray  # pixels, of the upright picture
    heights: np.ndarray
    labelled: np.ndarray  # whether it has a class, as all have where the data have none


class _SampleTable(NamedTuple):
    """Where the samples of a shard lie, their texts and classes."""

    keys: "pa.ChunkedArray"
    captions: "pa.ChunkedArray"
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @classmethod
    def read(cls, folder: Path, shard: Shard) -> "_SampleTable":
        table = _read_beside(folder, shard, ["key", "caption", "offset", "size", "label"])
        offsets, sizes = table["offset"].to_numpy(), table["size"].to_numpy()
        outside = (offsets < 0) | (sizes < 0) | (offsets > shard.bytes) | (sizes > shard.bytes - offsets)
        if outside.any():
            row = int(outside.argmax())
            raise ArtefactError(
                f"{_beside(folder, shard)}, row {row}: {sizes[row]} bytes at byte {offsets[row]} of {shard.name}, which has "
                f"{shard.bytes}; {REMEDY}"
            )
        return cls(table["key"], table["caption"], offsets, sizes, table["label"].to_numpy())

    @property
    def bytes(self) -> int:
        return 4096 + sum(column.nbytes for column in self)  # a small table is not much smaller


class LruCache(Generic[T]):
    """What was made for some numbers, up to a size together; whatever was used longest ago makes room."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._held: OrderedDict[int, tuple[T, int]] = OrderedDict()

    def get(self, number: int) -> T | None:
        """What is there for a number."""
        if number not in self._held:
            return None
        self._held.move_to_end(number)
        return self._held[number][0]

    def put(self, number: int, item: T, size: int) -> None:
        """Keep one more."""
        self._held[number] = item, size
        self._size += size
        while self._size > self._capacity and len(self._held) > 1:
            self._size -= self._held.popitem(last=False)[1][1]

    def keep(self, numbers: Collection[int]) -> None:
        """Let go of all others."""
        for number in self._held.keys() - set(numbers):
            self._size -= self._held.pop(number)[1]


def _text(content: bytes) -> str:
    """Empty where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return ""


def _beside(folder: Path, shard: Shard) -> Path:
    """The table of a shard."""
    return (folder / shard.name).with_suffix(".parquet")


def _read_beside(folder: Path, shard: Shard, columns: list[str]) -> "pa.Table":
    """Columns of the table of a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _beside(folder, shard)
    verify_files(folder, {path.name: shard.table_sha256}, remedy=REMEDY)
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns, use_threads=False)  # every worker would have a thread per core
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtefactError(f"{path}: {error}; {REMEDY}") from None
    if missing := set(columns) - set(table.column_names):
        raise ArtefactError(f"{path}: no column {', '.join(sorted(missing))}; {REMEDY}")
    if len(table) != shard.samples:
        raise ArtefactError(f"{path}: {len(table)} rows, manifest.json says {shard.samples}; {REMEDY}")
    return table


def _verify(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ArtefactError(f"{path}: this shard is in manifest.json and not in the folder; {REMEDY}") from None
    if size != shard.bytes:
        raise ArtefactError(f"{path}: {size} bytes, manifest.json says {shard.bytes}; {REMEDY}")
