"""The visual tokenizer: encoder, bottleneck, pixel decoder and, when CLIP is trained, the text tower (paper 3, fig. 3).

On disk it has the layout that the authors publish (`vtp.models.official_layout`), so weights go both ways.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.artefact import load_module, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.config import Config
from vtp.layers.drop_path import DropPath
from vtp.models.base import (
    LARGEST_SIDE,
    EncoderLayers,
    MissingDecoder,
    TrainableTokenizer,
    gradients,
    require_batch,
)
from vtp.models.decoder import DecoderConfig, PixelDecoder
from vtp.models.hub import checkpoint_folder
from vtp.models.official_layout import flatten, official_key, official_name, our_key, sections_of
from vtp.models.text import CaptionTokenizer, TextConfig, build_text_tower
from vtp.models.vit import Features, RopeDtype, VisionConfig, VisionTransformer

INIT_LOGIT_SCALE = math.log(1 / 0.07)


class TokenizerConfig(Config):
    """Architecture of the tokenizer. Field names are the official ones less their prefix (`vision_embed_dim`)."""

    image_size: int = Field(ge=1, le=LARGEST_SIDE, description="side of the training images in pixels")
    vision: VisionConfig
    decoder: DecoderConfig | None = Field(description="pixel decoder; null for an encoder that was published without")
    text: TextConfig | None = Field(description="text tower; null when CLIP is not trained")
    rope_dtype: RopeDtype = Field(description="precision of the rotary embedding; published weights use bfloat16")
    decoder_upscale: int | None = Field(
        None, ge=1, description="side in pixels that the decoder makes of a latent; null: the patch size, for training"
    )
    init_logit_scale: float | None = Field(None, description="log of the first inverse temperature; null: CLIP's")
    init_logit_bias: float | None = Field(None, description="first bias of SigLIP's logits; null: none")
    nonscalar_logit_scale: bool = Field(False, description="logit scale and bias of shape [1], as FSDP wants them")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.vision.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.vision.patch_size}")
        for name, part in (("vision", self.vision), ("decoder", self.decoder)):
            if part is not None and part.embed_dim % (4 * part.num_heads):
                raise ValueError(
                    f"{name}.embed_dim {part.embed_dim} is not a multiple of 4 * {name}.num_heads {part.num_heads}"
                )
        return self

    @property
    def upscale(self) -> int:
        """Side in pixels of what the decoder makes of a latent."""
        return self.decoder_upscale or self.vision.patch_size

    @property
    def compares_captions(self) -> bool:
        """Whether a caption becomes one vector, beside those of images."""
        return self.text is not None and self.text.pool_type != "none"

    @property
    def grid_size(self) -> int:
        """Side of the latent grid."""
        return self.image_size // self.vision.patch_size

    @property
    def pixels_per_latent(self) -> int:
        """Along a side."""
        return self.vision.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) at the training image size."""
        return (self.vision.latent_channels, self.grid_size, self.grid_size)


