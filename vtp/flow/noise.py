"""Where samples begin."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtp.draws import torch_draws


def draw_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int], *, purpose: str = "noise") -> Tensor:
    """Standard Gaussian noise [n, *shape] on the CPU; that of a sample is a function of (seed, purpose, index)."""
    return torch.stack([torch.randn(shape, generator=torch_draws(seed, purpose, index)) for index in indices])
