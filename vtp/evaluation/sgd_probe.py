"""Linear heads trained jointly by SGD in one pass over features: a grid of learning rates, as DINOv2's protocol has it.

Every head is a problem of its own: their losses add up and share nothing. Of each head there are two, one that does not
see the held-out part of the training samples, by which the learning rate is chosen, and one that sees all, which is
reported. Features are taken as they are; the official protocol does not standardise them.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.draws import numpy_draws, torch_draws

MOMENTUM = 0.9
REFERENCE_BATCH = 256  # learning rates are per so many samples
INIT_STD = 0.01
EVALUATED = 4096  # samples at a time


class SgdConfig(Config):
    """SGD with momentum 0.9 and a cosine to 0, no weight decay."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="the grid, per 256 samples of a batch; the best on held-out samples is taken"
    )
    epochs: int = Field(
        ge=1, description="passes over the training samples; the official 12,500 batches of 1,024 are 10"
    )
    batch_size: int = Field(ge=1)


class Sight(NamedTuple):
    """One batch: features [B, D] by name of the feature set, labels [B], and who is held out [B]."""

    features: Mapping[str, Tensor]
    labels: Tensor
    held: Tensor


class Split(NamedTuple):
    """Samples that heads are judged on: features [N, D] by name, labels [N]."""

    features: Mapping[str, Tensor]
    labels: Tensor


class SgdResult(NamedTuple):
    """Accuracies in [0, 1]."""

    accuracy: float  # of the chosen head on the test samples
    chosen: tuple[str, float]  # feature set and learning rate
    best_on_test: float  # over all heads and epochs: selected on what it reports, the official way
    by_rate: dict[tuple[str, float], tuple[float, float]]  # of every head: held-out accuracy, test accuracy


class SgdProbe:
    """Heads on several feature sets of widths `dims`. Their draws do not depend on which others there are."""

    def __init__(self, dims: Mapping[str, int], classes: int, config: SgdConfig, *, seed: int, device: str) -> None:
        self.config = config
        self._rates = torch.tensor(config.learning_rates, device=device) * config.batch_size / REFERENCE_BATCH  # [L]
        count = len(config.learning_rates)
        self._weights: dict[str, Tensor] = {}  # [2 L, D + 1, C]: without the held-out samples, then with them
        for name, dim in dims.items():
            first = INIT_STD * torch.randn(dim, classes, generator=torch_draws(seed, f"sgd_probe/{name}"))
            weight = torch.cat([first, torch.zeros(1, classes)]).to(device)
            self._weights[name] = weight.expand(2 * count, -1, -1).clone()
        self._velocity = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self._best = 0.0

    def step(self, sight: Sight, *, done: float) -> None:
        """Learn from one batch; `done` is the share of the training behind it."""
        rate = (self._rates * 0.5 * (1 + math.cos(math.pi * done))).repeat(2)[:, None, None]
        labels = sight.labels.to(self._rates.device)
        known = 1 - sight.held.to(labels.device).float()
        share = torch.stack([known / known.sum().clamp(min=1), torch.ones_like(known) / len(known)])  # [2, B]
        share = share.repeat_interleave(len(self._rates), 0)  # [2 L, B]
        for name, weight in self._weights.items():
            x = _with_bias(sight.features[name].to(weight))
            # d mean cross-entropy / d logits = (softmax - onehot) / B
            errors = (x @ weight).softmax(-1) - F.one_hot(labels, weight.shape[-1]).to(weight)  # [2 L, B, C]
            gradient = x.T @ (errors * share[:, :, None])
            velocity = self._velocity[name].mul_(MOMENTUM).add_(gradient)
            weight.sub_(rate * velocity)

    def end_epoch(self, test: Split) -> None:
        """Note the best accuracy of any head that saw all, on the test samples."""
        count = len(self._rates)
        found = [self._accuracies(name, test)[count:].max().item() for name in self._weights]
        self._best = max(self._best, *found)

    def result(self, held: Split, test: Split) -> SgdResult:
        """Choose on the held-out samples, report on the others."""
        count = len(self._rates)
        table: dict[tuple[str, float], tuple[float, float]] = {}
        for name in self._weights:
            on_held, on_test = self._accuracies(name, held)[:count], self._accuracies(name, test)[count:]
            for rate, of_held, of_test in zip(self.config.learning_rates, on_held, on_test, strict=True):
                table[name, rate] = (of_held.item(), of_test.item())
        chosen = max(table, key=lambda head: table[head][0])  # the held-out samples alone decide
        return SgdResult(table[chosen][1], chosen, self._best, table)

    def _accuracies(self, name: str, split: Split) -> Tensor:
        """Of every head [2 L], float64."""
        weight, hits = self._weights[name], torch.zeros(2 * len(self._rates), dtype=torch.float64)
        features = split.features[name]
        for x, labels in zip(features.split(EVALUATED), split.labels.split(EVALUATED), strict=True):
            predicted = (_with_bias(x.to(weight)) @ weight).argmax(-1)  # [2 L, n]
            hits += (predicted == labels.to(predicted.device)).sum(1).cpu()
        return hits / len(split.labels)


def sgd_probe(
    sights: Iterable[Iterable[Sight]], held: Split, test: Split, *, probe: SgdProbe, samples: int
) -> SgdResult:
    """Train on `sights`, epochs of the batches that `epoch_batches` names for `samples`, and choose on `held`."""
    steps, done = probe.config.epochs * count_batches(samples, probe.config), 0
    for of_epoch in sights:
        for sight in of_epoch:
            probe.step(sight, done=done / steps)
            done += 1
        probe.end_epoch(test)
    return probe.result(held, test)


def count_batches(samples: int, config: SgdConfig) -> int:
    """Of an epoch; what does not fill a batch waits for another epoch's order."""
    return max(1, samples // config.batch_size)


def epoch_batches(samples: int, config: SgdConfig, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Which samples each batch of an epoch holds, a function of the seed and the epoch."""
    order = numpy_draws(seed, "probe_order", epoch).permutation(samples)
    size = min(samples, config.batch_size)
    return [order[start : start + size] for start in range(0, size * count_batches(samples, config), size)]


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)
