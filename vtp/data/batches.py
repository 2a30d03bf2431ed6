"""Batches as functions of the step: what each training sees, drawn by address and not by history.

A dataset here has one item per step. A loader may compute items in any worker and in any order; a resumed run asks for
the same items again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from vtp.config import Config
from vtp.data.latents import LatentDataset
from vtp.data.masking import MaskConfig, draw_masks
from vtp.data.shards import ShardDataset, sample_indices
from vtp.data.views import ClipViewConfig, SslViewsConfig, clip_batch, ssl_batch
from vtp.draws import numpy_draws


class PretrainBatch(NamedTuple):
    """One step's views. The part of an objective that is switched off is empty."""

    clip_images: Tensor  # [B_clip, 3, S, S]
    tokens: Tensor  # [B_clip, L]
    global_views: Tensor  # [2, B_ssl, 3, G, G]
    local_views: Tensor  # [views, B_ssl, 3, s, s]
    masks: Tensor  # [2 * B_ssl, N], true where the student sees the mask token
    rec_images: Tensor  # [B_rec, 3, S, S]


class ImageBatch(NamedTuple):
    """Images of one step."""

    images: Tensor  # [B, 3, S, S] uint8


class LatentBatch(NamedTuple):
    """Latents of one step, normalised per channel."""

    latents: Tensor  # [B, d, h, w]
    labels: Tensor  # [B] int64


class BatchSizes(Config):
    """Samples per step and objective (paper 3.6: 16k, 4k, 2k)."""

    clip: int = Field(ge=1)
    ssl: int = Field(ge=1)
    reconstruction: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.clip >= self.ssl >= self.reconstruction:
            raise ValueError(
                f"batch sizes must fall, clip {self.clip} >= ssl {self.ssl} >= reconstruction {self.reconstruction}: "
                "the smaller ones are drawn from the larger (paper 3.6)"
            )
        return self


class PretrainDataConfig(Config):
    """Views of the three objectives."""

    batch: BatchSizes
    clip_view: ClipViewConfig = Field(description="shared by CLIP and reconstruction, without flips")
    ssl_views: SslViewsConfig
    masks: MaskConfig


class ActiveBatch(NamedTuple):
    """Batch sizes of the objectives that are switched on, 0 for the others; `pool` is what a step draws from."""

    clip: int
    ssl: int
    reconstruction: int

    @property
    def pool(self) -> int:
        return max(self)


class PretrainBatches(Dataset[PretrainBatch]):
    """Joint batches: each step draws a pool, and each objective a random subset of it (paper 3.6)."""

    def __init__(
        self,
        shards: ShardDataset,
        config: PretrainDataConfig,
        *,
        active: ActiveBatch,
        patch_size: int,
        tokenize: Callable[[Sequence[str]], Tensor] | None,
        seed: int,
    ) -> None:
        self.shards = shards
        self.config = config
        self.active = active
        self.patch_size = patch_size
        self.tokenize = tokenize
        self.seed = seed

    def __getitem__(self, step: int) -> PretrainBatch:
        pool = self.active.pool
        drawn = sample_indices(step * pool, pool, len(self.shards), self.seed)
        draws = numpy_draws(self.seed, "subsets", step)
        for_ssl = draws.permutation(pool)[: self.active.ssl]
        for_rec = draws.permutation(pool)[: self.active.reconstruction]
        first = step * pool  # position of the pool in the endless stream: the address of every view's draws
        plain_views = np.arange(pool) if self.active.clip else np.sort(for_rec)
        shared = clip_batch(self._images(drawn[plain_views]), self.config.clip_view, self.seed, first + plain_views)
        captions = [self.shards.captions[index] for index in drawn] if self.active.clip else []
        global_views, local_views = ssl_batch(
            self._images(drawn[for_ssl]), self.config.ssl_views, self.seed, first + for_ssl
        )
        return PretrainBatch(
            clip_images=shared if self.active.clip else shared[:0],
            tokens=self.tokenize(captions) if self.tokenize and captions else torch.empty(0, 0, dtype=torch.int64),
            global_views=global_views,
            local_views=local_views,
            masks=self._masks(step),
            rec_images=shared[np.searchsorted(plain_views, for_rec)],
        )

    def _images(self, indices: np.ndarray) -> list:
        return [self.shards.image(index) for index in indices.tolist()]

    def _masks(self, step: int) -> Tensor:
        side = self.config.ssl_views.global_size // self.patch_size
        draws = numpy_draws(self.seed, "masks", step)
        return draw_masks(2 * self.active.ssl, side, side, self.config.masks, draws)


class ImageBatches(Dataset[ImageBatch]):
    """Plain images for decoder tuning."""

    def __init__(self, shards: ShardDataset, *, batch_size: int, seed: int) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed

    def __getitem__(self, step: int) -> ImageBatch:
        drawn = sample_indices(step * self.batch_size, self.batch_size, len(self.shards), self.seed)
        return ImageBatch(self.shards.images(drawn))


class LatentBatches(Dataset[LatentBatch]):
    """Normalised minibatches, a function of the step."""

    def __init__(self, latents: LatentDataset, *, batch_size: int, seed: int) -> None:
        self.latents = latents
        self.batch_size = batch_size
        self.seed = seed

    def __getitem__(self, step: int) -> LatentBatch:
        drawn = sample_indices(step * self.batch_size, self.batch_size, len(self.latents), self.seed)
        rows = self.latents.statistics.normalise(self.latents.rows(drawn))
        return LatentBatch(rows, self.latents.labels[torch.from_numpy(drawn)])