class VisualTokenizer(TrainableTokenizer):
    """Images [B, 3, H, W] in ImageNet-normalised space to latents [B, d, H/p, W/p] and back."""

    pixel_decoder: PixelDecoder  # or a MissingDecoder, as no training has it
    has_features = True
    logit_scale: nn.Parameter  # [], or [1]
    logit_bias: nn.Parameter  # likewise; only with SigLIP's loss
    visual_proj: nn.Linear

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.trunk = VisionTransformer(vision, rope_dtype=config.rope_dtype)
        self.pixel_decoder = build_decoder(config)  # pyright: ignore[reportAttributeAccessIssue]
        if config.text is not None:
            clip_dim = vision.embed_dim if vision.bottleneck_ae_only else vision.latent_channels
            self.visual_proj = nn.Linear(clip_dim, config.text.embed_dim, bias=False)
            nn.init.normal_(self.visual_proj.weight, std=clip_dim**-0.5)
            self.text = build_text_tower(config.text)
            scale = INIT_LOGIT_SCALE if config.init_logit_scale is None else config.init_logit_scale
            shape = (1,) if config.nonscalar_logit_scale else ()
            self.logit_scale = nn.Parameter(torch.full(shape, scale))
            if config.init_logit_bias is not None:
                self.logit_bias = nn.Parameter(torch.full(shape, config.init_logit_bias))

    @property
    def num_blocks(self) -> int:
        return len(self.trunk.blocks)

    @property
    def feature_dim(self) -> int:
        return self.config.vision.embed_dim

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) at the training image size."""
        return self.config.latent_shape

    def encode(self, images: Tensor, *, grad: bool = False, drop_path: DropPath | None = None) -> Tensor:
        """Latents [B, d, H/p, W/p]: the bottleneck of the last patch tokens, deterministic and unbounded.

        `grad`: record it for a backward pass. `drop_path` is the encoder's stochastic depth in training
        (`VisionTransformer.forward`). Raises ValueError for what is no batch of images, and sides that are no multiple of p.
        """
        with gradients(grad):
            return self._encode(images, drop_path)

    def _encode(self, images: Tensor, drop_path: DropPath | None = None) -> Tensor:
        require_batch(images, 3, "images", "preprocess")
        patch_size = self.config.vision.patch_size
        latents = self.trunk(images, drop_path=drop_path, latent=True).patches  # [B, N, d]
        return latents.transpose(1, 2).unflatten(2, (images.shape[2] // patch_size, images.shape[3] // patch_size))

    def mean_latent(self, features: Features) -> Tensor:
        return self.trunk.feature_bottleneck(features.patches.mean(1))

    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """The trunk and its bottleneck; what CLIP and masked modelling add does not touch latents."""
        settings = self.config.vision.model_dump(exclude={"bottleneck_ae_only", "clip_feat"})
        tensors = {name: tensor for name, tensor in self.trunk.state_dict().items() if name != "mask_token"}
        return {"model": "vtp", "rope_dtype": self.config.rope_dtype, **settings}, tensors

    def encoder_layers(self) -> EncoderLayers:
        trunk = self.trunk
        top = nn.ModuleList([trunk.norm, trunk.feature_bottleneck])
        return EncoderLayers(trunk.patch_embed, [trunk.cls_token], [trunk.mask_token], list(trunk.blocks), top)

    def blocks(self) -> Iterator[nn.Module]:
        yield from (*self.trunk.blocks, *self.pixel_decoder.blocks)

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        for model in (self.trunk, self.pixel_decoder):
            yield [*model.blocks, model]
        if self.config.text is not None:
            text: Any = self.text  # open_clip's
            yield [*text.transformer.resblocks, text]

    def recompute(self) -> None:
        for model in (self.trunk, self.pixel_decoder):
            model.blocks.recompute = True
        if self.config.text is not None:
            text: Any = self.text  # open_clip's
            text.set_grad_checkpointing(True)

    def architecture(self) -> Mapping[str, Any]:
        return official_config(self.config)

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        vision, decoder = (
            self.config.vision.model_dump(exclude={"bottleneck_ae_only", "clip_feat"}),
            self.config.decoder,
        )
        return {"vision": vision} | ({"decoder": decoder.model_dump()} if decoder else {})

    def encode_image(self, images: Tensor, *, drop_path: DropPath | None = None) -> Tensor:
        """Unit-norm CLIP embedding [B, E], float32. Raises ValueError for a tokenizer without a text tower."""
        self._require_text()
        return self._embed(self.trunk(images, drop_path=drop_path, latent=not self.config.vision.bottleneck_ae_only))

    def project_image(self, features: Features) -> Tensor:
        """Unit-norm CLIP embedding [B, E], float32, of trunk features, without another pass through the trunk."""
        if not self.config.vision.bottleneck_ae_only:
            features = Features(*map(self.trunk.feature_bottleneck, features))
        return self._embed(features)

    def _embed(self, features: Features) -> Tensor:
        pooled = features.cls if self.config.vision.clip_feat == "cls" else features.patches.mean(1)
        return F.normalize(self.visual_proj(pooled).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit-norm CLIP embedding [B, E], float32, of token ids [B, L] from `tokenize`; without pooling [B, L, E]."""
        self._require_text()
        return F.normalize(self.text(tokens).float(), dim=-1)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids [B, L] int64 of open_clip's byte-pair tokenizer."""
        self._require_text()
        assert self.config.text is not None
        return CaptionTokenizer(self.config.text)(captions)

    def features(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """Class token [B, D] and patch tokens [B, N, D] before the bottleneck; `masks` [B, N] hides patches."""
        return self.trunk(images, masks)

    def intermediate_features(self, images: Tensor, n: int) -> list[Features]:
        """Features after each of the last `n` blocks, normed; the last block comes last."""
        return self.trunk.intermediate(images, n)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the official layout; equal weights give equal bytes."""
        self.save(Path(folder), self.state_dict())

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_tokenizer(folder, self.config, weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the official layout, ours included, from a folder, or from the Hugging Face hub when there is none.

        The hub's names are strings: `org/name`, or `org/name@revision` for a branch, tag or commit. Raises ArtefactError
        naming what is missing or does not fit, ConfigError naming a value that the layout does not know.
        """
        folder = checkpoint_folder(folder)
        config, path = read_config(folder / "config.json"), folder / "model.safetensors"
        tensors = {our_key(key): value for key, value in load_tensors(path).items()}
        model = load_module(lambda: cls(config), tensors, where=path, name=official_key)
        _restore_unsaved_buffers(model)
        return model.requires_grad_(True).eval()

    def _require_text(self) -> None:
        if self.config.text is None:
            raise ValueError("this tokenizer was trained without CLIP: it has no text tower (text: null)")


def _restore_unsaved_buffers(model: VisualTokenizer) -> None:
    # open_clip's causal mask is a buffer that no checkpoint holds; on the meta device it was never filled.
    text = model.config.text
    if text is not None and getattr(model.text, "attn_mask", None) is not None:
        mask = torch.full([text.context_length] * 2, float("-inf")).triu_(1)
        model.text.register_buffer("attn_mask", mask, persistent=False)


def official_config(config: TokenizerConfig) -> dict[str, Any]:
    """`config.json` in the flat official form."""
    return flatten(config.model_dump())


def read_config(path: Path) -> TokenizerConfig:
    """The architecture in an official or own `config.json`. Raises ArtefactError or ConfigError."""
    sections = sections_of(read_json(path), path)
    return TokenizerConfig.parse(sections, where=lambda keys: ": ".join(filter(None, (str(path), official_name(keys)))))


def build_decoder(config: TokenizerConfig) -> PixelDecoder | MissingDecoder:
    """The pixel decoder that belongs to a tokenizer."""
    if config.decoder is None:
        return MissingDecoder()
    return PixelDecoder(
        config.decoder,
        latent_channels=config.vision.latent_channels,
        patch_size=config.upscale,
        rope_dtype=config.rope_dtype,
    )


def save_tokenizer(folder: Path, config: TokenizerConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a tokenizer, given by its state dict, in the official layout."""
    with whole_folder(folder) as temporary:
        write_json(temporary / "config.json", official_config(config))
        tensors = {official_key(key): value for key, value in weights.items()}
        save_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
