"""Self-distillation losses of DINOv2: teacher targets, class tokens (DINO), masked patches (iBOT) (paper eq. 2).

A target is softmax_k(logit / temperature + potential_k). The potential of a prototype balances it over the global
batch: Sinkhorn-Knopp solves for it, centering averages for it. Potentials are vectors [K], so targets never exist for
the whole batch at once: at 4,096 images and 65,536 prototypes they would take 61 GB. Logits come in chunks, as often as
they are asked for. Everything runs in float32 and log space, where logits of any size stay finite.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config
from vtp.distributed import largest, ranks, total

Chunks = Callable[[], Iterable[Tensor]]  # logits of this rank's rows, [m, K] each, computed anew by every call


class SinkhornConfig(Config):
    """Sinkhorn-Knopp: every prototype gets an equal share of the batch (SwAV; DINOv2's long recipe)."""

    name: Literal["sinkhorn"]
    iterations: int = Field(ge=1, description="number of row and column normalisations")


class CenteringConfig(Config):
    """Subtract a running mean of the teacher's logits (DINO; DINOv2's short recipe)."""

    name: Literal["centering"]
    momentum: float = Field(ge=0, lt=1, description="momentum of the running centre of the teacher's logits")


TargetsConfig = Annotated[SinkhornConfig | CenteringConfig, Field(discriminator="name")]


def build_targets(config: SinkhornConfig | CenteringConfig, prototypes: Mapping[str, int]) -> "Sinkhorn | Centering":
    """What balances the `prototypes` of several sets of rows, with whatever state it keeps between steps."""
    return Sinkhorn(config) if isinstance(config, SinkhornConfig) else Centering(config, prototypes)


class Sinkhorn(nn.Module):
    """Balanced assignment of the rows to the prototypes; keeps no state."""

    def __init__(self, config: SinkhornConfig) -> None:
        super().__init__()
        self.iterations = config.iterations

    def forward(self, sets: Mapping[str, Chunks], temperature: float) -> dict[str, Tensor]:
        """The potential [K] of each set for the rows of all ranks."""
        found = sinkhorn_potentials(list(sets.values()), temperature=temperature, iterations=self.iterations)
        return dict(zip(sets, found, strict=True))

    def after_step(self) -> None:
        """Nothing to keep."""


class Centering(nn.Module):
    """The centre of each set's logits, which moves after it has been used."""

    def __init__(self, config: CenteringConfig, prototypes: Mapping[str, int]) -> None:
        super().__init__()
        self.momentum = config.momentum
        for name, count in prototypes.items():
            self.register_buffer(name, torch.zeros(count))
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, sets: Mapping[str, Chunks], temperature: float) -> dict[str, Tensor]:
        """The potential [K] of each set; the mean logits of all ranks wait for the end of the step."""
        sums = {name: torch.zeros_like(self.get_buffer(name)) for name in sets}
        rows = dict.fromkeys(sets, 0)
        for name, chunks in sets.items():
            for logits in chunks():
                sums[name] += logits.float().sum(0)
                rows[name] += len(logits)
        summed = total(torch.cat(list(sums.values()))).split([len(mass) for mass in sums.values()])
        self._means = {
            name: mass / (rows[name] * ranks().size) for name, mass in zip(sets, summed, strict=True) if rows[name]
        }
        return {name: -self.get_buffer(name) / temperature for name in sets}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centres; a skipped step does not."""
        for name, mean in self._means.items():
            self.get_buffer(name).lerp_(mean, 1 - self.momentum)


@torch.no_grad()
def sinkhorn_potentials(sets: Sequence[Chunks], *, temperature: float, iterations: int) -> list[Tensor]:
    """For each set of rows the potential [K] of balanced prototypes after `iterations` rounds of columns, then rows.

    A round of columns makes every prototype's mass equal, over the rows of all ranks; one of rows makes the mass of
    every row 1. The last round of rows is the softmax of the target itself. The sets go together, so that a round is one
    reduction, and the first round two: from then on the mass of a column over all ranks is between 1 / K and the number
    of rows times what the potential before would have it, and no other peak is needed for the sum to be finite.
    """
    potentials: list[Tensor] | None = None
    for _ in range(iterations):
        known = potentials or [None] * len(sets)
        masses = [_column_masses(*each, temperature) for each in zip(sets, known, strict=True)]
        own = torch.cat(masses)
        peak = largest(own.clone()) if potentials is None else -torch.cat(potentials)
        of_all = peak + total((own - peak).exp()).log()
        potentials = list((-of_all).split([len(mass) for mass in masses]))
    assert potentials is not None
    return potentials


def _column_masses(chunks: Chunks, potential: Tensor | None, temperature: float) -> Tensor:
    """Log of each column's sum [K] over this rank's rows, of mass 1 each where there is a potential."""
    masses: Tensor | None = None
    for logits in chunks():
        scaled = logits.float() / temperature
        if potential is not None:
            scaled = scaled - (scaled + potential).logsumexp(1, keepdim=True)
        of_chunk = scaled.logsumexp(0)
        masses = of_chunk if masses is None else torch.logaddexp(masses, of_chunk)
    if masses is None:
        raise ValueError("no rows to balance: no patch is masked; raise masks.probability or masks.ratio_max")
    return masses


def target_of(logits: Tensor, potential: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., K] of teacher logits."""
    return torch.softmax(logits.float() / temperature + potential, dim=-1)


