"""The process that calls img2dataset: `python -m vtp.curation.download.worker JOB`.

It ends, with all its children, when its stdin does. Four of img2dataset's parts are replaced by ours; `safe_resizer` has
two. Its pool of processes waits for ever for the shard of one that was killed. Its logger is a process that imports
everything once more, prints what the stage shows already, and lives on when its parent is killed.
"""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp.artefact import read_json
from vtp.config import Config
from vtp.processes import follow_parent

if TYPE_CHECKING:
    from vtp.curation.download.safe_resizer import ProxiedDownloader

SHARDS_OF_A_PROCESS = 20


class SparkJob(Config):
    """A Spark session."""

    master: str
    conf: dict[str, str]


class FetchJob(Config):
    """What img2dataset is asked to do."""

    deliveries: list[str]  # folders of lists, each with a folder of shards
    hashed: list[bool]  # whether the rows of each have a sha256 to verify
    proxy: str
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
    distributor: str
    spark: SparkJob | None


def main() -> None:
    """Command line."""
    job = FetchJob.parse(read_json(Path(sys.argv[1])), where=sys.argv[1])
    signal.signal(signal.SIGTERM, lambda number, frame: end_group())
    threading.Thread(target=_follow_stdin, daemon=True).start()
    theirs: Any = importlib.import_module("img2dataset.main")  # the package has a function of that name
    from img2dataset.downloader import Downloader

    from vtp.curation.download.safe_resizer import ProxiedDownloader, SafeResizer

    def downloader(**options: Any) -> ProxiedDownloader:  # noqa: ANN401 - theirs
        return ProxiedDownloader(Downloader(**options), proxy=job.proxy, deadline=job.deadline)

    theirs.Resizer, theirs.Downloader, theirs.LoggerProcess = SafeResizer, downloader, _NoLogger
    theirs.multiprocessing_distributor = distribute
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
        # The proxy keeps the time: it answers at the deadline, and this is for a proxy that hangs.
        timeout=job.deadline + 30,
        retries=job.retries,
        max_shard_retry=0,  # a shard that failed is missing, and listed again
        user_agent_token=job.user_agent_token,
        disallowed_header_directives=job.opt_out,
        distributor=job.distributor,
    )


def distribute(
    processes: int, downloader: "ProxiedDownloader", shards: Iterable[tuple[int, str]], *unused: object
) -> None:
    """Fetch shards in processes of this machine, with the arguments of img2dataset's own distributor.

    Raises BrokenProcessPool when a process is killed, for want of memory for example. Processes are replaced now and
    then, because decoders leak.
    """
    waiting = iter(shards)
    while batch := list(islice(waiting, processes * SHARDS_OF_A_PROCESS)):
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=follow_parent) as pool:
            for _, shard in pool.map(downloader, batch):
                print(f"shard {shard[0]} ended", flush=True)


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
    # A second attempt at a shard that is still being written would write into the same files; and executors on other
    # machines do not have the environment of this process.
    needed = {"spark.speculation": "false", "spark.executorEnv.NO_ALBUMENTATIONS_UPDATE": "1"}
    for name, value in (job.conf | needed).items():
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


def end_group() -> None:
    """End this process and all that it started; what they had not finished does not count."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
