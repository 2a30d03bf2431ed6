"""Features by name, behind Fréchet and kernel distances, inception score, precision and recall.

Inception, DINOv2, CLIP and networks of timm need a weights file; Inception's are those of published numbers.
EfficientNet-Lite0 comes with its weights of ImageNet and serves where nothing can be downloaded; the random VGG16 serves
tests. Numbers of one network compare with each other only, which is why metric names carry its name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import verified_weights
from vtp.config import Config
from vtp.evaluation.networks import (
    Clip,
    DinoV2,
    EfficientNetLite,
    Extracted,
    Inception,
    RandomVgg,
    Reading,
    TimmNetwork,
)
from vtp.finite import require_finite


class RandomVggFeaturesConfig(Config):
    """The last stage of a VGG16 with seeded random weights, averaged over space."""

    name: Literal["random_vgg16"]
    seed: int = Field(description="seed of the network's weights")


class EfficientNetFeaturesConfig(Config):
    """The pooled features of EfficientNet-Lite0 (Tan et al. 2020), whose weights of ImageNet a package ships."""

    name: Literal["efficientnet_lite0"]
    side: int = Field(
        ge=64,
        le=1024,
        multiple_of=32,
        description="pixels to which pictures are resized; from 128 on IS is measured too",
    )


class InceptionFeaturesConfig(Config):
    """The pooled features of the Inception network behind FID (Heusel et al. 2017), as torch-fidelity converted it."""

    name: Literal["inception"]
    weights: str = Field(description="file under weights/: weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    sha256: str = Field(description="digest that the file must have")


class DinoV2FeaturesConfig(Config):
    """The class token of DINOv2 (Oquab et al. 2023; Stein et al. 2023 recommend ViT-L), as torch-fidelity takes it."""

    name: Literal["dinov2"]
    architecture: Literal["vit-s-14", "vit-b-14", "vit-l-14", "vit-g-14"] = Field(
        description="vision transformer of DINOv2 whose weights the file holds"
    )
    weights: str = Field(description="file under weights/: dinov2_vitl14_pretrain.pth, or timm's safetensors")
    sha256: str = Field(description="digest that the file must have")


class ClipFeaturesConfig(Config):
    """The image embedding of OpenAI's CLIP (Kynkäänniemi et al. 2023), as torch-fidelity takes it."""

    name: Literal["clip"]
    architecture: Literal["vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336px"] = Field(
        description="vision transformer of OpenAI's CLIP whose weights the file holds"
    )
    weights: str = Field(description="file under weights/: open_clip_model.safetensors of timm/vit_..._clip_224.openai")
    sha256: str = Field(description="digest that the file must have")


class TimmNetworkConfig(Config):
    """A pretrained network of timm in its own normalisation, pictures resized bicubically."""

    name: Literal["timm"]
    model: str = Field(min_length=1, description="name of timm's model, such as vit_large_patch16_224.mae")
    weights: str = Field(description="file under weights/: timm's safetensors of that model")
    sha256: str = Field(description="digest that the file must have")
    side: int = Field(ge=16, le=1024, description="pixels to which pictures are resized")
    reading: Reading = Field(
        description="class_token, behind the last norm; spatial_mean of all places; pooled, as for its classes"
    )


AnyFeaturesConfig = (
    EfficientNetFeaturesConfig
    | RandomVggFeaturesConfig
    | InceptionFeaturesConfig
    | DinoV2FeaturesConfig
    | ClipFeaturesConfig
    | TimmNetworkConfig
)
FeaturesConfig = Annotated[AnyFeaturesConfig, Field(discriminator="name")]
CLASSIFIES = 128  # pixels from which EfficientNet's classes mean something; smaller photos are told wrong


