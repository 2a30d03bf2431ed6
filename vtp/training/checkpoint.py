"""Checkpoints in a stage's scratch folder: whole files, the newest two kept, damage detected.

They are written and read by the same run only. `torch.load` is limited to tensors and plain containers.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtp.artefact import digest, whole_file

KEPT = 2


class Checkpoint(NamedTuple):
    """State after `step` completed steps."""

    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, `step-<count>.<digest>.pt` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps, whole, then drop the oldest files."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content_digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:16]
        with whole_file(self.folder / f"step-{step:09d}.{content_digest}.pt") as temporary:
            temporary.write_bytes(buffer.getbuffer())
        for path in self._paths()[:-KEPT]:
            path.unlink()

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are deleted on the way."""
        for path in reversed(self._paths()):
            _, content_digest, _ = path.name.split(".")
            if digest(path).startswith(content_digest):
                state = torch.load(path, map_location="cpu", weights_only=True)
                return Checkpoint(int(path.name[5:14]), state)
            path.unlink()
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))
