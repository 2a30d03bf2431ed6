"""The processes that write shards. A shard is complete when its JSON file stands in the state folder.

state/train-00000.json   size, digest and statistics of a complete shard
state/train-00000.csv    the pictures that it lacks, when there are any
"""

from collections.abc import Iterable, Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple, Self

from vtp.artefact import whole_file, write_json
from vtp.config import Config
from vtp.curation.ingest.source import PictureSource, Rejected
from vtp.data.shards import SampleRecord, ShardSummary, write_shard
from vtp.processes import SPAWN, WorkerPool
from vtp.texts import LISTED, shown, write_csv


class IngestError(ValueError):
    """Shards cannot be made of a source; the message names the place and the remedy."""


class Stopped(Exception):
    """The work was asked to stop; what is complete stays."""


class ShardJob(NamedTuple):
    """One shard."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return f"{self.split}-{self.number:05d}"


class Task(NamedTuple):
    """What is common to all jobs."""

    source: PictureSource
    folder: Path  # of the shards
    state: Path
    location: str | None  # URL to which tars are moved


class Finished(Config):
    """A shard that is written; `summary` is null when none of its pictures can be read."""

    summary: ShardSummary | None
    rejected: int
    examples: list[str]  # the first rejected ones


class Result(NamedTuple):
    """What became of a job; not `whole` when it was stopped."""

    job: ShardJob
    finished: Finished
    whole: bool


class ShardWorkers:
    """Writes shards in `processes` others or, for 0, in a thread of this one."""

    def __init__(self, task: Task, processes: int) -> None:
        self._shared = _Shared()
        self._pool = WorkerPool(processes, _begin, task, self._shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._pool.__exit__(None, None, None)

    @property
    def seen(self) -> int:
        """Pictures of this start that are written or rejected."""
        return self._shared.seen.get_obj().value

    @property
    def rejected(self) -> int:
        """Pictures of this start that cannot be read."""
        return self._shared.rejected.get_obj().value

    def stop(self) -> None:
        """End the jobs in work after their current picture, and begin no other."""
        self._shared.stop.value = True

    def results(self, jobs: Iterable[ShardJob]) -> Iterator[list[Result]]:
        """What has become of jobs since the last time; comes several times a second, and may be empty.

        Raises WorkerDied when a process was killed.
        """
        wanted = takewhile(lambda _: not self._shared.stop.value, jobs)
        for ended in self._pool.results(_write, wanted):
            yield [result for _, result in ended]


class _Shared:
    """What workers and their parent tell each other. The parent takes no lock: a worker may be killed that holds it."""

    def __init__(self) -> None:
        self.seen = SPAWN.Value("q", 0)
        self.rejected = SPAWN.Value("q", 0)
        self.stop = SPAWN.RawValue("b", False)

    def count(self, item: SampleRecord | Rejected) -> None:
        with self.seen:
            self.seen.value += 1
        if isinstance(item, Rejected):
            with self.rejected:
                self.rejected.value += 1


_worker: tuple[Task, _Shared] | None = None  # of this process, set once when it starts


def _begin(task: Task, shared: _Shared) -> None:
    global _worker  # noqa: PLW0603 - locks travel to a process at its start alone
    _worker = (task, shared)


def _write(job: ShardJob) -> Result:
    assert _worker is not None
    task, shared = _worker
    rejected: list[Rejected] = []
    summary, whole = None, True
    records = _records(task.source, job, shared, rejected)
    path = task.folder / f"{job.name}.tar"
    try:
        first = next(records, None)
        if first is not None:
            classes = len(task.source.description.classes)
            summary = write_shard(path, chain([first], records), classes=classes)
            if task.location is not None:
                _move(path, task.location)
    except Stopped:
        whole = False
    if rejected:
        with whole_file(task.state / f"{job.name}.csv") as temporary:
            _list_rejected(temporary, job.split, rejected)
    examples = [shown(f"{item.place}: {item.reason}") for item in rejected[:LISTED]]
    finished = Finished(summary=summary, rejected=len(rejected), examples=examples)
    if whole:
        write_json(task.state / f"{job.name}.json", finished.model_dump())
    return Result(job, finished, whole)


def _records(source: PictureSource, job: ShardJob, shared: _Shared, rejected: list[Rejected]) -> Iterator[SampleRecord]:
    for item in source.records(job.split, job.rows):
        if shared.stop.value:
            raise Stopped
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            yield item
        shared.count(item)


def _list_rejected(path: Path, split: str, rejected: list[Rejected]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, ((split, *item) for item in rejected))


def _move(path: Path, location: str) -> None:
    """Upload a tar and delete it here."""
    from fsspec.core import url_to_fs

    system, folder = url_to_fs(location)
    target = f"{folder}/{path.name}"
    system.makedirs(folder, exist_ok=True)
    system.put_file(str(path), target)
    if (uploaded := system.size(target)) != path.stat().st_size:
        raise IngestError(f"{location}/{path.name}: {uploaded} bytes after an upload of {path.stat().st_size}")
    path.unlink()
