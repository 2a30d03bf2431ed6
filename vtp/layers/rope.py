"""Axial rotary position embedding of DINOv3: patch centres in [-1, 1] per axis, periods 100^(2i / (D/2)).

The official tokenizer computes it in bfloat16 whatever the model's precision, and casts the whole of q and k to
bfloat16 and back on the way. Published weights were trained so; `dtype=torch.bfloat16` reproduces that.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

BASE = 100.0


class Rotation(NamedTuple):
    """Sine and cosine of every patch's angles, both [N, head_dim]."""

    sin: Tensor
    cos: Tensor


class AxialRope(nn.Module):
    """Angles for a grid of patches; one period per quarter of the head dimension."""

    periods: Tensor

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary embedding needs a head dimension divisible by 4, got {head_dim}")
        exponent = 2 * torch.arange(head_dim // 4, dtype=dtype) / (head_dim // 2)
        self.register_buffer("periods", BASE**exponent)

    def forward(self, height: int, width: int) -> Rotation:
        """Rotation of a `height` x `width` grid in row-major order."""
        like = {"dtype": self.periods.dtype, "device": self.periods.device}
        rows = torch.arange(0.5, height, **like) / height
        columns = torch.arange(0.5, width, **like) / width
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
        angles = 2 * math.pi * (2 * grid - 1)[:, :, None] / self.periods  # [N, 2, head_dim / 4]
        angles = angles.flatten(1).tile(2)  # [N, head_dim]
        return Rotation(angles.sin(), angles.cos())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last N tokens of x [B, heads, tokens, head_dim]; tokens before them (class token) stay."""
    wide = x.to(rotation.sin.dtype)
    patches = wide[:, :, -rotation.sin.shape[0] :]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin
    prefix = wide[:, :, : x.shape[2] - turned.shape[2]]
    return torch.cat([prefix, turned], dim=2).to(x.dtype)
