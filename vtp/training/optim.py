"""AdamW over groups, the schedules of learning rate and weight decay, and the norm of a gradient in pieces."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vtp.distributed import is_sharded, local
from vtp.step import OptimConfig, ParameterGroup, StepContext

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; parameters with fewer than two dimensions do not decay. Its state exists from the start.

    Raises ValueError when a parameter stands in two groups.
    """
    split = []
    for group in groups:
        for decays, sharded in itertools.product((True, False), (True, False)):  # fused steps cannot mix either
            own = [p for p in group.parameters if p.requires_grad and is_sharded(p) == sharded]
            parameters = [p for p in own if (p.ndim >= 2) == decays]
            factors = {"lr_factor": group.lr, "decay_factor": group.weight_decay * decays}
            if parameters:
                split.append({"params": parameters, **factors, "frozen_until": group.frozen_until})
    if len({p for group in split for p in group["params"]}) < sum(len(group["params"]) for group in split):
        raise ValueError("a parameter stands in more than one group")
    optimizer = torch.optim.AdamW(
        split, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0, fused=True
    )
    for parameter in parameters_of(optimizer):
        # As AdamW itself would at the first step; a checkpoint is then read into what is already there.
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimiser."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, context: StepContext) -> float:
    """Put the learning rate and weight decay of a step into every group; the learning rate of a factor of 1."""
    rate = learning_rate(config, context.step, context.steps)
    decay = _cosine(config.weight_decay, config.final_weight_decay, context.progress)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"] * (context.progress >= group["frozen_until"])
        group["weight_decay"] = decay * group["decay_factor"]
    return rate


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    warmup_steps = round(config.warmup * steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    return _cosine(config.lr, config.final_lr, (step - warmup_steps) / max(1, steps - warmup_steps))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def squared_norms(parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Squared norms of the gradients: of replicated parameters, and of this rank's pieces of sharded ones."""
    norms = []
    parameters = list(parameters)
    for sharded in (False, True):
        gradients = [local(p.grad) for p in parameters if p.grad is not None and is_sharded(p) == sharded]
        parts = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=parameters[0].device)]
        norms.append(torch.stack(parts).square().sum())
    return norms[0], norms[1]
