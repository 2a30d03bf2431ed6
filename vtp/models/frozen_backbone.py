"""A frozen vision transformer of timm as an encoder, with a decoder that is trained for it: the RAE baseline.

Representation autoencoders (Zheng et al. 2025) take the patch tokens of DINOv2 or the like as latents. Images are scaled
to the size that the backbone was trained on, and the last norm has no learned scale and shift, so that every token has unit
variance over its channels.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import (
    ArtefactError,
    assign_weights,
    load_module,
    load_tensors,
    read_json,
    save_tensors,
    whole_folder,
    write_json,
)
from vtp.config import Config
from vtp.device import constant
from vtp.layers.images import denormalise
from vtp.models.base import LARGEST_SIDE, Tokenizer, require_batch
from vtp.models.decoder import DecoderConfig, PixelDecoder
from vtp.models.vit import Features

FORMAT_VERSION = 1


class BackboneConfig(Config):
    """A backbone and the decoder behind it."""

    model: str = Field(
        min_length=1, description="a vision transformer of timm, such as vit_base_patch14_reg4_dinov2.lvd142m"
    )
    input_size: int = Field(
        ge=1, le=LARGEST_SIDE, description="side in pixels that images are scaled to for the backbone"
    )
    image_size: int = Field(ge=1, le=LARGEST_SIDE, description="side of the images that are encoded and decoded")
    decoder: DecoderConfig


class FrozenBackboneArtefact(Config):
    """`config.json` of a tokenizer's folder."""

    format_version: Literal[1]
    model_type: Literal["frozen_backbone"]
    mean: list[float] = Field(min_length=3, max_length=3, description="of the backbone's training images, in [0, 1]")
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3)
    backbone: BackboneConfig


