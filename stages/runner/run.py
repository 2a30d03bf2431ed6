"""Runs a stage: parameters in, whole outputs out, resumable in between. Stages themselves know nothing of this.

    python -m stages.pretrain params.yaml:pretrain --shards work/shards --tokenizer work/tokenizer ...

Flags are the keyword parameters of the stage's `run`. A run is known by its fingerprint: parameters, contents of its
inputs, meaning of its code. Equal fingerprints resume or republish; another one starts afresh.
"""

import argparse
import inspect
import logging
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, get_type_hints

from stages.runner import sinks
from stages.runner.environment import STOP, Interrupted, LocalHost, Runtime, explain, keep_freed_memory, log_to, tell
from stages.runner.fingerprint import DIGESTS, code_digest, fingerprint_of, input_digest, recall_digests, store_digests
from stages.runner.launch import RankJob, count_ranks, run_ranks
from stages.runner.scratch import Scratch, prune
from stages.runner.starts import Start, Starts, device_here
from vtp.artefact import StateError, remove, write_json
from vtp.config import Config
from vtp.params import load
from vtp.texts import escape_tracebacks, message

# Of the parameters of a stage's `run`, each with what it is: `shards: Annotated[Input, "folder of prepare_data"]`.
Input = Annotated[Path, "input"]
Output = Annotated[Path, "output"]
Inputs = Annotated[list[Path], "input", "several"]  # one flag, one path or more
OptionalInput = Annotated[Path | None, "input", "optional"]
OptionalOutput = Annotated[Path | None, "output", "optional"]

KINDS = {"input", "output", "several", "optional"}
FORMAT_VERSION = 1
BAD_PARAMETERS, DRIFTED, INTERRUPTED = 2, 3, 130


class StageError(Exception):
    """The stage cannot start; the message says why and what to do."""


def main(
    run: Callable[..., None],
    *,
    distributed: bool | Callable[[Any], bool] = False,
    divides: Callable[[Any, int, int | None], object] | None = None,
) -> None:
    """Run a stage from the command line, and exit with its status.

    A `distributed` stage runs on every device that there is, or only with the parameters for which that holds.
    `divides(config, devices, micro_batch)` raises ValueError for batches that do not split so: before an input is read.
    `--plan` prints what a run would take instead (`stages.plans.<stage>`); the rest of the command line is the plan's.
    """
    escape_tracebacks()
    arguments = sys.argv[1:]
    try:
        if "--plan" in arguments:
            plan = _plan_of(stage_name(run))([argument for argument in arguments if argument != "--plan"])
            print(message(plan.text(), indent=""))
            status = 0
        else:
            status = _run(run, arguments, distributed=distributed, divides=divides)
    except (ValueError, StageError) as error:  # ConfigError is a ValueError, as what files hold that are none of ours
        status = _fail(str(error), BAD_PARAMETERS)
    except OSError as error:
        status = _fail(explain(error), 1)
    except KeyboardInterrupt:  # no body is at work, which would save first
        tell("stopped; the next start goes on with what was saved before")
        status = INTERRUPTED
    sys.exit(status)


def _fail(problem: str, status: int) -> int:
    """Say in a line what went wrong; the traceback is for the log, once there is one."""
    if logging.root.handlers:
        logging.exception("the stage failed")
    tell(f"error: {problem}")
    return status


def _plan_of(stage: str) -> Callable[[list[str]], Any]:
    """The function `plan` of a stage's plan. Raises StageError when it has none."""
    if not _has_plan(stage):
        raise StageError(f"the stage {stage} has no plan: it runs on no device, and takes what its inputs take")
    return import_module(f"stages.plans.{stage}").plan


def _has_plan(stage: str) -> bool:
    return (Path(__file__).parents[1] / "plans" / f"{stage}.py").exists()


def stage_name(run: Callable[..., None]) -> str:
    """The name of the file that a stage is; a decorator's file is another one."""
    return Path(inspect.getfile(inspect.unwrap(run))).stem


def config_class(run: Callable[..., None]) -> type[Config]:
    """The parameter record of a stage: the annotation of the first parameter of its `run`."""
    return next(iter(get_type_hints(run).values()))


