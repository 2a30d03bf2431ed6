"""Views of an image for each objective: CLIP crops, DINOv2's multi-crop, all drawn by address.

Crops are cut and resized one by one, on the CPU. Colours change for the whole batch at once, on a GPU when there is one;
each sample has its own draws. What happens to a sample depends on
(seed, position in the stream) and not on its batch. Probabilities are the effective ones: DINOv2's blur probabilities
were inverted by its code, and its weights were trained so (0, 0.9, 0.5 for first global, second global, local).
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.draws import numpy_draws
from vtp.layers.colour import JITTER, gaussian_blur, grey
from vtp.layers.images import centre_crop
from vtp.layers.preprocess import TRIES, Box, random_box, random_square

if TYPE_CHECKING:
    from PIL.Image import Image

SOLARIZE_THRESHOLD = 128 / 255
CACHED = 1 << 18  # numbers in a working set
OF_CROP, OF_COLOURS = 4 * TRIES, 10  # uniform numbers per view
Size = tuple[int, int]  # width and height in pixels


class ClipViewConfig(Config):
    """Random crop of nearly the whole image; no flip and no colour, because captions speak of both."""

    size: int = Field(ge=1, description="side in pixels")
    scale_min: float = Field(gt=0, le=1, description="least area of the crop; the largest is the whole image")


class SharedView(Config):
    """Reconstruct the view that CLIP sees (fig. 3 of the paper shows one image)."""

    name: Literal["shared"]


class CentreCropView(Config):
    """Reconstruct the whole centre of the image, as evaluation does."""

    name: Literal["centre_crop"]


class RandomCropView(Config):
    """Reconstruct a random crop of its own."""

    name: Literal["random_crop"]
    scale_min: float = Field(gt=0, le=1, description="least area of the crop")


class ScaledCropView(Config):
    """Reconstruct a square of the scaled image at a random place, as RAE does: 256 pixels of a short side of 384."""

    name: Literal["scaled_crop"]
    scale: float = Field(ge=1, description="short side of the scaled image, in sides of the crop; RAE: 1.5")


OwnViewConfig = Annotated[CentreCropView | RandomCropView | ScaledCropView, Field(discriminator="name")]
ReconstructionViewConfig = Annotated[
    SharedView | CentreCropView | RandomCropView | ScaledCropView, Field(discriminator="name")
]


class BlurAsTrained(Config):
    """What DINOv2's weights were trained with: its code inverted the probabilities."""

    name: Literal["as_trained"]
    first: ClassVar[float] = 0.0
    second: ClassVar[float] = 0.9
    local: ClassVar[float] = 0.5


class BlurAsIntended(Config):
    """What DINOv2's configuration says."""

    name: Literal["as_intended"]
    first: ClassVar[float] = 1.0
    second: ClassVar[float] = 0.1
    local: ClassVar[float] = 0.5


class BlurProbabilities(Config):
    """Others."""

    name: Literal["probabilities"]
    first: float = Field(ge=0, le=1, description="probability of blur in the first global view")
    second: float = Field(ge=0, le=1, description="probability of blur in the second global view")
    local: float = Field(ge=0, le=1, description="probability of blur in each local view")


class SslViewsConfig(Config):
    """Two global and several local crops with colour augmentation (DINOv2)."""

    global_size: int = Field(ge=1, description="side of the two global crops in pixels")
    local_size: int = Field(ge=1, description="side of the local crops in pixels")
    local_views: int = Field(ge=0, description="number of local crops")
    global_scale_min: float = Field(gt=0, le=1, description="area of a global crop is at least this share")
    local_scale_min: float = Field(gt=0, le=1, description="area of a local crop is at least this share")
    local_scale_max: float = Field(gt=0, le=1, description="area of a local crop is at most this share")
    flip: float = Field(ge=0, le=1, description="probability of a horizontal flip")
    jitter: float = Field(ge=0, le=1, description="probability of colour jitter")
    brightness: float = Field(ge=0, le=1, description="largest change of the factor 1 on brightness")
    contrast: float = Field(ge=0, le=1, description="largest change of the factor 1 on contrast")
    saturation: float = Field(ge=0, le=1, description="largest change of the factor 1 on saturation")
    hue: float = Field(ge=0, le=0.5, description="largest shift of the hue, in turns")
    jitter_order: Literal["fixed", "random"] = Field(
        description="brightness, contrast, saturation and hue change in this order, or in one drawn for every view (DINOv2)"
    )
    grey: float = Field(ge=0, le=1, description="probability of a grey image")
    blur: BlurAsTrained | BlurAsIntended | BlurProbabilities = Field(discriminator="name")
    blur_sigma_max: float = Field(
        gt=0, description="largest standard deviation of the blur in pixels; the least is 0.1"
    )
    solarize: float = Field(ge=0, le=1, description="probability, second global view only")

    @property
    def colour_draws(self) -> int:
        """Numbers behind the colours of a view: that of the jitter's order comes last."""
        return OF_COLOURS + (self.jitter_order == "random")


