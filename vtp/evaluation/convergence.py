"""How fast a generator learns: its Fréchet distance along the training, and the epochs that it takes to reach one."""

import math
from collections.abc import Mapping
from typing import NamedTuple

EPOCHS = "epochs_"  # of the name of a distance along a training


class EpochsToReach(NamedTuple):
    """Epochs until a distance was reached."""

    evaluated: float  # of the first evaluation at or below it
    interpolated: float | None  # on the line from the evaluation before; None where the first of all was below


def epochs_to_reach(distance: float, points: Mapping[float, float]) -> EpochsToReach | None:
    """The epochs at which `points`, distances by epochs, first come to `distance` or below; None when they never do.

    After EP_FID@k of RAEv2 (arXiv 2605.18324), which names no interpolation. What lies between evaluations is not seen: both
    depend on how often one evaluates.
    """
    before = math.nan, math.nan
    for epochs, value in sorted(points.items()):
        if value <= distance:
            earlier, above = before
            share = (above - distance) / (above - value)
            return EpochsToReach(epochs, None if math.isnan(share) else earlier + share * (epochs - earlier))
        before = epochs, value
    return None
