"""One of several ranks of a stage, started by torchrun: `python -m stages.runner.rank JOB`."""

import logging
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from stages.runner.environment import Interrupted, LocalHost, Runtime, explain, keep_freed_memory, log_to
from stages.runner.fingerprint import DIGESTS, recall_digests
from stages.runner.launch import RankJob
from stages.runner.run import config_class
from vtp.artefact import write_json
from vtp.distributed import StateError, process_group
from vtp.processes import follow_parent

# What gloo and NCCL say when it is another rank that failed.
CONSEQUENCES = ("Connection closed", "Connection reset", "Timed out", "timed out", "timeout", "Broken pipe", "NCCL")


def main() -> None:
    """Run the body; leave a message when it fails."""
    path = Path(sys.argv[1])
    follow_parent()
    log_to(path.parent / "run.log")
    job, rank = RankJob.load(path), int(os.environ["RANK"])
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
        errors = path.parent / "errors" / f"rank-{rank:05d}.json"
        write_json(errors, {"rank": rank, "message": message, "consequence": consequence})
        os._exit(1)  # without the farewells of process groups, which would wait for the others


if __name__ == "__main__":
    main()