class FeatureExtractor:
    """uint8 images [B, 3, H, W] -> `Extracted` on `device`; `name` goes into metric names."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        dim: int,
        device: torch.device | str,
        spatial_dim: int | None = None,
        head: Tensor | None = None,
    ) -> None:
        self.name = name
        self.dim = dim
        self.spatial_dim = spatial_dim  # None: no spatial features
        self._network = network.eval().requires_grad_(False).to(device)
        self.device = device
        self._head = head  # [classes, dim]
        self._size: torch.Size | None = None

    @property
    def has_logits(self) -> bool:
        """Whether features can be classified, as the inception score needs."""
        return self._head is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        """Features of one batch.

        Raises TypeError for other images than uint8, whose range would be a guess; ValueError for an empty batch, other
        than three channels, another size than that of earlier batches, and features that are not finite.
        """
        if images.dtype != torch.uint8:
            raise TypeError(
                f"features are those of uint8 images, given {images.dtype}; convert by layers.images.to_uint8"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"features need RGB images [B, 3, H, W], given {list(images.shape)}")
        if not len(images):
            raise ValueError("no images to take features of; is the split or the folder empty?")
        self._size = self._size or images.shape[2:]
        if images.shape[2:] != self._size:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels after some of {self._size[0]} x "
                f"{self._size[1]}: features of mixed sizes do not compare; crop all to one size"
            )
        images = images.to(self.device)
        with torch.autocast(images.device.type, enabled=False):
            extracted = self._network(images)
        for part in extracted:
            if part is not None:
                require_finite(part, f"{self.name} features", "fetch the weights behind them again")
        return extracted

    def logits(self, pooled: Tensor) -> Tensor:
        """Class logits [N, classes] of features [N, dim], without biases, as the inception score is defined."""
        if self._head is None:
            raise TypeError(f"{self.name} features have no classes; ask `has_logits` first or choose inception")
        return pooled @ self._head.to(pooled).T


def count_name(count: int) -> str:
    """A number of images for metric names: 50000 is "50k", 1234 is "1234"."""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def features_name(config: AnyFeaturesConfig) -> str:
    """A network's name in those of metrics."""
    match config:
        case RandomVggFeaturesConfig():
            return "random-vgg16"
        case EfficientNetFeaturesConfig():
            return f"efficientnet-lite0-{config.side}"
        case InceptionFeaturesConfig():
            return "inception"
        case TimmNetworkConfig():
            return f"{re.sub('[_.]', '-', config.model)}-{config.side}"  # names of metrics are split at both
        case _:
            return f"{config.name}-{config.architecture}"


def build_features(config: AnyFeaturesConfig, *, weights: Path, device: torch.device | str) -> FeatureExtractor:
    """The extractor that the parameters name. Raises ArtefactError when its weights file is missing or another one."""
    name = features_name(config)
    if isinstance(config, RandomVggFeaturesConfig):
        spatial_dim = RandomVgg.CHANNELS * RandomVgg.SIDE**2
        network = RandomVgg(config.seed)
        return FeatureExtractor(name, network, dim=RandomVgg.DIM, device=device, spatial_dim=spatial_dim)
    if isinstance(config, EfficientNetFeaturesConfig):
        network = EfficientNetLite(config.side)
        head = network.head if config.side >= CLASSIFIES else None
        spatial_dim = EfficientNetLite.CHANNELS * EfficientNetLite.SIDE**2
        return FeatureExtractor(
            name, network, dim=EfficientNetLite.DIM, device=device, spatial_dim=spatial_dim, head=head
        )
    path = weights / config.weights
    if isinstance(config, InceptionFeaturesConfig):
        network = Inception(verified_weights(path, config.sha256, "torch-fidelity's Inception weights"))
        spatial_dim = Inception.CHANNELS * Inception.SIDE**2
        return FeatureExtractor(
            name, network, dim=Inception.DIM, device=device, spatial_dim=spatial_dim, head=network.head
        )
    if isinstance(config, TimmNetworkConfig):
        network = TimmNetwork(
            config.model,
            config.side,
            config.reading,
            verified_weights(path, config.sha256, f"timm's weights of {config.model}"),
        )
        return FeatureExtractor(name, network, dim=network.dim, device=device)
    kind, what = (DinoV2, "DINOv2") if isinstance(config, DinoV2FeaturesConfig) else (Clip, "OpenAI's CLIP")
    verified = verified_weights(path, config.sha256, f"the weights of {what} {config.architecture}")
    network = kind(config.architecture, verified)
    return FeatureExtractor(name, network, dim=network.dim, device=device)


def build_extractors(
    configs: Sequence[AnyFeaturesConfig], *, weights: Path, device: torch.device | str
) -> dict[str, FeatureExtractor]:
    """The extractors by their names in metrics, in the order of `configs`. Raises ArtefactError as `build_features`."""
    return {features_name(config): build_features(config, weights=weights, device=device) for config in configs}


def distinct_networks(configs: list[AnyFeaturesConfig]) -> list[AnyFeaturesConfig]:
    """Raises ValueError for two networks whose figures would have one name."""
    names = [features_name(config) for config in configs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two networks are called {twice[0]} in metrics; leave one out")
    return configs


def extract(extractors: Mapping[str, FeatureExtractor], images: Tensor) -> dict[str, Extracted]:
    """What every network sees in a batch."""
    return {name: extractor(images) for name, extractor in extractors.items()}
