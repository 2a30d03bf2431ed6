"""The endless stream of samples that pre-training sees: one source of shards, or several in given shares."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, count
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from vtp.config import Config, ConfigError
from vtp.data.dataset import SampleError, ShardDataset
from vtp.data.order import Mixture, epochs, of_batch, shards_around
from vtp.data.replacements import Replacements
from vtp.distributed import machines
from vtp.draws import address, numpy_draws
from vtp.layers.decode import open_header, upright_size

if TYPE_CHECKING:
    from PIL.Image import Image

TOGETHER = 1 << 26  # samples that are shuffled together: 0.5 GB for an epoch's order, in every worker


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
    groups: int = Field(
        ge=1,
        description="equal stretches of a batch, each from shards of its own: so many machines, or a divisor, fetch none "
        "twice; a window is cut into as many parts",
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        description="share of each source, by the name of its folder; null: every sample once an epoch"
    )
    decode: Literal["full", "reduced"] = Field(
        description="whether JPEGs much larger than their views are decoded in full, or only as far as the views need"
    )
    max_replaced: float = Field(ge=0, le=1, description="largest share of samples that cannot be used")

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.groups > 1 and (self.window is None or self.window % self.groups):
            window = "null" if self.window is None else self.window
            raise ValueError(
                f"window {window} has no {self.groups} equal parts; set it to a multiple of groups, or groups to 1"
            )
        return self

    def require_batch(self, size: int, named: str) -> None:
        """Raises ValueError for a batch that has no equal stretches for the groups."""
        if size % self.groups:
            raise ValueError(
                f"{named} {size} is not a multiple of stream.groups {self.groups}: each group has a stretch of every batch"
            )


class _Together(NamedTuple):
    """Shards that are shuffled together: those of all sources, or those of one in a mixture."""

    sizes: list[int]  # samples in each shard
    sources: list[tuple[int, int]]  # source and number there of each shard
    first: int  # number of the first sample
    seed: int


class Stream:
    """The endless stream of training samples: every epoch holds each once; a mixture follows its weights.

    Samples are numbered through the sources. What stands at a position depends on nothing but the seed and the
    manifests, and where there are groups on the size of a batch, so that ranks, workers and resumed runs agree. Raises
    ConfigError for a mixture of other sources, and for more shards in a window than memory or the folder for fetched
    shards can hold.
    """

    def __init__(self, sources: Sequence[ShardDataset], config: StreamConfig, *, seed: int) -> None:
        self.sources = sources
        self.config = config
        self.seed = seed
        self._replacements = Replacements(config.max_replaced, "data.stream.max_replaced")
        for source in sources:
            if config.samples is not None and config.samples > len(source):
                raise ConfigError(f"data.stream.samples is {config.samples:,}, {source.folder} has {len(source):,}")
        self._sizes = [_first_sizes(source.sizes, config.samples) for source in sources]  # of shards, by source
        self._first = np.concatenate([[0], np.cumsum([sum(sizes) for sizes in self._sizes], dtype=np.int64)])
        self._mixture = None
        if config.mixture is not None:
            names = [source.folder.name for source in sources]
            if sorted(names) != sorted(config.mixture):
                given, wanted = ", ".join(names), ", ".join(config.mixture)
                raise ConfigError(f"data.stream.mixture has weights for {wanted}; the shards given are {given}")
            self._mixture = Mixture([config.mixture[name] for name in names], seed)
        self._parts = self._divide()
        for part in self._parts:
            require_memory(part.sizes, config.window, "data.stream.window")
        for source in sources:
            require_room(source, config.window, "data.stream.window", groups=config.groups)
        self._remote = any(source.cache is not None for source in sources)

    def __len__(self) -> int:
        return int(self._first[-1])

    def _divide(self) -> list[_Together]:
        places = [[(which, shard) for shard in range(len(sizes))] for which, sizes in enumerate(self._sizes)]
        if self._mixture is None:
            return [_Together([*chain(*self._sizes)], [*chain(*places)], 0, self.seed)]
        return [
            _Together(sizes, places[which], int(self._first[which]), address(self.seed, "source", which))
            for which, sizes in enumerate(self._sizes)
        ]

    def numbers(self, start: int, count: int, *, batch: int) -> np.ndarray:
        """The samples at places `start` to `start + count` of all batches; what comes next is fetched meanwhile."""
        window, groups = self.config.window, self.config.groups
        positions = of_batch(np.arange(start, start + count), batch, groups)
        of_part, places = np.zeros_like(positions), positions
        if self._mixture is not None:
            of_part, places = self._mixture.of(positions, groups)
        numbers = np.empty(count, dtype=np.int64)
        now, later = ([[] for _ in self.sources] for _ in range(2))
        for which in np.unique(of_part).tolist():
            part, chosen = self._parts[which], of_part == which
            numbers[chosen] = part.first + epochs(places[chosen], part.sizes, part.seed, window=window, groups=groups)
            if self._remote:
                around = shards_around(places[chosen], part.sizes, part.seed, window=window, groups=groups)
                for found, shards in zip((now, later), around, strict=True):
                    for source, shard in (part.sources[number] for number in shards):
                        found[source].append(shard)
        for source, *shards in zip(self.sources, now, later, strict=True):
            source.settle(*shards)
        return numbers

    def read(self, number: int, position: int, *, decode: "Callable[[Image], Image]", captioned: bool) -> Drawn:
        """Sample `number` for `position` of the stream, through `decode`, which gets the picture with its header read.

        One that cannot be decoded, or has no caption where one is needed, gives way to another of its shard, drawn by
        position. Raises DataError when a shard cannot be read, or when more than `max_replaced` gave way.
        """
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        source, size = self.sources[which], int(self._first[which + 1] - self._first[which])

        def places() -> Iterator[int]:
            yield (first := number - int(self._first[which]))
            others = source.neighbours(first)
            for attempt in count():
                draws = numpy_draws(self.seed, "replacement", position, attempt)
                yield int(draws.integers(others.start, min(others.stop, size)))

        def read(index: int) -> Drawn:
            caption = source.caption(index)
            if captioned and not caption.strip():
                raise SampleError("the caption is empty")
            picture = open_header(source.content(index))
            whole = upright_size(picture)
            return Drawn(decode(picture), caption, False, whole)

        drawn, replaced = self._replacements.first_usable(places(), read, source.name)
        return drawn._replace(replaced=replaced)


def _first_sizes(sizes: Sequence[int], samples: int | None) -> list[int]:
    """Sizes of the shards that hold the first so many samples, the last one cut."""
    if samples is None:
        return list(sizes)
    ends = accumulate(sizes)
    cut = [size - max(0, end - samples) for size, end in zip(sizes, ends, strict=True)]
    return [size for size in cut if size > 0]


def require_memory(sizes: Sequence[int], window: int | None, named: str) -> None:
    """Raises ConfigError, which calls the window as it is `named`, when more is shuffled together than memory holds."""
    if (most := _largest(sizes, window)) > TOGETHER:
        raise ConfigError(
            f"{named} {window or 'null'} shuffles {most:,} samples together, and every worker keeps their order; "
            f"at most {TOGETHER:,} are possible: choose a window of fewer shards, such as 64"
        )


def require_room(source: ShardDataset, window: int | None, named: str, *, groups: int = 1) -> None:
    """Raises ConfigError when a machine's part of a window is more than the folder for fetched shards holds."""
    shards = None if window is None else window // groups * -(-groups // machines())
    most = _largest([shard.bytes for shard in source.shards], shards)
    if source.cache is not None and most > source.cache.capacity:
        raise ConfigError(
            f"{source.folder}: {named} {window or 'null'} reads {most / 1e9:.3g} GB of fetched shards "
            f"together, and the folder for them holds {source.cache.capacity / 1e9:.3g}: each would be fetched again and "
            "again; choose a window of fewer shards, or set VTP_CACHE_GIGABYTES higher"
        )


def _largest(sizes: Sequence[int], window: int | None) -> int:
    """The sum of the largest `window`, or of all."""
    return sum(sizes if window is None else sorted(sizes)[-window:])
