"""Stochastic depth with static shapes (Huang et al. 2016; DINOv2 computes the branches of the other samples alone)."""

from collections.abc import Callable

import torch
from torch import Tensor


def computed_samples(rate: float, *, crops: int, blocks: int, group: int) -> int:
    """How many of the `crops` samples of so many `blocks` of the batch each residual branch computes, an exact count.

    Every `group` of blocks keeps the same number: `1 - rate` of its samples, rounded, at least one. Raises ValueError
    when `blocks` are no whole number of groups.
    """
    if not rate or not crops:
        return crops
    if blocks % group:
        raise ValueError(
            f"{blocks} blocks in one pass are no whole number of groups of {group} blocks, which share a draw of "
            "stochastic depth; set drop_path.blocks to a divisor, or use larger micro-batches"
        )
    groups = blocks // group
    return groups * max(1, round(crops // groups * (1 - rate)))


def drop_path_indices(
    rate: float, *, crops: int, blocks: range, group: int, depth: int, draws: Callable[[int], torch.Generator]
) -> Tensor | None:
    """The samples [depth, 2, K] that the two residual branches of each layer compute; None: all of them.

    `crops` samples belong to the `blocks` of the global batch, equally many to each. `group` blocks in a row share a draw,
    from `draws(number of the group)`, and leave out the share `rate` of their samples, exactly: shapes are static, and
    who is left out does not depend on ranks or micro-batches. K is `computed_samples`, which raises ValueError when
    `blocks` cut a group.
    """
    if not rate or not crops:
        return None
    computed = computed_samples(rate, crops=crops, blocks=len(blocks), group=group)
    groups = len(blocks) // group
    size = crops // groups
    chosen = []
    for index in range(groups):
        order = torch.rand(depth, 2, size, generator=draws(blocks.start // group + index)).argsort(-1)
        chosen.append(order[..., : computed // groups] + index * size)
    return torch.cat(chosen, dim=-1)
