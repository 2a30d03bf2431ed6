"""Cached latents: sharded safetensors with labels, a table beside each, and the statistics that normalise them.

    config.json               type, classes, splits, digests of all files and of the encoder whose latents these are
    statistics.safetensors    mean and standard deviation per channel
    train-00000.safetensors   latents [n, d, h, w], those of the horizontal flips [n, d, h, w] if any, labels [n]
    train-00000.parquet       key, caption, label of each row

Of pictures of several sizes (`vtp.data.sized_latents`) the files of training are train-WIDTHxHEIGHT-00000, and validation
is of squares of the smallest short edge. Shards are memory-mapped once; a random minibatch touches only its own rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import (
    ArtefactError,
    digest,
    load_tensors,
    read_json,
    save_tensors,
    verify_files,
    whole_file,
    write_json,
)
from vtp.config import Config, ConfigError
from vtp.data.sizes import PictureSize, SizesConfig
from vtp.draws import numpy_draws
from vtp.layers.latent_space import LatentSpace, LatentStatistics

if TYPE_CHECKING:
    from vtp.data.dataset import ShardDataset

FORMAT_VERSION = 3
STATISTICS_FILE = "statistics.safetensors"
REMEDY = "fetch the folder again (dvc checkout), or run cache_latents again"
CHUNK = 256  # latents that the statistics hold in float64 at a time


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # of a file in the folder


class LatentSplit(Config):
    """What `config.json` says of a split."""

    samples: int = Field(ge=1)
    shards: list[FileName] = Field(min_length=1)


class LatentsArtefact(Config):
    """`config.json` of a folder of latents."""

    format_version: Literal[3]
    dtype: Literal["float32", "bfloat16", "float16"]
    image_size: int  # side of the pictures, or of the smallest squares
    sizes: SizesConfig | None = None  # of the training pictures; None: all are squares of that side
    classes: list[str]
    encoder: str  # digest of that whose latents these are
    statistics_images: int  # behind mean and deviation
    splits: dict[str, LatentSplit]
    files: dict[FileName, str]  # SHA-256 of every other file


class LatentShard(NamedTuple):
    """A file of a cache that is being written: rows of a split's samples that a generator learns."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.safetensors"

    def path(self, folder: Path) -> Path:
        """Of the tensors; the table beside it ends in .parquet."""
        return folder / self.name


def sized_split(size: PictureSize) -> str:
    """The name of the training latents of pictures of one size."""
    return f"train-{size}"


def plan_shards(counts: Mapping[str, int], shard_size: int) -> list[LatentShard]:
    """All files of a cache with so many samples per split."""
    return [
        LatentShard(split, number, range(first, min(first + shard_size, count)))
        for split, count in counts.items()
        for number, first in enumerate(range(0, count, shard_size))
    ]


def missing_shards(folder: Path, shards: Sequence[LatentShard]) -> Iterator[LatentShard]:
    """Those that are not written yet."""
    return (shard for shard in shards if not shard.path(folder).exists())


