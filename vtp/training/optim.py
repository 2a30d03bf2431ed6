"""AdamW and Muon over groups, the schedules of learning rate and weight decay, and the norm of a gradient in pieces."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp.distributed import copies, is_sharded, local
from vtp.step import MuonMatrices, OptimConfig, ParameterGroup, StepContext

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizers:
    """What moves the parameters of a phase, each by its own method."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all of them, which may be changed."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """What is kept of every parameter."""
        return {parameter: values for part in self.parts for parameter, values in part.state.items()}

    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimConfig) -> Optimizers:
    """Fused AdamW, and torch's Muon where `config` asks for it. Vectors and scalars decay where their group says so alone.

    State exists from the start. Muon multiplies in bfloat16, 15 products a matrix, one matrix after the other. Every rank
    does all of them for weights that are whole on each; of sharded ones the products are shared, and each communicates, so
    that many ranks are slow. These products are in no count of FLOPs.

    Raises ValueError when a parameter stands in two groups, and when there is nothing for Muon.
    """
    by_adamw: list[dict[str, Any]] = []
    by_muon: list[dict[str, Any]] = []
    muon = config.matrices if isinstance(config.matrices, MuonMatrices) else None
    for group in groups:
        own = [parameter for parameter in group.parameters if parameter.requires_grad]
        options = {name: getattr(group, name) for name in ("frozen_until", "module", "course", "last_term")}
        matrices = [p for p in own if p in group.hidden] if muon is not None else []
        if muon is not None and matrices:
            factors = {"lr_factor": group.lr * muon.lr, "decay_factor": group.weight_decay}
            by_muon.append({"params": matrices, **factors, **options})
            own = [p for p in own if p not in group.hidden]
        for decays, sharded in itertools.product((True, False), (True, False)):  # fused steps cannot mix either
            parameters = [p for p in own if (p.ndim >= 2 or group.vectors_decay) == decays and is_sharded(p) == sharded]
            factors = {"lr_factor": group.lr, "decay_factor": group.weight_decay * decays}
            if parameters:
                by_adamw.append({"params": parameters, **factors, **options})
    split = by_adamw + by_muon
    if len({p for group in split for p in group["params"]}) < sum(len(group["params"]) for group in split):
        raise ValueError("a parameter stands in more than one group")
    parts = [_adamw(by_adamw, config)] if by_adamw else []
    return Optimizers(*parts, *([_muon(by_muon, muon, lr=config.lr)] if muon is not None else []))


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)
    for parameter in parameters_of(optimizer):
        # As AdamW itself would at the first step; a checkpoint is then read into what is already there.
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def _muon(groups: list[dict[str, Any]], config: MuonMatrices, *, lr: float) -> torch.optim.Optimizer:
    if not groups:
        raise ValueError(
            "optim.matrices is muon, and these models have no matrices of hidden layers; choose {name: adamw}"
        )
    optimizer = torch.optim.Muon(
        groups,
        lr=lr,
        weight_decay=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        adjust_lr_fn=config.adjust_lr,
    )
    for parameter in parameters_of(optimizer):
        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return optimizer


def parameters_of(optimizer: Optimizers | torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimiser."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_rates(optimizer: Optimizers, config: OptimConfig, context: StepContext) -> float:
    """Put the learning rate and weight decay of a step into every group; the learning rate of a factor of 1.

    The groups of a phase have one course.
    """
    groups = optimizer.param_groups
    begin, end = groups[0]["course"]
    first, steps = round(begin * context.steps), max(1, round((end - begin) * context.steps))
    step = max(0, context.step - first)
    rate = learning_rate(config, step, steps)
    decay = _cosine(config.weight_decay, config.final_weight_decay, step / steps)
    for group in groups:
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
    """Squared norms of the gradients: of replicated parameters, and this rank's part of those of sharded ones."""
    norms = []
    parameters = list(parameters)
    for sharded in (False, True):
        gradients = [local(p.grad) for p in parameters if p.grad is not None and is_sharded(p) == sharded]
        parts = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=parameters[0].device)]
        norms.append(torch.stack(parts).square().sum())
    return norms[0], norms[1] / max(map(copies, parameters))
