"""What must hold of features and of pictures before they are compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtp.finite import require_finite


def require_features(real: Tensor, fake: Tensor) -> None:
    """Raises ValueError for an empty set, other than [N, D], and two dimensions; NotFiniteError for NaN and infinity."""
    for name, features in (("real", real), ("generated", fake)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name} features are {list(features.shape)}, not [N, D] with N above 0")
        require_finite(features, f"{name} features", "take them again")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and of {fake.shape[1]} dimensions do not compare")


def require_prompted(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises TypeError for other images than uint8, whose range would be a guess, ValueError for no [B, 3, H, W] of B."""
    if images.dtype != torch.uint8:
        raise TypeError(f"pictures are held against prompts as uint8, given {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many images [B, 3, H, W], given {list(images.shape)}")
