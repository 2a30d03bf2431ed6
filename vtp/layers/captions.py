"""What a generator is told of each sample of a batch."""

from typing import NamedTuple

from torch import Tensor


class Captions(NamedTuple):
    """Captions of a batch. One without any token is the null caption, for which a generator learns a vector."""

    features: Tensor  # [B, L, w], of a text encoder; anything where there is no token
    mask: Tensor  # [B, L] bool, true for tokens; padding is never looked at


Condition = Tensor | Captions  # labels [B] int64, or captions
