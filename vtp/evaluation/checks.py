"""What two sets of features must be to be compared."""

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
