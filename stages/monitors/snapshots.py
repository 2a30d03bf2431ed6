"""Pictures and figures at even intervals along a training: kept in scratch, so that a resumed run has them all."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vtp.artefact import load_tensors, save_tensors
from vtp.step import StepContext


class SnapshotStore:
    """The pictures of `evaluations` evenly spaced steps of a run; the last is its end."""

    def __init__(self, folder: Path, evaluations: int) -> None:
        self._folder = folder
        self._evaluations = evaluations

    def due(self, context: StepContext) -> bool:
        """Whether an evaluation falls onto this step."""
        done = context.step + 1
        return done * self._evaluations // context.steps > context.step * self._evaluations // context.steps

    def save(self, context: StepContext, images: Tensor, **figures: float) -> None:
        """Uint8 images [n, 3, H, W] of this step, on the CPU, and numbers by name."""
        exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
        save_tensors(self._path(context.step + 1), {"images": images, **exact})

    def rows(self, steps: int) -> dict[str, Tensor]:
        """The images of every evaluation of a run of `steps`, by names that say when."""
        return {f"step {step}": load_tensors(self._path(step))["images"] for step in self._done(steps)}

    def figures(self, name: str, steps: int) -> dict[int, float]:
        """A number of every evaluation of a run of `steps`, by the steps that were done."""
        return {step: float(load_tensors(self._path(step))[name]) for step in self._done(steps)}

    def _done(self, steps: int) -> Iterator[int]:
        contexts = (StepContext(step, steps, log_step=False) for step in range(steps))
        return (context.step + 1 for context in contexts if self.due(context))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}.safetensors"
