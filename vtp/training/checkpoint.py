"""Checkpoints in a stage's scratch folder: whole, the newest few kept, damage detected, for any number of ranks.

    step-000000120/     state of 120 completed steps
        *.distcp        tensors, in pieces that the ranks wrote (torch.distributed.checkpoint)
        counters.json   numbers
        digests.json    SHA-256 of every other file, written last

Tensors are copied and then written in the background, under a temporary name that the first rank replaces when all
pieces are there.
"""

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vtp.artefact import ArtefactError, digest, files, read_json, write_json
from vtp.distributed import (
    StateError,
    StateMismatchError,
    barrier,
    gather_objects,
    load_state,
    ranks,
    save_state,
    wait_for_state,
)


class Checkpoint(NamedTuple):
    """What was read: the tensors are in place already."""

    step: int
    counters: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, folder: Path, *, kept: int) -> None:
        self.folder = folder
        self.kept = kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if ranks().first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover)
        barrier()

    def save(self, step: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Begin to write the state after `step` steps; tensors may change as soon as this returns."""
        self.wait()
        temporary = self.folder / f"{_name(step)}.tmp"
        if ranks().first:
            temporary.mkdir()
            write_json(temporary / "counters.json", counters)
        barrier()
        self._writing = self._thread.submit(self._complete, temporary, save_state(temporary, tensors))

    def wait(self) -> None:
        """Until the last one is written. Raises what its writing raised, such as a full disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def newest(self, tensors: Mapping[str, Tensor]) -> Checkpoint | None:
        """Read the newest undamaged checkpoint into `tensors`, in place; damaged ones are deleted on the way."""
        while True:
            # The first rank decides which, so that all read the same.
            path = gather_objects(self._newest_whole() if ranks().first else None)[0]
            if path is None:
                return None
            try:
                load_state(path, tensors)
            except StateMismatchError as error:
                raise StateMismatchError(
                    f"{error}; the checkpoint is that of other code or another device: delete {path.parent}"
                ) from None
            except StateError as error:
                raise StateError(f"{error}; the checkpoint is undamaged and kept: start again") from None
            return Checkpoint(int(path.name[5:]), read_json(path / "counters.json"))

    def _newest_whole(self) -> Path | None:
        for path in reversed(self._paths()):
            if _undamaged(path):
                return path
            logging.warning("%s is damaged; the checkpoint before it is used", path)
            shutil.rmtree(path)
        return None

    def _complete(self, temporary: Path, written: "Future[Any]") -> None:
        """In the background: when all ranks have written, the first gives the folder its name."""
        try:
            wait_for_state(written)
        except BaseException:
            if ranks().first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if ranks().first:
            digests = {path.relative_to(temporary).as_posix(): digest(path) for path in files(temporary)}
            write_json(temporary / "digests.json", digests)
            temporary.rename(temporary.with_suffix(""))
            for path in self._paths()[: -self.kept]:
                shutil.rmtree(path)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".tmp")


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _undamaged(path: Path) -> bool:
    try:
        digests = read_json(path / "digests.json")
        return all(digest(path / name) == expected for name, expected in digests.items())
    except ArtefactError:
        return False
