"""What passes between the training loop and an objective within a step."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from vtp.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

UNINFORMED = "_uninformed"  # ends the name of a scalar with what a model that knows nothing would score

Logs = Mapping[str, "Tensor | float"]


class StepContext(NamedTuple):
    """Where in the run a step is."""

    step: int  # from 0
    steps: int
    log_step: bool  # a row of the curves ends here: diagnostics that cost something are made

    @property
    def progress(self) -> float:
        """Share of the run behind us, in [0, 1)."""
        return self.step / self.steps


class Term(NamedTuple):
    """This rank's part of a loss, or a piece of that part; gradients of all terms of all ranks add up.

    `parts` are scalars whose sums over terms, micro-batches and ranks are logged. `own` are features that depend on
    this rank's samples alone: when something is not finite, they show whose samples began it.
    """

    name: str  # of the objective that it belongs to
    loss: "Tensor | None"  # None: scalars alone
    parts: Logs = MappingProxyType({})
    own: "Sequence[Tensor]" = ()


class ParameterGroup(NamedTuple):
    """Parameters with factors on the optimiser's numbers."""

    parameters: "Sequence[nn.Parameter]"
    lr: float = 1.0
    weight_decay: float = 1.0
    frozen_until: float = 0.0  # share of the run in which the learning rate is 0


class OptimConfig(Config):
    """AdamW with linear warm-up, then a cosine to `final_lr` or a constant rate."""

    lr: float = Field(gt=0, description="peak learning rate")
    final_lr: float = Field(ge=0, description="learning rate at the end of the cosine")
    schedule: Literal["cosine", "constant"] = Field(description="course of the learning rate after warm-up")
    warmup: float = Field(ge=0, le=1, description="share of the run in which the rate rises from 0")
    beta1: float = Field(ge=0, lt=1, description="decay of the mean of gradients (AdamW)")
    beta2: float = Field(ge=0, lt=1, description="decay of the mean of squared gradients (AdamW)")
    eps: float = Field(gt=0, description="what is added to the root of squared gradients (AdamW)")
    weight_decay: float = Field(
        ge=0, description="weight decay of matrices and tokens; biases, norms and scales are exempt"
    )
    final_weight_decay: float = Field(
        ge=0, description="weight decay at the end of a cosine that begins at weight_decay (DINOv2)"
    )
    clip_norm: float | None = Field(gt=0, description="largest norm of the whole gradient, null for no limit")


class StepCost(NamedTuple):
    """What a global step takes."""

    flops: float  # model FLOPs of training; what is computed again to save memory does not count
    samples: Mapping[str, int]  # per objective
    tokens: int  # through the encoder, forward, teacher included
