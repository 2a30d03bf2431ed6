"""Joint pre-training batches (paper 3.6): what each objective sees of a step, drawn by address and not by history."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from vtp.config import Config
from vtp.data.batches import RankSlice
from vtp.data.masking import MaskConfig, draw_masks
from vtp.data.stream import Drawn, Stream, StreamConfig
from vtp.data.views import (
    CentreCropView,
    ClipViewConfig,
    Crop,
    RandomCropView,
    ReconstructionViewConfig,
    ScaledCropView,
    SharedView,
    Size,
    SslViews,
    SslViewsConfig,
    clip_batch,
    clip_crop,
    least_size,
    recolour,
    reconstruction_batch,
    reconstruction_crop,
    ssl_crops,
    ssl_views,
)
from vtp.draws import numpy_draws
from vtp.layers.decode import finish, upright_size

if TYPE_CHECKING:
    from PIL.Image import Image


class PretrainBatch(NamedTuple):
    """One micro-batch of a rank. The part of an objective that is switched off is empty; pictures are uint8."""

    clip_images: Tensor  # [B_clip, 3, S, S]
    tokens: Tensor  # [B_clip, L]
    global_views: Tensor  # [B_ssl, 2, 3, G, G]
    local_views: Tensor  # [B_ssl, views, 3, s, s]
    masks: Tensor  # [B_ssl, 2, N], true where the student sees the mask token
    masked: Tensor  # [M], the true entries of masks, counted through
    mask_weights: Tensor  # [M], one over the number of true entries of the same crop
    rec_images: Tensor  # [B_rec, 3, R, R]
    colours: Tensor  # [B_ssl, 2 + views, 10], draws of colour changes that wait for the device; no rows: none
    replaced: Tensor  # [blocks, samples of a block], true for one that stands in the place of one that cannot be used


class BatchSizes(Config):
    """Samples per step and objective over all devices (paper 3.6: 16k, 4k, 2k)."""

    clip: int = Field(ge=1, description="image-text pairs of a step, over all devices")
    ssl: int = Field(ge=1, description="images of self-supervision in a step, over all devices")
    reconstruction: int = Field(
        ge=1, description="images that are reconstructed in a step, over all devices; the number of blocks"
    )

    @model_validator(mode="after")
    def _nested(self) -> Self:
        for name, size in (("clip", self.clip), ("ssl", self.ssl)):
            if size % self.reconstruction:
                raise ValueError(
                    f"{name} {size} is not a multiple of reconstruction {self.reconstruction}: a batch consists of blocks "
                    "with one image to reconstruct"
                )
        if self.clip < self.ssl:
            raise ValueError(
                f"clip {self.clip} is below ssl {self.ssl}: the smaller is drawn from the larger (paper 3.6)"
            )
        return self


Subsets = Literal["independent", "nested", "disjoint", "contiguous"]


class PretrainDataConfig(Config):
    """Views of the three objectives."""

    stream: StreamConfig
    batch: BatchSizes
    subsets: Subsets = Field(
        description="images of self-supervision and reconstruction within a block: drawn independently, one from "
        "the other, without overlap, or the first ones"
    )
    clip_view: ClipViewConfig
    reconstruction_view: ReconstructionViewConfig
    ssl_views: SslViewsConfig
    masks: MaskConfig

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        self.stream.require_batch(self.batch.reconstruction, "batch.reconstruction")  # the others are multiples of it
        return self


class ActiveBatch(NamedTuple):
    """Batch sizes of the objectives that are switched on, 0 for the others; `pool` is what a step draws from."""

    clip: int
    ssl: int
    reconstruction: int

    @property
    def pool(self) -> int:
        return max(self)


class PretrainBatches(Dataset[PretrainBatch]):
    """Joint batches (paper 3.6): one item per micro-batch of this rank.

    The global batch of a step is a stretch of the endless stream of samples. It is cut into B_rec blocks of consecutive
    positions; each block draws its own images for self-supervision and reconstruction, and its masks, from its address.
    So what is drawn depends neither on ranks nor on micro-batches, and every block has the same shapes.

    With `colour_later`, colours change in `finish`, on the device of the batch, and not in the worker.
    """

    def __init__(
        self,
        stream: Stream,
        config: PretrainDataConfig,
        *,
        active: ActiveBatch,
        image_size: int,
        patch_size: int,
        tokenize: Callable[[Sequence[str]], Tensor] | None,
        rank_slice: RankSlice,
        colour_later: bool = False,
    ) -> None:
        if len(stream) < active.pool:
            raise ValueError(
                f"the training shards hold {len(stream)} samples and a batch takes {active.pool}; use more data or a "
                "smaller data.batch"
            )
        self.stream = stream
        self.config = config
        self.active = active
        self.image_size = image_size
        self.patch_size = patch_size
        self.tokenize = tokenize
        self.seed = stream.seed
        self.rank_slice = rank_slice
        self.colour_later = colour_later

    def __getitem__(self, index: int) -> PretrainBatch:
        step, blocks = self.rank_slice.of(self.config.batch.reconstruction, index)
        size = self.active.pool // self.config.batch.reconstruction  # of a block
        drawn = [self._subsets(step, block, size) for block in blocks]
        # Positions within the micro-batch, and in the stream: the addresses of every view's draws.
        for_ssl = np.concatenate([block * size + subset.ssl for block, subset in enumerate(drawn)])
        for_rec = np.concatenate([block * size + subset.reconstruction for block, subset in enumerate(drawn)])
        for_clip = np.arange(len(blocks) * size if self.active.clip else 0)
        first = step * self.active.pool + blocks.start * size
        samples = self._read(first, len(blocks) * size, _Places(for_clip, for_ssl, for_rec))
        config, seed = self.config, self.seed

        def of(places: np.ndarray) -> "list[Image]":
            return [samples[place].image for place in places.tolist()]

        def wholes(places: np.ndarray) -> list[Size]:
            return [samples[place].whole for place in places.tolist()]

        clip_images = clip_batch(of(for_clip), config.clip_view, seed, first + for_clip, wholes(for_clip))
        views = ssl_views(of(for_ssl), config.ssl_views, seed, first + for_ssl, wholes(for_ssl))
        if not self.colour_later:
            views = recolour(views, config.ssl_views)
        if isinstance(config.reconstruction_view, SharedView):
            rec_images = (
                clip_images[torch.from_numpy(for_rec)]
                if self.active.clip
                else clip_batch(of(for_rec), config.clip_view, seed, first + for_rec, wholes(for_rec))
            )
        else:
            rec_images = reconstruction_batch(
                of(for_rec), config.reconstruction_view, self.image_size, seed, first + for_rec, wholes(for_rec)
            )
        captions = [samples[place].caption for place in for_clip.tolist()]
        tokens = self.tokenize(captions) if self.tokenize and captions else torch.empty(0, 0, dtype=torch.int64)
        masks = self._masks(step, blocks)
        weights = (1 / masks.sum(2, keepdim=True).clamp_min(1)).expand_as(masks)
        return PretrainBatch(
            clip_images,
            tokens,
            views.whole,
            views.local,
            masks=masks,
            masked=masks.flatten().nonzero()[:, 0],
            mask_weights=weights[masks],
            rec_images=rec_images,
            colours=views.draws,
            replaced=torch.tensor(
                [place in samples and samples[place].replaced for place in range(len(blocks) * size)]
            ).unflatten(0, (len(blocks), size)),
        )

    def finish(self, batch: PretrainBatch) -> PretrainBatch:
        """What is left to do where the batch is now."""
        if not len(batch.colours):
            return batch
        views = recolour(SslViews(batch.global_views, batch.local_views, batch.colours), self.config.ssl_views)
        return batch._replace(global_views=views.whole, local_views=views.local, colours=views.draws)

    def _read(self, first: int, count: int, places: "_Places") -> dict[int, Drawn]:
        """The samples that any objective sees, by place in the micro-batch; each is decoded once."""
        numbers = self.stream.numbers(first, count, batch=self.active.pool)
        in_clip, in_ssl, in_rec = (set(part.tolist()) for part in places)
        config, seed, captioned = self.config, self.seed, bool(self.active.clip)

        def crops(place: int) -> list[Crop] | None:
            """Every crop of the picture, or None when all of it is needed."""
            view, picture_crops = config.reconstruction_view, []
            if place in in_rec and isinstance(view, CentreCropView):
                return None
            if place in in_rec and isinstance(view, RandomCropView | ScaledCropView):
                picture_crops.append(reconstruction_crop(view, self.image_size, seed, first + place))
            if place in in_clip or (place in in_rec and isinstance(view, SharedView)):
                picture_crops.append(clip_crop(config.clip_view, seed, first + place))
            return picture_crops + (ssl_crops(config.ssl_views, seed, first + place)[0] if place in in_ssl else [])

        def decode(picture: "Image", place: int) -> "Image":
            wanted = crops(place) if config.stream.decode == "reduced" else None
            return finish(picture, least=least_size(upright_size(picture), wanted) if wanted else None)

        return {
            place: self.stream.read(
                int(numbers[place]), first + place, decode=partial(decode, place=place), captioned=captioned
            )
            for place in sorted(in_clip | in_ssl | in_rec)
        }

    def _subsets(self, step: int, block: int, size: int) -> "_BlockSubsets":
        """Who in a block of `size` positions is seen by self-supervision, and who is reconstructed."""
        ssl, rec = (part // self.config.batch.reconstruction for part in self.active[1:])  # of a block, one or none
        draws = numpy_draws(self.seed, "subsets", step, block)
        order, other = draws.permutation(size), draws.permutation(size)
        match self.config.subsets:
            case "independent":
                return _BlockSubsets(order[:ssl], other[:rec])
            case "nested":
                return _BlockSubsets(order[:ssl], order[:rec])
            case "disjoint":
                return _BlockSubsets(order[:ssl], order[ssl : ssl + rec])
            case "contiguous":
                return _BlockSubsets(np.arange(ssl), np.arange(rec))

    def _masks(self, step: int, blocks: range) -> Tensor:
        side = self.config.ssl_views.global_size // self.patch_size
        samples = self.active.ssl // self.config.batch.reconstruction
        drawn = []
        for block in blocks:
            draws = numpy_draws(self.seed, "masks", step, block)
            drawn.append(draw_masks(2 * samples, side, side, self.config.masks, draws).unflatten(0, (samples, 2)))
        return torch.cat(drawn)


class _Places(NamedTuple):
    """Positions within a micro-batch, by objective."""

    clip: np.ndarray
    ssl: np.ndarray
    reconstruction: np.ndarray


class _BlockSubsets(NamedTuple):
    """Positions within a block."""

    ssl: np.ndarray
    reconstruction: np.ndarray
