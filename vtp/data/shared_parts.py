"""Files that ranks make together, each of many parts, so that all are busy to the end whatever the number of files.

A part is a file of its own in scratch until all of them are there, and what a stopped run has of them the next one keeps.
Ranks wait for each other by looking at the folder: no collective stands open for hours, which would time out.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vtp.artefact import load_tensors, save_tensors
from vtp.data.latents import LatentShard, missing_shards
from vtp.distributed import barrier, gather_objects, ranks
from vtp.host import Host

LOOK = 0.5  # seconds between looks at the folder
STOPPED = "stopped"  # in the folder of parts, when a rank was asked to stop


class BatchPart(NamedTuple):
    """Some rows of a file."""

    shard: LatentShard
    rows: range

    @property
    def name(self) -> str:
        return f"{self.shard.split}-{self.rows.start:09d}.safetensors"


class SharedParts:
    """What is missing, and what of it this rank makes; every rank must ask, and come to `end`."""

    def __init__(self, folder: Path, files: Sequence[LatentShard], size: int) -> None:
        """Files of `folder` in parts of `size` rows, the last of each file of fewer."""
        self.folder, self._files = folder, files
        self._parts_folder = folder.with_name(f"{folder.name}.parts")
        for each in (folder, self._parts_folder):
            each.mkdir(parents=True, exist_ok=True)
        self._parts = [
            BatchPart(shard, range(first, min(first + size, shard.rows.stop)))
            for shard in files
            for first in range(shard.rows.start, shard.rows.stop, size)
        ]
        if ranks().first:
            (self._parts_folder / STOPPED).unlink(missing_ok=True)
        missing = gather_objects(self._missing())[0]  # as the first rank finds them
        self.own: list[BatchPart] = missing[ranks().rank :: ranks().size]
        self.total = sum(len(shard.rows) for shard in files)
        self.done = self.total - sum(len(part.rows) for part in missing)  # rows

    def write(self, part: BatchPart, rows: Tensor) -> None:
        """A part [n, ...]."""
        save_tensors(self._parts_folder / part.name, {"rows": rows})

    def end(self, host: Host, finish: Callable[[LatentShard, Tensor], Mapping[str, Tensor]]) -> None:
        """Wait for all parts, and put the files together: `finish` makes of a file and its rows what it holds.

        Stops as this or another rank was asked to, with the parts that are there.
        """
        stopped = self._parts_folder / STOPPED
        while self._missing():
            if host.stop_seen:
                stopped.touch()
            if stopped.exists():
                break
            time.sleep(LOOK)
        if any(gather_objects(bool(self._missing()))):
            host.stop()
        for shard in list(missing_shards(self.folder, self._files))[ranks().rank :: ranks().size]:
            parts = [
                load_tensors(self._parts_folder / part.name)["rows"] for part in self._parts if part.shard == shard
            ]
            save_tensors(shard.path(self.folder), finish(shard, torch.cat(parts)))
        barrier()
        if ranks().first:
            shutil.rmtree(self._parts_folder)

    def _missing(self) -> list[BatchPart]:
        files = {shard.name for shard in missing_shards(self.folder, self._files)}
        there = {path.name for path in self._parts_folder.iterdir()}
        return [part for part in self._parts if part.shard.name in files and part.name not in there]
