"""The text tower: open_clip's transformer and byte-pair tokenizer (paper 4.1: 12 layers of width 768)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vtp.config import Config

VOCABULARY = 49408  # of open_clip's byte-pair tokenizer


class TextConfig(Config):
    """The text tower. The options with a default exist to read foreign checkpoints; ours keep the default."""

    context_length: int = Field(ge=1, description="tokens per caption, start and end included")
    vocab_size: int = Field(ge=1, description="49408 for open_clip's byte-pair tokenizer")
    embed_dim: int = Field(ge=1, description="width of the tower and of the shared image-text space")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="number of attention heads")
    mlp_ratio: float = Field(
        default=4.0, ge=0.1, le=100, description="hidden width of the feed-forward layers over the width"
    )
    ls_init_value: float | None = Field(default=None, description="initial LayerScale; null: none")
    pad_id: int = Field(default=0, description="token that pads captions; nothing depends on it")
    output_tokens: bool = Field(default=False, description="kept of official files; nothing depends on it")
    no_causal_mask: bool = Field(default=False, description="let every token see all others")
    pool_type: Literal["argmax", "first", "last", "none"] = Field(
        default="argmax", description="token that stands for the caption; argmax is its end, none keeps all"
    )
    proj_type: Literal["linear", "none"] = Field(
        default="linear", description="kind of projection into the shared space"
    )
    proj_bias: bool = Field(default=False, description="a bias in that projection")
    quick_gelu: bool = Field(default=False, description="OpenAI's approximation of GELU")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


def build_text_tower(config: TextConfig) -> nn.Module:
    """open_clip's TextTransformer: tokens [B, L] -> [B, E], without pooling [B, L, E], not normalised."""
    from open_clip.model import QuickGELU
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.embed_dim,
        heads=config.num_heads,
        layers=config.depth,
        mlp_ratio=config.mlp_ratio,
        ls_init_value=config.ls_init_value,  # pyright: ignore[reportArgumentType] - their annotation forgets None
        output_dim=config.embed_dim,
        no_causal_mask=config.no_causal_mask,
        pool_type=config.pool_type,
        proj_type=config.proj_type,
        proj_bias=config.proj_bias,
        act_layer=QuickGELU if config.quick_gelu else nn.GELU,
    )


class CaptionTokenizer:
    """Captions -> ids [B, L] int64: start, byte pairs, end, zeros; long captions are cut and keep their end token.

    open_clip's byte-pair tokenizer. It is built at the first call, so that workers can be sent this object. Raises
    ValueError when its vocabulary is not that of the tower.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.as_tensor(self._tokenizer(list(captions)))

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=self.config.context_length)
        if tokenizer.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"text.vocab_size is {self.config.vocab_size}; open_clip's tokenizer has {tokenizer.vocab_size} entries"
            )
        return tokenizer
