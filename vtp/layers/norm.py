"""Normalisation layers by name, with the epsilons of the official code."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

NormName = Literal["rmsnorm", "layernorm", "layernormbf16"]

EPS: Mapping[NormName, float] = {"rmsnorm": 1e-5, "layernorm": 1e-6, "layernormbf16": 1e-5}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32 with a learned weight, if any: x / rms(x) * weight over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x) if self.weight is None else scaled.type_as(x) * self.weight


def build_norm(name: NormName, dim: int, *, learned: bool = True) -> nn.Module:
    """RMSNorm or LayerNorm with the epsilon of its name, and with a `learned` scale and shift or without.

    The official names differ in nothing else.
    """
    return (RMSNorm if name == "rmsnorm" else nn.LayerNorm)(dim, eps=EPS[name], elementwise_affine=learned)