class DinoLoss(NamedTuple):
    """The two parts, scaled so that they add up to a mean over all pairs of different views, summed over images."""

    between_globals: Tensor
    local_to_global: Tensor


def dino_loss(student_global: Tensor, student_local: Tensor, targets: Tensor, *, temperature: float) -> DinoLoss:
    """Cross-entropy of every student view against the targets of the other global views, summed over images.

    `student_global` [B, 2, K] and `student_local` [B, L, K] are logits (L may be 0), `targets` [B, 2, K] probabilities
    of the same two views in the same order. There are 2 + 2 L pairs; each part is its sum over the number of all.
    """
    pairs = 2 + 2 * student_local.shape[1]
    crossed = _entropy(student_global, targets.flip(1), temperature)
    # Both targets meet every local view: their sum has mass 2.
    local = _entropy(student_local, targets.sum(1, keepdim=True), temperature, mass=2)
    return DinoLoss(crossed.sum() / pairs, local.sum() / pairs)


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy at masked patches [M, K], each times its weight [M]: one over the masked patches of its image."""
    return (weights * _entropy(student, targets, temperature)).sum()


def _entropy(student: Tensor, targets: Tensor, temperature: float, mass: float = 1) -> Tensor:
    """-sum_k target log softmax(student / temperature), for targets that sum to `mass`; no log-softmax is kept."""
    scaled = student.float() / temperature
    return mass * scaled.logsumexp(-1) - (targets * scaled).sum(-1)


class TargetDiagnostics:
    """Signs of collapse, collected over the targets of a step."""

    def __init__(self, prototypes: int, device: torch.device) -> None:
        self._entropy = torch.zeros((), device=device)
        self._mass = torch.zeros(prototypes, device=device)
        self._used = torch.zeros(prototypes, device=device)
        self._rows = 0

    @torch.no_grad()
    def add(self, targets: Tensor) -> None:
        """Count targets [..., K]."""
        rows = targets.flatten(0, -2)
        self._entropy -= torch.xlogy(rows, rows).sum()
        self._mass += rows.sum(0)
        self._used[rows.argmax(1)] = 1
        self._rows += len(rows)

    def parts(self) -> dict[str, Tensor]:
        """This rank's parts of what is logged.

        `teacher_entropy`: mean entropy of a target in nats (0 is one-hot, ln K says nothing).
        `teacher_kl_to_uniform`: of the mean target in nats (ln K when all samples share one prototype).
        `prototypes_used`: share of the prototypes that are some target's first choice.
        """
        size = ranks().size
        mass, used = total(self._mass.clone()), total(self._used.clone())
        mean = mass / mass.sum()
        return {
            "teacher_entropy": self._entropy / (self._rows * size),
            "teacher_kl_to_uniform": (torch.xlogy(mean, mean).sum() + math.log(len(mean))) / size,
            "prototypes_used": (used > 0).float().mean() / size,
        }
