"""DiffAug (Zhao et al. 2020): differentiable augmentation of what a discriminator sees, real and fake images alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config


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
    drawn = torch.stack([torch.rand(5, generator=draws(index)) for index in indices]) * 2 - 1  # [B, 5]
    colour = drawn.T[:3, :, None, None, None]
    reach = torch.tensor(size) * config.translation
    shift = (drawn[:, 3:] * reach).round().long()
    return Augmentation(
        colour[0] * config.brightness, 1 + colour[1] * config.saturation, 1 + colour[2] * config.contrast, shift
    )


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """Differentiable brightness, saturation, contrast, and translation with zeros beyond the border."""
    draws = Augmentation(*(value.to(images.device, non_blocking=True) for value in draws))
    x = images + draws.brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draws.saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * draws.contrast
    count, _, height, width = x.shape
    # One pixel of zeros on every side, to which all positions beyond the border are clamped.
    padded = F.pad(x, [1] * 4)
    rows = (torch.arange(height, device=x.device) + 1 - draws.shift[:, :1]).clamp(0, height + 1)  # [B, H]
    columns = (torch.arange(width, device=x.device) + 1 - draws.shift[:, 1:]).clamp(0, width + 1)  # [B, W]
    which = torch.arange(count, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
