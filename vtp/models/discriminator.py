"""PatchGAN: a convolutional critic that judges overlapping patches (Isola et al. 2017), with DiffAug.

Spectral normalisation rather than batch normalisation: statistics that mix real and fake batches are a known source
of collapse, and a Lipschitz bound suits the hinge loss.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vtp.config import Config

MAX_WIDTH_FACTOR = 8


class DiscriminatorConfig(Config):
    """The critic."""

    width: int = Field(ge=1, description="channels of the first layer; they double per layer up to eightfold")
    depth: int = Field(ge=1, description="layers that halve the resolution; 3 sees patches of 70 pixels")


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to logits [B, 1, h, w]; above 0 means real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**level, MAX_WIDTH_FACTOR) for level in range(config.depth + 1)]
        layers: list[nn.Module] = []
        channels = 3
        for level, width in enumerate(widths):
            stride = 2 if level < config.depth else 1
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride, padding=1)), nn.LeakyReLU(0.2)]
            channels = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 4, 1, padding=1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class AugmentationConfig(Config):
    """DiffAug (Zhao et al. 2020), on real and fake images alike."""

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


def draw_augmentation(shape: torch.Size, config: AugmentationConfig, generator: torch.Generator) -> Augmentation:
    """Independent draws for every image of a batch of `shape` [B, 3, H, W]."""
    count, _, height, width = shape
    colour = torch.rand(3, count, 1, 1, 1, generator=generator) * 2 - 1
    reach = torch.tensor([height, width]) * config.translation
    shift = ((torch.rand(count, 2, generator=generator) * 2 - 1) * reach).round().long()
    return Augmentation(
        colour[0] * config.brightness, 1 + colour[1] * config.saturation, 1 + colour[2] * config.contrast, shift
    )


def augment(images: Tensor, draws: Augmentation) -> Tensor:
    """Differentiable brightness, saturation, contrast, and translation with zeros beyond the border."""
    draws = Augmentation(*(value.to(images.device) for value in draws))
    x = images + draws.brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * draws.saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * draws.contrast
    count, _, height, width = x.shape
    reach = int(draws.shift.abs().max()) if count else 0
    padded = F.pad(x, [reach] * 4)
    rows = torch.arange(height, device=x.device) + reach - draws.shift[:, :1]  # [B, H]
    columns = torch.arange(width, device=x.device) + reach - draws.shift[:, 1:]  # [B, W]
    which = torch.arange(count, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
