"""The files of one output: ranks share them whole, and a run that was stopped goes on with those that are missing."""

from collections.abc import Sequence
from pathlib import Path

from vtp.data.latents import LatentShard, missing_shards, row_count
from vtp.distributed import gather_objects, ranks
from vtp.host import Host


class SharedFiles:
    """What is written already, and what this rank writes; every rank must ask, and come to `end`."""

    def __init__(self, folder: Path, files: Sequence[LatentShard]) -> None:
        self.folder = folder
        self._files = files
        folder.mkdir(parents=True, exist_ok=True)
        missing = gather_objects(list(missing_shards(folder, files)))[0]  # as the first rank finds them
        self.own = missing[ranks().rank :: ranks().size]
        self.total = row_count(files)
        self.done = self.total - row_count(missing)  # rows

    def end(self, host: Host) -> None:
        """Go on when every file is there; else stop, as a rank was asked to."""
        if any(gather_objects(host.stop_seen)) and any(missing_shards(self.folder, self._files)):
            host.stop()
