"""Mean and deviation of every feature, for probes that standardise what they read."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

BLOCK = 1 << 14  # samples at a time in float64


class Scale(NamedTuple):
    """Over training samples: float64 [D]."""

    mean: Tensor
    std: Tensor  # 1e-8 where a feature is constant

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Over the rows of [N, D], a block at a time."""
        mean, square = (torch.zeros(features.shape[1], dtype=torch.float64, device=features.device) for _ in range(2))
        for block in features.split(BLOCK):
            mean += block.double().sum(0) / len(features)
        for block in features.split(BLOCK):
            square += (block.double() - mean).square().sum(0) / len(features)
        return cls(mean, square.sqrt().clamp(min=1e-8))

    def standardise(self, features: Tensor) -> Tensor:
        """Features [B, D] with mean 0 and deviation 1, float64."""
        return (features.double() - self.mean.to(features.device)) / self.std.to(features.device)
