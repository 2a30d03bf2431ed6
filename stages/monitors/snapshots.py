"""Pictures at even intervals along a training: kept in scratch, so that a resumed run has them all, and shown as one PNG."""

from pathlib import Path

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

    def save(self, context: StepContext, images: Tensor) -> None:
        """Uint8 images [n, 3, H, W] of this step, on the CPU."""
        save_tensors(self._path(context.step + 1), {"images": images})

    def rows(self, steps: int) -> dict[str, Tensor]:
        """The images of every evaluation of a run of `steps`, by names that say when."""
        contexts = [StepContext(step, steps, log_step=False) for step in range(steps)]
        done = [context.step + 1 for context in contexts if self.due(context)]
        return {f"step {step}": load_tensors(self._path(step))["images"] for step in done}

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}.safetensors"
