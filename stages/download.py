"""Fetch the pictures of a selection with img2dataset, from public addresses alone, into a store that outlives the list.

A run fetches what the store does not know. It may be killed at any moment: whole shards stay, the rest is fetched by the
next run. A longer list costs its new rows, and failed rows are tried again when `retry_failed` grants them one more attempt.
"""

import hashlib
import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.runner.run import Input, Output, main
from stages.runner.scratch import Scratch
from vtp.artefact import remove
from vtp.config import Config, ConfigError
from vtp.curation.download.missing import Terms, list_missing
from vtp.curation.download.policy import Policy
from vtp.curation.download.pool import DownloadReport, write_pool
from vtp.curation.download.session import Live, LocalPool, spark_pool
from vtp.curation.download.shard import FetchJob, fetch_shard
from vtp.curation.download.store import Store
from vtp.host import Host
from vtp.processes import WorkerDied, WorkerPool
from vtp.texts import shown

LARGEST_PIXELS = 89_000_000  # Pillow's own limit


class NoResize(Config):
    """Pictures keep their size."""

    name: Literal["no"]


class Resize(Config):
    """`border` pads the longer side's square with white, `center_crop` cuts the shorter side's; the others keep all of
    the picture and fit its shorter (`keep_ratio`) or longer side (`keep_ratio_largest`)."""

    name: Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop"]
    size: int = Field(ge=1, description="pixels of that side")
    only_if_bigger: bool = Field(description="leave smaller pictures as they are")


class Lossy(Config):
    """JPEG or WebP."""

    name: Literal["jpg", "webp"]
    quality: int = Field(ge=1, le=100, description="quality from 1 to 100")


class Png(Config):
    """Without loss."""

    name: Literal["png"]
    compression: int = Field(ge=0, le=9, description="zlib's level from 0 to 9")


class Multiprocessing(Config):
    """On this machine."""

    name: Literal["multiprocessing"]
    processes: int = Field(ge=1, description="processes that fetch")
    threads: int = Field(ge=1, description="threads of each process; a picture is on its way in each")


class Spark(Config):
    """On a cluster: a task per shard, on a folder that all nodes share, where this project is installed too."""

    name: Literal["pyspark"]
    master: str = Field(min_length=1, description="URL of the cluster; local[N] for N cores of this machine")
    threads: int = Field(ge=1, description="threads of each task")
    conf: dict[str, str] = Field(description="Spark's own settings")


