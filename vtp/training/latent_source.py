"""Where the latents come from that a generator learns: a cache, or pictures that are encoded as they come."""

import logging
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.data.batches import LatentBatch, LatentBatches, RankSlice, finished
from vtp.data.buckets import ImageBuckets
from vtp.data.dataset import LabelledSamples, ShardDataset
from vtp.data.latents import HeldLatents, LatentDataset, read_latents_config
from vtp.data.loader import load_batches
from vtp.data.remote import ShardCache
from vtp.data.shards import WHOLE_SET
from vtp.data.size_order import SampleBuckets, SizeOrder
from vtp.data.sized_batches import EncodedImagesConfig, PictureBatch, PictureBatches, SizedLatentBatches
from vtp.data.sized_latents import SizedLatents
from vtp.device import Precision, computing
from vtp.distributed import gather_objects, gather_rows, own_rows, ranks, total
from vtp.host import Host
from vtp.layers.block import Block
from vtp.layers.flops import forward_flops, without_contents
from vtp.layers.images import normalise
from vtp.layers.latent_space import LatentSpace, LatentStatistics
from vtp.models.base import Encoding, Tokenizer
from vtp.training.conditioning import Conditioning
from vtp.training.parallelize import compile_units

LatentShape = tuple[int, int, int]  # (d, h, w)
HELD_OUT = 64  # pictures that are encoded together for evaluations


class LatentSource(NamedTuple):
    """What a generator learns."""

    batches: Dataset[Any]  # of LatentBatch, or of what becomes one on the device
    validation: LatentDataset | HeldLatents  # of squares
    space: LatentSpace
    shapes: Mapping[LatentShape, float]  # expected shares of steps
    samples: int  # that take part
    encoding_flops: float  # of a sample, expected

    @property
    def square(self) -> LatentShape:
        """Of the latents that evaluations look at, and whose positions the generator stores."""
        return self.validation.shape


class Batching(NamedTuple):
    """How batches are drawn and shared."""

    batch_size: int  # over all ranks
    seed: int
    rank_slice: RankSlice


def cached_source(folder: Path, told: Conditioning, batching: Batching) -> LatentSource:
    """Of a folder of cache_latents."""
    batch_size, seed, rank_slice = batching
    validation = LatentDataset(folder, "validation")
    if read_latents_config(folder).sizes is None:
        data = LatentDataset(folder)
        batches = LatentBatches(data, told.of(data), batch_size=batch_size, seed=seed, rank_slice=rank_slice)
        return LatentSource(batches, validation, data.space, {data.shape: 1.0}, len(data), 0.0)
    sized = SizedLatents(folder)
    order = _order(sized.buckets, batching, None)
    shapes = {sized.of_size(*place).shape: share for place, share in _places(order)}
    batches = SizedLatentBatches(sized, told.of, order, seed=seed, rank_slice=rank_slice)
    return LatentSource(batches, validation, sized.space, shapes, len(sized), 0.0)


