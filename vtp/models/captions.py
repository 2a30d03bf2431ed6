"""Captions as a generator reads them: token features of a frozen text encoder, and what becomes of them in the model."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.layers.captions import Captions
from vtp.layers.norm import RMSNorm

Reading = Literal["cross_attention", "joint"]


class TextCondition(Config):
    """`text` in a generator's `config.json`: the token features that it reads."""

    width: int = Field(ge=1, description="numbers of a token's features")
    length: int = Field(ge=1, description="tokens of a caption at most")
    reading: Reading = Field(
        description="cross_attention: a layer of its own in every block; joint: tokens of text beside those of the picture"
    )


class CaptionEmbed(nn.Module):
    """Token features to the model's width, by RMSNorm and an MLP; encoders differ in the scale of theirs."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.zeros(dim))

    def forward(self, captions: Captions) -> Captions:
        """[B, L, D]. A null caption becomes one token, the learnt one: no row is without any, over which a softmax fails."""
        features, mask = captions
        tokens = self.fc2(F.gelu(self.fc1(self.norm(features.to(self.fc1.weight.dtype))), approximate="tanh"))
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        null = first & ~mask.any(1, keepdim=True)  # [B, L]
        return Captions(torch.where(null[..., None], self.null.to(tokens.dtype), tokens), mask | null)


class CrossAttention(nn.Module):
    """Attention of a picture's tokens to those of its caption. It starts as zero: the model as one without captions."""

    def __init__(self, dim: int, num_heads: int, *, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = q_norm, k_norm  # per head; identities without QK-norm
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, captions: Captions) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]
        k, v = self.kv(captions.features).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=captions.mask[:, None, None, :]
        )
        return self.proj(mixed.transpose(1, 2).flatten(2))
