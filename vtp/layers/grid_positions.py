"""Positions of LightningDiT's tokens on a grid: a sine table that is added to them, and rotations of queries and keys.

Both are functions of a token's row and column, times `scale`, which lets a larger grid span what a smaller one does.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vtp.layers.rope import Rotation


class GridPositions(NamedTuple):
    """Of the tokens of a grid, row by row."""

    table: Tensor  # [N, D] or [1, N, D]
    rotation: Rotation | None  # [N, head_dim]; None: nothing turns

    @classmethod
    def of(
        cls, height: int, width: int, dim: int, head_dim: int | None, *, scale: float, like: Tensor
    ) -> "GridPositions":
        """On the device of `like` and of its type; `head_dim` None: without rotation."""
        table = sine_table(height, width, dim, scale=scale).to(like)
        if head_dim is None:
            return cls(table, None)
        return cls(table, Rotation(*(part.to(like) for part in grid_rotation(height, width, head_dim, scale=scale))))


class GridRope(nn.Module):
    """The rotation of a square grid, stored under the official names."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        sin, cos = grid_rotation(side, side, head_dim)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    @property
    def rotation(self) -> Rotation:
        """[side * side, head_dim]."""
        return Rotation(self.freqs_sin, self.freqs_cos)


def sine_table(height: int, width: int, dim: int, *, scale: float = 1.0) -> Tensor:
    """Positions [height * width, dim]: first half from the column, second from the row, sines then cosines (MAE)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def waves(count: int) -> Tensor:
        angles = scale * torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, dim / 2]

    columns = waves(width)[None].expand(height, -1, -1)
    rows = waves(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def grid_rotation(height: int, width: int, head_dim: int, *, scale: float = 1.0) -> Rotation:
    """Angles of a grid: the first half of a head turns with the row, the second with the column (RoPE of EVA)."""
    per_axis = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, per_axis, 2).float() / per_axis)

    def angles(count: int) -> Tensor:
        return (scale * torch.arange(count).float()[:, None] * frequencies).repeat_interleave(2, dim=1)

    rows = angles(height)[:, None].expand(-1, width, -1)
    columns = angles(width)[None].expand(height, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [height * width, head_dim]
    return Rotation(grid.sin(), grid.cos())


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of the first N tokens of x [B, heads, tokens, head_dim]; those of a text, behind, stay."""
    grid, rest = x[:, :, : len(rotation.cos)], x[:, :, len(rotation.cos) :]
    even, odd = grid.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    turned = (grid * rotation.cos + turned * rotation.sin).to(x.dtype)
    return torch.cat([turned, rest], dim=2) if rest.shape[2] else turned
