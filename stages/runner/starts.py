"""When, from which commit and on what a run was worked on: `starts.json` in its scratch.

It differs between equal runs, so no output holds it; who has the provenance of an output finds it by the fingerprint.
"""

import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.runner.environment import Runtime, cores_here
from stages.runner.fingerprint import fingerprint_of
from stages.runner.launch import count_nodes
from vtp.artefact import ArtefactError, read_json, write_json

STARTS = "starts.json"


class Start(NamedTuple):
    """One start of a run."""

    began: float  # Unix time
    seconds: float | None  # None: it is at work, or was killed
    commit: str
    device: str | None  # known when it ended


class Starts:
    """The starts of the run with this scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._starts = read_starts(scratch)

    def begin(self) -> Start:
        """Another start. The one before, if it was killed, lasted to its last sign of life."""
        if self._starts and self._starts[-1].seconds is None:
            last = self._starts[-1]
            self._starts[-1] = last._replace(seconds=max(0.0, self._last_sign(last.began) - last.began))
        self._starts.append(Start(time.time(), None, commit_here(), None))
        self._write()
        return self._starts[-1]

    def end(self, device: str) -> None:
        """The last start has ended."""
        last = self._starts[-1]
        self._starts[-1] = last._replace(seconds=time.time() - last.began, device=device)
        self._write()

    def _last_sign(self, began: float) -> float:
        """When something was written last beside or among the stage's own files."""
        paths = [path for folder in (self._scratch, self._scratch / "folder") for path in folder.glob("*")]
        return max([began, *(path.stat().st_mtime for path in paths if path.name != "lock")])

    def _write(self) -> None:
        write_json(self._scratch / STARTS, {"starts": [start._asdict() for start in self._starts]})


def read_starts(scratch: Path) -> list[Start]:
    """The starts of a run; none where they are not known, as of outputs that come from a cache."""
    try:
        return [Start(**start) for start in read_json(scratch / STARTS)["starts"]]
    except (ArtefactError, KeyError, TypeError):
        return []


def starts_of(provenance: Mapping[str, Any], scratch: Path) -> list[Start]:
    """The starts of the run that wrote a provenance; `scratch` is that of all stages."""
    identity = {name: provenance[name] for name in ("stage", "config", "inputs")}
    return read_starts(scratch / provenance["stage"] / fingerprint_of(identity, provenance["code"]))


def commit_here() -> str:
    """The commit of the working tree, with `-dirty` where files differ from it; `unknown` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def device_here(runtime: Runtime, *, distributed: bool) -> str:
    """What a stage that has just run here ran on."""
    if not distributed or runtime.torch_device != "cuda":
        return f"{cores_here()} CPU cores ({platform.machine()})"
    import torch

    with suppress(RuntimeError, AssertionError):
        return f"{runtime.local_ranks * count_nodes(runtime)} x {torch.cuda.get_device_name()}"
    return "cuda"
