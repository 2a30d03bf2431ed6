"""Features by name, behind Fréchet distances, inception score, precision and recall.

Inception, DINOv2 and CLIP need a weights file; Inception's are those of published numbers. The random VGG16 needs none
and serves laptops and tests; its numbers compare with each other only, which is why metric names carry the extractor's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import ArtefactError, load_tensors, verified_weights
from vtp.config import Config
from vtp.layers.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from vtp.layers.random_vgg import random_vgg16

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPATIAL_CHANNELS = 7  # of Inception's mixed_6/conv, as sFID takes them


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


class DinoFeaturesConfig(Config):
    """The class token of DINOv2 (Oquab et al. 2023; Stein et al. 2023 recommend ViT-L), as torch-fidelity takes it."""

    name: Literal["dinov2"]
    size: Literal["s", "b", "l", "g"]
    weights: str = Field(description="file under weights/: a published checkpoint, such as dinov2_vitl14_pretrain.pth")
    sha256: str


class ClipFeaturesConfig(Config):
    """The image embedding of OpenAI's CLIP (Kynkäänniemi et al. 2023), as torch-fidelity takes it."""

    name: Literal["clip"]
    size: Literal["vit-b-32", "vit-b-16", "vit-l-14"]
    weights: str = Field(description="file under weights/: the state dict of OpenAI's model, as safetensors or .pt")
    sha256: str


AnyFeaturesConfig = RandomVggFeaturesConfig | InceptionFeaturesConfig | DinoFeaturesConfig | ClipFeaturesConfig
FeaturesConfig = Annotated[AnyFeaturesConfig, Field(discriminator="name")]


class Extracted(NamedTuple):
    """Features of a batch, float32."""

    pooled: Tensor  # [B, D]
    spatial: Tensor | None  # [B, S], of sFID; None where the network has none


class FeatureExtractor:
    """uint8 images [B, 3, H, W] -> `Extracted` on `device`; `name` goes into metric names."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        dim: int,
        device: torch.device | str,
        head: Tensor | None = None,
        spatial_dim: int | None = None,
    ) -> None:
        self.name = name
        self.dim = dim
        self.spatial_dim = spatial_dim  # None: no spatial features
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device
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
        than three channels, a size that differs from that of earlier batches, and features that are not finite.
        """
        if images.dtype != torch.uint8:
            raise TypeError(
                f"features are those of uint8 images, given {images.dtype}; convert by layers.images.to_uint8"
            )
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"features need images [B, 3, H, W] with B above 0, given {list(images.shape)}")
        self._size = self._size or images.shape[2:]
        if images.shape[2:] != self._size:
            raise ValueError(
                f"images of {list(images.shape[2:])} pixels after some of {list(self._size)}: "
                "features of mixed sizes do not compare; crop all to one size"
            )
        images = images.to(self._device)
        with torch.autocast(images.device.type, enabled=False):
            found = self._network(images)
        extracted = found if isinstance(found, Extracted) else Extracted(found, None)
        if not all(bool(part.isfinite().all()) for part in extracted if part is not None):
            raise ValueError(f"{self.name} features are not finite; are its weights whole?")
        return extracted

    def logits(self, pooled: Tensor) -> Tensor:
        """Class logits [N, classes] of features [N, dim], without biases, as the inception score is defined."""
        if self._head is None:
            raise TypeError(f"{self.name} features have no classes; ask `has_logits` first or choose inception")
        return pooled @ self._head.to(pooled).T


def count_name(count: int) -> str:
    """A number of images for metric names: 50000 is "50k", 1234 is "1234"."""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


