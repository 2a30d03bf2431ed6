"""Self-distillation losses of DINOv2: teacher targets, class tokens (DINO), masked patches (iBOT) (paper eq. 2).

Targets are computed without gradient; everything runs in float32, and Sinkhorn in log space, where logits of any size
stay finite.
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config


class SinkhornConfig(Config):
    """Sinkhorn-Knopp: every prototype gets an equal share of the batch (SwAV; DINOv2's long recipe)."""

    name: Literal["sinkhorn"]
    iterations: int = Field(ge=1)


class CenteringConfig(Config):
    """Subtract a running mean of the teacher's logits (DINO; DINOv2's short recipe)."""

    name: Literal["centering"]
    momentum: float = Field(ge=0, lt=1)


TargetsConfig = Annotated[SinkhornConfig | CenteringConfig, Field(discriminator="name")]


def build_targets(config: SinkhornConfig | CenteringConfig, prototypes: int) -> nn.Module:
    """A module (logits [M, K], temperature) -> probabilities [M, K], with whatever state it keeps between steps."""
    return Sinkhorn(config) if isinstance(config, SinkhornConfig) else Centering(config, prototypes)


class Sinkhorn(nn.Module):
    """Balanced assignment of the rows to the prototypes; keeps no state."""

    def __init__(self, config: SinkhornConfig) -> None:
        super().__init__()
        self.iterations = config.iterations

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        return sinkhorn(logits, temperature=temperature, iterations=self.iterations)


class Centering(nn.Module):
    """Softmax of centred logits; the centre moves after it has been used."""

    center: Tensor

    def __init__(self, config: CenteringConfig, prototypes: int) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        logits = logits.float()
        probabilities = torch.softmax((logits - self.center) / temperature, dim=-1)
        if len(logits):
            self.center.lerp_(logits.mean(0, keepdim=True), 1 - self.momentum)
        return probabilities


@torch.no_grad()
def sinkhorn(logits: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """Probabilities [M, K] whose rows sum to 1 and whose columns are balanced after `iterations` rounds."""
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)  # equal mass for every prototype
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # mass 1 for every row
    return log_q.exp()


class DinoLoss(NamedTuple):
    """The two parts, scaled so that they add up to a mean over all pairs of different views."""

    between_globals: Tensor
    local_to_global: Tensor


def dino_loss(student_global: Tensor, student_local: Tensor, targets: Tensor, *, temperature: float) -> DinoLoss:
    """Cross-entropy of every student view against the targets of the other global views.

    `student_global` [2, B, K] and `student_local` [L, B, K] are logits (L may be 0), `targets` [2, B, K] probabilities
    of the same two views in the same order. There are 2 + 2 L pairs; each part is its sum over the number of all.
    """
    pairs = 2 + 2 * len(student_local)
    log_global = torch.log_softmax(student_global.float() / temperature, dim=-1)
    log_local = torch.log_softmax(student_local.float() / temperature, dim=-1)
    crossed = -(targets.flip(0) * log_global).sum(-1).mean(-1).sum()
    local = -torch.einsum("tbk,vbk->", targets, log_local) / targets.shape[1]
    return DinoLoss(crossed / pairs, local / pairs)


def ibot_loss(student: Tensor, targets: Tensor, masks: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy at masked patches, averaged within each image and then over all images.

    `student` logits and `targets` probabilities are [M, K], in the order of the true entries of `masks` [V, N]. An
    image without masked patches counts as zero.
    """
    per_image = masks.sum(1, keepdim=True).clamp_min(1)
    weights = (1 / per_image).expand_as(masks)[masks]  # [M]
    entropy = -(targets * torch.log_softmax(student.float() / temperature, dim=-1)).sum(-1)
    return (weights * entropy).sum() / masks.shape[0]


class TargetDiagnostics(NamedTuple):
    """Two signs of collapse."""

    entropy: Tensor  # mean entropy of a target, in nats: 0 is one-hot, ln K says nothing
    kl_to_uniform: Tensor  # of the mean target, in nats: ln K when all samples share one prototype


@torch.no_grad()
def target_diagnostics(targets: Tensor) -> TargetDiagnostics:
    """Diagnostics of targets [M, K]."""
    mean = targets.mean(0)
    return TargetDiagnostics(
        entropy=-torch.xlogy(targets, targets).sum(-1).mean(),
        kl_to_uniform=torch.xlogy(mean, mean).sum() + math.log(targets.shape[-1]),
    )
