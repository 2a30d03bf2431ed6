"""Batches of one size each, of cached latents and of pictures (`vtp.data.size_order`)."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from vtp.config import Config
from vtp.data.batches import FlowDraws, LatentBatch, RankSlice, cached_batch, finished
from vtp.data.conditions import SampleConditions
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.data.replacements import Replacements
from vtp.data.size_order import SizeOrder
from vtp.data.sized_latents import SizedLatents
from vtp.data.sizes import PictureSize, SizesConfig
from vtp.data.stream import require_memory, require_room
from vtp.device import Precision
from vtp.draws import numpy_draws
from vtp.layers.decode import finish, open_header, upright_size
from vtp.layers.images import cover_crop, cover_scale

if TYPE_CHECKING:
    from PIL.Image import Image

WINDOW = "train_generator.images.window"


class EncodedImagesConfig(Config):
    """Pictures that are encoded while a generator learns them."""

    sizes: SizesConfig
    labelled: bool = Field(
        description="pictures with a class alone; false: all, and those without what is told train the null condition"
    )
    horizontal_flips: bool = Field(description="half of the pictures are mirrored, by chance")
    precision: Precision = Field(description="precision of the encoder")
    window: int | None = Field(ge=1, description="shards that are shuffled together; null: all of them at once")
    decode: Literal["full", "reduced"] = Field(
        description="whether JPEGs much larger than a batch's pictures are decoded in full, or only as far as those need"
    )
    max_replaced: float = Field(ge=0, le=1, description="largest share of pictures that cannot be used")
    statistics_images: int | None = Field(
        ge=2, description="training pictures behind mean and deviation, in whole batches; null: those of --latents"
    )


class PictureBatch(NamedTuple):
    """A micro-batch of a rank: pictures of one size, with what their latents are trained with."""

    images: Tensor  # [B, 3, H, W] uint8
    told: Tensor  # as in LatentBatch
    mask: Tensor
    noise: Tensor
    normal: Tensor
    uniform: Tensor
    replaced: Tensor
    numbers: Tensor  # [B] int64, of the samples in their split


class SizedLatentBatches(Dataset[LatentBatch]):
    """Micro-batches of this rank, of cached latents of several sizes."""

    def __init__(
        self,
        latents: SizedLatents,
        conditions: Callable[[LatentDataset], SampleConditions],
        order: SizeOrder,
        *,
        seed: int,
        rank_slice: RankSlice,
    ) -> None:
        self.latents, self.order, self.seed, self.rank_slice = latents, order, seed, rank_slice
        self.conditions = {place: conditions(part) for place, part in latents.parts.items()}

    def __getitem__(self, index: int) -> LatentBatch:
        step, rows = self.rank_slice.of(self.order.batch_size, index)
        batch = self.order.batch(step)
        latents = self.latents.of_size(batch.ratio, batch.edge)
        draws = FlowDraws.of(self.seed, _places(step, self.order.batch_size, rows), latents.shape)
        conditions = self.conditions[batch.ratio, batch.edge]
        return cached_batch(latents, conditions, self.latents.rows(batch)[rows.start : rows.stop], draws)

    def finish(self, batch: LatentBatch) -> LatentBatch:
        """On the device."""
        return finished(batch, next(iter(self.conditions.values())))  # all finish alike


class PictureBatches(Dataset[PictureBatch]):
    """Micro-batches of this rank, of pictures; `latent`: channels of their latents, and pixels of one along a side.

    A picture that cannot be decoded gives way to another of its batch, which is of the same ratio. Raises ConfigError for
    windows that memory, or the folder for fetched shards, cannot hold.
    """

    def __init__(
        self,
        images: ShardDataset,
        conditions: SampleConditions,
        order: SizeOrder,
        config: EncodedImagesConfig,
        *,
        latent: tuple[int, int],
        seed: int,
        rank_slice: RankSlice,
    ) -> None:
        require_memory(images.sizes, config.window, WINDOW)
        require_room(images, config.window, WINDOW)
        self.images, self.order, self.config, self.seed, self.rank_slice = images, order, config, seed, rank_slice
        self.conditions = conditions
        self._latent = latent
        self._sizes = config.sizes.sizes
        self._replacements = Replacements(config.max_replaced, "train_generator.images.max_replaced")

    def __getitem__(self, index: int) -> PictureBatch:
        step, rows = self.rank_slice.of(self.order.batch_size, index)
        if self.images.cache is not None:
            self.images.settle(*self.order.shards_around(step))
        batch = self.order.batch(step)
        size, places = self._sizes[batch.ratio][batch.edge], _places(step, self.order.batch_size, rows)
        channels, pixels = self._latent
        draws = FlowDraws.of(self.seed, places, (channels, size.height // pixels, size.width // pixels))
        read = [self._read(batch.numbers, row, place, size) for row, place in zip(rows, places, strict=True)]
        numbers, pictures, replaced = zip(*read, strict=True)
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        if self.config.horizontal_flips:
            images = torch.where((draws.uniform[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        told, drawn = self.conditions.rows(np.array(numbers)), (draws.noise, draws.normal, draws.uniform[:, :2])
        return PictureBatch(
            images.contiguous(), *told, *drawn, replaced=torch.tensor(replaced), numbers=torch.tensor(numbers)
        )

    def _read(self, batch: np.ndarray, row: int, place: int, size: PictureSize) -> tuple[int, np.ndarray, bool]:
        """The number of a sample, its picture [H, W, 3], and whether it stands in the place of another."""

        def numbers() -> Iterator[int]:
            yield int(batch[row])
            for attempt in count():
                yield int(numpy_draws(self.seed, "replacement", place, attempt).choice(batch))

        read = partial(self._picture, size=size)
        (number, picture), replaced = self._replacements.first_usable(numbers(), read, self.images.name)
        return number, picture, replaced

    def _picture(self, number: int, size: PictureSize) -> tuple[int, np.ndarray]:
        picture, least = open_header(self.images.content(number)), None
        if self.config.decode == "reduced":
            least = _least_size(picture, size)
        return number, np.asarray(cover_crop(finish(picture, least=least), *size))


def _least_size(picture: "Image", size: PictureSize) -> tuple[int, int] | None:
    """Width and height at which an upright picture just covers `size`."""
    width, height = upright_size(picture)
    scale = min(1.0, cover_scale((width, height), *size))
    return ceil(width * scale), ceil(height * scale)


def _places(step: int, batch_size: int, rows: range) -> range:
    """Places in the stream of rows of a step."""
    return range(step * batch_size + rows.start, step * batch_size + rows.stop)