class FrozenBackbone(Tokenizer):
    """Images [B, 3, S, S] in ImageNet-normalised space to patch tokens [B, D, h, w] and back."""

    pixel_decoder: PixelDecoder
    has_features = True
    any_size = False

    def __init__(
        self, config: BackboneConfig, *, mean: list[float] | None = None, std: list[float] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = bare_backbone(config.model, config.input_size)
        side = config.input_size // self.backbone.patch_embed.patch_size[0]
        if config.image_size % side:
            raise ArtefactError(f"image_size {config.image_size} is not a multiple of {side}, the side of the latents")
        self._shape = (self.backbone.embed_dim, side, side)
        self.backbone.requires_grad_(False)
        trained_on = self.backbone.pretrained_cfg
        self._mean, self._std = list(mean or trained_on["mean"]), list(std or trained_on["std"])
        self.pixel_decoder = self.fresh_decoder()

    def fresh_decoder(self) -> PixelDecoder:
        """Another decoder of this size, with new weights."""
        channels, side, _ = self._shape
        patch_size = self.config.image_size // side
        return PixelDecoder(self.config.decoder, latent_channels=channels, patch_size=patch_size, rope_dtype="float32")

    @property
    def num_blocks(self) -> int:
        return len(self.backbone.blocks)

    @property
    def feature_dim(self) -> int:
        return self._shape[0]

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape

    def _encode(self, images: Tensor) -> Tensor:
        """Patch tokens of the last block [B, D, h, w], each with zero mean and unit variance over its channels.

        Raises ValueError for images of another size than `image_size`: the decoder could not give that back.
        """
        require_batch(images, 3, "images", "preprocess")
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            given = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"images are {given}, this tokenizer encodes those of {side}x{side}")
        return self.features(images).patches.transpose(1, 2).unflatten(2, self._shape[1:])

    def features(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """Class token [B, D], or the mean patch of a backbone without one, and patch tokens [B, N, D].

        Images of any size are scaled. Raises ValueError when patches are to be hidden.
        """
        if masks is not None:
            raise ValueError("a frozen backbone hides no patches")
        return self.intermediate_features(images, 1)[0]

    def intermediate_features(self, images: Tensor, n: int) -> list[Features]:
        """Features after each of the last `n` blocks, normed; the last block comes last."""
        if not 1 <= n <= len(self.backbone.blocks):
            raise ValueError(f"n must be between 1 and {len(self.backbone.blocks)}, got {n}")
        outputs = self.backbone.forward_intermediates(
            self._scaled(images), indices=n, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        # Without class token or registers there is no pair.
        return [self._features(*output) if isinstance(output, tuple) else self._features(output) for output in outputs]

    def mean_latent(self, features: Features) -> Tensor:
        return features.patches.mean(1)

    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        settings = self.config.model_dump(exclude={"decoder"}) | {"mean": self._mean, "std": self._std}
        return {"kind": "frozen_backbone", **settings}, self.backbone.state_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` reads; equal weights give equal bytes."""
        with whole_folder(Path(folder)) as temporary:
            write_json(temporary / "config.json", self._description().model_dump())
            save_tensors(temporary / "model.safetensors", self.state_dict(), {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote. Raises ArtefactError naming what is missing or does not fit."""
        folder = Path(folder)
        config = FrozenBackboneArtefact.parse(read_json(folder / "config.json"), where=str(folder / "config.json"))
        path = folder / "model.safetensors"
        build = partial(cls, config.backbone, mean=config.mean, std=config.std)
        state = load_module(build, load_tensors(path), where=path).state_dict()
        model = build()  # timm has buffers that no file holds
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _description(self) -> FrozenBackboneArtefact:
        return FrozenBackboneArtefact(
            format_version=FORMAT_VERSION,
            model_type="frozen_backbone",
            mean=self._mean,
            std=self._std,
            backbone=self.config,
        )

    def _scaled(self, images: Tensor) -> Tensor:
        """In the backbone's normalisation, at its size."""
        pixels, side = denormalise(images), self.config.input_size
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        mean, std = (constant(values, pixels).view(3, 1, 1) for values in (self._mean, self._std))
        return (pixels - mean) / std

    def _features(self, patches: Tensor, prefix: Tensor | None = None) -> Features:
        patches = self._normed(patches)
        if prefix is None or getattr(self.backbone, "cls_token", None) is None:
            return Features(patches.mean(1), patches)
        return Features(self._normed(prefix[:, 0]), patches)

    def _normed(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.backbone.final_eps)


def build_backbone(name: str, input_size: int) -> Any:  # noqa: ANN401 - timm's transformers have no common class
    """A vision transformer of timm without weights. Raises ArtefactError for names, kinds and sizes that do not fit."""
    import timm

    require_timm_model(name)
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=input_size)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ArtefactError(f"timm cannot build {name} for images of {input_size}: {error}") from None
    needed = ("blocks", "embed_dim", "forward_intermediates", "num_prefix_tokens", "patch_embed")
    if not all(hasattr(model, attribute) for attribute in needed) or _final_norm(model) is None:
        raise ArtefactError(f"{name} is not a vision transformer with a final LayerNorm; choose one of timm's vit_*")
    height, width = model.patch_embed.patch_size
    if height != width or input_size % height:
        raise ArtefactError(f"input_size {input_size} is not a multiple of the patch size {height} of {name}")
    return model


def require_timm_model(name: str) -> None:
    """Raises ArtefactError where timm has no such architecture."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), 1)
        raise ArtefactError(f"timm has no model {architecture!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def bare_backbone(name: str, input_size: int) -> Any:  # noqa: ANN401 - see build_backbone
    """The same without what stands behind the last block; `final_eps` is that of the norm that stood there."""
    backbone = build_backbone(name, input_size)
    backbone.final_eps = _final_norm(backbone).eps
    _strip(backbone)
    return backbone


def load_backbone(backbone: Any, name: str, path: Path) -> None:  # noqa: ANN401
    """Give the backbone its weights from a file of timm; position embeddings are scaled to `input_size`.

    Raises ArtefactError when the file belongs to another model.
    """
    tensors = {key: value for key, value in timm_tensors(backbone, name, path).items() if not key.startswith(_BEHIND)}
    assign_weights(backbone, tensors, where=path)


def timm_tensors(model: Any, name: str, path: Path) -> dict[str, Tensor]:  # noqa: ANN401 - as above
    """A file of timm under the names of today's `model`. Raises ArtefactError for weights of another model or shape."""
    given = {key: value.float() for key, value in load_tensors(path).items()}
    adapt = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        tensors = adapt(dict(given), model) if adapt is not None else given
    except (KeyError, IndexError, RuntimeError, ValueError) as error:  # it looks for what it renames
        raise ArtefactError(
            f"{path} does not hold the weights of {name} ({error!r}); fetch those of this model"
        ) from None
    for key in tensors.keys() & given.keys():
        if key != "pos_embed" and tensors[key].shape != given[key].shape:  # timm scales patches of other sizes as well
            raise ArtefactError(
                f"{path}: {key} has shape {list(given[key].shape)}, {name} {list(tensors[key].shape)}; "
                "fetch the weights of this model"
            )
    return tensors


# Behind the last block: a learned norm, pooling and a classifier.
_BEHIND = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")


def _final_norm(backbone: Any) -> Any:  # noqa: ANN401 - see build_backbone
    """Of the tokens, or behind their mean; None when it is no LayerNorm."""
    norms = (getattr(backbone, name, None) for name in ("norm", "fc_norm"))
    return next((norm for norm in norms if isinstance(norm, nn.LayerNorm)), None)


def _strip(backbone: Any) -> None:  # noqa: ANN401 - see build_backbone
    """Leave what latents depend on."""
    backbone.norm = nn.Identity()
    for name in ("fc_norm", "attn_pool"):
        if isinstance(getattr(backbone, name, None), nn.Module):
            setattr(backbone, name, nn.Identity())
