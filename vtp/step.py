"""What passes between the training loop and an objective within a step."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

Logs = Mapping[str, Tensor | float]


class Moment(NamedTuple):
    """Where in the run a step is."""

    step: int  # from 0
    steps: int
    watched: bool  # diagnostics that cost something are made in this step

    @property
    def progress(self) -> float:
        """Share of the run behind us, in [0, 1)."""
        return self.step / self.steps


class Term(NamedTuple):
    """This rank's part of a loss, or a piece of that part; gradients of all terms of all ranks add up.

    `parts` are scalars whose sums over terms, micro-batches and ranks are logged. `own` are features that depend on
    this rank's samples alone: when something is not finite, they tell whose samples began it.
    """

    name: str  # of the objective that it belongs to
    loss: Tensor | None  # None: scalars alone
    parts: Logs = MappingProxyType({})
    own: Sequence[Tensor] = ()


class ParameterGroup(NamedTuple):
    """Parameters with factors on the optimiser's numbers."""

    parameters: Sequence[nn.Parameter]
    lr: float = 1.0
    weight_decay: float = 1.0
    frozen_until: float = 0.0  # share of the run in which the learning rate is 0


class StepCost(NamedTuple):
    """What a global step takes."""

    flops: float  # model FLOPs of training; what is computed again to save memory does not count
    samples: Mapping[str, int]  # per objective
    tokens: int  # through the encoder, forward, teacher included
