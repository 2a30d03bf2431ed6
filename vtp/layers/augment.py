"""DiffAug (Zhao et al. 2020): differentiable augmentation of what a discriminator sees, real and fake images alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.device import send


class AugmentationConfig(Config):
    """Largest changes."""

    translation: float = Field(ge=0, lt=1, description="largest shift as a share of the side")
    brightness: float = Field(ge=0, description="largest shift, in units of [-1, 1]")
    saturation: float = Field(ge=0, le=1, description="largest change of the factor 1")
    contrast: float = Field(ge=0, le=1, description="largest change of the factor 1")


class Augmentation(NamedTuple):
    """What is done to each image of a batch."""

    brightness: Tensor  # [B, 1, 1, 1], added
    saturation: Tensor  # [B, 1, 1, 1], factor of the distance to the grey image
    contrast: Tensor  # [B, 1, 1, 1], factor of the distance to the mean
    shift: Tensor  # [B, 2] int64, pixels down and right


def draw_augmentation(
    size: Sequence[int], config: AugmentationConfig, indices: range, draws: Callable[[int], torch.Generator]
) -> Augmentation:
    """For images of `size` (H, W): what happens to image `index` comes from the generator `draws(index)` alone."""
    uniform = torch.stack([torch.rand(5, generator=draws(index)) for index in indices], dim=1)
    return augmentation_of(uniform, size, config)


def augmentation_of(uniform: Tensor, size: Sequence[int], config: AugmentationConfig) -> Augmentation:
    """What numbers [5, B], uniform in [0, 1), come to: shifts down and right, brightness, saturation, contrast.

    All whole shifts up to the largest are as likely as each other.
    """
    reach = (torch.tensor(size) * config.translation).round()
    shift = reach - (uniform[:2].T * (2 * reach + 1)).floor()
    brightness, saturation, contrast = (uniform[2:] * 2 - 1)[:, :, None, None, None]
    return Augmentation(
        brightness * config.brightness, 1 + saturation * config.saturation, 1 + contrast * config.contrast, shift.long()
    )


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """Differentiable translation with zeros beyond the border, then brightness, saturation, contrast of what that gives.

    The order is RAE's; in the first implementation of DiffAug colours come first, and its zeros keep their value.
    """
    draws = Augmentation(*(send(value, images.device) for value in draws))
    x = _moved(images, draws.shift) + draws.brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draws.saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * draws.contrast


def _moved(images: Tensor, shift: Tensor) -> Tensor:
    count, _, height, width = images.shape
    # One pixel of zeros on every side, to which all positions beyond the border are clamped.
    padded = F.pad(images, [1] * 4)
    rows = (torch.arange(height, device=images.device) + 1 - shift[:, :1]).clamp(0, height + 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + 1 - shift[:, 1:]).clamp(0, width + 1)  # [B, W]
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