class Crop(NamedTuple):
    """A random crop before the image is known: torchvision's `RandomResizedCrop` with its aspects of 3/4 to 4/3.

    Or a square of a given side.
    """

    size: int  # side of the result in pixels
    area: tuple[float, float]  # in shares of the image
    draws: np.ndarray  # [OF_CROP] uniform numbers
    side: float | None = None  # of a square in its place, in shares of the short side

    def box(self, whole: Size) -> Box:
        """Where it lies in an image of that size."""
        if self.side is not None:
            return random_square(*whole, self.draws[:2], side=self.side)
        return random_box(*whole, self.draws.reshape(TRIES, 4), scale=self.area)

    def of(self, image: Tensor, whole: Size) -> Tensor:
        """The crop [1, 3, size, size] of [1, 3, H, W], in whole pixels, resized bicubically as Pillow does.

        The box is drawn in the `whole` image, of which `image` may be a smaller decode, so that it lies in the same place
        in both: whether a try lies within the image is a matter of single pixels.
        """
        box, (height, width) = self.box(whole), image.shape[2:]
        columns = _scaled(box.left, box.width, width / whole[0])
        rows = _scaled(box.top, box.height, height / whole[1])
        return F.interpolate(image[:, :, rows, columns], size=(self.size, self.size), mode="bicubic", antialias=True)


def _scaled(start: int, length: int, factor: float) -> slice:
    first = round(start * factor)
    return slice(first, max(first + 1, round((start + length) * factor)))


def clip_crop(config: ClipViewConfig, seed: int, position: int) -> Crop:
    """CLIP's crop of the sample at `position` of the stream."""
    return Crop(config.size, (config.scale_min, 1.0), numpy_draws(seed, "clip_view", position).random(OF_CROP))


def reconstruction_crop(config: RandomCropView | ScaledCropView, size: int, seed: int, position: int) -> Crop:
    """The crop to reconstruct, when it is no view of another objective."""
    draws = numpy_draws(seed, "reconstruction_view", position).random(OF_CROP)
    if isinstance(config, ScaledCropView):
        return Crop(size, (1.0, 1.0), draws, 1 / config.scale)
    return Crop(size, (config.scale_min, 1.0), draws)


def ssl_crops(config: SslViewsConfig, seed: int, position: int) -> tuple[list[Crop], np.ndarray]:
    """The crops of self-supervision, global ones first, and the draws of their colours [V, config.colour_draws]."""
    uniform = numpy_draws(seed, "ssl_views", position).random((2 + config.local_views, OF_CROP + OF_COLOURS))
    whole, part = (config.global_scale_min, 1.0), (config.local_scale_min, config.local_scale_max)
    crops = [Crop(config.global_size, whole, draws[:OF_CROP]) for draws in uniform[:2]]
    crops += [Crop(config.local_size, part, draws[:OF_CROP]) for draws in uniform[2:]]
    if config.jitter_order == "random":
        uniform = np.column_stack([uniform, numpy_draws(seed, "jitter_order", position).random(len(uniform))])
    return crops, uniform[:, OF_CROP:]


