"""Random generators addressed by meaning: (seed, purpose, indices).

Two draws are equal exactly when their addresses are, whatever ran before, on how many devices or workers. A run that
resumes at step k therefore needs no stored random state: it asks for the generators of step k again.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def address(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit number from the address, by SHA-256."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_draws(seed: int, purpose: str, *indices: int) -> "torch.Generator":
    """A CPU torch generator for the address."""
    import torch  # here: whoever composes pictures does without it

    return torch.Generator().manual_seed(address(seed, purpose, *indices))


def numpy_draws(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A numpy generator (PCG64) for the address."""
    return np.random.Generator(np.random.PCG64(address(seed, purpose, *indices)))
