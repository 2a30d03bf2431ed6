"""The endless stream of samples that pre-training sees: one source of shards, or several in given shares.

A sample that cannot be used is replaced, counted and logged, up to a limit; a shard that cannot be read is an error at
once.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from vtp.config import Config, ConfigError
from vtp.data.dataset import DataError, SampleError, ShardDataset
from vtp.data.order import Mixture, epochs
from vtp.draws import address, numpy_draws
from vtp.layers.decode import DecodeError, open_header, upright_size

if TYPE_CHECKING:
    from PIL.Image import Image

TOGETHER = 1 << 26  # samples that are shuffled together: 0.5 GB for an epoch's order, in every worker
REPLACEMENTS = 20  # samples that are tried in the place of one that cannot be used
FIRST_SAMPLES = 10_000  # the limit on replaced samples is a share of at least so many: a worker may meet a few early
NAMED = 5  # replaced samples in the message of the limit


class Drawn(NamedTuple):
    """A sample of the stream."""

    image: "Image"
    caption: str
    replaced: bool  # it stands in the place of one that cannot be used
    whole: tuple[int, int]  # width and height of the picture, of which `image` may be a smaller decode


class StreamConfig(Config):
    """How shards become a stream of training samples."""

    samples: int | None = Field(
        ge=1,
        description="the first so many samples of every source, so that smaller sets lie in larger ones; null: all",
    )
    window: int | None = Field(ge=1, description="shards that are shuffled together; null: all of them at once")
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        description="share of each source, by the name of its folder; null: every sample once an epoch"
    )
    decode: Literal["full", "reduced"] = Field(
        description="whether JPEGs much larger than their views are decoded in full, or only as far as the views need"
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
        for source in sources:
            if config.samples is not None and config.samples > len(source):
                raise ConfigError(f"data.stream.samples is {config.samples:,}, {source.folder} has {len(source):,}")
        self._sizes = [_first_sizes(source.sizes, config.samples) for source in sources]  # of shards, by source
        self._first = np.concatenate([[0], np.cumsum([sum(sizes) for sizes in self._sizes], dtype=np.int64)])
        self._shards = tuple(size for sizes in self._sizes for size in sizes)
        self._mixture = None
        if config.mixture is not None:
            names = [source.folder.name for source in sources]
            if sorted(names) != sorted(config.mixture):
                given, wanted = ", ".join(names), ", ".join(config.mixture)
                raise ConfigError(f"data.stream.mixture has weights for {wanted}; the shards given are {given}")
            self._mixture = Mixture([config.mixture[name] for name in names], seed)
        together = [self._shards] if self._mixture is None else self._sizes
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
        for number in range(len(self.sources)):
            chosen = of_source == number
            seed = address(self.seed, "source", number)
            drawn = epochs(places[chosen], self._sizes[number], seed, window=self.config.window)
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
                picture = open_header(source.content(index))
                whole = upright_size(picture)
                return Drawn(decode(picture), caption, attempt > 0, whole)
            except (SampleError, DecodeError) as error:
                self._replace(f"{source.name(index)}: {error}", first=attempt == 0)
            others = source.neighbours(index)
            stop = min(others.stop, int(self._first[which + 1] - self._first[which]))
            index = int(numpy_draws(self.seed, "replacement", position, attempt).integers(others.start, stop))
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


def _first_sizes(sizes: Sequence[int], samples: int | None) -> list[int]:
    """Sizes of the shards that hold the first so many samples, the last one cut."""
    if samples is None:
        return list(sizes)
    ends = accumulate(sizes)
    cut = [size - max(0, end - samples) for size, end in zip(sizes, ends, strict=True)]
    return [size for size in cut if size > 0]


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