def least_size(whole: Size, crops: Sequence[Crop]) -> Size:
    """The smallest size of the whole image that enlarges no crop beyond what the full size would."""
    width, height = whole
    boxes = [crop.box(whole) for crop in crops]
    scale = max(crop.size / min(box.width, box.height) for crop, box in zip(crops, boxes, strict=True))
    return min(width, math.ceil(scale * width)), min(height, math.ceil(scale * height))


def clip_batch(
    images: Sequence["Image"],
    config: ClipViewConfig,
    seed: int,
    positions: np.ndarray,
    wholes: Sequence[Size] | None = None,
) -> Tensor:
    """Crops [B, 3, S, S] uint8; `positions` are the places of the images in the stream.

    `wholes` are the sizes of the whole images, of which `images` may be smaller decodes; None: their own.
    """
    drawn = [clip_crop(config, seed, position) for position in positions.tolist()]
    return _cut(drawn, images, wholes, config.size)


def reconstruction_batch(
    images: Sequence["Image"],
    config: CentreCropView | RandomCropView | ScaledCropView,
    size: int,
    seed: int,
    positions: np.ndarray,
    wholes: Sequence[Size] | None = None,
) -> Tensor:
    """Crops [B, 3, size, size] uint8 that are no view of another objective; `wholes` as in `clip_batch`."""
    if isinstance(config, CentreCropView):
        return _stack([_pixels(centre_crop(image, size)) for image in images], size)
    drawn = [reconstruction_crop(config, size, seed, position) for position in positions.tolist()]
    return _cut(drawn, images, wholes, size)


class SslViews(NamedTuple):
    """Views of self-supervision, uint8, and what is still to happen to their colours."""

    whole: Tensor  # [B, 2, 3, G, G]
    local: Tensor  # [B, L, 3, S, S]
    draws: Tensor  # [B, 2 + L, config.colour_draws] uniform numbers; no rows when nothing is left to do


def ssl_batch(
    images: Sequence["Image"], config: SslViewsConfig, seed: int, positions: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Global views [B, 2, 3, G, G] and local views [B, L, 3, S, S], uint8."""
    whole, local, _ = recolour(ssl_views(images, config, seed, positions), config)
    return whole, local


def ssl_views(
    images: Sequence["Image"],
    config: SslViewsConfig,
    seed: int,
    positions: np.ndarray,
    wholes: Sequence[Size] | None = None,
) -> SslViews:
    """The crops alone, before their colours change; `wholes` as in `clip_batch`."""
    views: list[list[Tensor]] = [[] for _ in range(2 + config.local_views)]
    draws = []
    for image, whole, position in zip(images, wholes or _sizes(images), positions.tolist(), strict=True):
        crops, uniform = ssl_crops(config, seed, position)
        draws.append(uniform)
        pixels = _pixels(image)
        for view, crop in zip(views, crops, strict=True):
            view.append(crop.of(pixels, whole))
    whole = torch.stack([_stack(view, config.global_size) for view in views[:2]], 1)
    local = [_stack(view, config.local_size) for view in views[2:]]
    empty = torch.empty(len(images), 0, 3, config.local_size, config.local_size, dtype=torch.uint8)
    colours = np.array(draws, dtype=np.float32).reshape(len(images), len(views), config.colour_draws)
    return SslViews(whole, torch.stack(local, 1) if local else empty, torch.from_numpy(colours))


def recolour(views: SslViews, config: SslViewsConfig) -> SslViews:
    """Flip and change the colours of every view, on the device that holds them."""
    reach = math.ceil(2 * config.blur_sigma_max)  # of the widest blur, so that no sample depends on its batch
    first, second = (
        _coloured(views.whole[:, view], views.draws[:, view], config, blur, reach, solarize=view == 1)
        for view, blur in enumerate((config.blur.first, config.blur.second))
    )
    local = _coloured(views.local.flatten(0, 1), views.draws[:, 2:].flatten(0, 1), config, config.blur.local, reach)
    return SslViews(torch.stack([first, second], 1), local.unflatten(0, views.local.shape[:2]), views.draws[:0])


def _coloured(
    pixels: Tensor, draws: Tensor, config: SslViewsConfig, blur: float, reach: int, *, solarize: bool = False
) -> Tensor:
    """One kind of view, [B, 3, H, W] uint8."""
    if not len(pixels):
        return pixels
    # A few images at a time stay in the cache of a core; a GPU takes all of them.
    size = max(1, CACHED // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
    parts = []
    for some, own in zip(pixels.split(size), draws.split(size), strict=True):
        colours = _Colours.of(own, config, blur, solarize=solarize)
        parts.append(_recolour(some.float().div_(255), colours, reach).mul_(255).round_().to(torch.uint8))
    return torch.cat(parts)


def _cut(crops: list[Crop], images: Sequence["Image"], wholes: Sequence[Size] | None, side: int) -> Tensor:
    trios = zip(crops, images, wholes or _sizes(images), strict=True)
    return _stack([crop.of(_pixels(image), whole) for crop, image, whole in trios], side)


def _sizes(images: Sequence["Image"]) -> list[Size]:
    return [image.size for image in images]


def _pixels(image: "Image") -> Tensor:
    """[1, 3, H, W] uint8, channels last as Pillow has them: torch resizes those several times faster than Pillow."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _stack(crops: list[Tensor], size: int) -> Tensor:
    """[B, 3, size, size], channels first: colours change plane by plane."""
    return torch.cat(crops).contiguous() if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)


