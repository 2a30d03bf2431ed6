"""What passes between the training loop and an objective within a step."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

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
    last: bool = False  # of its phase: gradients of parameters that it reaches are complete when it has passed


class ParameterGroup(NamedTuple):
    """Parameters with factors on the optimiser's numbers."""

    parameters: "Sequence[nn.Parameter]"
    lr: float = 1.0
    weight_decay: float = 1.0
    frozen_until: float = 0.0  # share of the run in which the learning rate is 0
    module: str = ""  # of which it is a part: that whose gradient is clipped by itself where `clip_by` says module
    hidden: "Set[nn.Parameter]" = frozenset()  # among others, its matrices of hidden layers
    vectors_decay: bool = False  # as matrices do, and not only these
    course: tuple[float, float] = (0.0, 1.0)  # shares of the run at which its rates begin and end their course
    last_term: str = ""  # name of the last terms that reach them; by default the phase's


def hidden_matrices(blocks: "Iterable[nn.Module]") -> "frozenset[nn.Parameter]":
    """The matrices of hidden layers: all weights of two dimensions in the blocks of a transformer."""
    return frozenset(parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2)


class AdamwMatrices(Config):
    """AdamW moves them, as it moves all else."""

    name: Literal["adamw"]


class MuonMatrices(Config):
    """Muon moves them: along their momentum with all of its singular values made about 1 (Jordan et al. 2024)."""

    name: Literal["muon"]
    lr: float = Field(gt=0, description="factor on the learning rate of what Muon moves; 1 fits match_rms_adamw")
    momentum: float = Field(ge=0, lt=1, description="decay of the mean of gradients (Muon)")
    nesterov: bool = Field(description="step along the mean of the momentum and the gradient, not the momentum alone")
    adjust_lr: Literal["original", "match_rms_adamw"] = Field(
        description="factor by the shape of a matrix: sqrt(max(1, out / in)), or 0.2 sqrt(max(out, in)), with which steps "
        "are as long as AdamW's, whose learning rates then fit (Moonshot)"
    )


class OptimConfig(Config):
    """AdamW, or beside it Muon, with linear warm-up, then a cosine to `final_lr` or a constant rate.

    Hidden layers are the blocks of transformers: of encoder, decoder, text tower and generator. Muon moves their matrices
    alone, a fused one (queries, keys and values) as one matrix. What is AdamW's in any case: patch, token, label and time
    embeddings, learned tokens, the layers to and from latents and pixels, projections and heads, norms, biases, scales.
    """

    matrices: Annotated[AdamwMatrices | MuonMatrices, Field(discriminator="name")]
    lr: float = Field(gt=0, description="peak learning rate")
    reference_batch: int | None = Field(
        ge=1,
        description="samples of a step (of pre-training its largest batch) for which lr is given: the run's is lr times the "
        "root of its own batch over this one (DINOv2); null: lr is the run's",
    )
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
    clip_norm: float | None = Field(gt=0, description="largest norm of the gradient, null for no limit")
    clip_by: Literal["whole", "module"] = Field(
        description="what clip_norm limits: the whole gradient, or that of each module by itself (encoder, decoder, text "
        "tower, each head; DINOv2)"
    )

    def for_batch(self, samples: int) -> Self:
        """The same for steps of so many samples: `lr` by the square-root rule, where it is given for another batch."""
        if self.reference_batch is None:
            return self
        lr = self.lr * math.sqrt(samples / self.reference_batch)
        return self.model_copy(update={"lr": lr, "reference_batch": None})


class StepCost(NamedTuple):
    """What a global step takes."""

    flops: float  # model FLOPs of training; what is computed again to save memory does not count
    samples: Mapping[str, int]  # per objective
    tokens: int  # through the encoder, forward, teacher included
