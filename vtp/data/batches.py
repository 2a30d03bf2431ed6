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
from vtp.layers.decode import finish, upright_size

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageBatch(NamedTuple):
    """Images of one micro-batch of a rank."""

    images: Tensor  # [B, 3, S, S] uint8
    replaced: Tensor  # [B], true for a sample that stands in the place of one that cannot be used


class LatentBatch(NamedTuple):
    """A micro-batch of a rank: latents, normalised per channel, with the draws that each sample is trained with."""

    latents: Tensor  # [B, d, h, w]
    labels: Tensor  # [B] int64
    noise: Tensor  # [B, d, h, w], standard normal
    normal: Tensor  # [B], standard normal, for the time
    uniform: Tensor  # [B, 2] in [0, 1), for the time and for the label


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


def count_micro_batches(blocks: int, ranks: int, largest: int, *, named: str, group: int = 1) -> int:
    """The least number of equal micro-batches of at most `largest` blocks that a rank needs; `group` blocks stay together.

    Where a group is larger than `largest`, a micro-batch is one group. Raises ValueError, which calls the number of blocks
    as it is `named`, when a rank would get parts of blocks or of groups.
    """
    if blocks % ranks:
        raise ValueError(
            f"{named} {blocks} is not a multiple of the {ranks} ranks, and a rank holds whole blocks; "
            "change the number of devices or the batch"
        )
    of_rank = blocks // ranks
    if of_rank % group:
        raise ValueError(
            f"{named} {blocks} is {of_rank} blocks for each of {ranks} ranks, which hold no whole number of groups of "
            f"{group} blocks that share a draw of stochastic depth; set drop_path.blocks to a divisor of {of_rank}"
        )
    groups, most = of_rank // group, max(1, largest // group)
    return next(
        micro_batches
        for micro_batches in range(1, groups + 1)
        if groups % micro_batches == 0 and groups <= most * micro_batches
    )


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
    """Micro-batches of this rank. What is drawn for a sample belongs to its place in the stream, and to nothing else."""

    def __init__(self, latents: LatentDataset, *, batch_size: int, seed: int, rank_slice: RankSlice) -> None:
        self.latents = latents
        self.batch_size = batch_size
        self.seed = seed
        self.rank_slice = rank_slice

    def __getitem__(self, index: int) -> LatentBatch:
        step, rows = self.rank_slice.of(self.batch_size, index)
        first = step * self.batch_size + rows.start
        drawn = sample_indices(first, len(rows), len(self.latents), self.seed)
        samples = [self._draw(position) for position in range(first, first + len(rows))]
        noise, normal, uniform = (torch.stack(values) for values in zip(*samples, strict=True))
        flipped = (uniform[:, 2] < 0.5).numpy() if self.latents.has_flipped else None
        latents = self.latents.statistics.normalise(self.latents.rows(drawn, flipped))
        return LatentBatch(latents, self.latents.labels[torch.from_numpy(drawn)], noise, normal, uniform[:, :2])

    def _draw(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, a normal and three uniform draws of a position of the stream."""
        draws = torch_draws(self.seed, "flow", position)
        noise = torch.randn(self.latents.shape, generator=draws)
        return noise, torch.randn((), generator=draws), torch.rand(3, generator=draws)
