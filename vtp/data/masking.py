"""Block masks for masked image modelling (BEiT, iBOT), filled to an exact count.

The number of masked patches is the same in every batch (DINOv3), so shapes stay static and no step costs more.
"""

import math

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
    ratio_max: float = Field(ge=0, lt=1, description="largest; ratios are spread evenly between the two")


def draw_masks(count: int, height: int, width: int, config: MaskConfig, draws: np.random.Generator) -> Tensor:
    """Masks [count, height * width], true where a patch is hidden, in random order over the crops."""
    patches = height * width
    masked = int(count * config.probability)
    ratios = np.linspace(config.ratio_min, config.ratio_max, masked + 1)[1:]
    masks = np.zeros((count, height, width), dtype=bool)
    for mask, ratio in zip(masks, ratios, strict=False):
        _fill(mask, int(patches * ratio), draws)
    return torch.from_numpy(masks[draws.permutation(count)].reshape(count, patches))


def _fill(mask: np.ndarray, target: int, draws: np.random.Generator) -> None:
    """Rectangles until none fits, then single patches, up to exactly `target` patches."""
    height, width = mask.shape
    remaining = target
    for area, log_aspect, top, left in draws.random((TRIES, 4)):
        if remaining < MIN_BLOCK:
            break
        size = MIN_BLOCK + area * (remaining - MIN_BLOCK)
        aspect = math.exp((2 * log_aspect - 1) * MAX_LOG_ASPECT)
        rows, columns = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if not (0 < rows < height and 0 < columns < width):
            continue
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        block = mask[y : y + rows, x : x + columns]
        fresh = block.size - int(block.sum())
        if fresh <= remaining:
            block[:] = True
            remaining -= fresh
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[draws.permutation(free)[:remaining]] = True
