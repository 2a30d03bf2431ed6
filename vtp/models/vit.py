"""The tokenizer's encoder: a vision transformer with rotary positions and a linear bottleneck (paper 3.1).

The parameter names are those of the official trunk, so its weights load as they are.
"""

from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.layers.block import Block, Blocks, FfnName, initialise_weights
from vtp.layers.drop_path import DropPath
from vtp.layers.norm import NormName, build_norm
from vtp.layers.rope import AxialRope

RopeDtype = Literal["float32", "bfloat16"]


class VisionConfig(Config):
    """The encoder and its bottleneck."""

    patch_size: int = Field(ge=1, description="side of a patch in pixels; latents are image_size / patch_size wide")
    embed_dim: int = Field(ge=4, description="width of the encoder")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="attention heads; width / heads must be divisible by 4")
    mlp_ratio: float = Field(ge=0.1, le=100, description="hidden width of the feed-forward layers over the width")
    ffn_layer: FfnName = Field(description="kind of the feed-forward layers")
    norm_layer: NormName = Field(description="kind of normalisation layers")
    use_qk_norm: bool = Field(description="RMS-normalise queries and keys (paper 4.1)")
    init_values: float | None = Field(description="initial LayerScale, null for none")
    feature_bottleneck: int | None = Field(
        ge=1,
        description="latent channels d; null: no bottleneck: latents are the patch tokens of the encoder's width, whose "
        "last norm then has no learned scale and shift, as in RAE",
    )
    bottleneck_ae_only: bool = Field(description="CLIP reads: true, the trunk; false, the d channels")
    clip_feat: Literal["cls", "pooled"] = Field(description="CLIP feature: class token, or mean of the patches")

    @property
    def has_bottleneck(self) -> bool:
        """Whether there is such a layer: latents as wide as the encoder are its patch tokens."""
        return self.latent_channels != self.embed_dim

    @property
    def latent_channels(self) -> int:
        """Channels d of the latents."""
        return self.embed_dim if self.feature_bottleneck is None else self.feature_bottleneck


class EncoderSize(NamedTuple):
    """Depth, width and heads of a named model."""

    depth: int
    embed_dim: int
    num_heads: int


# The paper's encoders; its final models have a decoder of the same size (paper 4.1).
SIZES: Mapping[str, EncoderSize] = {
    "S": EncoderSize(12, 384, 6),
    "B": EncoderSize(12, 768, 12),
    "L": EncoderSize(24, 1024, 16),
}


class Features(NamedTuple):
    """Output of the last block after the final norm; D is the width of the encoder, or d behind the bottleneck."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D]


class VisionTransformer(nn.Module):
    """Images [B, 3, H, W] to features; H and W are multiples of the patch size and may differ from call to call."""

    def __init__(self, config: VisionConfig, *, rope_dtype: RopeDtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.rope_embed = AxialRope(dim // config.num_heads, getattr(torch, rope_dtype))
        self.blocks = Blocks(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                ffn_layer=config.ffn_layer,
                norm_layer=config.norm_layer,
                use_qk_norm=config.use_qk_norm,
                init_values=config.init_values,
            )
            for _ in range(config.depth)
        )
        self.norm = build_norm(config.norm_layer, dim, learned=config.feature_bottleneck is not None)
        self.feature_bottleneck = (
            nn.Linear(dim, config.latent_channels, bias=False) if config.has_bottleneck else nn.Identity()
        )
        self.apply(initialise_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        *,
        drop_path: DropPath | None = None,
        latent: bool = False,
    ) -> Features:
        """Features of `images` [B, 3, H, W], or with `latent` what the bottleneck makes of them, d channels.

        Patches where `masks` [B, N] is true are replaced by the mask token after patch embedding (paper 3.3).
        `drop_path` holds, for each residual branch, the samples that it computes (stochastic depth).
        Raises ValueError when H or W is not a multiple of the patch size.
        """
        x = self.norm(self._tokens(images, masks, drop_path, num_last=1)[-1])
        return self._split(self.feature_bottleneck(x) if latent else x)

    def intermediate(self, images: Tensor, num_last: int) -> list[Features]:
        """Features after each of the last `num_last` blocks, each through the final norm; the last block comes last."""
        if not 1 <= num_last <= len(self.blocks):
            raise ValueError(f"num_last must be between 1 and {len(self.blocks)}, got {num_last}")
        return [self._split(self.norm(x)) for x in self._tokens(images, None, None, num_last=num_last)]

    def _tokens(
        self, images: Tensor, masks: Tensor | None, drop_path: DropPath | None, *, num_last: int
    ) -> list[Tensor]:
        height, width = self._grid(images)
        x = self.patch_embed(images)  # [B, N, D]
        if masks is not None:
            x = torch.where(masks[:, :, None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + N, D]
        rotation = self.rope_embed(height, width)
        return list(deque(self.blocks.outputs(x, rotation, drop_path), maxlen=num_last))

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    @staticmethod
    def _split(x: Tensor) -> Features:
        return Features(x[:, 0], x[:, 1:])


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens by one convolution: [B, 3, H, W] -> [B, N, D]."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)