def write_latent_shard(
    folder: Path, shard: LatentShard, tensors: Mapping[str, Tensor], images: "ShardDataset", rows: np.ndarray
) -> None:
    """One whole file, `rows` of `images`. Its table comes first: a file whose tensors are there is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {
        "key": [images.key(int(row)) for row in rows],
        "caption": [images.caption(int(row)) for row in rows],
        "label": tensors["labels"].numpy(),
    }
    with whole_file(shard.path(folder).with_suffix(".parquet")) as temporary:
        pq.write_table(pa.table(table), temporary, compression="zstd")
    save_tensors(shard.path(folder), tensors)


class FileSummary(Config):
    """What is known of a file when it is written, so that nobody reads a whole cache again; beside it until the end."""

    digests: dict[str, str]  # SHA-256 of the file and of its table
    count: int  # numbers of a channel behind the sums
    first: list[
        float
    ]  # per channel the sum of the rows that the statistics take, both ways round, and of their squares
    second: list[float]


def statistics_rows(shards: Sequence[LatentShard], *, most: int | None, seed: int) -> dict[LatentShard, np.ndarray]:
    """Rows of each file of training images that are behind the statistics: of `most` images, or of all of them."""
    training = [shard for shard in shards if shard.split.partition("-")[0] == "train"]
    total = row_count(training)
    chosen = np.arange(total)
    if most is not None and most < total:
        chosen = np.sort(numpy_draws(seed, "latent statistics").permutation(total)[:most])
    ends = np.cumsum([len(shard.rows) for shard in training])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return {
        shard: part - (end - len(shard.rows)) for shard, part, end in zip(training, parts, ends.tolist(), strict=True)
    }


def row_count(files: Sequence[LatentShard]) -> int:
    """Rows of all of them."""
    return sum(len(shard.rows) for shard in files)


def summarise(folder: Path, shard: LatentShard, rows: np.ndarray) -> FileSummary:
    """Of a file that is written; `rows` of it are behind the statistics."""
    path = shard.path(folder)
    tensors, chosen = load_tensors(path), torch.from_numpy(rows)
    channels = tensors["latents"].shape[1]
    count, first, second = 0, *torch.zeros(2, channels, dtype=torch.float64)
    for latents in (tensors[name] for name in ("latents", "flipped") if name in tensors):
        for part in chosen.split(CHUNK) if len(chosen) else ():
            values = latents[part].double().transpose(0, 1).flatten(1)  # [d, n h w]
            first, second = first + values.sum(1), second + values.square().sum(1)
            count += values.shape[1]
    files = [each for each in (path, path.with_suffix(".parquet")) if each.exists()]
    digests = {each.name: digest(each) for each in files}
    summary = FileSummary(digests=digests, count=count, first=first.tolist(), second=second.tolist())
    write_json(_summary_path(folder, shard), summary.model_dump())
    return summary


def finish_cache(
    folder: Path, shards: Sequence[LatentShard], description: Mapping[str, Any], *, most: int | None, seed: int
) -> None:
    """Write the statistics over `most` training images, both ways round (None: all), and `config.json`, which ends it.

    A file that has no summary yet gets one. Raises ArtefactError when a channel is constant.
    """
    rows = statistics_rows(shards, most=most, seed=seed)
    summaries = [_summary(folder, shard, rows.get(shard, np.empty(0, dtype=np.int64))) for shard in shards]
    count = sum(summary.count for summary in summaries)
    mean, square = (
        torch.tensor([getattr(summary, name) for summary in summaries], dtype=torch.float64).sum(0) / count
        for name in ("first", "second")
    )
    std, images = (square - mean.square()).clamp_min(0).sqrt(), sum(map(len, rows.values()))
    if not bool((std > 0).all()):
        dead = int((std == 0).sum())
        raise ArtefactError(
            f"{dead} latent channels are constant over the data set: its {images} pictures are all alike and plain, or the "
            "encoder has collapsed; see the curves of the tokenizer's training"
        )
    LatentStatistics(mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)).save(folder / STATISTICS_FILE)
    splits: dict[str, dict[str, Any]] = {}
    for shard in shards:
        entry = splits.setdefault(shard.split, {"samples": 0, "shards": []})
        entry["samples"] += len(shard.rows)
        entry["shards"].append(shard.name)
    written = {name: value for summary in summaries for name, value in summary.digests.items()}
    written[STATISTICS_FILE] = digest(folder / STATISTICS_FILE)
    values = {"format_version": FORMAT_VERSION, "splits": splits, "statistics_images": images, "files": written}
    config = LatentsArtefact.parse(values | dict(description), where="config.json")
    for shard in shards:
        _summary_path(folder, shard).unlink(missing_ok=True)
    write_json(folder / "config.json", config.model_dump(exclude_none=True))


def _summary(folder: Path, shard: LatentShard, rows: np.ndarray) -> FileSummary:
    path = _summary_path(folder, shard)
    return FileSummary.parse(read_json(path), where=str(path)) if path.exists() else summarise(folder, shard, rows)


def _summary_path(folder: Path, shard: LatentShard) -> Path:
    return shard.path(folder).with_suffix(".summary.json")


class LatentDataset:
    """A split of a folder of cached latents. Raises ArtefactError when a file is not the one that was written."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.folder, self.split = folder, split
        self.config = read_latents_config(folder)
        if split not in self.config.splits:
            raise ArtefactError(f"{folder}: no split {split!r}; it has {', '.join(self.config.splits)}")
        entry = self.config.splits[split]
        names = [STATISTICS_FILE, *entry.shards]
        if unknown := [name for name in names if name not in self.config.files]:
            raise ArtefactError(f"{folder / 'config.json'}: no digest of {unknown[0]}; {REMEDY}")
        verify_files(folder, {name: self.config.files[name] for name in names}, remedy=REMEDY)
        shards = [load_tensors(folder / name) for name in entry.shards]
        self._latents = [shard["latents"] for shard in shards]
        self._flipped = [shard["flipped"] for shard in shards if "flipped" in shard]
        self._starts = np.cumsum([0, *(len(latents) for latents in self._latents)])
        self.labels = torch.cat([shard["labels"] for shard in shards])
        if len(self.labels) != entry.samples:
            raise ArtefactError(f"{folder}: {len(self.labels)} latents, config.json says {entry.samples}; {REMEDY}")
        for name, shard in zip(entry.shards, shards, strict=True):
            require_labels(shard["labels"], len(self.classes), folder / name)
        self.statistics = LatentStatistics.load(folder / STATISTICS_FILE)
        self.pixels_per_latent = self._height_in_pixels(split) // self.shape[1]  # along a side

    def _height_in_pixels(self, split: str) -> int:
        sizes = self.config.sizes.sizes if self.config.sizes is not None else []
        heights = {sized_split(size): size.height for of_ratio in sizes for size in of_ratio}
        return heights.get(split, self.config.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        channels, height, width = self._latents[0].shape[1:]
        return channels, height, width

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.config.classes

    @cached_property
    def captions(self) -> list[str]:
        """Of every sample; empty: none."""
        import pyarrow.parquet as pq

        entry = self.config.splits[self.split]
        tables = [(self.folder / name).with_suffix(".parquet") for name in entry.shards]
        verify_files(self.folder, {path.name: self.config.files[path.name] for path in tables}, remedy=REMEDY)
        return [text for path in tables for text in pq.read_table(path, columns=["caption"])["caption"].to_pylist()]

    def captions_of(self, rows: np.ndarray) -> list[str]:
        """Of some samples."""
        return [self.captions[int(row)] for row in rows]

    @property
    def has_flipped(self) -> bool:
        """Whether the latents of horizontally flipped images are there too."""
        return bool(self._flipped)

    @property
    def encoder(self) -> str:
        """Digest of the encoder whose latents these are."""
        return self.config.encoder

    @property
    def space(self) -> LatentSpace:
        """What these latents mean, and which classes are none of theirs."""
        untrained = sorted(set(range(len(self.classes))) - set(self.labels.tolist()))
        return LatentSpace(self.encoder, self.classes, self.statistics, untrained, self.pixels_per_latent)

    def require_encoder(self, digest: str, who: str) -> None:
        """Raises ArtefactError when these are not the latents of the encoder with that digest."""
        if self.encoder != digest:
            raise ArtefactError(
                f"{self.folder} holds the latents of another encoder than that of {who}; run cache_latents again"
            )

    def rows(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> Tensor:
        """Latents [n, d, h, w] in float32, as the tokenizer gave them; of the flipped image where `flipped` is true.

        Raises ArtefactError when those of flips are asked for and were not cached.
        """
        if flipped is not None and flipped.any() and not self.has_flipped:
            raise ArtefactError(
                f"{self.folder}: no latents of horizontal flips; set cache_latents.horizontal_flips to true"
            )
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = indices - self._starts[shards]
        flips = np.zeros(len(indices), dtype=bool) if flipped is None else flipped
        out = torch.empty(len(indices), *self.shape)
        places = zip(shards.tolist(), offsets.tolist(), flips.tolist(), strict=True)
        for row, (shard, offset, flip) in enumerate(places):
            out[row] = (self._flipped if flip else self._latents)[shard][offset]
        return out


class HeldLatents:
    """Held-out latents in memory, as far as evaluations along a training ask for them."""

    def __init__(self, latents: Tensor, labels: Tensor, captions: Sequence[str], statistics: LatentStatistics) -> None:
        self._latents, self.labels, self.captions, self.statistics = latents, labels, captions, statistics

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        channels, height, width = self._latents.shape[1:]
        return channels, height, width

    def captions_of(self, rows: np.ndarray) -> list[str]:
        """Of some samples."""
        return [self.captions[int(row)] for row in rows]

    def rows(self, indices: np.ndarray) -> Tensor:
        """Latents [n, d, h, w] in float32, as the tokenizer gave them."""
        return self._latents[torch.from_numpy(indices)]


def require_labels(labels: Tensor, classes: int, where: Path) -> None:
    """Raises ArtefactError when a label is none of `classes`."""
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise ArtefactError(f"{where}: {len(bad)} labels are none of {classes} classes, the first is {int(bad[0])}")


def read_latents_config(folder: Path) -> LatentsArtefact:
    """`config.json` alone. Raises ArtefactError when it is that of something else, damaged, or of another format."""
    values = read_json(folder / "config.json")
    if values.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder}: latents of format {values.get('format_version')!r}, this code reads {FORMAT_VERSION}; is this the "
            "right folder? If so, run cache_latents again"
        )
    try:
        return LatentsArtefact.parse(values, where=str(folder / "config.json"))
    except ConfigError as error:
        raise ArtefactError(f"{error}; run cache_latents again") from None
