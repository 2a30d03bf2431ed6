"""The networks behind features, each with weights from a file: uint8 images [B, 3, H, W] in, `Extracted` out.

torch-fidelity has them as the field compares them, and loads weights in ways that run what is in a file: by unpickling
(Inception), as TorchScript (CLIP), or from a hub with its code (DINOv2). Here a file gives tensors and nothing else.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.artefact import ArtefactError, assign_weights, load_tensors
from vtp.layers.efficientnet_lite import DIM, EfficientNetLite0
from vtp.layers.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from vtp.layers.random_vgg import random_vgg16
from vtp.models.frozen_backbone import require_timm_model, timm_tensors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CLIP_SHAPES = {  # patch, width, resolution
    "vit-b-32": (32, 768, 224),
    "vit-b-16": (16, 768, 224),
    "vit-l-14": (14, 1024, 224),
    "vit-l-14-336px": (14, 1024, 336),
}
DINO_SIZES = {"vit-s-14": "small", "vit-b-14": "base", "vit-l-14": "large", "vit-g-14": "giant"}  # timm's words


class Extracted(NamedTuple):
    """Features of a batch, float32."""

    pooled: Tensor  # [B, D]
    spatial: Tensor | None  # [B, S], where things are (sFID); None where the network has none

    def first(self, count: int) -> "Extracted":
        """Those of the first images."""
        return Extracted(self.pooled[:count], None if self.spatial is None else self.spatial[:count])


class RandomVgg(nn.Module):
    """The last stage averaged over space; spatial: seven channels of the third, averaged onto 8 x 8 places."""

    DIM, STAGE, CHANNELS, SIDE, LEAST = 512, 2, 7, 8, 16  # LEAST pixels: it halves them four times

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = random_vgg16(seed)

    def forward(self, images: Tensor) -> Extracted:
        if min(images.shape[2:]) < self.LEAST:
            raise ValueError(
                f"random_vgg16 needs images of {self.LEAST} x {self.LEAST} pixels or more, given {images.shape[2]} x "
                f"{images.shape[3]}; choose larger ones, or other features"
            )
        stages = self.network(normalise(images))
        spatial = F.adaptive_avg_pool2d(stages[self.STAGE][:, : self.CHANNELS], self.SIDE)
        return Extracted(stages[-1].mean((2, 3)), spatial.flatten(1))


class EfficientNetLite(nn.Module):
    """What the classes are told by; spatial: seven channels of the third stage, averaged onto 8 x 8 places."""

    DIM, STAGE, CHANNELS, SIDE = DIM, 2, 7, 8

    def __init__(self, side: int, *, weights: bool = True) -> None:
        super().__init__()
        self.network = EfficientNetLite0(side, weights=weights)

    @property
    def head(self) -> Tensor:
        """Weights [1000, 1280] of the classes."""
        return self.network.classifier.weight.detach()

    def forward(self, images: Tensor) -> Extracted:
        stages = self.network(images.float() / 255)
        spatial = F.adaptive_avg_pool2d(stages[self.STAGE][:, : self.CHANNELS], self.SIDE)
        return Extracted(self.network.last(stages[-1]), spatial.flatten(1))


class Inception(nn.Module):
    """The pooled features of FID, by torch-fidelity; spatial: those of sFID (Nash et al. 2021), as ADM takes them.

    ADM reads seven channels of the tensor `mixed_6/conv` of the TensorFlow graph, the last operation of that scope:
    the first branch of `Mixed_6d` behind batch norm and ReLU, as OpenAI's own port has it (consistency_models).
    """

    DIM, CHANNELS, SIDE = 2048, 7, 17

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # It unpickles what it is given, so it is given what was written here from plain tensors.
        own = BytesIO()
        torch.save(dict(read_weights(path)), own)
        own.seek(0)
        with _fitting(path, "torch-fidelity's Inception"):
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], own)
        self._seen: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._see)

    @property
    def head(self) -> Tensor:
        """Weights [1008, 2048] of the classes."""
        return self.network.fc.weight.detach()

    def forward(self, images: Tensor) -> Extracted:
        pooled = self.network(images)[0]
        assert self._seen is not None
        spatial, self._seen = self._seen, None
        return Extracted(pooled, spatial)

    def _see(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        # Channels last, as TensorFlow has them: ADM's `mu_s` is in that order.
        self._seen = output[:, : self.CHANNELS].permute(0, 2, 3, 1).flatten(1).float()  # [B, 17 * 17 * 7]


class DinoV2(nn.Module):
    """The class token of DINOv2 at 224 pixels, resized as torch-fidelity does; timm holds the network."""

    PATCH, SIDE, OFFSET = 14, 16, 0.1  # SIDE patches; OFFSET is added by the official code before it scales positions

    def __init__(self, architecture: str, path: Path) -> None:
        super().__init__()
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        name = f"vit_{DINO_SIZES[architecture]}_patch14_dinov2"
        self.network: Any = timm.create_model(name, num_classes=0, img_size=self.PATCH * self.SIDE)
        self.dim: int = self.network.num_features
        tensors = dict(read_weights(path))
        with _fitting(path, f"DINOv2 {architecture}"):
            tensors["pos_embed"] = self._positions(tensors["pos_embed"])
            self.network.load_state_dict(checkpoint_filter_fn(tensors, self.network))

    def forward(self, images: Tensor) -> Extracted:
        return Extracted(self.network(_prepared(images, self.PATCH * self.SIDE, IMAGENET_MEAN, IMAGENET_STD)), None)

    def _positions(self, table: Tensor) -> Tensor:
        """Those of the training grid, at 16 x 16, by the official interpolation: timm's own one smooths."""
        token, grid = table[:, :1], table[:, 1:]
        side = round(grid.shape[1] ** 0.5)
        scale = (self.SIDE + self.OFFSET) / side
        planes = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([token, planes.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Clip(nn.Module):
    """The image embedding of OpenAI's CLIP, by torch-fidelity."""

    def __init__(self, architecture: str, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_clip import build_model

        # The builder looks at the width of the text projection too, and at nothing else of the text tower.
        tensors = {
            name: value
            for name, value in read_weights(path).items()
            if name.startswith("visual.") or name == "text_projection"
        }
        with _fitting(path, f"CLIP {architecture}"):
            kernel, positions = tensors["visual.conv1.weight"], tensors["visual.positional_embedding"]
            patch, width = kernel.shape[-1], kernel.shape[0]
            shape = (patch, width, patch * round((len(positions) - 1) ** 0.5))
            if shape != CLIP_SHAPES[architecture]:
                raise RuntimeError(f"patch, width and resolution are {shape}, not {CLIP_SHAPES[architecture]}")
            self.network: Any = build_model(tensors, torch.float32).visual
        self.dim: int = self.network.output_dim

    def forward(self, images: Tensor) -> Extracted:
        return Extracted(self.network(_prepared(images, self.network.input_resolution, CLIP_MEAN, CLIP_STD)), None)


Reading = Literal["class_token", "spatial_mean", "pooled"]


class TimmNetwork(nn.Module):
    """A network of timm at `side` pixels, in its own normalisation: RAEv2's FDr6 names five.

    Pictures are resized bicubically with antialiasing. Vision transformers take any side: positions are scaled, and
    pictures padded to whole patches. Without `path` it has the shapes alone. Raises ArtefactError for unknown models,
    sides that do not suit, readings that it does not have, and weights of another one.
    """

    def __init__(self, name: str, side: int, reading: Reading, path: Path | None) -> None:
        super().__init__()
        self.side, self._reading = side, reading
        with torch.device("meta"):
            self.network: Any = self._built(name)
            self.dim = self._tried(name)
        if path is not None:
            self.network = self._built(name)
            behind = self.network.pretrained_cfg["classifier"]  # of classes, which are left out
            tensors = timm_tensors(self.network, name, path)
            known = {key: value for key, value in tensors.items() if not behind or not key.startswith(f"{behind}.")}
            assign_weights(self.network, known, where=path)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Extracted:
        pictures = F.interpolate(images.float() / 255, (self.side, self.side), mode="bicubic", antialias=True)
        trained_on = self.network.pretrained_cfg
        mean, std = (pictures.new_tensor(trained_on[key]).view(3, 1, 1) for key in ("mean", "std"))
        return Extracted(self._read((pictures - mean) / std), None)

    def _read(self, pictures: Tensor) -> Tensor:
        features = self.network.forward_features(pictures)  # [B, tokens, D] or [B, D, h, w]
        if self._reading == "pooled":
            return self.network.forward_head(features, pre_logits=True)
        if self._reading == "class_token":
            return features[:, 0]
        return features.mean((2, 3)) if features.ndim == 4 else features[:, self.network.num_prefix_tokens :].mean(1)

    def _built(self, name: str) -> Any:  # noqa: ANN401 - timm's networks have no common class
        import timm

        require_timm_model(name)
        any_side: dict[str, Any] = {}
        if name.startswith("vit_"):
            any_side = {"dynamic_img_size": True, "dynamic_img_pad": True}
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, **any_side)
        if self._reading == "class_token" and getattr(network, "cls_token", None) is None:
            raise ArtefactError(f"{name} has no class token; read spatial_mean or pooled")
        return network.eval()

    def _tried(self, name: str) -> int:
        """Numbers of a picture's features."""
        try:
            return self._read(torch.empty(1, 3, self.side, self.side)).shape[1]
        except (AssertionError, RuntimeError) as error:
            raise ArtefactError(f"{name} takes no pictures of {self.side} pixels: {str(error)[:200]}") from None


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file or of a state dict. Raises ArtefactError for a file that is more or less."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ArtefactError(
            f"{path}: not a file of tensors alone ({str(error).splitlines()[0][:200]}); "
            "take one of safetensors, or a plain state dict"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ArtefactError(f"{path}: not a state dict, tensors by name; take one of safetensors, or a plain one")
    return tensors


@contextmanager
def _fitting(path: Path, what: str) -> Iterator[None]:
    """Tells which file does not fit which network, where its weights are put into it."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error)[:300].split())
        raise ArtefactError(f"{path} does not hold the weights of {what}: {problem}") from None


def _prepared(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Resized by TensorFlow 1's bilinear interpolation, as torch-fidelity does it for all networks, and normalised."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(size, size), align_corners=False)
    shift, scale = (x.new_tensor([255 * value for value in values]).view(3, 1, 1) for values in (mean, std))
    return (x - shift) / scale
