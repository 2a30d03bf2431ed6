"""Block masks for masked image modelling (BEiT, iBOT), filled to an exact count.

Every block of the batch hides the same number of patches (as DINOv3 does for a whole batch), so shapes stay static for
any number of ranks and micro-batches, and no step costs more.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config

MIN_BLOCK = 4
MAX_LOG_ASPECT = math.log(1 / 0.3)
TRIES = 10


class MaskConfig(Config):
    """Which crops are masked, and how much of them."""

    probability: float = Field(ge=0, le=1, description="share of the crops that are masked at all")
    ratio_min: float = Field(ge=0, le=1, description="least share of masked patches in a masked crop")
    ratio_max: float = Field(
        ge=0, lt=1, description="largest share of masked patches; ratios are spread evenly between the two"
    )
    tries: Literal["mask", "rectangle"] = Field(
        description="what ten tries are for: a whole mask, or each of its rectangles, until none of ten fits (DINOv2)"
    )


def draw_masks(crops: int, height: int, width: int, config: MaskConfig, draws: np.random.Generator) -> Tensor:
    """Masks [crops, height * width] of one block of the batch, true where a patch is hidden, in random order.

    Ratios are drawn from even strata in pairs that mirror each other, so their sum is always the same; a crop without
    a partner has the mean ratio.
    """
    patches = height * width
    masks = np.zeros((crops, height, width), dtype=bool)
    for mask, count in zip(masks, _counts(int(crops * config.probability), patches, config, draws), strict=False):
        _fill(mask, count, config, draws)
    return torch.from_numpy(masks[draws.permutation(crops)].reshape(crops, patches))


def _counts(masked: int, patches: int, config: MaskConfig, draws: np.random.Generator) -> list[int]:
    """Hidden patches of each masked crop."""
    span, pair = config.ratio_max - config.ratio_min, round(patches * (config.ratio_min + config.ratio_max))
    strata = (np.arange(masked // 2) + draws.random(masked // 2)) / max(masked, 1)
    lower = [round(patches * (config.ratio_min + span * float(share))) for share in strata]
    return [*lower, *(pair - count for count in lower), *([pair // 2] if masked % 2 else [])]


def _fill(mask: np.ndarray, target: int, config: MaskConfig, draws: np.random.Generator) -> None:
    """Rectangles until none fits, then single patches, up to exactly `target` patches."""
    remaining = target
    if config.tries == "mask":
        for numbers in draws.random((TRIES, 4)):
            if remaining < MIN_BLOCK:
                break
            remaining -= _hide(mask, remaining, numbers)
    else:
        while added := _hide_first(mask, remaining, draws.random((TRIES, 4))):
            remaining -= added
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[draws.permutation(free)[:remaining]] = True


def _hide_first(mask: np.ndarray, most: int, tries: np.ndarray) -> int:
    """Hide the first rectangle of `tries` that adds 1 to `most` patches; how many it adds, or 0 when none does."""
    return next(filter(None, (_hide(mask, most, uniform) for uniform in tries)), 0)


def _hide(mask: np.ndarray, most: int, uniform: np.ndarray) -> int:
    """Hide a rectangle by numbers [4] in [0, 1): area, aspect, top, left. What it adds; 0 if that is more than `most`."""
    (height, width), (area, log_aspect, top, left) = mask.shape, uniform
    size = MIN_BLOCK + area * (most - MIN_BLOCK)
    aspect = math.exp((2 * log_aspect - 1) * MAX_LOG_ASPECT)
    rows, columns = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
    if not (0 < rows < height and 0 < columns < width):
        return 0
    y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    block = mask[y : y + rows, x : x + columns]
    fresh = block.size - int(block.sum())
    if fresh > most:
        return 0
    block[:] = True
    return fresh
