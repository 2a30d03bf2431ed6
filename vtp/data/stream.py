"""Reading shards: samples in any order through the table beside each tar, and the endless stream that training sees.

Nothing is loaded before it is asked for: tables and files of a shard are opened at its first sample, and the ones
used longest ago are closed. A sample that cannot be used is replaced, counted and logged, up to a limit; a shard that
cannot be read is an error at once.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from os import pread
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError
from vtp.data.decode import DecodeError, decode_rgb, open_header
from vtp.data.order import Mixture, epochs
from vtp.data.remote import ShardCache, verify_remote
from vtp.data.shards import NO_LABEL, Manifest, Shard
from vtp.draws import address, numpy_draws
from vtp.layers.images import centre_crop

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

TABLES, FILES = 1 << 28, 128  # bytes of tables and number of tars that a process keeps
TOGETHER = 1 << 26  # samples that are shuffled together: 0.5 GB for an epoch's order, in every worker
REPLACEMENTS = 20  # samples that are tried in the place of one that cannot be used
FIRST_SAMPLES = 10_000  # the limit on replaced samples is a share of at least so many: a worker may meet a few early
REMEDY = "fetch the folder again (dvc checkout), or write the shards again with prepare_data"
NAMED = 5  # replaced samples in the message of the limit
T = TypeVar("T")


class DataError(ValueError):
    """A sample or a shard cannot be read; the message names it."""


class SampleError(DataError):
    """A sample cannot be used, and its shard is in order."""


class ShardDataset:
    """Random access to the samples of a split.

    Opening it checks that there are samples, and that every shard is there with its size.
    """

    def __init__(self, folder: Path, split: str, *, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        if split not in self.manifest.splits:
            raise ArtefactError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        self.shards = self.split.shards
        self.sizes = [shard.samples for shard in self.shards]
        self._first = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        self._cache = cache
        self._tables, self._files = _Kept[_Table](TABLES), _Kept[BinaryIO](FILES)
        if not len(self):
            raise ArtefactError(f"{folder}: split {split!r} has no samples; write the shards again with prepare_data")
        if self.manifest.location is None:
            for shard in self.shards:
                _verify(folder / shard.name, shard)
        else:
            verify_remote(self.manifest.location, self.shards)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens its own files.
        return self.__dict__ | {"_tables": _Kept[_Table](TABLES), "_files": _Kept[BinaryIO](FILES)}

    def singles(self, most: int | None = None) -> "Singles":
        """The samples that have a class: all, or the first `most`, whose shards alone are looked at."""
        rows, labels, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        known = sum(self.split.class_counts)
        wanted = known if most is None else min(most, known)
        for shard, first in zip(self.shards, self._first[:-1].tolist(), strict=True):
            if found >= wanted:
                break
            classes = _read_beside(self.folder, shard, ["label"])["label"].to_numpy()
            singles = np.flatnonzero(classes != NO_LABEL)
            rows.append(first + singles)
            labels.append(classes[singles])
            found += len(singles)
        return Singles(np.concatenate(rows)[:wanted], np.concatenate(labels)[:wanted])

    def key(self, index: int) -> str:
        """Name of a sample in its tar."""
        table, row = self._place(index)
        return table.keys[row].as_py()

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

    def images(self, indices: Sequence[int] | np.ndarray | Tensor, size: int) -> Tensor:
        """Pictures [n, 3, size, size] uint8, centre-cropped as ADM does."""
        pixels = [np.asarray(centre_crop(self.image(int(index)), size)) for index in indices]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

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

    def _place(self, index: int) -> "tuple[_Table, int]":
        shard = self.shard_of(index)
        table = self._tables.get(shard)
        if table is None:
            table = _Table.read(self.folder, self.shards[shard])
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
            return path.open("rb")
        if self._cache is None:
            raise DataError(f"{self.folder}: its shards are at {self.manifest.location}, and no cache folder was given")
        return self._cache.open(self.manifest.location, shard)

    @property
    def cache(self) -> ShardCache | None:
        """Where shards from elsewhere are kept; None for shards that are here."""
        return None if self.manifest.location is None else self._cache


class Singles(NamedTuple):
    """Samples that have a class."""

    rows: np.ndarray  # [n] int64, ascending
    labels: np.ndarray  # [n] int64, their classes


class _Table(NamedTuple):
    """Where the samples of a shard lie, and their texts."""

    keys: "pa.ChunkedArray"
    captions: "pa.ChunkedArray"
    offsets: np.ndarray
    sizes: np.ndarray

    @classmethod
    def read(cls, folder: Path, shard: Shard) -> "_Table":
        table = _read_beside(folder, shard, ["key", "caption", "offset", "size"])
        return cls(table["key"], table["caption"], table["offset"].to_numpy(), table["size"].to_numpy())

    @property
    def bytes(self) -> int:
        return 4096 + sum(column.nbytes for column in self)  # a small table is not much smaller


class _Kept(Generic[T]):
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


class Drawn(NamedTuple):
    """A sample of the stream."""

    image: "Image"
    caption: str
    replaced: bool  # it stands in the place of one that cannot be used


class StreamConfig(Config):
    """How shards become a stream of training samples."""

    window: int | None = Field(ge=1, description="shards that are shuffled together; null: all of them at once")
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        description="share of each source, by the name of its folder; null: every sample once an epoch"
    )
    decode: Literal["full", "reduced"] = Field(
        description="of JPEGs much larger than their views, all coefficients or those that the views need"
    )
    max_replaced: float = Field(ge=0, le=1, description="largest share of samples that cannot be used")


class Stream:
    """The endless stream of training samples: every epoch holds each once; a mixture follows its weights.

    Samples are numbered through the sources. What stands at a position depends on nothing but the seed and the
    manifests, so that ranks, workers and resumed runs agree. Raises ConfigError for a mixture of other sources, and for
    more shards in a window than memory or the folder for fetched shards can hold.
    """

    def __init__(self, sources: Sequence[ShardDataset], config: StreamConfig, *, seed: int) -> None:
        self.sources = sources
        self.config = config
        self.seed = seed
        self._limit = config.max_replaced
        self._first = np.concatenate([[0], np.cumsum([len(source) for source in sources], dtype=np.int64)])
        self._shards = tuple(size for source in sources for size in source.sizes)
        self._mixture = None
        if config.mixture is not None:
            names = [source.folder.name for source in sources]
            if sorted(names) != sorted(config.mixture):
                given, wanted = ", ".join(names), ", ".join(config.mixture)
                raise ConfigError(f"data.stream.mixture has weights for {wanted}; the shards given are {given}")
            self._mixture = Mixture([config.mixture[name] for name in names], seed)
        together = [self._shards] if self._mixture is None else [source.sizes for source in sources]
        for sizes in together:
            _check_order(sizes, config.window)
        for source in sources:
            _check_cache(source, config.window)
        self._seen, self._replaced = 0, 0
        self._first_replaced: list[str] = []

    def __len__(self) -> int:
        return int(self._first[-1])

    def numbers(self, start: int, count: int) -> np.ndarray:
        """The samples at positions `start` to `start + count`."""
        positions = np.arange(start, start + count)
        if self._mixture is None:
            return epochs(positions, self._shards, self.seed, window=self.config.window)
        numbers = np.empty(count, dtype=np.int64)
        of_source, places = self._mixture.of(positions)
        for number, source in enumerate(self.sources):
            chosen = of_source == number
            seed = address(self.seed, "source", number)
            drawn = epochs(places[chosen], source.sizes, seed, window=self.config.window)
            numbers[chosen] = self._first[number] + drawn
        return numbers

    def read(self, number: int, position: int, *, decode: "Callable[[Image], Image]", captioned: bool) -> Drawn:
        """Sample `number` for `position` of the stream, through `decode`, which gets the picture with its header read.

        One that cannot be decoded, or has no caption where one is needed, gives way to another of its shard, drawn by
        position. Raises DataError when a shard cannot be read, or when more than `max_replaced` gave way.
        """
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        source, index = self.sources[which], number - int(self._first[which])
        self._seen += 1
        for attempt in range(REPLACEMENTS):
            try:
                caption = source.caption(index)
                if captioned and not caption.strip():
                    raise SampleError("the caption is empty")
                return Drawn(decode(open_header(source.content(index))), caption, attempt > 0)
            except (SampleError, DecodeError) as error:
                self._replace(f"{source.name(index)}: {error}", first=attempt == 0)
            others = source.neighbours(index)
            index = int(numpy_draws(self.seed, "replacement", position, attempt).integers(others.start, others.stop))
        raise DataError(
            f"{self._first_replaced[-1]}; {REPLACEMENTS} others of its shard cannot be used either: fetch it again"
        )

    def _replace(self, what: str, *, first: bool) -> None:
        logging.warning("%s; another sample takes its place", what)
        self._replaced += first
        self._first_replaced = [*self._first_replaced[:NAMED], what]
        share = self._replaced / max(self._seen, FIRST_SAMPLES)
        if share > self._limit:
            raise DataError(
                f"{self._replaced} of {self._seen} samples cannot be used, data.stream.max_replaced is "
                f"{self._limit}: {'; '.join(self._first_replaced)}"
            )


def _check_order(sizes: Sequence[int], window: int | None) -> None:
    if (most := _largest(sizes, window)) > TOGETHER:
        raise ConfigError(
            f"data.stream.window {window or 'null'} shuffles {most:,} samples together, and every worker keeps their order; "
            f"at most {TOGETHER:,} are possible: choose a window of fewer shards, such as 64"
        )


def _check_cache(source: ShardDataset, window: int | None) -> None:
    most = _largest([shard.bytes for shard in source.shards], window)
    if source.cache is not None and most > source.cache.capacity:
        raise ConfigError(
            f"{source.folder}: data.stream.window {window or 'null'} reads {most / 1e9:.3g} GB of fetched shards together, "
            f"and the folder for them holds {source.cache.capacity / 1e9:.3g}: each would be fetched again and again; "
            "choose a window of fewer shards, or set VTP_CACHE_GIGABYTES higher"
        )


def _largest(sizes: Sequence[int], window: int | None) -> int:
    """The sum of the largest `window`, or of all."""
    return sum(sizes if window is None else sorted(sizes)[-window:])


def _beside(folder: Path, shard: Shard) -> Path:
    """The table of a shard."""
    return (folder / shard.name).with_suffix(".parquet")


def _read_beside(folder: Path, shard: Shard, columns: list[str]) -> "pa.Table":
    """Columns of the table of a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _beside(folder, shard)
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
