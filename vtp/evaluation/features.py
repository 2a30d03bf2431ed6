"""Features by name, behind FID, inception score, precision and recall.

Inception needs a weights file and gives published numbers. The random VGG16 needs none and serves laptops and tests;
its numbers compare with each other only, which is why metric names carry the extractor's name.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import verified_weights
from vtp.config import Config
from vtp.layers.images import normalise
from vtp.layers.random_vgg import random_vgg16


class RandomVggFeaturesConfig(Config):
    """The last stage of a VGG16 with seeded random weights, averaged over space."""

    name: Literal["random_vgg16"]
    seed: int


class InceptionFeaturesConfig(Config):
    """The pooled features of the Inception network behind FID (Heusel et al. 2017), as torch-fidelity converted it."""

    name: Literal["inception"]
    weights: str = Field(description="file under weights/: weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    sha256: str
    splits: int = Field(ge=1, description="parts of the inception score; 10 for published numbers")


FeaturesConfig = Annotated[RandomVggFeaturesConfig | InceptionFeaturesConfig, Field(discriminator="name")]


class FeatureExtractor:
    """uint8 images [B, 3, H, W] -> float32 features [B, dim] on `device`; `name` goes into metric names."""

    def __init__(
        self, name: str, network: nn.Module, *, dim: int, device: torch.device | str, head: Tensor | None = None
    ) -> None:
        self.name = name
        self.dim = dim
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
        self._head = head  # [classes, dim]

    @property
    def has_logits(self) -> bool:
        """Whether features can be classified, as the inception score needs."""
        return self._head is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of one batch. Raises TypeError for other images than uint8, whose range would be a guess."""
        if images.dtype != torch.uint8:
            raise TypeError(
                f"features are those of uint8 images, given {images.dtype}; convert by layers.images.to_uint8"
            )
        images = images.to(self._device)
        with torch.autocast(images.device.type, enabled=False):
            return self._network(images)

    def all(self, batches: Iterable[Tensor], progress: Callable[[int], object] | None = None) -> Tensor:
        """Features [N, dim] of all batches, on the CPU; `progress` is told the size of every batch."""
        parts = []
        for images in batches:
            parts.append(self(images).cpu())
            if progress is not None:
                progress(len(images))
        return torch.cat(parts)

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N, classes] of features [N, dim], without biases, as the inception score is defined."""
        if self._head is None:
            raise TypeError(f"{self.name} features have no classes; ask `has_logits` first or choose inception")
        return features @ self._head.to(features).T


def count_name(count: int) -> str:
    """A number of images for metric names: 50000 is "50k", 1234 is "1234"."""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def build_features(
    config: RandomVggFeaturesConfig | InceptionFeaturesConfig, *, weights: Path, device: torch.device | str
) -> FeatureExtractor:
    """The extractor that the parameters name. Raises ArtefactError when its weights file is missing or another one."""
    if isinstance(config, RandomVggFeaturesConfig):
        return FeatureExtractor("random-vgg16", _RandomVggFeatures(config.seed), dim=512, device=device)
    network = _Inception(
        verified_weights(weights / config.weights, config.sha256, "torch-fidelity's Inception weights")
    )
    head = network.network.fc.weight.detach()
    return FeatureExtractor("inception", network, dim=2048, device=device, head=head)


class _RandomVggFeatures(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = random_vgg16(seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images))[-1].mean((2, 3))


class _Inception(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles whatever it is given; this load refuses a file that holds more than tensors.
        torch.load(path, map_location="cpu", weights_only=True)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]
