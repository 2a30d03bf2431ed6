"""One shard, fetched by img2dataset's downloader in the process that calls `fetch_shard`: of this machine, or of Spark.

    <incoming>/<name>.parquet        rows to fetch
    <incoming>/<name>-<unique>/      the attempt's own: img2dataset's tar and table, and nobody else's

Whatever a process leaves that is killed lies in a folder of its own, and is deleted with the others by the stage.
"""

import os
import re
import tarfile
import urllib.request
from functools import cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from vtp.artefact import sync
from vtp.config import Config
from vtp.curation.download.opener import GuardedOpener
from vtp.curation.download.policy import Policy
from vtp.curation.download.store import FAILED, SUCCESS, DownloadRecord
from vtp.curation.rows import CAPTION, KEY, ORDER, SHA256, URL

ROW = "row"
SOURCE_URL = "source_url"  # as the selection has it; `url` is in ASCII
ATTEMPT = "attempt"
ASKED = (URL, CAPTION, SHA256, ROW)  # what img2dataset sees of a row
EXPECTED = "expected"  # its name for the sha256 there: `sha256` is that of what came
# What a message begins with, of our opener and our resizer.
CAUSES = {
    *(
        "bad gateway",
        "bad url",
        "deadline",
        "host not found",
        "no connection",
        "redirect loop",
        "time out",
        "tls error",
    ),
    *("address refused", "port refused", "scheme refused", "too large", "truncated body"),
    *("cannot be resized", "not an image", "sha256 differs", "too many pixels"),
}
RENAMED = {"not a readable image": "damaged image", "Use of image disallowed by X-Robots-Tag directive": "opted out"}
NO_HOST = re.compile("Invalid IPv6 URL|IPv4 or IPv6 address|IPvFuture")  # of urllib, which looks into brackets first


class FetchJob(Config):
    """How the rows of every shard are fetched and stored."""

    policy: Policy
    retries: int
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


class Fetched(NamedTuple):
    """A shard of which every row has an answer."""

    tar: Path | None  # None without a picture
    records: list[DownloadRecord]


def fetch_shard(job: FetchJob, path: Path) -> Fetched:
    """Fetch the rows in a file of `list_missing`, whose name ends in the number of the shard.

    Raises OSError when the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or an import calls home
    from img2dataset.downloader import Downloader

    from vtp.curation.download.safe_resizer import SafeResizer, StrictWriter

    urllib.request.install_opener(_opener(job.policy.model_dump_json()))  # type: ignore[arg-type] - `open` is all of one
    table = pq.read_table(path)
    asked = table.append_column(ROW, pa.array(np.arange(len(table))))
    folder = path.with_name(f"{path.stem}-{uuid4().hex}")
    folder.mkdir()
    shown = asked.select(ASKED).rename_columns([EXPECTED if name == SHA256 else name for name in ASKED])
    with pa.ipc.new_file(str(folder / "asked.arrow"), shown.schema) as writer:
        writer.write_table(shown)
    number = int(path.stem.rpartition("-")[2])
    downloader = Downloader(
        sample_writer_class=StrictWriter,
        resizer=SafeResizer(
            image_size=job.image_size,
            resize_mode=job.resize_mode,
            resize_only_if_bigger=job.only_if_bigger,
            encode_format=job.encoding,
            encode_quality=job.quality,
            max_image_area=job.max_pixels,
        ),
        thread_count=job.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=shown.column_names,
        timeout=None,
        number_sample_per_shard=job.rows_per_shard,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=job.encoding,
        retries=job.retries,
        user_agent_token=job.user_agent_token,
        disallowed_header_directives=job.opt_out,
        blurring_bbox_col=EXPECTED,  # the one column that a resizer gets to see
    )
    downloader.download_shard((number, str(folder / "asked.arrow")))
    tar = folder / f"{number:05d}.tar"
    sync(tar)
    told = {row[ROW]: row for row in pq.read_table(tar.with_suffix(".parquet")).to_pylist()}
    members = _members(tar, job.encoding)
    kept = f"tars/{path.stem}.tar"
    records = [_record(row, told.get(row[ROW]), members, kept) for row in asked.to_pylist()]
    return Fetched(tar if members else None, records)


@cache
def _opener(policy: str) -> GuardedOpener:
    """One for all shards of a process: it has threads, and the certificates of all authorities."""
    return GuardedOpener(Policy.model_validate_json(policy))


def _members(path: Path, extension: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every image in a tar, by img2dataset's key."""
    places = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            if suffix == extension:
                places[key] = (member.offset_data, member.size)
    return places


def _record(asked: dict, told: dict | None, members: dict[str, tuple[int, int]], tar: str) -> DownloadRecord:
    """What became of a row."""
    what = DownloadRecord(asked[KEY], asked[SOURCE_URL], asked[ORDER], asked[SHA256], asked[ATTEMPT], FAILED)
    if told is None:
        return what._replace(error="other", message="img2dataset lost this row; its log holds an exception")
    if told["status"] != "success":
        message = told["error_message"] or ""
        return what._replace(error=cause_of(message), message=message[:200])
    offset, size = members[told["key"]]
    return what._replace(
        status=SUCCESS,
        tar=tar,
        offset=offset,
        size=size,
        stored_width=told["width"],
        stored_height=told["height"],
        width=told["original_width"],
        height=told["original_height"],
        sha256=told["sha256"],
    )


def cause_of(message: str) -> str:
    """The cause that a message of our opener or our resizer, or of img2dataset's opt-out, begins with."""
    cause = re.split(r": | \(", message, maxsplit=1)[0]
    if cause in CAUSES or re.fullmatch(r"http \d+", cause):
        return cause
    return "bad url" if NO_HOST.search(message) else RENAMED.get(cause, "other")
