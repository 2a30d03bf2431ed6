"""The machine that a stage runs on: what the environment says, and the host that a stage gets.

Nothing here changes a result beyond rounding, so none of it is a parameter and none of it invalidates a stage.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BeforeValidator, Field, ValidationError

from vtp.artefact import write_json
from vtp.config import Config, ConfigError
from vtp.host import ProgressBar
from vtp.texts import message, shown

PREFIX = "VTP_"
STOP = "stop"  # in the scratch folder: a request to stop, seen by all machines
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = 2**31 - 1  # bytes above which free memory would go back


def tell(text: str) -> None:
    """A message to the person at the terminal, beside the bars. All messages of a stage leave here or through its log."""
    print(message(text), file=sys.stderr)


class _LogFormatter(logging.Formatter):
    """Records whose texts can be none of another record."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: a line says so, once, and the work goes on as far as it can."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            tell(f"the log {self.baseFilename} cannot be written: {error.strerror}")


def log_to(path: Path) -> None:
    """Have this process log to a file."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_LogFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def explain(error: OSError, within: Path | None = None) -> str:
    """What the operating system refused, in a line; `within` says where, of an error that names no file."""
    somewhere = "a file of the run" if within is None else f"a file in {within}"
    place = shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else somewhere
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: no space is left there; make room and start again, what was saved before is kept"
    return f"{place}: {error.strerror or error}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class Interrupted(Exception):
    """The stage has saved and stops because it was asked to."""


class Runtime(Config):
    """Environment variables `VTP_<NAME>`."""

    device: Literal["cpu", "cuda"] | None = Field(
        None, description="cpu or cuda; cuda where there is one. CUDA_VISIBLE_DEVICES chooses which"
    )
    ranks: int | None = Field(None, ge=1, description="processes per machine; every visible GPU, or one on a CPU")
    nodes: int | None = Field(None, ge=1, description="machines; those of the Slurm job, or one")
    rendezvous: str | None = Field(None, description="HOST:PORT of the first of several machines without Slurm")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp", description="weights on every rank, or sharded over all ranks, or over those of each machine"
    )
    micro_batch: int | None = Field(None, ge=1, description="most images of a rank in one pass; all, if not given")
    compile: bool | None = Field(None, description="torch.compile; on GPUs, if not given")
    recompute: bool = Field(False, description="compute activations again in the backward pass, to save memory")
    workers: int | None = Field(None, ge=0, description="processes per rank that prepare batches; half of its cores")
    processes: int | None = Field(None, ge=0, description="processes for work outside of torch; one per core")
    restarts: int = Field(
        3, ge=0, description="how often all ranks begin again, from the last checkpoint, when one of them dies"
    )
    checkpoint_seconds: float = Field(60, ge=0, description="time between checkpoints, at least")
    checkpoint_share: float = Field(
        0.02, gt=0, le=1, description="share of the time that writing checkpoints may take; else they become rarer"
    )
    checkpoints_kept: int = Field(2, ge=1, description="checkpoints of a run on disk")
    fresh: bool = Field(False, description="begin anew: forget finished work and checkpoints of the same run")
    timeout_seconds: float = Field(1800, gt=0, description="wait for a rank or a batch at most so long")
    peak_flops: float | None = Field(None, gt=0, description="of a device per second, for utilisation")
    cache: str | None = Field(
        None, description="folder of this machine for shards that are fetched from elsewhere; in its temporary folder"
    )
    cache_gigabytes: float = Field(100, gt=0, description="largest size of that folder")
    download_store: str | None = Field(None, description="folder of all that was ever downloaded; .scratch/download/")
    spark: str | None = Field(None, min_length=1, description="URL of a Spark cluster for the rows of filter; none")
    weights: str | None = Field(None, description="folder of external weights; weights/")
    sinks: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_names)] = Field(
        (), description="where curves are shown while a run goes on, separated by commas"
    )

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read the environment.

        Raises ConfigError for a variable that does not exist, a value that is none, and a device that is not here.
        """
        given = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
        known = {PREFIX + field.upper(): field for field in cls.model_fields}
        for name in given:
            if name not in known:
                close = get_close_matches(name, known, 1)
                raise ConfigError(f"${name}: no such setting{f'; did you mean ${close[0]}?' if close else ''}")
        try:
            runtime = cls.model_validate_strings({known[name]: value for name, value in given.items()})
        except ValidationError as error:
            lines = [
                f"${PREFIX}{str(problem['loc'][0]).upper()}: {problem['msg']} (given: {problem['input']!r})"
                for problem in error.errors()
            ]
            raise ConfigError("\n".join(lines)) from None
        runtime.require_device()
        return runtime

    def require_device(self) -> None:
        """Raises ConfigError when a GPU is asked for where there is none."""
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(f"${PREFIX}DEVICE: 'cuda', and torch finds no GPU here; unset it, or set it to 'cpu'")

    @property
    def torch_device(self) -> str:
        """cpu or cuda."""
        if self.device is not None:
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def local_ranks(self) -> int:
        """Processes that a stage starts on this machine."""
        if self.ranks is not None:
            return self.ranks
        if self.torch_device != "cuda":
            return 1
        import torch

        return torch.cuda.device_count()

    @property
    def cores(self) -> int:
        """Processes for work outside of torch."""
        return cores_here() if self.processes is None else self.processes


