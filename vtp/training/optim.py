"""AdamW over named groups, and the schedules of learning rate and temperature as functions of progress."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from vtp.config import Config


class OptimConfig(Config):
    """AdamW with linear warm-up, then a cosine to `final_lr` or a constant rate."""

    lr: float = Field(gt=0, description="peak learning rate")
    final_lr: float = Field(ge=0, description="learning rate at the end of the cosine")
    schedule: Literal["cosine", "constant"] = Field(description="after warm-up")
    warmup: float = Field(ge=0, le=1, description="share of the run in which the rate rises from 0")
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0, description="on matrices only: biases, norms, scales and tokens are exempt")
    clip_norm: float | None = Field(gt=0, description="largest norm of the whole gradient, null for no limit")


def build_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `modules`; those with fewer than two dimensions do not decay."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    warmup_steps = round(config.warmup * steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
