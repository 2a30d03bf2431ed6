"""How pictures become the squares that an encoder is judged on, by the names of the protocols.

Each is held equal to torchvision's transforms on PIL images, pixel for pixel. `images.centre_crop` is ADM's, for
reconstruction.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.draws import numpy_draws
from vtp.layers.decode import middle

if TYPE_CHECKING:
    from PIL.Image import Image

TRIES = 10  # of a random box to lie within the picture
ASPECTS = (3 / 4, 4 / 3)  # least and largest width over height of a random box


def squash(image: "Image", size: int) -> "Image":
    """The whole picture, bilinearly, whatever its aspect: VTP's zero-shot protocol, `Resize((size, size))`."""
    from PIL.Image import Resampling

    return image.resize((size, size), Resampling.BILINEAR)


def resize_and_crop(image: "Image", *, resize: int, size: int) -> "Image":
    """Shortest side to `resize`, bicubically, then the centre: CLIP's protocol, `Resize(resize)`, `CenterCrop(size)`."""
    from PIL.Image import Resampling

    image = middle(image)
    short = min(image.size)
    if short != resize:
        width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


class Box(NamedTuple):
    """Part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


def random_box(
    width: int,
    height: int,
    uniform: np.ndarray,
    *,
    scale: tuple[float, float],
    aspects: tuple[float, float] = ASPECTS,
) -> Box:
    """The box of torchvision's `RandomResizedCrop.get_params`, from numbers [10, 4] in [0, 1): area, aspect, left, top.

    Its area is a share of the picture's between those of `scale`, its aspect (width over height) between `aspects`,
    uniform in the logarithm. A try that does not lie within the picture gives way to the next; after the last comes the
    largest centred box of such an aspect, whatever its area.
    """
    least, largest = aspects
    for area, aspect, left, top in uniform.tolist():
        pixels = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(math.log(least) + (math.log(largest) - math.log(least)) * aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(left * (width - w + 1)), int(top * (height - h + 1)), w, h)
    w, h = min(width, round(height * largest)), min(height, round(width / least))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def random_square(width: int, height: int, uniform: np.ndarray, *, side: float) -> Box:
    """A square of `side` times the short side at a place by two numbers in [0, 1): left, top."""
    pixels = max(1, round(side * min(width, height)))
    left, top = uniform.tolist()
    return Box(int(left * (width - pixels + 1)), int(top * (height - pixels + 1)), pixels, pixels)


def resized_box(image: "Image", box: Box, size: int) -> "Image":
    """A box of the picture, bicubically: `resized_crop`."""
    from PIL.Image import Resampling

    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return part if part.size == (size, size) else part.resize((size, size), Resampling.BICUBIC)


class Squash(NamedTuple):
    """A view by `squash`."""

    size: int

    def of(self, image: "Image", row: int) -> "Image":
        """[size, size] of any picture."""
        return squash(image, self.size)


class CentreView(NamedTuple):
    """A view by `resize_and_crop`."""

    resize: int
    size: int

    def of(self, image: "Image", row: int) -> "Image":
        """[size, size] of any picture."""
        return resize_and_crop(image, resize=self.resize, size=self.size)


class RandomView(NamedTuple):
    """`RandomResizedCrop` and a flip, drawn by (seed, epoch, row)."""

    size: int
    scale_min: float
    flip: float
    seed: int
    epoch: int

    def of(self, image: "Image", row: int) -> "Image":
        """[size, size] of the picture at `row` of its data set."""
        from PIL.Image import Transpose

        uniform = numpy_draws(self.seed, "probe_view", self.epoch, row).random(4 * TRIES + 1)
        box = random_box(*image.size, uniform[1:].reshape(TRIES, 4), scale=(self.scale_min, 1.0))
        view = resized_box(image, box, self.size)
        return view.transpose(Transpose.FLIP_LEFT_RIGHT) if uniform[0] < self.flip else view


View = Squash | CentreView | RandomView
