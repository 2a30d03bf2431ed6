"""Linear heads trained jointly by SGD on frozen features, as DINOv2's and the official protocol have it (paper table 2).

All heads see the same batches in the same order, and those of one feature set begin with the same weights, so that only
the learning rate tells them apart. They share nothing, and are one matrix product. Of each there are two: one that does not
see the held-out training samples, by which a learning rate is chosen, and one that sees all, which is reported. Momentum
0.9, no weight decay, a cosine to 0, first weights of N(0, 0.01); features as they are, unless a set has a scale.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config, Distinct
from vtp.draws import torch_draws
from vtp.evaluation.scale import Scale

MOMENTUM = 0.9
REFERENCE_BATCH = 256  # learning rates are per so many samples
INIT_STD = 0.01
JUDGED = 2048  # samples at a time


class SgdConfig(Config):
    """SGD with momentum 0.9 and a cosine to 0, no weight decay."""

    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Distinct] = Field(
        min_length=1, description="the grid, per 256 samples of a batch; the best on held-out samples is taken"
    )
    epochs: int = Field(
        ge=1, description="passes over the training samples; the official 12,500 batches of 1,024 are 10"
    )
    batch_size: int = Field(ge=1, description="features of a step")


class SgdSolverConfig(SgdConfig):
    """A grid of learning rates on standardised features."""

    name: Literal["sgd"]


class ProbeFeatures(NamedTuple):
    """What the heads of a grid read, and which labels they tell apart."""

    name: str
    probe: str  # of which they are candidates
    table: str
    width: int  # last columns of the table
    of_class: Tensor  # [classes], the label of each class
    scale: Scale | None  # None: features as they are

    def read(self, tables: Mapping[str, Tensor]) -> Tensor:
        """[B, width] float32."""
        x = tables[self.table][:, -self.width :]
        return x.float() if self.scale is None else self.scale.standardise(x).float()


class Choice(NamedTuple):
    """One head of a probe's candidates."""

    accuracy: float  # on validation
    features: str
    learning_rate: float
    epoch: int  # counted from 1


class Candidate(NamedTuple):
    """Accuracies of a learning rate after the last epoch."""

    features: str
    learning_rate: float
    holdout: float  # of the head that has not seen these samples
    validation: float  # of the one that has seen all