def build_features(config: AnyFeaturesConfig, *, weights: Path, device: torch.device | str) -> FeatureExtractor:
    """The extractor that the parameters name. Raises ArtefactError when its weights file is missing or another one."""
    if isinstance(config, RandomVggFeaturesConfig):
        return FeatureExtractor("random-vgg16", _RandomVggFeatures(config.seed), dim=512, device=device)
    path = weights / config.weights
    if isinstance(config, InceptionFeaturesConfig):
        network = _Inception(verified_weights(path, config.sha256, "torch-fidelity's Inception weights"))
        head = network.network.fc.weight.detach()
        return FeatureExtractor(
            "inception", network, dim=2048, device=device, head=head, spatial_dim=17 * 17 * SPATIAL_CHANNELS
        )
    if isinstance(config, DinoFeaturesConfig):
        network = _Dino(config.size, verified_weights(path, config.sha256, "a published checkpoint of DINOv2"))
        return FeatureExtractor(f"dinov2-{config.size}", network, dim=network.dim, device=device)
    network = _Clip(config.size, verified_weights(path, config.sha256, "the state dict of OpenAI's CLIP"))
    return FeatureExtractor(f"clip-{config.size}", network, dim=network.dim, device=device)


class _RandomVggFeatures(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = random_vgg16(seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images))[-1].mean((2, 3))


class _Inception(nn.Module):
    """Pooled features, and of the convolution that TensorFlow calls mixed_6/conv the seven channels of sFID."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        _read(path)  # torch-fidelity unpickles whatever it is given; this refuses a file of more than tensors
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.conv.register_forward_hook(self._keep)

    def forward(self, images: Tensor) -> Extracted:
        pooled = self.network(images)[0]
        assert self._spatial is not None
        return Extracted(pooled, self._spatial.flatten(1))

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        # Channels last, as TensorFlow flattens them.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).contiguous()  # [B, 17, 17, 7]


class _Dino(nn.Module):
    """The published DINOv2 at 224 pixels. timm holds the network: torch-fidelity would run code from a hub."""

    SIDE, OFFSET = 16, 0.1  # patches; what the official code adds before it scales the positions

    def __init__(self, size: str, path: Path) -> None:
        super().__init__()
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        names = {"s": "small", "b": "base", "l": "large", "g": "giant"}
        name = f"vit_{names[size]}_patch14_dinov2"
        self.network: Any = timm.create_model(name, num_classes=0, img_size=14 * self.SIDE)
        self.dim: int = self.network.num_features
        tensors = _read(path)
        tensors = {**tensors, "pos_embed": self._positions(tensors["pos_embed"])}
        self.network.load_state_dict(checkpoint_filter_fn(tensors, self.network))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(_resized(images, 14 * self.SIDE, IMAGENET_MEAN, IMAGENET_STD))

    def _positions(self, table: Tensor) -> Tensor:
        """Those of the training grid, at 16 x 16, by the official interpolation: timm's own one differs."""
        token, grid = table[:, :1], table[:, 1:]
        side = round(grid.shape[1] ** 0.5)
        planes = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        scale = (self.SIDE + self.OFFSET) / side
        planes = F.interpolate(planes, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        return torch.cat([token, planes.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class _Clip(nn.Module):
    """The image tower of OpenAI's CLIP, by torch-fidelity."""

    def __init__(self, size: str, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_clip import build_model

        tensors = _read(path)
        missing = {"visual.conv1.weight", "visual.positional_embedding", "text_projection"} - tensors.keys()
        if missing:
            raise ArtefactError(f"{path}: no {sorted(missing)[0]}; it is not a state dict in OpenAI's names")
        found = tensors["visual.conv1.weight"].shape[-1]
        if not size.endswith(f"-{found}"):
            raise ArtefactError(f"{path}: patches of {found} pixels, features.size is {size}")
        self.dim = tensors["text_projection"].shape[1]
        known = {
            name: value for name, value in tensors.items() if name.startswith("visual.") or name == "text_projection"
        }
        self.network = build_model(known, torch.float32).visual

    def forward(self, images: Tensor) -> Tensor:
        return self.network(_resized(images, self.network.input_resolution, CLIP_MEAN, CLIP_STD))


def _resized(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images, resized as torch-fidelity does (TensorFlow 1's bilinear) and normalised."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(size, size), align_corners=False)
    shift, scale = (255 * torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x - shift) / scale


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weights file, and nothing that a pickle could do."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return torch.load(path, map_location="cpu", weights_only=True)
