"""What a reconstruction lacks (paper eq. 1)."""

from typing import Literal, NamedTuple

from torch import Tensor

from vtp.layers.images import denormalise
from vtp.losses.perceptual import PerceptualDistance

L1Space = Literal["normalised", "unit", "pixels"]  # ImageNet-normalised; in [-1, 1]; in [0, 1]


class Distance(NamedTuple):
    """Batch means."""

    l1: Tensor
    perceptual: Tensor


def reconstruction_distance(
    perceptual: PerceptualDistance, reconstructions: Tensor, images: Tensor, *, l1_space: L1Space = "normalised"
) -> Distance:
    """L1 and the perceptual distance of ImageNet-normalised images, in float32 (paper eq. 1).

    The perceptual distance is taken in [-1, 1], L1 there (`unit`), in normalised space, or in [0, 1] (`pixels`).
    """
    reconstructions, images = reconstructions.float(), images.float()
    ours, theirs = denormalise(reconstructions) * 2 - 1, denormalise(images) * 2 - 1
    pair = (reconstructions, images) if l1_space == "normalised" else (ours, theirs)
    l1 = (pair[0] - pair[1]).abs().mean()
    return Distance(l1 / 2 if l1_space == "pixels" else l1, perceptual(ours, theirs).mean())
