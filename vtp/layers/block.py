"""The pre-norm transformer block of the tokenizer's encoder and decoder.

Ours rather than timm's EvaBlock for three reasons: rotary embedding in bfloat16 (published weights), residual branches
on a subset of the batch (DINOv2's stochastic depth, which saves the dropped compute), and the official state-dict keys.
`tests/layers/test_block.py` holds it equal to timm's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtp.layers.drop_path import DropPath
from vtp.layers.norm import NormName, RMSNorm, build_norm
from vtp.layers.rope import Rotation, rotate

FfnName = Literal["swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp"]
SWIGLU_MULTIPLES: Mapping[FfnName, int] = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}
Branch = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are RMS-normalised per head (QK-norm) before rotation, if asked."""

    def __init__(self, dim: int, num_heads: int, *, use_qk_norm: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if use_qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, head_dim]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head_dim]
        q = rotate(self.q_norm(q), rotation)
        k = rotate(self.k_norm(k), rotation)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # [B, T, D]


def ffn_width(name: FfnName, hidden_dim: int) -> int:
    """Hidden width of a feed-forward layer; SwiGLU's is 2/3 of an MLP's, rounded up to the multiple of its name."""
    if name == "mlp":
        return hidden_dim
    multiple = SWIGLU_MULTIPLES[name]
    return -(-int(hidden_dim * 2 / 3) // multiple) * multiple


def build_ffn(name: FfnName, dim: int, hidden_dim: int) -> nn.Module:
    """The feed-forward layer of that name; `hidden_dim` is what the hidden width of an MLP would be."""
    return (Mlp if name == "mlp" else SwiGLU)(dim, ffn_width(name, hidden_dim))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Mlp(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attention(norm1 x)), then x + ls2(ffn(norm2 x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        ffn_layer: FfnName,
        norm_layer: NormName,
        use_qk_norm: bool,
        init_values: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm_layer, dim)
        self.attn = Attention(dim, num_heads, use_qk_norm=use_qk_norm)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = build_norm(norm_layer, dim)
        self.mlp = build_ffn(ffn_layer, dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, x: Tensor, rotation: Rotation, drop_path: DropPath | None = None) -> Tensor:
        """x [B, T, D]; `drop_path` [2, K]: samples whose two branches are computed (None: all)."""
        x = self._residual(x, drop_path, 0, lambda part: self.ls1(self.attn(self.norm1(part), rotation)))
        return self._residual(x, drop_path, 1, lambda part: self.ls2(self.mlp(self.norm2(part))))

    @staticmethod
    def _residual(x: Tensor, drop_path: DropPath | None, number: int, branch: Branch) -> Tensor:
        if drop_path is None:
            return x + branch(x)
        indices, weights = drop_path.of(number)  # [K] each
        return x.index_add(0, indices, (branch(x[indices]) * weights[:, None, None]).to(x.dtype))


class Blocks(nn.ModuleList):
    """A stack of blocks. With `recompute`, activations inside a block are not kept but computed again (backward)."""

    recompute = False

    def outputs(self, x: Tensor, rotation: Rotation, drop_path: DropPath | None = None) -> Iterator[Tensor]:
        """x after each block; `drop_path` is that of all of them, see `Block.forward`."""
        for index, block in enumerate(self):
            arguments = (x, rotation, None if drop_path is None else drop_path.of(index))
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
            yield x


def initialise_weights(module: nn.Module) -> None:
    """Truncated normal 0.02 for every linear layer, zero biases; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
