"""The process that calls img2dataset: `python -m stages._fetch JOB`. It ends, with all its children, when its stdin does.

Three of img2dataset's parts are replaced by ours: see `stages._careful` for two. The third is its logger, a process that
imports everything once more, prints what the stage shows already, and lives on when its parent is killed.
"""

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vtp.artefact import read_json
from vtp.config import Config


class SparkJob(Config):
    """A Spark session."""

    master: str
    conf: dict[str, str]


class FetchJob(Config):
    """What img2dataset is asked to do."""

    deliveries: list[str]  # folders of lists, each with a folder of shards
    hashed: list[bool]  # whether the rows of each have a sha256 to verify
    guard: str
    deadline: float
    retries: int
    processes: int
    threads: int
    rows_per_shard: int
    resize_mode: str
    image_size: int
    only_if_bigger: bool
    encoding: str
    quality: int
    max_pixels: int
    user_agent_token: str | None
    opt_out: list[str]
    spark: SparkJob | None


def main() -> None:
    """Command line."""
    job = FetchJob.parse(read_json(Path(sys.argv[1])), where=sys.argv[1])
    signal.signal(signal.SIGTERM, lambda number, frame: end_group())
    threading.Thread(target=_follow_stdin, daemon=True).start()
    if job.spark is None:  # which starts a task again by itself
        threading.Thread(target=_watch_children, daemon=True).start()
    theirs: Any = importlib.import_module("img2dataset.main")  # the package has a function of that name
    from img2dataset.downloader import Downloader

    from stages._careful import CarefulResizer, GuardedDownloader

    def downloader(**options: Any) -> GuardedDownloader:  # noqa: ANN401 - theirs
        return GuardedDownloader(Downloader(**options), guard=job.guard, deadline=job.deadline)

    theirs.Resizer, theirs.Downloader, theirs.LoggerProcess = CarefulResizer, downloader, _NoLogger
    with _spark(job.spark):
        for delivery, hashed in zip(job.deliveries, job.hashed, strict=True):
            fetch(theirs, job, Path(delivery), hashed=hashed)


def fetch(theirs: Any, job: FetchJob, delivery: Path, *, hashed: bool) -> None:  # noqa: ANN401 - a module of theirs
    """Run img2dataset over the lists of a delivery."""
    theirs.download(
        url_list=str(delivery / "lists"),
        output_folder=str(delivery / "shards"),
        input_format="parquet",
        output_format="webdataset",
        caption_col="caption",
        save_additional_columns=["row"],
        compute_hash="sha256",
        verify_hash=["sha256", "sha256"] if hashed else None,
        extract_exif=False,
        image_size=job.image_size,
        resize_mode=job.resize_mode,
        resize_only_if_bigger=job.only_if_bigger,
        encode_format=job.encoding,
        encode_quality=job.quality,
        max_image_area=job.max_pixels,
        number_sample_per_shard=job.rows_per_shard,
        processes_count=job.processes,
        thread_count=job.threads,
        # The guard keeps the time: it answers at the deadline, and this is for a guard that hangs.
        timeout=job.deadline + 30,
        retries=job.retries,
        max_shard_retry=0,  # a shard that failed is missing, and listed again
        user_agent_token=job.user_agent_token,
        disallowed_header_directives=job.opt_out,
        distributor="multiprocessing" if job.spark is None else "pyspark",
    )


class _NoLogger:
    """In the place of img2dataset's logger."""

    def __init__(self, *arguments: object) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None: ...

    def join(self) -> None: ...

    def terminate(self) -> None: ...


@contextmanager
def _spark(job: SparkJob | None) -> Iterator[None]:
    """The session that img2dataset's distributor finds; its own would be local and take 16 GB."""
    if job is None:
        yield
        return
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(job.master).appName("download")
    for name, value in job.conf.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    try:
        yield
    finally:
        session.stop()


def _follow_stdin() -> None:
    """The other side is held by the stage alone: however it dies, this ends."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would be held at the end of the interpreter
        pass
    end_group()


def _watch_children() -> None:
    """A process of a multiprocessing pool that is killed takes its shard along, and the pool waits for it for ever."""
    while True:
        with suppress(ChildProcessError):  # none yet, or the pool asked first
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            if ended is not None and ended.si_status not in (0, signal.SIGTERM):
                print(f"process {ended.si_pid} of the pool died with {ended.si_status}", flush=True)
                end_group()
        time.sleep(0.02)


def end_group() -> None:
    """End this process and all that it started; what they had not finished does not count."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