def encoded_source(  # noqa: PLR0913 - what decides it
    folder: Path,
    latents: Path | None,
    tokenizer: Tokenizer,
    config: EncodedImagesConfig,
    told: Conditioning,
    batching: Batching,
    *,
    patch_size: int,
    held_out: int,
    host: Host,
) -> LatentSource:
    """Of shards. Statistics and held-out latents are those of the cache `latents`, or are measured now.

    Raises ConfigError where the parameters ask for other statistics than what is given, and ValueError for sizes that the
    tokenizer, or a generator with that `patch_size`, cannot take.
    """
    batch_size, seed, rank_slice = batching
    if (config.statistics_images is None) != (latents is not None):
        raise ConfigError(
            "train_generator.images.statistics_images: null takes those of the command's --latents, a number measures "
            "them; give the one or the other"
        )
    tokenizer.require_sizes(config.sizes.all, patch_size)
    images, validation = (ShardDataset(folder, split, cache=ShardCache.of(host)) for split in ("train", "validation"))
    buckets = ImageBuckets(images, config.sizes, labelled=config.labelled).samples(host.folder / "buckets.safetensors")
    order = _order(buckets, batching, config.window)
    channels, pixels = tokenizer.latent_shape[0], tokenizer.pixels_per_latent
    pictures = PictureBatches(
        images, told.of_images(images), order, config, latent=(channels, pixels), seed=seed, rank_slice=rank_slice
    )
    compile_units((module for module in tokenizer.modules() if isinstance(module, Block)), host, len(config.sizes.all))
    encoder = _Encoder(tokenizer, config.precision, host.device)
    if config.statistics_images is None:
        assert latents is not None
        held = _given(latents, images, config, told, tokenizer)
        statistics = held.statistics
    else:
        steps = ceil(config.statistics_images / batch_size)
        statistics = _measured(EncodedBatches(pictures, encoder, None), steps * rank_slice.micro_batches, host)
        chosen = validation.learnt(max(1, held_out)) if told.text is None else validation.captioned(max(1, held_out))
        held = _held_out(validation, chosen, config.sizes.square, encoder, statistics)
    space = LatentSpace(
        tokenizer.encoder_digest(), images.manifest.learnt_classes, statistics, _untrained(images), pixels
    )
    sizes = {config.sizes.sizes[ratio][edge]: share for (ratio, edge), share in _places(order)}
    shapes = {(channels, size.height // pixels, size.width // pixels): share for size, share in sizes.items()}
    shadow = without_contents(Encoding(tokenizer))
    flops = sum(share * forward_flops(shadow, torch.empty(1, 3, *size)) for size, share in sizes.items())
    return LatentSource(EncodedBatches(pictures, encoder, statistics), held, space, shapes, len(order), flops)


class EncodedBatches(Dataset[Any]):
    """Pictures of workers, which become latents on the device; `statistics` None: in the tokenizer's own scale."""

    def __init__(
        self, pictures: PictureBatches, encoder: "_Encoder | None", statistics: LatentStatistics | None
    ) -> None:
        self._pictures, self._encoder, self._statistics = pictures, encoder, statistics

    def __getitem__(self, index: int) -> PictureBatch:
        return self._pictures[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}  # workers read alone

    def finish(self, batch: PictureBatch) -> LatentBatch:
        """On the device."""
        assert self._encoder is not None
        latents = self._encoder(batch.images)
        if self._statistics is not None:
            latents = self._statistics.normalise(latents)
        drawn = batch.noise, batch.normal, batch.uniform, batch.replaced
        return finished(LatentBatch(latents, batch.told, batch.mask, *drawn), self._pictures.conditions)


class _Encoder(NamedTuple):
    """A frozen tokenizer, from pixels on."""

    tokenizer: Tokenizer
    precision: Precision
    device: str

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Latents [B, d, h, w] float32 of uint8 pictures [B, 3, H, W]."""
        with computing(self.precision, self.device):
            return self.tokenizer.encode(normalise(pictures.to(self.device))).float()


def _order(buckets: SampleBuckets, batching: Batching, window: int | None) -> SizeOrder:
    order = SizeOrder(buckets, batch_size=batching.batch_size, seed=batching.seed, window=window)
    left = order.left_out(0)
    logging.info(
        "%d of %d pictures do not fill a batch of their ratio in the first epoch: it leaves them out", left, len(order)
    )
    return order


def _places(order: SizeOrder) -> list[tuple[tuple[int, int], float]]:
    """Places of ratio and edge of all sizes that come, with their shares."""
    return [
        ((ratio, edge), float(order.shares[ratio, edge])) for ratio, edge in zip(*order.shares.nonzero(), strict=True)
    ]


def _given(
    folder: Path, images: ShardDataset, config: EncodedImagesConfig, told: Conditioning, tokenizer: Tokenizer
) -> LatentDataset:
    """Held-out latents of a cache. Raises ArtefactError when it is of another tokenizer, of other squares or classes."""
    held, side = LatentDataset(folder, "validation"), config.sizes.square.height
    held.require_encoder(tokenizer.encoder_digest(), "the tokenizer")
    classes = images.manifest.learnt_classes if told.text is None else [WHOLE_SET]
    if held.config.image_size != side or held.classes != classes:
        raise ArtefactError(
            f"{folder}: squares of {held.config.image_size} pixels of {len(held.classes)} classes, those of "
            f"train_generator.images and {images.folder} are of {side} and {len(classes)}; run cache_latents with the same "
            "sizes on the same data"
        )
    return held


def _measured(batches: EncodedBatches, items: int, host: Host) -> LatentStatistics:
    """Mean and deviation of the first items of all ranks; they stay in the scratch folder for the next start."""
    path = host.folder / "statistics.safetensors"
    if gather_objects(path.exists())[0]:
        return LatentStatistics.load(path)
    sums: list[Tensor] = []
    for batch in load_batches(batches, range(items), host):
        values = batch.latents.double().transpose(0, 1).flatten(1)  # [d, n h w]
        sums.append(
            torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)]).cpu()
        )
    count, first, second = total(torch.stack(sums).sum(0))
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt()
    if not bool((std > 0).all()):
        raise ArtefactError(
            f"{int((std == 0).sum())} latent channels are constant over the first pictures: these are all alike and plain, "
            "or the encoder has collapsed; see the curves of the tokenizer's training"
        )
    statistics = LatentStatistics(mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1))
    if ranks().first:
        statistics.save(path)
    return statistics


def _held_out(
    images: ShardDataset,
    chosen: LabelledSamples,
    size: tuple[int, int],
    encoder: _Encoder,
    statistics: LatentStatistics,
) -> HeldLatents:
    """Held-out pictures; each rank encodes its share."""
    rows, labels = chosen
    own = np.array(own_rows(len(rows)))
    parts = [
        encoder(images.images(rows[part], size)).cpu()
        for part in np.split(own, range(HELD_OUT, len(own), HELD_OUT))
        if len(part)
    ]
    empty = torch.empty(0, *(encoder(images.images(rows[:1], size)).shape[1:]))
    encoded = gather_rows(torch.cat([empty, *parts]))
    return HeldLatents(encoded, torch.from_numpy(labels), images.captions_of(rows), statistics)


def _untrained(images: ShardDataset) -> list[int]:
    """Labels of which no training picture is."""
    manifest = images.manifest
    if not manifest.classes:
        return []
    counts = np.array(images.split.class_counts)
    trained = manifest.learnt_labels(np.flatnonzero(counts))
    return sorted(set(range(len(manifest.learnt_classes))) - set(trained.tolist()))
