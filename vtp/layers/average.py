"""Exponential moving averages of weights: the self-supervised teacher, and the weights that are kept."""

import copy
from typing import TypeVar

import torch
from torch import nn

from vtp.distributed import local

M = TypeVar("M", bound=nn.Module)
EMA_WARMUP = "let averages follow faster at first: momentum (1 + step) / (10 + step) until that is larger"


def frozen_copy(module: M) -> M:
    """A copy of `module` in evaluation mode that takes no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * module, over all parameters; buffers are copied.

    Works on the pieces that a rank holds, when both are sharded alike.
    """
    ours, theirs = ([local(p) for p in part.parameters()] for part in (average, module))
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)


def warm_momentum(momentum: float, step: int) -> float:
    """The momentum of an average that starts from the first weights: smaller while it has seen few steps."""
    return min(momentum, (1 + step) / (10 + step))
