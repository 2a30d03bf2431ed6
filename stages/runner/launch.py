"""Several ranks: a stage starts torchrun, watches it, and reports what went wrong.

    stage process       holds the lock of the run, publishes its outputs
    `- torchrun         one on every machine; through srun in a Slurm job of several
       `- stages.runner.rank  one per device: the body of the stage

When the stage dies, torchrun and the ranks are told to stop, and save. A request to stop is a file in the scratch
folder, which the ranks of all machines see. When a rank dies or hangs, torchrun ends all of them and starts them again,
VTP_RESTARTS times in a run at most; they go on from the last checkpoint. An error that would come again ends the run.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from stages.runner.environment import PREFIX, STOP, Runtime, tell
from vtp.artefact import read_json, remove, write_json
from vtp.config import ConfigError
from vtp.processes import follow_parent

PORT = 29500
# Ranks meet in a store of each start of theirs: in torchrun's own those that start again find addresses of the dead.
OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class RankJob(NamedTuple):
    """What a rank needs to run the body of a stage."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str | list[str]]
    outputs: dict[str, str]
    folder: str
    root: str

    @classmethod
    def load(cls, path: Path) -> "RankJob":
        return cls(**read_json(path))


def count_ranks(runtime: Runtime) -> int:
    """Processes of a stage that runs on every device."""
    return runtime.local_ranks * count_nodes(runtime)


def count_nodes(runtime: Runtime) -> int:
    """Machines of the run."""
    return runtime.nodes or int(os.environ.get("SLURM_NNODES", "1"))


def run_ranks(job: RankJob, scratch: Path, runtime: Runtime, *, lock: int) -> str | None:
    """Run the body on all ranks, to its end or to a requested stop; what went wrong, if anything.

    torchrun inherits the file descriptor `lock`: until its ranks have saved and ended, nobody else works on the run.
    """
    path = scratch / "job.json"
    write_json(path, job._asdict())
    for leftover in (scratch / STOP, scratch / "errors"):
        remove(leftover)
    (scratch / "errors").mkdir()
    command = command_of(path, runtime)
    environment = os.environ | OWN_STORES | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(runtime))}
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        pass_fds=(lock,),
        preexec_fn=follow_parent,  # noqa: PLW1509 - this process has no threads yet
    )

    def request_stop(number: int, frame: object) -> None:
        tell("stopping after this step; the next start goes on from here")
        (scratch / STOP).touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    status = process.wait()
    return None if status == 0 else _report(scratch / "errors", status, restarts=runtime.restarts)


def command_of(job: Path, runtime: Runtime) -> list[str]:
    """The torchrun command of this machine; in a Slurm job of several, srun starts one on each."""
    nodes = count_nodes(runtime)
    ranks = [f"--nproc-per-node={runtime.local_ranks}", f"--max-restarts={runtime.restarts}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *ranks]
    body = ["-m", "stages.runner.rank", str(job)]
    if nodes == 1:
        return [*torchrun, "--standalone", *body]
    if runtime.rendezvous is None and "SLURM_JOB_NODELIST" not in os.environ:
        raise ConfigError(
            f"$VTP_NODES is {nodes}: set $VTP_RENDEZVOUS to HOST:PORT of the first machine, on all of them"
        )
    head = runtime.rendezvous or f"{_first_host()}:{PORT}"
    rendezvous = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}", f"--rdzv-id={job.parent.name}"]
    command = [*torchrun, *rendezvous, *body]
    if "SLURM_JOB_ID" in os.environ:
        tasks = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", *_cores_of_tasks()]
        return ["srun", *tasks, "--kill-on-bad-exit=1", *command]
    set_here = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)} | OWN_STORES
    settings = " ".join(shlex.quote(f"{name}={value}") for name, value in set_here.items())
    tell(f"run this in {Path.cwd()} on the other machines too:\n{settings} {shlex.join(command)}")
    return command


def _cores_of_tasks() -> list[str]:
    """All cores of the job to each task; srun itself takes over no number of them, and binds a task to one."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    return [f"--cpus-per-task={cores}"] if cores else []


def _first_host() -> str:
    names = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    )
    return names.stdout.split()[0]


def _threads(runtime: Runtime) -> str:
    return str(max(1, runtime.cores // runtime.local_ranks))


def _report(folder: Path, status: int, *, restarts: int) -> str:
    """The errors of the ranks, causes before consequences."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))]
    causes = [error for error in errors if not error["consequence"]]
    lines = [f"rank {error['rank']}: {error['message']}" for error in (causes or errors)[:4]]
    if not causes:
        lines.append(
            f"a rank died or hung without a word, and {restarts} restarts did not help (torchrun ended with {status}; its "
            "report above names the first that failed); the last checkpoint is kept: start again"
        )
    return "\n".join(lines)
