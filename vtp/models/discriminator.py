"""Discriminators of images and reconstructions, by name.

`patch` is PatchGAN (Isola et al. 2017): convolutions that judge overlapping patches. `features` puts light heads on frozen
self-supervised features (Sauer et al. 2023, StyleGAN-T; Zheng et al. 2025, RAE): the discriminator need not learn to see.

Spectral normalisation and per-sample statistics rather than batch normalisation: a Lipschitz bound suits the hinge loss,
and statistics that mix real and fake images, or ranks, are a known source of collapse.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from vtp.config import Config

MAX_WIDTH_FACTOR = 8
LEAK = 0.2
EPS = 1e-6  # of the statistics of heads, as in RAE
FeatureMaps = Callable[[Tensor], list[Tensor]]  # images [B, 3, H, W] in [-1, 1] to maps [B, D, L]


class PatchDiscriminatorConfig(Config):
    """PatchGAN."""

    name: Literal["patch"]
    width: int = Field(ge=1, description="channels of the first layer; they double per layer up to eightfold")
    depth: int = Field(ge=1, le=16, description="layers that halve the resolution; 3 sees patches of 70 pixels")

    @property
    def least_side(self) -> int:
        """Of images that have a logit, in pixels: the last two layers take 2 away from the side."""
        return 3 * 2**self.depth


class TimmFeaturesConfig(Config):
    """A pretrained vision transformer of timm."""

    name: Literal["timm"]
    model: str = Field(min_length=1, description="name of timm's model, such as vit_small_patch8_224.dino")
    weights: str = Field(description="file under weights/: timm's safetensors of that model")
    sha256: str = Field(description="digest that the file must have")
    image_size: int = Field(ge=1, description="side in pixels that images are scaled to")
    blocks: int = Field(ge=1, description="heads on so many blocks, evenly over the depth")
    antialias: bool = Field(description="scale images down with antialiasing; RAE: false")
    layer_norm: bool = Field(description="normalise each token of the features, without learned scales; RAE: false")


class TokenizerFeaturesConfig(Config):
    """A tokenizer's encoder: the one that is tuned, or that of --discriminator-features. Needs no download."""

    name: Literal["tokenizer"]
    image_size: int | None = Field(ge=1, description="side that images are scaled to; null: as they are")
    blocks: int = Field(ge=1, description="heads on so many blocks, evenly over the depth")


class FeatureDiscriminatorConfig(Config):
    """Heads on frozen features."""

    name: Literal["features"]
    network: Annotated[TimmFeaturesConfig | TokenizerFeaturesConfig, Field(discriminator="name")]
    kernel: int = Field(ge=1, description="length of the heads' convolution over tokens, odd; 9 in StyleGAN-T")

    @field_validator("kernel")
    @classmethod
    def _is_odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("a convolution over neighbours on both sides needs an odd one")
        return kernel


DiscriminatorConfig = Annotated[PatchDiscriminatorConfig | FeatureDiscriminatorConfig, Field(discriminator="name")]


class Discriminator(nn.Module, ABC):
    """Images [B, 3, H, W] in [-1, 1] to logits; above 0 means real. A sample's logits depend on that sample alone."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, ...]."""

    def perceive(self, images: Tensor) -> object:
        """What is computed without anything that trains; nothing in most discriminators."""
        return None

    @torch.no_grad()
    def forward_flops(self, side: int) -> tuple[float, float]:
        """FLOPs of judging one image: of what trains, and of what is frozen.

        An image is judged for that on the device: frozen features are no part of this module.
        """
        image = torch.zeros(1, 3, side, side, device=next(self.parameters()).device)
        counts = []
        for judge in (self, self.perceive):
            with FlopCounterMode(display=False) as counter:
                judge(image)
            counts.append(float(counter.get_total_flops()))
        everything, frozen = counts
        return everything - frozen, frozen

    @torch.no_grad()
    def refine_norms(self) -> None:
        """One power iteration of every spectral norm.

        It is not done in forward passes, whose number depends on micro-batches: the discriminator stays in evaluation mode.
        """
        for module in self.modules():
            if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
                parametrizations.train()
                _ = module.weight  # computed, and the vectors of the iteration with it
                parametrizations.eval()


class PatchDiscriminator(Discriminator):
    """Logits [B, 1, h, w] of overlapping patches."""

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**level, MAX_WIDTH_FACTOR) for level in range(config.depth + 1)]
        layers: list[nn.Module] = []
        channels = 3
        for level, width in enumerate(widths):
            stride = 2 if level < config.depth else 1
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride, padding=1)), nn.LeakyReLU(LEAK)]
            channels = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 4, 1, padding=1)))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class FeatureDiscriminator(Discriminator):
    """Logits [B, heads * L] from every map of frozen `features`, with `dim` channels, which are no part of its state."""

    def __init__(self, config: FeatureDiscriminatorConfig, features: FeatureMaps, *, dim: int, heads: int) -> None:
        super().__init__()
        self._features = features if not isinstance(features, nn.Module) else features.forward
        self.heads = nn.ModuleList(TokenHead(dim, config.kernel) for _ in range(heads))
        self.eval()

    def perceive(self, images: Tensor) -> list[Tensor]:
        """The frozen features."""
        return self._features(images)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.perceive(images)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


class TokenHead(nn.Module):
    """Maps [B, D, L] to logits [B, 1, L]: a layer per token, a residual one over neighbours, a linear one.

    Raises ValueError for maps of fewer tokens than the kernel is long: a circle would meet itself.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self._kernel = kernel
        self.point = spectral_norm(nn.Conv1d(dim, dim, 1, bias=False))
        self.point_norm = nn.GroupNorm(
            dim, dim, eps=EPS
        )  # per sample and channel: a batch normalisation over one sample
        self.near = spectral_norm(nn.Conv1d(dim, dim, kernel, padding=kernel // 2, padding_mode="circular", bias=False))
        self.near_norm = nn.GroupNorm(dim, dim, eps=EPS)
        self.out = spectral_norm(nn.Conv1d(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < self._kernel:
            raise ValueError(
                f"the discriminator's features have {x.shape[2]} tokens, fewer than discriminator.kernel "
                f"{self._kernel}; choose a smaller kernel or a larger image_size"
            )
        x = F.leaky_relu(self.point_norm(self.point(x)), LEAK)
        x = (x + F.leaky_relu(self.near_norm(self.near(x)), LEAK)) / 2**0.5
        return self.out(x)