def cores_here() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _cache_of_machine(root: Path) -> Path:
    """The folder of this user and this project in the temporary folder of this machine, or of its part of a Slurm job.

    Raises ConfigError where somebody else has made it, as anybody may in /tmp.
    """
    project = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    place = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    folder = place / f"vtp-{os.getuid()}-{root.resolve().name}-{project}"
    if os.path.lexists(folder) and folder.lstat().st_uid != os.getuid():
        raise ConfigError(f"{folder} is another user's; set $VTP_CACHE to a folder of yours on a disk of this machine")
    return folder


def _ranks() -> tuple[int, int]:
    """This process among all. Only torchrun starts several; without it torch, which takes seconds to load, is not asked."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    from vtp.distributed import ranks

    return ranks()


class LocalHost:
    """`vtp.host.Host` on this machine: the scratch folder of a run, and what its environment says."""

    def __init__(self, folder: Path, root: Path, runtime: Runtime) -> None:
        self.folder = folder
        self.root = root
        self.runtime = runtime
        self.weights = Path(runtime.weights) if runtime.weights else root / "weights"
        self.facts: dict[str, int | float | str] = {}
        self.signalled = False  # a signal asked this process to stop

    @property
    def device(self) -> str:
        return self.runtime.torch_device

    @property
    def parallel(self) -> Literal["ddp", "fsdp", "hsdp"]:
        return self.runtime.parallel

    @property
    def micro_batch(self) -> int | None:
        return self.runtime.micro_batch

    @property
    def compiles(self) -> bool:
        return self.device == "cuda" if self.runtime.compile is None else self.runtime.compile

    @property
    def recomputes(self) -> bool:
        return self.runtime.recompute

    @property
    def processes(self) -> int:
        return self.runtime.cores

    @property
    def rank_processes(self) -> int:
        share = self.processes // (self.runtime.local_ranks if _ranks()[1] > 1 else 1)
        return max(share, min(1, self.processes))

    @property
    def workers(self) -> int:
        if self.runtime.workers is not None:
            return self.runtime.workers
        return min(16, max(1, self.processes // (2 * self.runtime.local_ranks)))

    @property
    def shard_cache(self) -> Path:
        return Path(self.runtime.cache) if self.runtime.cache else _cache_of_machine(self.root)

    @property
    def shard_cache_bytes(self) -> float:
        return self.runtime.cache_gigabytes * 1e9

    @property
    def download_store(self) -> Path | None:
        return Path(self.runtime.download_store) if self.runtime.download_store else None

    @property
    def spark(self) -> str | None:
        return self.runtime.spark

    @property
    def checkpoint_seconds(self) -> float:
        return self.runtime.checkpoint_seconds

    @property
    def checkpoint_share(self) -> float:
        return self.runtime.checkpoint_share

    @property
    def checkpoints_kept(self) -> int:
        return self.runtime.checkpoints_kept

    @property
    def timeout(self) -> float:
        return self.runtime.timeout_seconds

    @property
    def peak_flops(self) -> float | None:
        return self.runtime.peak_flops

    @property
    def stop_requested(self) -> bool:
        return self.signalled or (_ranks()[0] == 0 and (self.folder.parent / STOP).exists())

    @property
    def stop_seen(self) -> bool:
        return self.signalled or (self.folder.parent / STOP).exists()

    def stop(self) -> NoReturn:
        raise Interrupted

    def record(self, **facts: float | str) -> None:
        self.facts |= facts
        if _ranks()[0] == 0:
            write_json(self.folder.parent / "facts.json", self.facts)

    def recorded(self) -> dict[str, Any]:
        """All facts, whichever process recorded them."""
        path = self.folder.parent / "facts.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> AbstractContextManager[ProgressBar]:
        from tqdm import tqdm

        interval = 0.1 if sys.stderr.isatty() else 15.0
        return tqdm(
            total=total,
            desc=description,
            unit=unit,
            initial=done,
            mininterval=interval,
            maxinterval=interval,
            disable=_ranks()[0] > 0,
        )


def keep_freed_memory(runtime: Runtime) -> None:
    """Tell malloc not to give memory back to the kernel before the process ends.

    By default glibc maps every large tensor afresh, and the first touch of each of its pages is a fault: they took
    two fifths of the time of the root's `generate`. Nothing is done where tensors live on a GPU, or without glibc.
    """
    if runtime.torch_device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_MMAP_MAX, 0)
