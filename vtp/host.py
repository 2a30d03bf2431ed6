"""The machine that a stage runs on, as everything below the stages sees it.

`stages.runner.environment` implements it from environment variables. Nothing here changes a result beyond rounding.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NoReturn, Protocol


class ProgressBar(Protocol):
    """Shows how far the work is, with its rate and the time left."""

    total: float | None

    def update(self, n: int) -> object: ...
    def set_postfix_str(self, s: str) -> object: ...


class Host(Protocol):
    """Devices, processes and folders of a run, and the request to stop it."""

    @property
    def folder(self) -> Path:
        """Scratch of this run: what is written here survives a kill, and is dropped when the run is finished."""
        ...

    @property
    def device(self) -> str:
        """cpu or cuda."""
        ...

    @property
    def parallel(self) -> Literal["ddp", "fsdp", "hsdp"]:
        """Whether weights are whole on every rank, sharded over all ranks, or over those of each machine."""
        ...

    @property
    def micro_batch(self) -> int | None:
        """Most samples of a rank in one pass; None: all of them."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether models are compiled."""
        ...

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes activations again, to save memory."""
        ...

    @property
    def processes(self) -> int:
        """Processes for work outside of torch."""
        ...

    @property
    def rank_processes(self) -> int:
        """This rank's share of them, while all ranks of the machine work."""
        ...

    @property
    def workers(self) -> int:
        """Processes that prepare batches for this rank."""
        ...

    @property
    def weights(self) -> Path:
        """Folder of external weights."""
        ...

    @property
    def shard_cache(self) -> Path:
        """Folder for shards that are fetched from elsewhere, on a disk of this machine alone."""
        ...

    @property
    def shard_cache_bytes(self) -> float:
        """Largest size of that folder."""
        ...

    @property
    def download_store(self) -> Path | None:
        """Folder of all pictures that were ever downloaded; None: beside the scratch of the run."""
        ...

    @property
    def spark(self) -> str | None:
        """URL of a Spark cluster that does the work of `processes` on rows; None: they do."""
        ...

    @property
    def checkpoint_seconds(self) -> float:
        """Time between checkpoints, at least."""
        ...

    @property
    def checkpoint_share(self) -> float:
        """Share of the time that writing them may take, at most."""
        ...

    @property
    def checkpoints_kept(self) -> int:
        """Checkpoints of a run on disk."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds to wait for a rank or a batch at most."""
        ...

    @property
    def peak_flops(self) -> float | None:
        """FLOPs per second of a device, when they are given."""
        ...

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop, or the first rank finds that the run was. Cheap: for every step."""
        ...

    @property
    def stop_seen(self) -> bool:
        """The same on any rank. It asks the file system: for work in large pieces."""
        ...

    def stop(self) -> NoReturn:
        """End a run that has saved its state."""
        ...

    def record(self, **facts: float | str) -> None:
        """Facts about the run for its provenance, such as samples seen."""
        ...

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> AbstractContextManager[ProgressBar]:
        """A bar of the first rank; `done` units were done by an earlier start."""
        ...
