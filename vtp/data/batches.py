"""Batches as functions of the step: what each training sees, drawn by address and not by history.

A dataset here has one item per step, or per micro-batch of a step. A loader may compute items in any worker and in any
order; a resumed run asks for the same items again.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtp.data.conditions import SampleConditions, Told
from vtp.data.latents import LatentDataset
from vtp.data.order import sample_indices
from vtp.data.stream import Stream
from vtp.data.views import (
    CentreCropView,
    RandomCropView,
    ScaledCropView,
    least_size,
    reconstruction_batch,
    reconstruction_crop,
)
from vtp.draws import torch_draws
from vtp.layers.captions import Condition
from vtp.layers.decode import finish, upright_size

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageBatch(NamedTuple):
    """Images of one micro-batch of a rank."""

    images: Tensor  # [B, 3, S, S] uint8
    replaced: Tensor  # [B], true for a sample that stands in the place of one that cannot be used


NONE_REPLACED = torch.zeros(0, dtype=torch.bool)


class LatentBatch(NamedTuple):
    """A micro-batch of a rank: latents, normalised per channel, with the draws that each sample is trained with."""

    latents: Tensor  # [B, d, h, w]
    told: Tensor  # [B] int64 labels, or of captions the features [B, L, w]
    mask: Tensor  # [B, L] bool, true for tokens; [B, 0] of labels
    noise: Tensor  # [B, d, h, w], standard normal
    normal: Tensor  # [B], standard normal, for the time
    uniform: Tensor  # [B, 2] in [0, 1), for the time and for dropping the condition
    replaced: Tensor = NONE_REPLACED  # [B], as in ImageBatch; empty where latents are cached

    @property
    def condition(self) -> Condition:
        """What the model is told."""
        return Told(self.told, self.mask).condition


class FlowDraws(NamedTuple):
    """What latents are trained with: a function of their places in the stream, and of nothing else."""

    noise: Tensor  # [B, d, h, w], standard normal
    normal: Tensor  # [B], standard normal, for the time
    uniform: Tensor  # [B, 3] in [0, 1), for the time, for dropping the condition, for mirroring

    @classmethod
    def of(cls, seed: int, places: range, shape: tuple[int, int, int]) -> "FlowDraws":
        """For latents of one shape (d, h, w)."""
        return cls(
            *(torch.stack(values) for values in zip(*(_draw(seed, place, shape) for place in places), strict=True))
        )


def _draw(seed: int, place: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch_draws(seed, "flow", place)
    return torch.randn(shape, generator=draws), torch.randn((), generator=draws), torch.rand(3, generator=draws)


class RankSlice(NamedTuple):
    """What a rank takes of every global batch, in so many micro-batches."""

    rank: int
    ranks: int
    micro_batches: int

    def of(self, blocks: int, index: int) -> tuple[int, range]:
        """The step and the blocks of item `index`, counted over steps and micro-batches."""
        step, micro = divmod(index, self.micro_batches)
        count = blocks // (self.ranks * self.micro_batches)
        first = (self.rank * self.micro_batches + micro) * count
        return step, range(first, first + count)


def count_micro_batches(blocks: int, ranks: int, largest: int, *, named: str) -> int:
    """The least number of equal micro-batches of at most `largest` blocks that a rank needs.

    Raises ValueError, which calls the number of blocks as it is `named`, when a rank would get parts of blocks.
    """
    if blocks % ranks:
        raise ValueError(
            f"{named} {blocks} is not a multiple of the {ranks} ranks, and a rank holds whole blocks; "
            "change the number of devices or the batch"
        )
    of_rank = blocks // ranks
    return next(count for count in range(1, of_rank + 1) if of_rank % count == 0 and of_rank <= largest * count)


class ImageBatches(Dataset[ImageBatch]):
    """Plain images for decoder tuning: one item per micro-batch of this rank, a stretch of the endless stream.

    Raises ValueError when a batch holds more samples than there are.
    """

    def __init__(
        self,
        stream: Stream,
        view: CentreCropView | RandomCropView | ScaledCropView,
        *,
        size: int,
        batch_size: int,
        rank_slice: RankSlice,
    ) -> None:
        if len(stream) < batch_size:
            raise ValueError(
                f"the training shards hold {len(stream)} samples and a batch takes {batch_size}; use more data or a "
                "smaller batch_size"
            )
        self.stream = stream
        self.view = view
        self.size = size
        self.batch_size = batch_size
        self.rank_slice = rank_slice

    def __getitem__(self, index: int) -> ImageBatch:
        step, rows = self.rank_slice.of(self.batch_size, index)
        positions = np.arange(rows.start, rows.stop) + step * self.batch_size
        numbers = self.stream.numbers(int(positions[0]), len(positions), batch=self.batch_size)
        drawn = [
            self.stream.read(number, position, decode=partial(self._decode, position=position), captioned=False)
            for number, position in zip(numbers.tolist(), positions.tolist(), strict=True)
        ]
        images = reconstruction_batch(
            [d.image for d in drawn], self.view, self.size, self.stream.seed, positions, [d.whole for d in drawn]
        )
        return ImageBatch(images, torch.tensor([d.replaced for d in drawn]))

    def _decode(self, picture: "Image", position: int) -> "Image":
        if self.stream.config.decode == "full" or isinstance(self.view, CentreCropView):
            return finish(picture)
        crop = reconstruction_crop(self.view, self.size, self.stream.seed, position)
        return finish(picture, least=least_size(upright_size(picture), [crop]))


class LatentBatches(Dataset[LatentBatch]):
    """Micro-batches of this rank, of latents of one size."""

    def __init__(
        self, latents: LatentDataset, conditions: SampleConditions, *, batch_size: int, seed: int, rank_slice: RankSlice
    ) -> None:
        self.latents = latents
        self.conditions = conditions
        self.batch_size = batch_size
        self.seed = seed
        self.rank_slice = rank_slice

    def __getitem__(self, index: int) -> LatentBatch:
        step, rows = self.rank_slice.of(self.batch_size, index)
        first = step * self.batch_size + rows.start
        drawn = sample_indices(first, len(rows), len(self.latents), self.seed)
        draws = FlowDraws.of(self.seed, range(first, first + len(rows)), self.latents.shape)
        return cached_batch(self.latents, self.conditions, drawn, draws)

    def finish(self, batch: LatentBatch) -> LatentBatch:
        """On the device."""
        return finished(batch, self.conditions)


def finished(batch: LatentBatch, conditions: SampleConditions) -> LatentBatch:
    """With what is left to do for its conditions on the device."""
    told = conditions.finish(Told(batch.told, batch.mask))
    return batch._replace(told=told.values, mask=told.mask)


def cached_batch(
    latents: LatentDataset, conditions: SampleConditions, rows: np.ndarray, draws: FlowDraws
) -> LatentBatch:
    """These rows of a cache; half of them mirrored, where that holds mirrored ones."""
    flipped = (draws.uniform[:, 2] < 0.5).numpy() if latents.has_flipped else None
    normalised = latents.statistics.normalise(latents.rows(rows, flipped))
    return LatentBatch(normalised, *conditions.rows(rows), draws.noise, draws.normal, draws.uniform[:, :2])
