"""Stochastic depth with static shapes (Huang et al. 2016; DINOv2 computes the branches of the other samples alone)."""

from collections.abc import Callable

import torch
from torch import Tensor


def drop_path_indices(
    rate: float, *, crops: int, blocks: range, group: int, depth: int, draws: Callable[[int], torch.Generator]
) -> Tensor | None:
    """The samples [depth, 2, K] that the two residual branches of each layer compute; None: all of them.

    `crops` samples belong to the `blocks` of the global batch, equally many to each. `group` blocks in a row share a draw,
    from `draws(number of the group)`, and leave out the share `rate` of their samples, exactly: shapes are static, and
    who is left out does not depend on ranks or micro-batches. Raises ValueError when `blocks` cut a group.
    """
    if not rate or not crops:
        return None
    if len(blocks) % group:
        raise ValueError(
            f"a micro-batch of {len(blocks)} blocks holds no whole number of groups of {group} blocks, which share a "
            "draw of stochastic depth; set drop_path.blocks to a divisor, or use larger micro-batches"
        )
    groups = len(blocks) // group
    size = crops // groups
    computed = max(1, round(size * (1 - rate)))
    chosen = []
    for index in range(groups):
        order = torch.rand(depth, 2, size, generator=draws(blocks.start // group + index)).argsort(-1)
        chosen.append(order[..., :computed] + index * size)
    return torch.cat(chosen, dim=-1)
