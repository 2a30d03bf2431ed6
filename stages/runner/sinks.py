"""Live curves in TensorBoard and Weights & Biases, by a process of each beside the run, which reads what training writes.

    folder/curves.csv                    scalars `curves/<column>`
    folder/throughput.csv                scalars `throughput/<column>`
    folder/snapshots/step-*.safetensors  pictures `snapshots`

The run knows nothing of it and waits for it at its end alone, at most END_SECONDS. Curves stay on disk whatever becomes of
a sink, so one that fails is tried again and gets what it missed. How far each has come survives a kill (`sinks/<name>.json`
in the scratch of the run): steps that a resumed run takes again are not sent again.
"""

import csv
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stages.runner.environment import log_to, tell
from vtp.artefact import ArtefactError, read_json, write_json
from vtp.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

STATE = "sinks"  # folder in the scratch of a run: the last step that each sink has
POLL_SECONDS = 1.0
LONGEST_PAUSE = 60.0  # seconds between two attempts of a sink that fails
END_SECONDS = 60.0  # for what is left when the run has ended


def require(names: Sequence[str]) -> None:
    """Raises ConfigError for a sink whose package is not installed."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            raise ConfigError(
                f"$VTP_SINKS names {name}, which is not installed: pip install -c constraints.txt -e '.[{name}]'"
            ) from None


class Job(NamedTuple):
    """What a sink needs to know of a run."""

    stage: str
    config: Mapping[str, Any]
    scratch: str  # of the run; its name is the fingerprint
    logs: str  # folder of what the sinks keep here, for all runs


@contextmanager
def following(job: Job, names: Sequence[str], *, lock: int) -> Iterator[None]:
    """Show the curves of the run that the block is. The processes inherit the file descriptor `lock`: until they have
    ended, nobody else works on the run.
    """
    processes = {name: _start(name, job, lock) for name in names}
    try:
        yield
    finally:
        # A line, for workers that were forked hold the pipe too and it may stay open.
        for process in processes.values():
            _tell(process, "end")
        for name, process in processes.items():
            if process.wait():
                tell(f"{name}: ended with {process.returncode}; its curves may lack steps")


def _start(name: str, job: Job, lock: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", __name__, name]
    # A session of its own: Ctrl-C is for the run.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, pass_fds=(lock,), start_new_session=True)
    _tell(process, json.dumps(job._asdict()))
    return process


def _tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # its exit status says why
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


class StepRow(NamedTuple):
    """What there is of a step."""

    step: int
    scalars: dict[str, float]
    pictures: "np.ndarray | None"  # [3, H, n W] uint8, side by side


def rows_after(folder: Path, step: int) -> Iterator[StepRow]:
    """Rows of the steps behind `step`, up to the last of the curves: what belongs to a step is written before its row."""
    curves = _table(folder / "curves.csv", step)
    last = max(curves, default=step)
    rates = {at: row for at, row in _table(folder / "throughput.csv", step).items() if at <= last}
    pictures = {int(path.stem.removeprefix("step-")): path for path in folder.glob("snapshots/step-*.safetensors")}
    pictures = {at: path for at, path in pictures.items() if step < at <= last}
    for at in sorted({*curves, *rates, *pictures}):
        scalars = {f"curves/{name}": value for name, value in curves.get(at, {}).items()}
        scalars |= {f"throughput/{name}": value for name, value in rates.get(at, {}).items()}
        yield StepRow(at, scalars, _side_by_side(pictures[at]) if at in pictures else None)


def _table(path: Path, step: int) -> dict[int, dict[str, float]]:
    """The rows of steps behind `step`; a line that is being written counts when it is whole."""
    if not path.exists():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(whole.splitlines())]
    return {at: row for row in rows if (at := int(row.pop("step"))) > step}


def _side_by_side(path: Path) -> "np.ndarray":
    import numpy as np
    from safetensors.numpy import load_file

    return np.concatenate(list(load_file(path)["images"]), axis=2)


class Sink(Protocol):
    """Where curves are shown. Whatever a method raises is a failure of the sink."""

    def write(self, row: StepRow) -> None:
        """Take a step, which comes never again."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `logs/tensorboard/<stage>/<fingerprint>`."""

    def __init__(self, job: Job, *, sent: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(job.logs, "tensorboard", job.stage, Path(job.scratch).name)
        # What lies behind the last known step was written by a start that was killed before it said so, or forgotten.
        self._writer = SummaryWriter(str(folder), purge_step=sent + 1)

    def write(self, row: StepRow) -> None:
        for name, value in row.scalars.items():
            self._writer.add_scalar(name, value, row.step)
        if row.pictures is not None:
            self._writer.add_image("snapshots", row.pictures, row.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run whose id is the fingerprint; offline (WANDB_MODE) in `logs/wandb`. All WANDB_* variables count.

    wandb writes in a process of its own, every 15 s or at its end. That survives the run being killed; when everything
    is killed at once, what it had not written yet is missing there.
    """

    def __init__(self, job: Job, *, sent: int) -> None:
        import wandb

        fingerprint = Path(job.scratch).name
        folder = Path(os.environ.get("WANDB_DIR", job.logs), "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK | os.R_OK):  # wandb would silently go to the system's temporary folder
            raise PermissionError(f"{folder.parent}: cannot be written; make it writable, or set $WANDB_DIR")
        self._run = wandb.init(
            id=fingerprint,
            resume="allow" if sent else None,  # None: what is there under this id is replaced
            project=os.environ.get("WANDB_PROJECT", "vtp"),
            name=os.environ.get("WANDB_NAME", f"{job.stage}-{fingerprint[:8]}"),
            job_type=job.stage,
            config=dict(job.config),
            dir=folder.parent,
            settings=wandb.Settings(console="off"),
        )
        self._picture = wandb.Image

    def write(self, row: StepRow) -> None:
        shown: dict[str, Any] = dict(row.scalars)
        if row.pictures is not None:
            shown["snapshots"] = self._picture(row.pictures.transpose(1, 2, 0))
        self._run.log(shown, step=row.step, commit=True)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, type[TensorBoard | WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Feed:
    """Gives a sink what it lacks; its failures are named once, counted, and end nothing."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self.failures = 0
        self._job = job
        self._sink: Sink | None = None
        self._state = Path(job.scratch, STATE, f"{name}.json")
        self._sent = self._recall()
        self._read = 0  # time of the last change of the curves that was seen
        self._pause = 0.0
        self._next = 0.0

    def follow(self, *, now: float) -> None:
        """Send what there is since the last time; a sink that failed rests, up to LONGEST_PAUSE."""
        if now < self._next:
            return
        folder = Path(self._job.scratch, "folder")
        before = self._sent
        try:
            changed = (folder / "curves.csv").stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed == self._read:
            return
        try:
            for row in rows_after(folder, self._sent):
                if self._sink is None:
                    self._sink = SINKS[self.name](self._job, sent=self._sent)
                self._sink.write(row)
                self._sent = row.step
            self._read, self._pause = changed, 0.0
        except Exception as error:
            self._failed(error)
            self._pause = min(LONGEST_PAUSE, max(POLL_SECONDS, 2 * self._pause))
            self._next = now + self._pause
        if self._sent != before:
            self._keep()

    def end(self) -> None:
        """Send the rest, and let the sink finish."""
        self.follow(now=float("inf"))
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            self._failed(error)
        if self.failures:
            _say(f"{self.name}: failed {self.failures} times; the last step that it has is {self._sent}")

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        logging.warning("%s failed", self.name, exc_info=error)
        if self.failures == 1:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(f"{self.name}: {reason}; the run goes on, and what is missing is sent when it works again")
        sink, self._sink = self._sink, None  # the next attempt opens another one
        with suppress(Exception):
            if sink is not None:
                sink.close()

    def _recall(self) -> int:
        try:
            return int(read_json(self._state)["step"])
        except (ArtefactError, KeyError, TypeError, ValueError):
            return 0

    def _keep(self) -> None:
        try:
            write_json(self._state, {"step": self._sent})
        except OSError as error:
            self._failed(error)


def _say(text: str) -> None:
    tell(text)
    logging.warning("%s", text)


def main() -> None:
    """Show the run that a line of standard input describes, until another line comes or its process is gone."""
    name, line = sys.argv[1], sys.stdin.readline()
    if not line:
        return
    job = Job(**json.loads(line))
    log_to(Path(job.scratch, "run.log"))
    feed = Feed(name, job)
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        feed.follow(now=time.monotonic())
    limit = threading.Timer(END_SECONDS, _give_up, [name])
    limit.daemon = True
    limit.start()
    feed.end()


def _give_up(name: str) -> None:
    _say(f"{name}: not finished {END_SECONDS:g} s after the run; given up")
    os._exit(1)


if __name__ == "__main__":
    main()
