"""Runs a stage: parameters in, whole outputs out, resumable in between. Stages themselves know nothing of this.

    python -m stages.pretrain params.yaml:pretrain --shards work/shards --tokenizer work/tokenizer ...

Flags are the keyword parameters of the stage's `run`. A run is known by its fingerprint: parameters, contents of its
inputs, meaning of its code. Equal fingerprints resume or republish; another one starts afresh.
"""

import argparse
import errno
import hashlib
import inspect
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, get_type_hints

from stages._closure import code_digest
from stages._scratch import Scratch, prune
from vtp.artefact import digest, write_json
from vtp.config import Config, ConfigError, load

Input = Annotated[Path, "input"]
Output = Annotated[Path, "output"]

FORMAT_VERSION = 1
BAD_PARAMETERS, DRIFTED, INTERRUPTED = 2, 3, 130


class Interrupted(Exception):
    """The stage has saved and stops because it was asked to."""


class StageError(Exception):
    """The stage cannot start; the message says why and what to do."""


class Work:
    """What a stage gets besides its parameters and paths: its folder, the machine, and the wish to stop."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.weights = Path(os.environ.get("VTP_WEIGHTS", root / "weights"))
        self.facts: dict[str, int | float | str] = {}
        self.stop_requested = False

    @property
    def device(self) -> str:
        """$VTP_DEVICE, or cuda where there is one."""
        if "VTP_DEVICE" in os.environ:
            return os.environ["VTP_DEVICE"]
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def processes(self) -> int:
        """Processes for work outside of torch: $VTP_PROCESSES, or one per core."""
        return int(os.environ.get("VTP_PROCESSES", len(os.sched_getaffinity(0))))

    @property
    def workers(self) -> int:
        """Processes that prepare batches: $VTP_WORKERS, or half of the cores, at most 16."""
        return int(os.environ.get("VTP_WORKERS", min(16, max(1, self.processes // 2))))

    @property
    def checkpoint_seconds(self) -> float:
        """Time between two checkpoints: $VTP_CHECKPOINT_SECONDS, or a minute."""
        return float(os.environ.get("VTP_CHECKPOINT_SECONDS", "60"))

    def record(self, **facts: float | str) -> None:
        """Facts about the run for its provenance, such as samples seen."""
        self.facts |= facts

    def stop(self) -> NoReturn:
        """End a run that has saved its state."""
        raise Interrupted

    def progress(self, total: int, description: str, unit: str, done: int = 0) -> AbstractContextManager[Any]:
        """A bar on stderr with rate and time left; `done` units were done by an earlier start."""
        from tqdm import tqdm

        interval = 0.1 if sys.stderr.isatty() else 15.0
        return tqdm(total=total, desc=description, unit=unit, initial=done, mininterval=interval, maxinterval=interval)


def main(run: Callable[..., None]) -> None:
    """Run a stage from the command line, and exit with its status."""
    try:
        status = _run(run, sys.argv[1:])
    except (ConfigError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = BAD_PARAMETERS
    sys.exit(status)


def config_class(run: Callable[..., None]) -> type[Config]:
    """The parameter record of a stage: the annotation of the first parameter of its `run`."""
    return next(iter(get_type_hints(run).values()))


def path_flags(run: Callable[..., None], kind: str) -> list[str]:
    """Names of a stage's `input` or `output` parameters."""
    hints = get_type_hints(run, include_extras=True)
    return [name for name, hint in hints.items() if kind in getattr(hint, "__metadata__", ())]