class Download(Config):
    """The section `download`."""

    resize: NoResize | Resize = Field(discriminator="name")
    encoding: Lossy | Png = Field(discriminator="name")
    rows_per_shard: int = Field(ge=1, description="rows of a shard of the pool")
    policy: Policy
    max_pixels: int = Field(ge=1, le=LARGEST_PIXELS, description="a header that announces more is refused")
    retries: int = Field(ge=0, description="further attempts within a run, at once")
    user_agent_token: str | None = Field(
        pattern=r"^[A-Za-z0-9._-]+$", description="names the downloader to servers, and in their X-Robots-Tag"
    )
    respect_opt_out: list[str] = Field(description="directives of X-Robots-Tag that refuse; an empty list: none")
    verify_sha256: bool = Field(description="refuse a picture whose sha256 is not that of its row, where it has one")
    retry_failed: int = Field(
        ge=0, description="further rounds in which failed rows are tried again; counts over all runs"
    )
    min_success: float = Field(ge=0, le=1, description="share of rows with a picture below which the stage fails")
    distributor: Annotated[Multiprocessing | Spark, Field(discriminator="name")]

    @property
    def identity(self) -> str:
        """Digest of what decides whether a picture in a store is the one that these parameters ask for."""
        parts = [self.resize.model_dump(), self.encoding.model_dump(), self.user_agent_token]
        parts += [sorted(self.respect_opt_out), sorted(self.policy.allowed_networks)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def terms(self) -> Terms:
        return Terms(self.verify_sha256, self.retry_failed, self.rows_per_shard)


class DownloadError(ValueError):
    """The download cannot be finished; the message says why, and what is kept."""


def run(
    config: Download,
    *,
    selection: Annotated[Input, "folder of the stage filter: rows with the URLs to fetch"],
    pool: Annotated[Output, "folder for the pictures and what became of every row"],
    report: Annotated[Output, "JSON file for the counts by outcome"],
    errors: Annotated[Output, "CSV file for the causes of failures, with an example of each"],
    host: Host,
) -> None:
    require_packages(config)
    folder = host.download_store or host.folder.parents[1]
    lock = Scratch((folder / f"store-{config.identity}").absolute())
    with lock.locked():
        store = Store(lock.root)
        fetch_missing(config, selection, store, host)
        result = write_pool(selection, store, pool, verify=config.verify_sha256)
    host.record(rows=result.rows, success=result.successes, tars=len(result.tars))
    if result.share < config.min_success:
        raise DownloadError(too_few(result, config))
    result.save(report)
    result.save_errors(errors)


def fetch_missing(config: Download, selection: Path, store: Store, host: Host) -> None:
    """Bring the store to know every row of the selection.

    Raises DownloadError for an empty selection, and when no shard can be finished; OSError when the disk is full.
    """
    store.sweep()
    missing = list_missing(selection, store, config.terms)
    if not missing.total:
        raise DownloadError(f"{selection}: no rows; the filter before it let none pass")
    if not missing.rows:
        return
    log = host.folder.parent / "fetch.log"
    remove(log)
    with host.progress(total=missing.rows, description="fetching", unit="image") as bar:
        live = Live(bar, host.folder / "progress.csv")
        while missing.rows:
            before = live.rows
            try:
                fetch(missing.shards, job_of(config), pool_of(config.distributor, log), store, live, host)
            except WorkerDied as died:
                if live.rows == before:
                    raise DownloadError(no_progress(died, log)) from None
            finally:
                live.log()
                store.sweep()
            missing = list_missing(selection, store, config.terms)
            bar.total = live.rows + missing.rows  # failures that are tried again, and what a killed process had


def fetch(shards: list[Path], job: FetchJob, pool: WorkerPool, store: Store, live: Live, host: Host) -> None:
    """Fetch shards, and put each into the store as soon as it is whole. Raises WorkerDied and OSError."""
    with pool as workers:
        for ended in workers.results(partial(fetch_shard, job), shards):
            for path, fetched in ended:
                store.adopt(path.stem, fetched.tar, fetched.records)
                live.note(fetched)
            if host.stop_requested:
                host.stop()


def pool_of(distributor: Multiprocessing | Spark, log: Path) -> WorkerPool:
    """The processes that fetch."""
    if distributor.name == "pyspark":
        return spark_pool(distributor.master, distributor.conf, log)
    return LocalPool(distributor.processes, log)


def job_of(config: Download) -> FetchJob:
    """How every shard is fetched."""
    resize, encoding = config.resize, config.encoding
    return FetchJob(
        policy=config.policy,
        retries=config.retries,
        threads=config.distributor.threads,
        rows_per_shard=config.rows_per_shard,
        resize_mode=resize.name,
        image_size=resize.size if isinstance(resize, Resize) else 1,
        only_if_bigger=isinstance(resize, Resize) and resize.only_if_bigger,
        encoding=encoding.name,
        quality=encoding.compression if isinstance(encoding, Png) else encoding.quality,
        max_pixels=config.max_pixels,
        user_agent_token=config.user_agent_token,
        opt_out=config.respect_opt_out,
    )


def require_packages(config: Download) -> None:
    """Raises ConfigError that names the extra to install."""
    wanted = {"download": ["img2dataset", "imghdr"]}  # the latter comes with Python below 3.13
    wanted |= {"spark": ["pyspark"]} if isinstance(config.distributor, Spark) else {}
    for extra, packages in wanted.items():
        for package in packages:
            if find_spec(package) is None:
                raise ConfigError(f"{package} is not installed here: pip install -e '.[{extra}]'")


def no_progress(died: WorkerDied, log: Path) -> str:
    """Why no shard could be finished."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:] if log.exists() else []
    return "\n".join([str(died), *([f"The end of {log}:", *lines] if lines else [])])


def too_few(result: DownloadReport, config: Download) -> str:
    """The table of causes, and what can be done."""
    lines = [shown(f"  {rows:>9,} {cause}, such as {result.examples[cause][0]}") for cause, rows in result.table()]
    return "\n".join(
        [
            f"{result.successes:,} of {result.rows:,} rows have a picture ({result.share:.1%}), "
            f"download.min_success asks for {config.min_success:.1%}; the others:",
            *lines,
            "Pictures are kept, and failures are remembered. See that the network is up, and set download.retry_failed "
            f"to {config.retry_failed + 1} to ask for the others once more; or filter the list, or lower "
            "download.min_success.",
        ]
    )


if __name__ == "__main__":
    main(run)
