"""Floating-point operations of a module, counted by torch on the meta device: nothing is allocated or computed.

Two per multiply-add of every matrix product and convolution; norms and activations are left out, as is usual. A
backward pass through weights and inputs costs twice the forward pass, through inputs alone once.
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vtp.layers.captions import Captions, Condition

TRAINING = 3  # forward, and backward through weights and inputs
FROZEN = 2  # forward, and backward through inputs alone
_OF_FEATURES = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}  # what attention is made of on the meta device


@torch.no_grad()
def forward_flops(module: nn.Module, *inputs: Condition, attention: bool = True) -> float:
    """FLOPs of `module(*inputs)`; only the shapes of the inputs matter.

    `attention` False leaves out products of features with features, such as attention's scores: a count by weights.
    """
    shadow = without_contents(module)
    with FlopCounterMode(display=False) as counter:
        shadow(*(_shape(value) for value in inputs))
    counts = counter.get_flop_counts().get("Global", {})  # absent where nothing counts
    return float(sum(flops for operation, flops in counts.items() if attention or operation not in _OF_FEATURES))


def without_contents(module: nn.Module) -> nn.Module:
    """A copy on the meta device, of which operations for many shapes are counted without copying it each time."""
    return copy.deepcopy(module).to("meta").eval()


def _shape(value: Condition) -> Condition:
    if isinstance(value, Captions):
        return Captions(*(each.to("meta") for each in value))
    return value.to("meta")