def _run(run: Callable[..., None], arguments: list[str]) -> int:
    stage = Path(inspect.getfile(run)).stem
    address, inputs, outputs, provenance = _parse(run, stage, arguments)
    config = load(address, config_class(run))
    digests = {name: _input_digest(name, path) for name, path in inputs.items()}
    identity = {"stage": stage, "config": config.model_dump(mode="json"), "inputs": digests}
    code = code_digest(f"stages.{stage}")
    fingerprint = hashlib.sha256(json.dumps([identity, code], sort_keys=True).encode()).hexdigest()[:16]
    root = _project_root()
    scratch = Scratch(root / ".scratch" / stage / fingerprint)
    destinations = outputs | {"provenance": provenance}
    with scratch.locked():
        prune(scratch.root.parent, scratch.root, Path("dvc.lock"))
        if scratch.finished:
            print(f"{stage}: this run is finished; its outputs are put back in place", file=sys.stderr)
        else:
            work = Work(scratch.folder, root)
            status = _work(run, config, work, scratch, {"inputs": inputs, "outputs": outputs})
            if status:
                return status
            provenance_path = scratch.output("provenance", provenance)
            write_json(
                provenance_path, {"format_version": FORMAT_VERSION, **identity, "code": code, "facts": work.facts}
            )
            scratch.finish(destinations)
        if (drift := _drift(address, config, stage, code)) is not None:
            print(f"error: {drift}; the finished work is kept and used when they are set back", file=sys.stderr)
            return DRIFTED
        scratch.publish(destinations)
    return 0


def _work(
    run: Callable[..., None], config: Config, work: Work, scratch: Scratch, paths: dict[str, dict[str, Path]]
) -> int:
    """Run the body; its exit status. Errors of ours are told without a traceback."""
    scratch.start()
    _log_start(scratch.root / "run.log")
    written = {name: scratch.output(name, path) for name, path in paths["outputs"].items()}

    def request_stop(number: int, frame: FrameType | None) -> None:
        print("stopping after this step; the next start goes on from here", file=sys.stderr)
        work.stop_requested = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    try:
        run(config, **paths["inputs"], **written, work=work)
    except Interrupted:
        return INTERRUPTED
    except (ValueError, FloatingPointError) as error:
        logging.exception("the stage failed")
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print(
                f"error: no space left for {error.filename or scratch.root}; free some and start again", file=sys.stderr
            )
            return 1
        raise
    finally:
        logging.info("ended")
    missing = [name for name, path in written.items() if not path.exists()]
    if missing:
        raise RuntimeError(f"the stage returned without writing {', '.join(missing)}")
    return 0


def _parse(
    run: Callable[..., None], stage: str, arguments: list[str]
) -> tuple[str, dict[str, Path], dict[str, Path], Path]:
    module = inspect.getmodule(run)
    parser = argparse.ArgumentParser(f"python -m stages.{stage}", description=(module and module.__doc__) or "")
    parser.add_argument("address", metavar="FILE:SECTION", help="parameters, such as params.yaml:pretrain")
    names = {kind: path_flags(run, kind) for kind in ("input", "output")}
    for kind, flags in names.items():
        for name in flags:
            parser.add_argument(_flag(name), type=Path, required=True, metavar="PATH", help=kind)
    parser.add_argument("--provenance", type=Path, required=True, metavar="PATH", help="what the outputs were made of")
    values = vars(parser.parse_args(arguments))
    inputs, outputs = ({name: values[name] for name in names[kind]} for kind in ("input", "output"))
    return values["address"], inputs, outputs, values["provenance"]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _input_digest(name: str, path: Path) -> str:
    if not path.exists():
        raise StageError(f"{_flag(name)} {path}: no such file or folder; run the stage that makes it, or dvc checkout")
    return digest(path)


def _drift(address: str, config: Config, stage: str, code: str) -> str | None:
    """What changed since the start, if anything: DVC records parameters and code as they are now."""
    try:
        same = load(address, type(config)) == config
    except ConfigError:
        same = False
    if not same:
        return f"{address} was edited during the run"
    return None if code_digest(f"stages.{stage}") == code else f"the code of {stage} was edited during the run"


def _project_root() -> Path:
    """$DVC_ROOT, which names the original repository in an experiment's copy too; else the nearest folder with .dvc."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"])
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def _log_start(path: Path) -> None:
    """What does not belong to the result: versions, commit, host, time."""
    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    logging.info("started %s", " ".join(sys.argv))
    logging.info("python %s on %s, commit %s", platform.python_version(), platform.node(), commit or "unknown")