def path_flags(run: Callable[..., None], kind: str) -> list[str]:
    """Names of a stage's `input`, `output` or `optional` parameters."""
    hints = get_type_hints(run, include_extras=True)
    return [name for name, hint in hints.items() if kind in getattr(hint, "__metadata__", ())]


def describe_flag(run: Callable[..., None], name: str) -> str:
    """What the path of a parameter is, as its annotation says. Raises TypeError when it says nothing."""
    description = get_type_hints(run, include_extras=True)[name].__metadata__[-1]
    if description in KINDS:
        raise TypeError(f"stages.{stage_name(run)}.run: {name} has no description; write Annotated[..., 'what it is']")
    return description


def _run(
    run: Callable[..., None],
    arguments: list[str],
    *,
    distributed: bool | Callable[[Any], bool],
    divides: Callable[[Any, int, int | None], object] | None,
) -> int:
    stage = stage_name(run)
    address, inputs, outputs, provenance = _parse(run, arguments)
    runtime = Runtime.of(os.environ)
    config = load(address, config_class(run))
    distributed = distributed if isinstance(distributed, bool) else distributed(config)
    if divides is not None:
        divides(config, count_ranks(runtime), runtime.micro_batch)
    sinks.require(runtime.sinks)
    root = _repository()
    store = root / DIGESTS
    recall_digests(store)
    digests = {name: _input_digest(name, path) for name, path in inputs.items()}
    store_digests(store)
    identity = {"stage": stage, "config": config.model_dump(mode="json"), "inputs": digests}
    code = code_digest(f"stages.{stage}")
    scratch = Scratch(root / ".scratch" / stage / fingerprint_of(identity, code))
    destinations = outputs | {"provenance": provenance}
    with scratch.locked():
        prune(scratch.root.parent, scratch.root, Path("dvc.lock"))
        if runtime.fresh:
            scratch.forget()
        if scratch.finished:
            tell(f"{stage}: this run is finished; its outputs are put back in place")
        else:
            host = LocalHost(scratch.folder, root, runtime)
            body = _Body(run, config, inputs, {name: scratch.output(name, path) for name, path in outputs.items()})
            if distributed:  # others allocate little at once, or not by torch
                keep_freed_memory(runtime)
            job = sinks.Job(stage, identity["config"], str(scratch.root), str(root / ".scratch"))
            with sinks.following(job, runtime.sinks, lock=scratch.lock_descriptor):
                status = _work(body, host, scratch, distributed=distributed)
            if status:
                return status
            provenance_path = scratch.output("provenance", provenance)
            write_json(
                provenance_path, {"format_version": FORMAT_VERSION, **identity, "code": code, "facts": host.recorded()}
            )
            scratch.finish(destinations)
        if code_digest(f"stages.{stage}") != code:  # DVC records the code as it is now
            tell(
                f"error: the code of {stage} was edited during the run; the finished work is kept and used when it is set "
                "back"
            )
            return DRIFTED
        scratch.publish(destinations)
    return 0


class _Body(NamedTuple):
    """A stage's function and its arguments."""

    run: Callable[..., None]
    config: Config
    inputs: "dict[str, Path | list[Path]]"
    outputs: dict[str, Path]

    @property
    def written(self) -> bool:
        return all(path.exists() for path in self.outputs.values())


