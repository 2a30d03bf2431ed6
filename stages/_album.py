"""Pictures at even intervals along a training: kept in scratch, so that a resumed run has them all, and shown as one PNG."""

from pathlib import Path

from torch import Tensor

from vtp.artefact import load_tensors, save_tensors
from vtp.step import Moment


class Album:
    """The pictures of `looks` evenly spaced steps of a run; the last is its end."""

    def __init__(self, folder: Path, looks: int) -> None:
        self._folder = folder
        self._looks = looks

    def due(self, moment: Moment) -> bool:
        """Whether a look falls onto this step."""
        done = moment.step + 1
        return done * self._looks // moment.steps > moment.step * self._looks // moment.steps

    def keep(self, moment: Moment, images: Tensor) -> None:
        """Uint8 images [n, 3, H, W] of this step, on the CPU."""
        save_tensors(self._path(moment.step + 1), {"images": images})

    def rows(self, steps: int) -> dict[str, Tensor]:
        """The images of every look of a run of `steps`, by names that say when."""
        moments = [Moment(step, steps, watched=False) for step in range(steps)]
        done = [moment.step + 1 for moment in moments if self.due(moment)]
        return {f"step {step}": load_tensors(self._path(step))["images"] for step in done}

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}.safetensors"
