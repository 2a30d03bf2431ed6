"""The one training loop. It knows steps, gradients, schedules, checkpoints and curves, and nothing of images.

An objective yields its losses one after the other, and each is back-propagated at once, so that the activations of
only one objective are alive at a time. Its phases are trained in turn within every step: one for pre-training and
generation, two for adversarial tuning.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vtp.config import Config
from vtp.training.checkpoint import Checkpoints
from vtp.training.log import Curves, Logs, Means
from vtp.training.optim import OptimConfig, build_optimizer, learning_rate

Batch = TypeVar("Batch", bound=tuple)
Consumed_contra = TypeVar("Consumed_contra", bound=tuple, contravariant=True)


class Samples(Config):
    """The run ends when this many samples have been seen."""

    name: Literal["samples"]
    samples: int = Field(ge=1)


class Flops(Config):
    """The run ends when its training FLOPs (forward, backward, teacher and losses) reach this number."""

    name: Literal["flops"]
    flops: float = Field(gt=0)


Length = Annotated[Samples | Flops, Field(discriminator="name")]


class Plan(NamedTuple):
    """How long a run is."""

    steps: int
    samples: int  # seen in all
    flops: float  # training FLOPs in all


def plan(length: Samples | Flops, *, samples: int, flops: float) -> Plan:
    """The steps that come nearest to `length`, at least one, when a step takes so many samples and FLOPs."""
    wanted = length.samples / samples if isinstance(length, Samples) else length.flops / flops
    steps = max(1, round(wanted))
    return Plan(steps, steps * samples, steps * flops)


class TrainingConfig(Config):
    """What every training run has."""

    length: Length
    precision: Literal["float32", "bfloat16"] = Field(description="of the forward pass; weights stay float32")
    log_every: int = Field(ge=1, description="steps per row of the curves; a row holds means over them")


class Objective(Protocol[Consumed_contra]):
    """A module that holds models and losses. Its state dict, with the optimisers', is the state of the run."""

    def phases(self) -> Mapping[str, Sequence[nn.Module]]:
        """The modules that each phase trains, in the order of the phases within a step."""
        ...

    def losses(self, phase: str, batch: Consumed_contra, step: int, progress: float) -> Iterator[tuple[Tensor, Logs]]:
        """The phase's loss terms, each with the scalars to log; their gradients add up.

        Each term is differentiated before the next is computed, so no two share a graph. Progress is in [0, 1).
        """
        ...

    def after_step(self, step: int) -> None:
        """Moving averages and limits, when all phases have stepped."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...


class Progress(Protocol):
    """A progress bar."""

    def update(self, n: int) -> object: ...


class Host(Protocol):
    """Where the run lives: the part of a stage's `Work` that the loop uses."""

    @property
    def folder(self) -> Path: ...
    @property
    def device(self) -> str: ...
    @property
    def workers(self) -> int: ...
    @property
    def checkpoint_seconds(self) -> float: ...
    @property
    def stop_requested(self) -> bool: ...
    def stop(self) -> NoReturn: ...
    def progress(self, total: int, description: str, unit: str, done: int = 0) -> AbstractContextManager[Progress]: ...


class NotFinite(FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


def fit(
    objective: Objective[Batch],
    batches: Dataset[Batch],
    *,
    steps: int,
    training: TrainingConfig,
    optim: Mapping[str, OptimConfig],
    host: Host,
) -> None:
    """Train for `steps` steps, from the newest checkpoint in `host.folder` if there is one.

    `batches[step]` is a named tuple of tensors and a function of the step alone, so the order of the data survives a
    resume. Curves are in `host.folder / "curves.csv"` from the first interval on. A requested stop ends after the
    current step with a checkpoint. Raises NotFinite, which names the step and the terms; the last checkpoint stays.
    """
    phases = objective.phases()
    optimizers = {phase: build_optimizer(modules, optim[phase]) for phase, modules in phases.items()}
    means = Means()
    checkpoints = Checkpoints(host.folder / "checkpoints")
    parts: dict[str, Any] = {"objective": objective, "means": means} | optimizers
    start = _resume(checkpoints, parts)
    curves = Curves(host.folder / "curves.csv", start=start)
    saved_at = time.monotonic()
    if start:
        logging.info("resumed after step %d of %d", start, steps)
    with host.progress(total=steps, description="training", unit="step", done=start) as bar:
        for step, batch in zip(range(start, steps), _stream(batches, range(start, steps), host), strict=True):
            for phase, optimizer in optimizers.items():
                terms = objective.losses(phase, batch, step, step / steps)
                means.add(_step(optimizer, terms, optim[phase], _Place(phase, step, steps), training.precision))
            objective.after_step(step)
            bar.update(1)
            if (step + 1) % training.log_every == 0 or step + 1 == steps:
                curves.write(step + 1, means.take())
            due = time.monotonic() - saved_at >= host.checkpoint_seconds
            if due or step + 1 == steps or host.stop_requested:
                checkpoints.save(step + 1, {name: part.state_dict() for name, part in parts.items()})
                saved_at = time.monotonic()
            if host.stop_requested:
                host.stop()


class _Place(NamedTuple):
    phase: str
    step: int
    steps: int


def _step(
    optimizer: torch.optim.Optimizer,
    terms: Iterator[tuple[Tensor, Logs]],
    config: OptimConfig,
    place: _Place,
    precision: str,
) -> dict[str, Tensor | float]:
    """Gradients of all terms, clipping, one update; the scalars of the phase under its name."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device.type
    logs: dict[str, Tensor | float] = {}
    # Terms are computed lazily: the loop body runs between two of them.
    while (term := _next(terms, device, precision)) is not None:
        loss, scalars = term
        loss.backward(inputs=[p for p in parameters if p.requires_grad])
        logs |= scalars
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf"))
    if not torch.isfinite(norm):
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in logs.items())
        raise NotFinite(
            f"step {place.step}, phase {place.phase}: gradient norm is {float(norm)} ({values}); "
            "lower the learning rate or set clip_norm; the last checkpoint is kept"
        )
    rate = learning_rate(config, place.step, place.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**logs, f"{place.phase}_gradient_norm": norm, f"{place.phase}_lr": rate}


def _next(terms: Iterator[tuple[Tensor, Logs]], device: str, precision: str) -> tuple[Tensor, Logs] | None:
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        return next(terms, None)


def _resume(checkpoints: Checkpoints, parts: Mapping[str, Any]) -> int:
    newest = checkpoints.newest()
    if newest is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(newest.state[name])
    return newest.step


def _stream(batches: Dataset[Batch], steps: range, host: Host) -> Iterable[Batch]:
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=host.workers,
        prefetch_factor=4 if host.workers else None,
        pin_memory=host.device != "cpu",
    )
    for batch in loader:
        yield type(batch)(*(value.to(host.device, non_blocking=True) for value in batch))
