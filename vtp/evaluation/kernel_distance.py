"""Kernel distance (Binkowski et al. 2018): KID, when the features are Inception's.

The unbiased estimate of the squared maximum mean discrepancy under (x . y / D + 1)^3. Unlike a Fréchet distance it does
not grow as samples get fewer; near 0 it may be negative.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp.evaluation.checks import require_features


class KernelDistance(NamedTuple):
    """Mean and standard deviation (of the population) over random subsets."""

    mean: float
    std: float


@torch.no_grad()
def kernel_distance(fake: Tensor, real: Tensor, *, subsets: int, subset_size: int, seed: int) -> KernelDistance:
    """Of features [N, D] and [M, D]. Seeds mean what they mean in torch-fidelity, where published ones are 2020.

    Raises ValueError when a subset has more samples than a set, or fewer than 2, and for features that cannot be compared.
    """
    if not 2 <= subset_size <= min(len(fake), len(real)):
        raise ValueError(
            f"subsets of {subset_size} need 2 samples or more, and no more than {len(fake)} generated and {len(real)} "
            "real ones; set `subset_size` between, or take more samples"
        )
    require_features(real, fake)
    draws = np.random.RandomState(seed)  # the legacy generator, as there
    estimates = []
    for _ in range(subsets):
        x, y = (
            each[torch.from_numpy(draws.choice(len(each), subset_size, replace=False)).to(each.device)].double()
            for each in (fake, real)
        )
        estimates.append(_squared_discrepancy(x, y))
    distances = torch.stack(estimates)
    return KernelDistance(distances.mean().item(), distances.std(correction=0).item())


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Of two sets of one size [n, D]; a sample is not compared with itself."""
    n = len(x)
    within = torch.stack([kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y))]).sum()
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
