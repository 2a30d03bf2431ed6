"""From any source to shards and their manifest: in parallel, in a fixed order, resumable by shard.

A source numbers its pictures, split by split; shard i of a split holds those of the rows i * n to (i + 1) * n that can be
read. Bytes therefore depend neither on the number of processes nor on interruptions.
"""

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, field_validator

from vtp.artefact import read_json, whole_file
from vtp.config import Config
from vtp.curation.ingest.shard_workers import (
    Finished,
    IngestError,
    Result,
    ShardJob,
    ShardWorkers,
    Stopped,
    Task,
)
from vtp.curation.ingest.source import PictureSource
from vtp.data.remote import require_shared
from vtp.data.shards import FORMAT_VERSION, Manifest, ShardSummary, describe_split
from vtp.texts import listed

UNREADABLE = "unreadable.csv"


class IngestConfig(Config):
    """How any source becomes shards."""

    samples_per_shard: int = Field(ge=1, description="pictures per tar; tars of 100 MB to 1 GB stream best")
    max_unreadable: float = Field(ge=0, le=1, description="share of pictures that may be left out, or the stage fails")
    location: str | None = Field(
        description="URL of a folder for the tars, one per version of the data; null: beside the manifest"
    )

    @field_validator("location")
    @classmethod
    def _is_shared(cls, location: str | None) -> str | None:
        if location is not None:
            require_shared(location)
        return location


class Ingest:
    """The work of writing one source's shards into `folder`; `state` keeps what is known of complete ones."""

    def __init__(self, source: PictureSource, config: IngestConfig, folder: Path, state: Path) -> None:
        self._task = Task(source, folder, state, config.location)
        for path in (folder, state):
            path.mkdir(parents=True, exist_ok=True)
        size = config.samples_per_shard
        self._jobs = [
            ShardJob(split, number, range(first, min(first + size, total)))
            for split, total in source.sizes.items()
            for number, first in enumerate(range(0, total, size))
        ]
        self._finished = {job: done for job in self._jobs if (done := self._load(job)) is not None}
        self.total = sum(len(job.rows) for job in self._jobs)
        self.done = sum(len(job.rows) for job in self._finished)
        self._allowed = int(round(config.max_unreadable * self.total, 6))  # 0.29 * 100 is 28.999999999999996

    @property
    def rejected(self) -> int:
        """Pictures that were left out."""
        return sum(done.rejected for done in self._finished.values())

    def run(
        self, *, processes: int, progress: Callable[[int], object], stop: Callable[[], bool] = lambda: False
    ) -> Manifest:
        """Write what is missing, in `processes` others or, for 0, in this one.

        `progress` gets how many pictures were done since its last call, `stop` is asked several times a second.
        Raises Stopped when it was asked to stop, and IngestError when more pictures are unreadable than `max_unreadable`
        allows, as soon as that is certain.
        """
        missing = [job for job in self._jobs if job not in self._finished]
        broken_off: list[Result] = []
        before, reported, stopping = self.rejected, 0, False
        with ShardWorkers(self._task, min(processes, len(missing))) as workers:
            for results in workers.results(missing):
                seen = workers.seen
                progress(seen - reported)
                reported, stopping = seen, stopping or stop()
                if stopping or before + workers.rejected > self._allowed:
                    workers.stop()
                self._finished |= {result.job: result.finished for result in results if result.whole}
                broken_off += [result for result in results if not result.whole]
            progress(workers.seen - reported)
        finished = self._finished | {result.job: result.finished for result in broken_off}
        if sum(done.rejected for done in finished.values()) > self._allowed:
            raise self._too_many(finished)
        if len(self._finished) < len(self._jobs):
            raise Stopped
        return self._assemble()

    def _load(self, job: ShardJob) -> Finished | None:
        """What is known of a shard, if it is complete."""
        path = self._task.state / f"{job.name}.json"
        if not path.exists():
            return None
        finished = Finished.parse(read_json(path), where=str(path))
        if finished.summary is None:
            return finished
        tar = self._task.folder / f"{job.name}.tar"
        moved = self._task.location is not None
        there = moved or (tar.exists() and tar.stat().st_size == finished.summary.shard.bytes)
        return finished if there and tar.with_suffix(".parquet").exists() else None

    def _too_many(self, finished: dict[ShardJob, Finished]) -> IngestError:
        examples = [example for job in sorted(finished) for example in finished[job].examples]
        count = sum(done.rejected for done in finished.values())
        return IngestError(
            f"{count} of {self.total} pictures are unreadable{' so far' if len(finished) < len(self._jobs) else ''}, "
            f"max_unreadable allows {self._allowed}; {self._task.state}/*.csv lists them:\n  "
            + listed(examples, "\n  ", count=count)
        )

    def _assemble(self) -> Manifest:
        source, folder = self._task.source, self._task.folder
        summaries: dict[str, list[ShardSummary]] = {split: [] for split in source.sizes}
        for job in self._jobs:
            if (summary := self._finished[job].summary) is not None:
                summaries[job.split].append(summary)
        for split, some in summaries.items():
            if not some:
                raise IngestError(f"split {split!r} has no picture; give the source some, or a larger share")
        self._list_rejected()
        description = source.description
        if description.attribution:
            (folder / "ATTRIBUTION.txt").write_text(description.attribution, encoding="utf-8")
        sides = {summary.side for some in summaries.values() for summary in some}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            image_size=sides.pop() if len(sides) == 1 else None,
            location=self._task.location,
            splits={split: describe_split(some) for split, some in summaries.items()},
            **description._asdict(),
        )
        manifest.save(folder)
        return manifest

    def _list_rejected(self) -> None:
        """`unreadable.csv`, in the order of the shards; none when all could be read."""
        if not self.rejected:
            return
        with whole_file(self._task.folder / UNREADABLE) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write("split,key,place,reason\n")
            for job in self._jobs:
                if self._finished[job].rejected:
                    file.write((self._task.state / f"{job.name}.csv").read_text(encoding="utf-8"))