class _Colours(NamedTuple):
    """What happens to each image of a batch; factors are [B, 1, 1, 1], conditions are [B]."""

    flip: Tensor
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor
    order: (
        Tensor | None
    )  # of the jitter: numbers of JITTER in the order in which they come, [B, 4]; None: as they stand

    @classmethod
    def of(cls, uniform: Tensor, config: SslViewsConfig, blur: float, *, solarize: bool) -> "_Colours":
        columns = uniform.unbind(1)

        def factor(column: int, strength: float) -> Tensor:
            return (1 + (2 * columns[column] - 1) * strength).view(-1, 1, 1, 1)

        return cls(
            flip=columns[0] < config.flip,
            jitter=columns[1] < config.jitter,
            brightness=factor(2, config.brightness),
            contrast=factor(3, config.contrast),
            saturation=factor(4, config.saturation),
            hue=factor(5, config.hue) - 1,
            grey=columns[6] < config.grey,
            blur=columns[7] < blur,
            sigma=0.1 + columns[8] * (config.blur_sigma_max - 0.1),
            solarize=columns[9] < (config.solarize if solarize else 0.0),
            order=_orders(columns[OF_COLOURS]) if config.jitter_order == "random" else None,
        )


def _orders(uniform: Tensor) -> Tensor:
    """Permutations [B, 4] by numbers [B] in [0, 1), all as likely as each other."""
    every = torch.tensor(list(permutations(range(len(JITTER)))), device=uniform.device)
    return every[(uniform * len(every)).long().clamp_max(len(every) - 1)]


def _recolour(x: Tensor, colours: _Colours, reach: int) -> Tensor:
    """Flip, jitter, grey, blur, solarize, on [0, 1]."""

    def jitter(x: Tensor, *factors: Tensor) -> Tensor:
        for change, factor in zip(JITTER, factors, strict=True):
            x = change(x, factor)
        return x

    x = torch.where(_wide(colours.flip), x.flip(3), x)
    factors = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
    if colours.order is None:
        x = _some(x, colours.jitter, jitter, *factors)
    else:
        for next_ones in colours.order.unbind(1):
            for number, (change, factor) in enumerate(zip(JITTER, factors, strict=True)):
                x = _some(x, colours.jitter & (next_ones == number), change, factor)
    x = _some(x, colours.grey, lambda x: grey(x).expand_as(x))
    x = _some(x, colours.blur, lambda x, sigma: gaussian_blur(x, sigma, reach), colours.sigma)
    return _some(x, colours.solarize, lambda x: torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x))


def _some(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """`change(x, *factors)` for the `chosen` images [B]; may write into `x`."""
    if x.device.type != "cpu":  # all of them, without waiting for the device to say which ones
        return torch.where(_wide(chosen), change(x, *factors), x)
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        x[rows] = change(x[rows], *(factor[rows] for factor in factors))
    return x


def _wide(condition: Tensor) -> Tensor:
    return condition.view(-1, 1, 1, 1)
