"""Perceptual distance by name: LPIPS with its trained weights, or LPIPS's formula on another network (paper eq. 1)."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import verified_weights
from vtp.config import Config
from vtp.layers.efficientnet_lite import TAPPED, EfficientNetLite0
from vtp.layers.images import normalise
from vtp.layers.random_vgg import STAGES, ConvStages, random_vgg16


class RandomVggDistanceConfig(Config):
    """Stages of a VGG16 with seeded random weights."""

    name: Literal["random_vgg16"]
    seed: int = Field(description="seed of the network's weights")
    stages: int = Field(ge=1, le=5, description="the first so many stages; fewer are cheaper")


class EfficientNetDistanceConfig(Config):
    """Stages of EfficientNet-Lite0, whose weights of ImageNet a package ships."""

    name: Literal["efficientnet_lite0"]
    side: int = Field(ge=32, le=1024, multiple_of=32, description="pixels to which pictures are resized")
    stages: int = Field(ge=1, le=5, description="the first so many stages; fewer are cheaper")


class LpipsConfig(Config):
    """LPIPS (Zhang et al. 2018) with VGG16."""

    name: Literal["lpips"]
    weights: str = Field(description="file under weights/: the state dict of lpips.LPIPS(net='vgg')")
    sha256: str = Field(description="digest that the file must have")


AnyPerceptualConfig = EfficientNetDistanceConfig | RandomVggDistanceConfig | LpipsConfig
PerceptualConfig = Annotated[AnyPerceptualConfig, Field(discriminator="name")]


class PerceptualDistance(nn.Module):
    """(a, b) in [-1, 1], [B, 3, H, W] -> distance [B], in float32; `name` goes into metric names."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.network = network.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return self.network(a.float(), b.float()).flatten()


class StagesDistance(nn.Module):
    """Mean over stages of |f_a / |f_a| - f_b / |f_b||^2, channels normalised at every position, positions averaged."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features  # images in [0, 1] -> activations by stage

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # Two passes: the one over a target takes no gradient and keeps no activations.
        distances = []
        for of_a, of_b in zip(self._directions(a), self._directions(b), strict=True):
            distances.append((of_a - of_b).square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)

    def _directions(self, images: Tensor) -> list[Tensor]:
        return [F.normalize(stage, dim=1, eps=1e-6) for stage in self.features((images + 1) / 2)]


class _VggStages(nn.Module):
    """Stages of images in [0, 1]."""

    def __init__(self, config: RandomVggDistanceConfig) -> None:
        super().__init__()
        self.stages = random_vgg16(config.seed, num_stages=config.stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.stages(normalise(images))


class _EfficientNetStages(nn.Module):
    """The tapped ones among the stages, of images in [0, 1]."""

    def __init__(self, config: EfficientNetDistanceConfig, *, weights: bool = True) -> None:
        super().__init__()
        self.network = EfficientNetLite0(config.side, TAPPED[config.stages - 1] + 1, weights=weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        stages = self.network(images)
        return [stages[number] for number in TAPPED if number < len(stages)]


def perceptual_shapes(config: AnyPerceptualConfig) -> nn.Module:
    """The convolutions behind a distance on the meta device: images [B, 3, H, W] to activations by stage."""
    with torch.device("meta"):
        if isinstance(config, EfficientNetDistanceConfig):
            return _EfficientNetStages(config, weights=False)
        stages = config.stages if isinstance(config, RandomVggDistanceConfig) else len(STAGES)
        return ConvStages(STAGES[:stages]).requires_grad_(False)


def build_perceptual(config: AnyPerceptualConfig, *, weights: Path) -> PerceptualDistance:
    """The distance that the parameters name. Raises ArtefactError when its weights file is missing or another one."""
    if isinstance(config, RandomVggDistanceConfig):
        return PerceptualDistance("random-vgg16", StagesDistance(_VggStages(config)))
    if isinstance(config, EfficientNetDistanceConfig):
        return PerceptualDistance(f"efficientnet-lite0-{config.side}", StagesDistance(_EfficientNetStages(config)))
    path = verified_weights(weights / config.weights, config.sha256, "a state dict of lpips.LPIPS(net='vgg')")
    from lpips import LPIPS

    network = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return PerceptualDistance("vgg16", network)
