"""Stochastic depth with static shapes (Huang et al. 2016; DINOv2 computes the branches of the other samples alone)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vtp.device import send

ONE = 1 << 32  # a crop: shares of one are whole numbers of these parts, so that counts are exact


class DropPath(NamedTuple):
    """What the two residual branches of every layer compute; K is equal in all of them and in every step."""

    indices: Tensor  # [depth, 2, K] samples
    weights: Tensor  # [depth, 2, K] of what the branch adds to them: 1 / (1 - rate), or 0 for one that fills up K

    def of(self, number: int) -> "DropPath":
        """That of one layer [2, K], or of one of its branches [K]."""
        return DropPath(self.indices[number], self.weights[number])

    def to(self, device: torch.device) -> "DropPath":
        """The same on a device."""
        return DropPath(*(send(part, device) for part in self))


def draw_drop_path(
    rate: float, *, crops: int, blocks: range, depth: int, draws: Callable[..., torch.Generator]
) -> DropPath | None:
    """Which of the `crops` samples of each of these `blocks` of the batch every branch computes; None: all of them.

    A branch leaves out each sample with probability `rate`, and of the whole batch that share. Who is left out comes from
    `draws()`, the generator of the step, and from `draws(block)`: it does not depend on how blocks are shared out over ranks
    and micro-batches. The samples that a branch computes are drawn systematically (Madow 1944): 1 - rate of each is laid end
    to end over all blocks, and as many of a block are computed as whole numbers fall into its stretch, from a start that is
    drawn for the branch. So every run of blocks computes its share within one sample, and shapes are static.
    """
    if not rate or not crops:
        return None
    share = round(crops * (1 - rate) * ONE)  # of a block
    start = torch.randint(ONE, (depth, 2), generator=draws())
    ends = torch.arange(blocks.start, blocks.stop + 1)[:, None, None] * share
    counts = ((ends + start) // ONE).diff(dim=0)  # [blocks, depth, 2]
    drawn = torch.stack([torch.rand(depth, 2, crops, generator=draws(block)) for block in blocks])
    places = drawn.argsort(-1).argsort(-1)  # of each crop in the order of its block
    computed = (places < counts[..., None]).permute(1, 2, 0, 3).flatten(2)  # [depth, 2, blocks * crops]
    most = -(-len(blocks) * share // ONE)
    indices = computed.logical_not().byte().argsort(stable=True)[..., :most]
    return DropPath(indices, computed.gather(-1, indices) / (1 - rate))