class SgdProbe:
    """The heads of several feature sets, and how well they did after every epoch.

    `train` and `judge` take tables of features [N, columns] by name, and labels [N].
    """

    def __init__(self, sets: Sequence[ProbeFeatures], config: SgdConfig, *, seed: int, device: str) -> None:
        self.sets = sets
        self.config = config
        self._seed = seed
        self._device = device
        count = len(config.learning_rates)
        rates = torch.tensor(config.learning_rates, device=device) * (config.batch_size / REFERENCE_BATCH)
        self._rates = rates.repeat(2)[:, None]  # without the held-out samples, then with them
        self._weights, self._biases = [], []
        for one in sets:
            classes = int(one.of_class.max()) + 1
            draws = torch_draws(seed, f"sgd_probe/{one.table}", one.width, classes)
            first = INIT_STD * torch.randn(one.width, 1, classes, generator=draws)
            self._weights.append(first.repeat(1, 2 * count, 1).to(device))  # [D, 2 L, classes]
            self._biases.append(torch.zeros(2 * count, classes, device=device))
        self._velocities = [torch.zeros_like(tensor) for tensor in (*self._weights, *self._biases)]
        none = torch.empty(0, len(sets), count, dtype=torch.float64)
        self._history = {"holdout": none, "validation": none}  # [epochs, sets, L]

    @property
    def epochs_done(self) -> int:
        """How many epochs are over."""
        return len(self._history["validation"])

    def batches(self, samples: int) -> list[Tensor]:
        """Rows of the next epoch's batches: all `samples` in an order of its own, in about equal parts."""
        order = torch.randperm(samples, generator=torch_draws(self._seed, "probe_order", self.epochs_done))
        return list(order.tensor_split(max(1, round(samples / self.config.batch_size))))

    @torch.no_grad()
    def train(self, tables: Mapping[str, Tensor], labels: Tensor, held: Tensor) -> None:
        """The next epoch; `held` [N] are the held-out samples."""
        batches = self.batches(len(labels))
        for number, rows in enumerate(batches):
            done = (self.epochs_done + number / len(batches)) / self.config.epochs
            some = {name: tables[name][rows].to(self._device) for name in self._tables()}
            self._step(some, labels[rows], held[rows], factor=(1 + math.cos(math.pi * done)) / 2)

    def end_epoch(self, *, holdout: Tensor, validation: Tensor) -> None:
        """An epoch is over: accuracies as `judge` gives them, on held-out samples and on validation."""
        count = len(self.config.learning_rates)
        for name, scores in (("holdout", holdout[:, :count]), ("validation", validation[:, count:])):
            self._history[name] = torch.cat([self._history[name], scores[None]])

    @torch.no_grad()
    def judge(self, tables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Accuracy [sets, 2 L] of every head, of those that have not seen the held-out samples first."""
        hits = torch.zeros(len(self.sets), len(self._rates), dtype=torch.float64)
        for rows in torch.arange(len(labels)).split(JUDGED):
            some = {name: tables[name][rows].to(self._device) for name in self._tables()}
            for number, one in enumerate(self.sets):
                predicted = self._logits(number, one.read(some)).argmax(2).cpu()  # [n, 2 L]
                hits[number] += (predicted == one.of_class[labels[rows], None]).sum(0)
        return hits / len(labels)

    def chosen(self, probe: str) -> Choice:
        """The learning rate and feature set that are best on held-out samples after the last epoch; the first of equals."""
        return self._best(probe, self._history["holdout"][-1:], first_epoch=self.epochs_done)

    def best_on_val(self, probe: str) -> Choice:
        """The best head of any epoch on validation, the official way; by construction not below `chosen`."""
        return self._best(probe, self._history["validation"], first_epoch=1)

    def candidates(self, probe: str) -> list[Candidate]:
        """All that were to choose from."""
        return [
            Candidate(one.name, rate, *(self._history[name][-1, number, place].item() for name in self._history))
            for number, one in enumerate(self.sets)
            if one.probe == probe
            for place, rate in enumerate(self.config.learning_rates)
        ]

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the training by name."""
        named = dict(self._history)
        for name, tensors in (("weight", self._weights), ("bias", self._biases), ("velocity", self._velocities)):
            named |= {f"{name}_{number}": tensor for number, tensor in enumerate(tensors)}
        return named

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        self._history = {name: state[name] for name in self._history}
        for name, tensor in self.state().items():
            if name not in self._history:
                tensor.copy_(state[name])

    def _step(self, tables: Mapping[str, Tensor], labels: Tensor, held: Tensor, *, factor: float) -> None:
        labels, known = labels.to(self._device), (~held).to(self._device).float()
        # Each head's mean is over the samples that it sees.
        shares = torch.stack([known / known.sum().clamp(min=1), torch.full_like(known, 1 / len(known))], 1)  # [B, 2]
        shares = shares.repeat_interleave(len(self._rates) // 2, 1)[:, :, None]  # [B, 2 L, 1]
        rows = torch.arange(len(labels), device=self._device)
        for number, one in enumerate(self.sets):
            x, weight, bias = one.read(tables), self._weights[number], self._biases[number]
            excess = self._logits(number, x).softmax(2)  # d cross-entropy / d logits = softmax - onehot
            excess[rows, :, one.of_class.to(self._device)[labels]] -= 1
            excess *= shares
            gradients = (x.T @ excess.flatten(1)).view_as(weight), excess.sum(0)
            velocities = self._velocities[number], self._velocities[len(self.sets) + number]
            for tensor, velocity, gradient in zip((weight, bias), velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                tensor.addcmul_(velocity, self._rates, value=-factor)

    def _logits(self, number: int, x: Tensor) -> Tensor:
        """[B, 2 L, classes]."""
        bias = self._biases[number]
        return (x @ self._weights[number].flatten(1)).unflatten(1, bias.shape) + bias

    def _tables(self) -> set[str]:
        return {one.table for one in self.sets}

    def _best(self, probe: str, by: Tensor, *, first_epoch: int) -> Choice:
        own = [number for number, one in enumerate(self.sets) if one.probe == probe]
        values = by[:, own].flatten().tolist()
        epoch, rest = divmod(values.index(max(values)), len(own) * by.shape[2])
        number, place = own[rest // by.shape[2]], rest % by.shape[2]
        accuracy = self._history["validation"][first_epoch - 1 + epoch, number, place].item()
        return Choice(accuracy, self.sets[number].name, self.config.learning_rates[place], first_epoch + epoch)