def _work(body: _Body, host: LocalHost, scratch: Scratch, *, distributed: bool) -> int:
    """Run the body here or on several ranks; its exit status. Our own errors are printed without a traceback."""
    starts = Starts(scratch.root)
    start = starts.begin()  # before anything else touches the folder: its files tell how long a killed start lived
    scratch.start()
    _log_start(scratch.root / "run.log", start)
    on_ranks = distributed and count_ranks(host.runtime) > 1
    try:
        problem = _run_ranks(body, host, scratch) if on_ranks else _run_here(body, host)
    except Interrupted:
        return INTERRUPTED
    except (ValueError, StateError) as error:
        logging.exception("the stage failed")
        problem = str(error)
    except OSError as error:
        logging.exception("the stage failed")
        problem = explain(error, scratch.root)
    finally:
        starts.end(device_here(host.runtime, distributed=distributed))
        logging.info("ended, peak memory %.3g GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    if problem is not None:
        tell(f"error: {problem}")
        return 1
    if not body.written:
        missing = [name for name, path in body.outputs.items() if not path.exists()]
        raise RuntimeError(f"the stage returned without writing {', '.join(missing)}")
    return 0


def _run_here(body: _Body, host: LocalHost) -> None:
    def request_stop(number: int, frame: FrameType | None) -> None:
        tell("stopping after this step; the next start goes on from here")
        host.signalled = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    remove(host.folder.parent / STOP)
    body.run(body.config, **body.inputs, **body.outputs, host=host)


def _run_ranks(body: _Body, host: LocalHost, scratch: Scratch) -> str | None:
    """What went wrong, if anything. Raises Interrupted when the ranks stopped because they were asked to."""
    inputs = {n: [str(p) for p in path] if isinstance(path, list) else str(path) for n, path in body.inputs.items()}
    outputs = {name: str(path) for name, path in body.outputs.items()}
    stage, config = stage_name(body.run), body.config.model_dump(mode="json")
    job = RankJob(stage, config, inputs, outputs, str(host.folder), str(_repository()))
    problem = run_ranks(job, scratch.root, host.runtime, lock=scratch.lock_descriptor)
    if problem is None and not body.written and (scratch.root / STOP).exists():
        raise Interrupted
    return problem


def command_line(run: Callable[..., None]) -> argparse.ArgumentParser:
    """The parser of a stage: its flags are the parameters of `run`."""
    stage, module = stage_name(run), inspect.getmodule(inspect.unwrap(run))
    description = inspect.getdoc(module) or ""
    # A cut flag could be one of another meaning: --pla would run the stage.
    parser = argparse.ArgumentParser(f"python -m stages.{stage}", description=description, allow_abbrev=False)
    parser.add_argument("address", metavar="FILE:SECTION", help=f"parameters, such as params.yaml:{stage}")
    optional, several = path_flags(run, "optional"), path_flags(run, "several")
    for kind in ("input", "output"):
        for name in path_flags(run, kind):
            many = {"nargs": "+"} if name in several else {}
            text = f"{kind}: {describe_flag(run, name)}".replace("%", "%%")
            parser.add_argument(
                _flag(name), type=Path, required=name not in optional, metavar="PATH", help=text, **many
            )
    parser.add_argument(
        "--provenance",
        type=Path,
        required=True,
        metavar="PATH",
        help="output: JSON file for what the others were made of",
    )
    if _has_plan(stage):
        text = "print what a run would take, and run nothing; its own flags: --plan --help"
        parser.add_argument("--plan", action="store_true", help=text)
    return parser


def _parse(
    run: Callable[..., None], arguments: list[str]
) -> tuple[str, dict[str, Path | list[Path]], dict[str, Path], Path]:
    values = vars(command_line(run).parse_args(arguments))
    names = {kind: path_flags(run, kind) for kind in ("input", "output")}
    inputs, outputs = (
        {name: values[name] for name in names[kind] if values[name] is not None} for kind in ("input", "output")
    )
    return values["address"], inputs, outputs, values["provenance"]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _input_digest(name: str, path: Path | list[Path]) -> str | list[str]:
    if isinstance(path, list):
        return [str(_input_digest(name, each)) for each in path]
    if not path.exists():
        raise StageError(f"{_flag(name)} {path}: no such file or folder; run the stage that makes it, or dvc checkout")
    return input_digest(path)


def _repository() -> Path:
    """The folder of the repository, which holds `.scratch` and `weights` of all its DVC projects.

    $DVC_ROOT names the project, the original one in an experiment's copy too; a study's has a link to the code.
    """
    here = Path.cwd()
    nearest = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
    project = Path(os.environ.get("DVC_ROOT", nearest))
    code = project / "stages"
    return code.resolve().parent if code.is_dir() else project


def _log_start(path: Path, start: Start) -> None:
    """What does not belong to the result: versions, commit, host, time."""
    log_to(path)
    logging.info("started %s", " ".join(sys.argv))
    logging.info("python %s on %s, commit %s", platform.python_version(), platform.node(), start.commit or "unknown")
