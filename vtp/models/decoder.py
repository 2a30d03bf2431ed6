"""The tokenizer's pixel decoder: latents -> ViT blocks -> pixels by pixel shuffle (paper 3.2)."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.layers.block import Block, Blocks, FfnName, initialise_weights
from vtp.layers.norm import NormName, build_norm
from vtp.layers.rope import AxialRope
from vtp.models.base import LatentDecoder
from vtp.models.vit import RopeDtype


class DecoderConfig(Config):
    """The pixel decoder; its feed-forward layers are four times its width."""

    embed_dim: int = Field(ge=4, description="width of the decoder")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="attention heads; width / heads must be divisible by 4")
    ffn_layer: FfnName = Field(description="kind of the feed-forward layers")
    norm_layer: NormName = Field(description="kind of normalisation layers")
    use_qk_norm: bool = Field(description="RMS-normalise queries and keys")
    init_values: float | None = Field(description="initial LayerScale, null for none")


class VitDecoderArchitecture(Config):
    """All that a `PixelDecoder` is built from."""

    name: Literal["vit"] = "vit"
    latent_channels: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    rope_dtype: RopeDtype
    blocks: DecoderConfig


class PixelDecoder(LatentDecoder):
    """Latents [B, d, h, w] to images [B, 3, h * patch_size, w * patch_size] in ImageNet-normalised space."""

    def __init__(self, config: DecoderConfig, *, latent_channels: int, patch_size: int, rope_dtype: RopeDtype) -> None:
        super().__init__()
        self._architecture = VitDecoderArchitecture(
            latent_channels=latent_channels, patch_size=patch_size, rope_dtype=rope_dtype, blocks=config
        )
        dim = config.embed_dim
        self.proj_in = nn.Conv2d(latent_channels, dim, 1)
        self.rope_embed = AxialRope(dim // config.num_heads, getattr(torch, rope_dtype))
        self.blocks = Blocks(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=4.0,
                ffn_layer=config.ffn_layer,
                norm_layer=config.norm_layer,
                use_qk_norm=config.use_qk_norm,
                init_values=config.init_values,
            )
            for _ in range(config.depth)
        )
        self.norm = build_norm(config.norm_layer, dim)
        self.proj_out = nn.Conv2d(dim, 3 * patch_size**2, 1)
        self.pixel_shuffle = nn.PixelShuffle(patch_size)
        self.apply(initialise_weights)

    @classmethod
    def of(cls, architecture: VitDecoderArchitecture) -> Self:
        """As its `architecture` says."""
        return cls(
            architecture.blocks,
            latent_channels=architecture.latent_channels,
            patch_size=architecture.patch_size,
            rope_dtype=architecture.rope_dtype,
        )

    @property
    def last_layer(self) -> nn.Module:
        return self.proj_out

    @property
    def upscale(self) -> int:
        return self._architecture.patch_size

    def architecture(self) -> Mapping[str, Any]:
        return self._architecture.model_dump()

    def forward(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        x = self.proj_in(latents).flatten(2).transpose(1, 2)  # [B, N, D]
        rotation = self.rope_embed(height, width)
        *_, x = self.blocks.outputs(x, rotation)
        x = self.norm(x).transpose(1, 2).unflatten(2, (height, width))  # [B, D, h, w]
        return self.pixel_shuffle(self.proj_out(x))
