"""Whether samples show what they were asked for: their class, told linearly from features of real images with labels.

The probe knows real images alone. What it tells right of held-out real ones is its ceiling, of reconstructions that of the
decoder, and a generator stays below both. Unlike a Fréchet distance it is a share, and sees one sample at a time.
"""

from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.evaluation.linear_probe import accuracy, draw_holdout, fit_logistic
from vtp.evaluation.scale import Scale


class ClassProbeConfig(Config):
    """A linear probe on the features that the reference keeps."""

    seed: int = Field(description="seed of the held-out share")
    holdout: float = Field(gt=0, lt=1, description="share of the real images on which its ceiling is measured")
    l2: float = Field(gt=0, description="l in mean cross-entropy + l/2 |W|^2 on standardised features")
    max_iterations: int = Field(ge=1, description="most iterations of L-BFGS")


class ClassProbe(NamedTuple):
    """Tells classes from features of one network."""

    weight: Tensor  # [D + 1, classes] float64
    scale: Scale
    held: int  # real images behind `ceiling`
    ceiling: float  # share of them that is told right

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, config: ClassProbeConfig) -> Self:
        """Fitted on features [N, D] of real images with labels [N], but for the held-out ones.

        Raises ValueError when none would be left to fit.
        """
        held = draw_holdout(len(features), config.holdout, config.seed)
        known, truth = features[~held], labels[~held]
        scale, classes = Scale.of(known), int(labels.max()) + 1
        weight = fit_logistic(
            known, truth.to(known.device), classes, l2=config.l2, max_iterations=config.max_iterations, scale=scale
        )
        asked = features[held]
        return cls(weight, scale, int(held.sum()), accuracy(weight, asked, labels[held].to(asked.device), scale))

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [N, D] whose class is that of `labels` [N]."""
        return accuracy(self.weight, features, labels.to(features.device), self.scale)
