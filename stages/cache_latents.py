"""Encode once the images that a generator learns, those with a class or those with a caption: sharded latents, of
horizontal flips too, and their statistics per channel (paper 4.1, 5).

Each picture is decoded once, by worker processes, and flipped on the device; of pictures of several sizes, once for every
size at which it is stored. A file is written while the next is encoded; ranks share whole files, and a killed run goes on
with those that are missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.runner.run import Input, Output, main
from vtp.config import Config
from vtp.data.buckets import ImageBuckets
from vtp.data.dataset import LabelledSamples, ShardDataset
from vtp.data.latents import (
    LatentShard,
    finish_cache,
    plan_shards,
    row_count,
    sized_split,
    statistics_rows,
    summarise,
    write_latent_shard,
)
from vtp.data.remote import ShardCache
from vtp.data.shards import WHOLE_SET
from vtp.data.shared_files import SharedFiles
from vtp.data.sizes import PictureSize, SizesConfig
from vtp.device import Precision, computing
from vtp.distributed import ranks
from vtp.finite import require_finite
from vtp.host import Host
from vtp.layers.images import normalise
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer

SPLITS = ("train", "validation")


class StatisticsConfig(Config):
    """What normalises the latents."""

    images: int | None = Field(ge=2, description="training images behind mean and deviation; null: all")
    seed: int = Field(description="seed of the choice of those images")


class CacheLatents(Config):
    """The section `cache_latents`."""

    of: Literal["classes", "captions"] = Field(
        description="the pictures that are encoded: those with a class, or those with a caption"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="floating-point type of the stored latents")
    precision: Precision = Field(description="precision of the encoder's forward pass")
    horizontal_flips: bool = Field(description="store the latents of horizontally flipped images as well")
    sizes: SizesConfig | None = Field(
        description="sizes of the training pictures, each at every short edge up to its own; null: the tokenizer's squares"
    )
    batch_size: int = Field(ge=1, description="images per forward pass")
    shard_size: int = Field(ge=1, description="images per file")
    statistics: StatisticsConfig


@torch.inference_mode()
def run(
    config: CacheLatents,
    *,
    shards: Annotated[
        Input,
        "folder of prepare_data, whose pictures with a class or a caption are encoded; without classes all",
    ],
    tokenizer: Annotated[Input, "folder of the tokenizer"],
    latents: Annotated[Output, "folder for the latents"],
    host: Host,
) -> None:
    model = load_tokenizer(tokenizer).to(host.device)
    train, validation = (ShardDataset(shards, name, cache=ShardCache.of(host)) for name in SPLITS)
    square = config.sizes.square if config.sizes else PictureSize(model.image_size, model.image_size)
    splits = {"train": _SplitImages(train, _learnt(train, config), square)}
    if config.sizes is not None:
        model.require_sizes(config.sizes.all)
        splits = _by_size(train, config.sizes, _learnt(train, config))
    splits["validation"] = _SplitImages(validation, _learnt(validation, config), square)
    files = plan_shards({name: len(split.singles.rows) for name, split in splits.items()}, config.shard_size)
    most, seed = config.statistics.images, config.statistics.seed
    shared = SharedFiles(host.folder / "latents", files)
    total = shared.done + row_count(shared.own)
    with (
        host.progress(total=total, description="encoding", unit="image", done=shared.done) as bar,
        _LatentWriter(shared.folder, splits, statistics_rows(files, most=most, seed=seed)) as writer,
    ):
        for shard, parts in _by_file(_batches(shared.own, splits, config.batch_size), host):
            encoded = []
            for pictures in parts:
                encoded.append(_encode(model, pictures.to(host.device), config))
                bar.update(len(pictures))
            writer.write(shard, {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]})
            if host.stop_seen:
                break
    shared.end(host)
    if not ranks().first:
        return
    description = {
        "dtype": config.dtype,
        "classes": train.manifest.learnt_classes if config.of == "classes" else [WHOLE_SET],
        "image_size": square.height,
        "sizes": config.sizes,
        "encoder": model.encoder_digest(),
    }
    finish_cache(shared.folder, files, description, most=most, seed=seed)
    shared.folder.rename(latents)
    host.record(samples=shared.total)


class _SplitImages(NamedTuple):
    """The samples of a split that a generator learns, at one size; scenes have no class, other pictures no caption."""

    images: ShardDataset
    singles: LabelledSamples
    size: PictureSize


def _learnt(images: ShardDataset, config: CacheLatents) -> LabelledSamples:
    return images.learnt() if config.of == "classes" else images.captioned()


def _by_size(images: ShardDataset, sizes: SizesConfig, singles: LabelledSamples) -> dict[str, _SplitImages]:
    """By the names of their splits: of every ratio those that are for the most edges come first."""
    buckets = ImageBuckets(images, sizes, labelled=False)
    found = np.concatenate([buckets.of_shard(shard) for shard in range(len(images.shards))])[singles.rows]
    ratios, edges = np.divmod(found, len(sizes.short_edges))
    splits = {}
    for ratio, of_ratio in enumerate(sizes.sizes):
        chosen = np.flatnonzero(ratios == ratio)
        chosen = chosen[np.argsort(-edges[chosen], kind="stable")]
        for edge, size in enumerate(of_ratio):
            here = chosen[edges[chosen] >= edge]
            if len(here):
                splits[sized_split(size)] = _SplitImages(
                    images, LabelledSamples(*(each[here] for each in singles)), size
                )
    return splits


class _FileBatch(NamedTuple):
    """Pictures of one forward pass, all of one file."""

    shard: LatentShard
    images: ShardDataset
    rows: np.ndarray
    size: PictureSize


class _FileBatches(Dataset[Tensor]):
    """Uint8 pictures [B, 3, H, W], decoded where they are asked for."""

    def __init__(self, batches: Sequence[_FileBatch]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Tensor:
        batch = self.batches[index]
        return batch.images.images(batch.rows, batch.size)


def _batches(own: Sequence[LatentShard], splits: Mapping[str, _SplitImages], count: int) -> _FileBatches:
    batches = []
    for shard in own:
        images, singles, size = splits[shard.split]
        rows = singles.rows[shard.rows.start : shard.rows.stop]
        batches += [_FileBatch(shard, images, part, size) for part in np.split(rows, range(count, len(rows), count))]
    return _FileBatches(batches)


def _by_file(batches: _FileBatches, host: Host) -> Iterator[tuple[LatentShard, Iterator[Tensor]]]:
    """Files in turn, each with its pictures, which must be taken before the next."""
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(len(batches.batches)),
            num_workers=host.workers,
            prefetch_factor=4 if host.workers else None,
            pin_memory=host.device != "cpu",
        )
    )
    counts: dict[LatentShard, int] = {}
    for batch in batches.batches:
        counts[batch.shard] = counts.get(batch.shard, 0) + 1
    for shard, count in counts.items():
        yield shard, (next(loader) for _ in range(count))


def _encode(model: Tokenizer, pictures: Tensor, config: CacheLatents) -> dict[str, Tensor]:
    """Latents of pictures, and of their horizontal flips, as they are stored."""
    images = normalise(pictures)
    with computing(config.precision, images.device):
        encoded = {"latents": model.encode(images)}
        if config.horizontal_flips:
            encoded["flipped"] = model.encode(images.flip(3))
    stored = {name: latents.to(getattr(torch, config.dtype)).cpu() for name, latents in encoded.items()}
    for name, latents in stored.items():
        remedy = "is the tokenizer sound? If so, set cache_latents.dtype to float32"
        require_finite(latents, f"{name} of a batch as {config.dtype}", remedy)
    return stored


class _LatentWriter:
    """Writes and sums up a file in a thread of its own; the next one waits for it, and errors surface there."""

    def __init__(
        self, folder: Path, splits: Mapping[str, _SplitImages], statistics: Mapping[LatentShard, np.ndarray]
    ) -> None:
        """`statistics`: rows of the files of training pictures that are behind mean and deviation."""
        self._folder = folder
        self._splits = splits
        self._statistics = statistics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "_LatentWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._wait()

    def write(self, shard: LatentShard, latents: Mapping[str, Tensor]) -> None:
        """Begin to write a file."""
        self._wait()
        images, singles, _ = self._splits[shard.split]
        chosen = slice(shard.rows.start, shard.rows.stop)
        tensors = {**latents, "labels": torch.from_numpy(singles.labels[chosen])}
        self._writing = self._thread.submit(self._write, shard, tensors, images, singles.rows[chosen])

    def _write(self, shard: LatentShard, tensors: Mapping[str, Tensor], images: ShardDataset, rows: np.ndarray) -> None:
        write_latent_shard(self._folder, shard, tensors, images, rows)
        summarise(self._folder, shard, self._statistics.get(shard, np.empty(0, dtype=np.int64)))

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


if __name__ == "__main__":
    main(run, distributed=True)
