"""A finished tiny pipeline, copies of it to damage, and stages that run in forks of this process, as their commands do."""

import ctypes
import fcntl
import os
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the recipe at a size of seconds

from tiny import ROOT, tiny_params, write_params

from vtp.artefact import digest, files, read_json, remove, write_json
from vtp.config import read_yaml

SETTINGS = {"VTP_WORKERS": "0", "VTP_PROCESSES": "0", "VTP_CHECKPOINT_SECONDS": "0", "VTP_DEVICE": "cpu"}
SETTINGS |= {"VTP_CHECKPOINT_SHARE": "1"}
SETTINGS |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "DVC_ROOT": ""}
MEASURED = {"speed.json"}  # differs between equal runs
MOST_SAID = 1 << 20  # bytes
CAPABILITIES = 0x20080522  # version of Linux' calls about them


class Ended(NamedTuple):
    """How a command ended."""

    status: int | None  # None: it hung and was killed; negative: a signal
    said: str
    seconds: float
    cpu: float  # seconds of it
    peak: float  # bytes of memory, beside what it began with

    def refusal(self, *names: str) -> str | None:
        """What is wrong with how it refused: lines say what was wrong, the name of one of `names` in one of them."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if self.status is None:
            return f"hung for {self.seconds:.0f} s"
        if self.status < 0:
            return f"died of signal {-self.status}"
        if "Traceback" in self.said or not errors:
            return f"status {self.status}, said {self.said.strip()[-300:]!r}"
        if names and not any(name in line for line in errors for name in names):
            return f"names none of {', '.join(names)}: {errors[0][:300]}"
        return None


def ended(
    function: Callable[[], object], folder: Path, *, seconds: float, during: Callable[[int], object] | None = None
) -> Ended:
    """Call `function` in a fork, in `folder`, at most so long once `during` is over, which gets the process."""
    began = time.monotonic()
    said, write = os.pipe()
    os.set_blocking(said, False)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, MOST_SAID)  # a file would meet the limits that a case sets
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(_call(function, folder, write))
        finally:
            os._exit(1)
    os.close(write)
    if during is not None:
        during(pid)
    status, usage = _wait(pid, time.monotonic() + seconds)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it left
    text = b""
    with suppress(BlockingIOError):
        text = os.read(said, MOST_SAID)
    os.close(said)
    cpu = usage.ru_utime + usage.ru_stime
    grown = usage.ru_maxrss * 1024.0 - before
    return Ended(status, text.decode(errors="replace"), time.monotonic() - began, cpu, grown)


def _call(function: Callable[[], object], folder: Path, said: int) -> int:
    try:
        os.setsid()
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)
        os.chdir(folder)
        function()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _wait(pid: int, deadline: float) -> tuple[int | None, resource.struct_rusage]:
    hung = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return None if hung else os.waitstatus_to_exitcode(status), usage
        if not hung and time.monotonic() > deadline:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


class Stage(NamedTuple):
    """A command of dvc.yaml."""

    name: str
    words: Sequence[str]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    ranks: int = 1

    def __call__(self) -> None:
        """What `python -m stages.NAME ...` does once Python has started."""
        os.environ.update(SETTINGS | {"VTP_RANKS": str(self.ranks)})
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is there already
        sys.argv = [self.name, *self.words]
        runpy.run_module(f"stages.{self.name}", run_name="__main__", alter_sys=True)

    @property
    def distributed(self) -> bool:
        """Whether it runs on several ranks."""
        return "distributed=True" in (ROOT / f"stages/{self.name}.py").read_text()

    def files(self, folder: Path) -> list[Path]:
        """Of all outputs, but the provenance, which knows the inputs, and what is measured."""
        paths = [folder / output for output in self.outputs if "provenance" not in output]
        each = [file for path in paths for file in (files(path) if path.is_dir() else [path])]
        return [file for file in each if file.name not in MEASURED]


def unprivileged(stage: Stage) -> Callable[[], object]:
    """The stage as a user like others: permissions count, for root too."""

    def call() -> None:
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())
        stage()

    return call


def different(stage: Stage, whole: Path, folder: Path) -> str | None:
    """Outputs of a stage that are not those of a whole run."""
    expected, actual = (
        {file.relative_to(each): digest(file) if file.exists() else "missing" for file in stage.files(each)}
        for each in (whole, folder)
    )
    wrong = sorted(str(name) for name in expected | actual if expected.get(name) != actual.get(name))
    return f"other bits in silence: {', '.join(wrong[:4])}" if wrong else None


class Project:
    """The reference pipeline at tiny size in a folder, all stages run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        entries = read_yaml(ROOT / "dvc.yaml")["stages"]
        self.stages = [
            _stage(name, entries[name]) for name in entries if name != "check"
        ]  # those that are needed first
        for name in ("check", *(stage.name for stage in self.stages)):
            import_module(f"stages.{name}")  # forks have it
        if not (seconds := folder / "seconds.json").exists():
            (folder / ".dvc").mkdir(parents=True)
            write_params(tiny_params(), folder / "work/check/params.yaml")
            write_json(seconds, {stage.name: _seconds(stage, folder) for stage in self.stages})
        self.seconds = read_json(seconds)  # that each stage takes

    def copy(self, folder: Path, stage: Stage, *, scratch: bool = False) -> None:
        """Another finished one, without the outputs of a stage, and without its scratch folder unless asked for."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        for path in [*stage.outputs, *([] if scratch else [f".scratch/{stage.name}"])]:
            remove(folder / path)

    def on_two_ranks(self, stage: Stage) -> tuple[Path, float]:
        """A project in which a stage ran on two ranks, and the seconds that it took."""
        folder = self.folder.with_name(f"{self.folder.name}-{stage.name}-2")
        if not (seconds := folder / "on_two.json").exists():
            self.copy(folder, stage)
            write_json(seconds, {"seconds": _seconds(stage._replace(ranks=2), folder)})
        return folder, read_json(seconds)["seconds"]


def _stage(name: str, entry: dict) -> Stage:
    outs = [out for kind in ("outs", "plots", "metrics") for out in entry.get(kind, [])]
    outputs = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
    inputs = [path for path in entry["deps"] if not path.startswith("work/check")]
    return Stage(name, shlex.split(entry["cmd"])[3:], tuple(inputs), tuple(outputs))


def _seconds(stage: Stage, folder: Path) -> float:
    result = ended(stage, folder, seconds=600)
    if result.status != 0:
        raise RuntimeError(result.said)
    return result.seconds
