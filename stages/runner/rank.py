"""One of several ranks of a stage, started by torchrun: `python -m stages.runner.rank JOB`."""

import errno
import logging
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from stages.runner.environment import Interrupted, LocalHost, Runtime, explain, keep_freed_memory, log_to
from stages.runner.fingerprint import DIGESTS, recall_digests
from stages.runner.launch import RankJob
from stages.runner.run import config_class
from vtp.artefact import ArtefactError, read_json, write_json
from vtp.distributed import StateError, StateMismatchError, process_group
from vtp.processes import follow_parent

# What gloo and NCCL say when it is another rank that failed.
CONSEQUENCES = ("Connection closed", "Connection reset", "Timed out", "timed out", "timeout", "Broken pipe", "NCCL")


def main() -> None:
    """Run the body; leave a message when it fails."""
    path = Path(sys.argv[1])
    follow_parent()
    log_to(path.parent / "run.log")
    job, rank, errors = RankJob.load(path), int(os.environ["RANK"]), path.parent / "errors"
    _begin_again(errors, rank)
    runtime = Runtime.of(os.environ)
    keep_freed_memory(runtime)
    recall_digests(Path(job.root) / DIGESTS)
    try:
        run = import_module(f"stages.{job.stage}").run
        config = config_class(run).parse(job.config, where=f"{path}:config")
        host = LocalHost(Path(job.folder), Path(job.root), runtime)

        def request_stop(number: int, frame: object) -> None:
            host.signalled = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, request_stop)
        given = job.inputs | job.outputs
        paths = {name: [*map(Path, v)] if isinstance(v, list) else Path(v) for name, v in given.items()}
        with process_group(host.device, timeout=host.timeout):
            try:
                run(config, **paths, host=host)
            except Interrupted:
                logging.info("stopped")
    except Exception as error:
        logging.exception("rank %d failed", rank)
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError | StateError):
            message = str(error)
        elif isinstance(error, OSError):
            message = explain(error, path.parent)
        consequence = isinstance(error, RuntimeError) and any(word in str(error) for word in CONSEQUENCES)
        if consequence:
            message = f"waited for another rank, at most {runtime.timeout_seconds:g} s ({message.splitlines()[0]})"
        told = {"rank": rank, "message": message, "consequence": consequence, "again": _may_pass(error)}
        write_json(errors / _name(rank), told)
        os._exit(1)  # without the farewells of process groups, which would wait for the others


def _begin_again(errors: Path, rank: int) -> None:
    """When torchrun starts ranks another time: not after an error that would come again; else without the last ones."""
    for path in errors.glob("rank-*.json"):
        with suppress(ArtefactError):  # that rank has begun again
            if not read_json(path)["again"]:
                os._exit(1)
    (errors / _name(rank)).unlink(missing_ok=True)
    if number := int(os.environ["TORCHELASTIC_RESTART_COUNT"]):  # of this machine
        logging.warning("rank %d begins again, for the %d. time", rank, number)


def _may_pass(error: Exception) -> bool:
    """Whether another start may do without this error: not where parameters, data, numbers or room are to blame."""
    from torch import OutOfMemoryError

    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return not (full or isinstance(error, ValueError | StateMismatchError | OutOfMemoryError))


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


if __name__ == "__main__":
    main()
