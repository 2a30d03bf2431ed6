"""Lists for img2dataset, and what is kept of its work.

    <delivery>/plain/lists/00000.parquet   rows to fetch
    <delivery>/plain/shards/00000.tar      img2dataset's, with 00000.parquet and, when it is whole, 00000_stats.json
    <delivery>/hashed/...                  the same for rows whose sha256 is verified

img2dataset says nothing reliable at its end: it exits 0 when it was interrupted, prints the shards that failed, loses a
row whose exception it prints, and goes by shard numbers, so it cannot be given a longer list. So every delivery is a
new list of what is missing; a shard counts when its statistics, its table and its tar agree, and is moved into the
store; the rest is deleted, and missing again.
"""

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np

from vtp.artefact import read_json, remove, write_json
from vtp.config import Config
from vtp.curation.download.policy import PREFIX
from vtp.curation.download.store import (
    FAILED,
    SHA256_DIFFERS,
    SUCCESS,
    DownloadRecord,
    Store,
    expected_sha256,
    fetchable,
    readable,
    selected,
    texts,
    to_disk,
)
from vtp.curation.rows import CAPTION, KEY, ORDER, SHA256, URL

if TYPE_CHECKING:
    import pyarrow as pa

PLAIN, HASHED = "plain", "hashed"
LIST_ROWS = 200_000  # img2dataset reads a whole list at once
NEARLY_FULL = 256 << 20  # bytes
PRINTABLE = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
HTTP_ERROR = re.compile(r"HTTP Error (\d+): (.*)", re.DOTALL)
# Of messages, in this order. None: the proxy was gone, so nobody asked for the picture.
CAUSES: tuple[tuple[str, str | None], ...] = (
    ("hash mismatch", SHA256_DIFFERS),
    ("Use of image disallowed", "opted out"),
    ("too many pixels", "too many pixels"),
    ("not an image", "not an image"),
    ("not a readable image", "damaged image"),
    ("cannot be resized", "cannot be resized"),
    ("unknown url type", "scheme refused"),
    ("Connection refused", None),
    ("Connection reset", None),
    ("Broken pipe", None),
    ("Remote end closed connection", None),
    ("IncompleteRead", None),
    ("timed out", "time out"),
    ("URL too long", "bad url"),
    ("Invalid IPv6 URL", "bad url"),
)


class Terms(NamedTuple):
    """How missing rows are found and listed."""

    verify_sha256: bool
    retry_failed: int
    rows_per_shard: int
    extension: str


class DeliveryBatch(Config):
    """What img2dataset was given."""

    rows_per_shard: int
    rows_per_list: int
    extension: str


class Adopted(NamedTuple):
    """What became of one shard's rows."""

    successes: int
    causes: list[str]

    @property
    def rows(self) -> int:
        return self.successes + len(self.causes)


class _Lists:
    """Writes parquet files of equal numbers of rows, a multiple of a shard's."""

    def __init__(self, folder: Path, terms: Terms) -> None:
        per_list = terms.rows_per_shard * max(1, LIST_ROWS // terms.rows_per_shard)
        self.batch = DeliveryBatch(
            rows_per_shard=terms.rows_per_shard, rows_per_list=per_list, extension=terms.extension
        )
        self.count = 0
        self._folder = folder
        self._files = 0
        self._waiting: list[pa.Table] = []

    def add(self, rows: "pa.Table") -> None:
        self._waiting.append(rows)
        self.count += len(rows)
        if sum(map(len, self._waiting)) >= self.batch.rows_per_list:
            self._write(whole=False)

    def close(self) -> None:
        if self._waiting:
            self._write(whole=True)
        if self.count:
            write_json(self._folder / "batch.json", self.batch.model_dump())

    def _write(self, *, whole: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, size = pa.concat_tables(self._waiting), self.batch.rows_per_list
        folder = self._folder / "lists"
        folder.mkdir(parents=True, exist_ok=True)
        end = len(rows) if whole else len(rows) // size * size
        for start in range(0, end, size):
            part = rows.slice(start, min(size, end - start))
            at = np.arange(len(part)) + self._files * size
            pq.write_table(part.append_column("row", pa.array(at)), folder / f"{self._files:05d}.parquet")
            self._files += 1
        self._waiting = [rows.slice(end)] if end < len(rows) else []


def list_missing(selection: Path, store: Store, delivery: Path, terms: Terms) -> tuple[int, int]:
    """Write lists of the rows to fetch; how many rows the selection has, and how many are to fetch.

    To fetch are rows with an http(s) URL of which the store knows nothing valid, or a failure after fewer attempts
    than `retry_failed` + 1.
    """
    import pyarrow as pa

    lists = {kind: _Lists(delivery / kind, terms) for kind in (PLAIN, HASHED)}
    total = 0
    for _, rows in selected(selection):
        total += len(rows)
        known = store.lookup(rows, verify=terms.verify_sha256)
        status, attempts = texts(known["status"]), known["attempt"].fill_null(0).to_numpy()
        again = (status == FAILED) & (attempts <= terms.retry_failed)
        missing = fetchable(rows) & ((status == "") | again)
        expected = expected_sha256(rows, verify=terms.verify_sha256)
        asked = {
            URL: pa.array([plain_url(url) for url in rows[URL].to_pylist()], pa.string()),
            CAPTION: readable(rows[CAPTION]) if CAPTION in rows.column_names else pa.nulls(len(rows), "string"),
            SHA256: pa.array(expected, pa.string()),
            KEY: rows[KEY],
            "source_url": rows[URL],
            ORDER: rows[ORDER],
            "attempt": pa.array(attempts + 1, pa.int32()),
        }
        table = pa.table(asked)
        for kind, chosen in ((PLAIN, expected == ""), (HASHED, expected != "")):
            if (missing & chosen).any():
                lists[kind].add(table.filter(pa.array(missing & chosen)))
    for writer in lists.values():
        writer.close()
    return total, sum(writer.count for writer in lists.values())


def plain_url(url: str) -> str:
    """A URL in ASCII, which is all that urllib takes: an international host name in Punycode, the rest quoted."""
    url = url.strip()
    if not url.isascii():
        try:
            parts = urlsplit(url)
            user, at, place = parts.netloc.rpartition("@")
            host, colon, port = place.partition(":")
            if not host.isascii():
                host = host.encode("idna").decode()
                url = urlunsplit(parts._replace(netloc=f"{user}{at}{host}{colon}{port}"))
        except ValueError:
            pass  # img2dataset will fail on it and say so
    return quote(url, safe=PRINTABLE)


def adopt(delivery: Path, store: Store) -> Iterator[Adopted]:
    """Move the shards that img2dataset finished into the store."""
    for kind in (PLAIN, HASHED):
        folder = delivery / kind
        for statistics in sorted((folder / "shards").glob("*_stats.json")):
            if (adopted := _adopt(folder, statistics, store)) is not None:
                yield adopted


def recover(incoming: Path, store: Store) -> int:
    """Adopt what earlier deliveries finished, and delete them; how many rows were adopted."""
    rows = 0
    for delivery in sorted(incoming.iterdir()) if incoming.is_dir() else []:
        rows += sum(adopted.rows for adopted in adopt(delivery, store))
        remove(delivery)
    return rows


def _adopt(folder: Path, statistics: Path, store: Store) -> Adopted | None:
    """A finished shard's rows; None for one that is not whole, or whose statistics are being written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = statistics.name.removesuffix("_stats.json")
    name = f"{folder.parent.name}-{folder.name}-{shard}"
    tar, table = statistics.with_name(f"{shard}.tar"), statistics.with_name(f"{shard}.parquet")
    kept_tar = store.tars / f"{name}.tar"
    adopted = None
    if not store.holds(name):
        batch = DeliveryBatch.parse(read_json(folder / "batch.json"), where=str(folder / "batch.json"))
        try:
            asked = _asked(folder, batch, int(shard))
            count = json.loads(statistics.read_text(encoding="utf-8"))["count"]
            log_row = {row["row"]: row for row in pq.read_table(table).to_pylist()}
            # A process that was killed below has moved the tar already.
            members = _members(tar if tar.exists() else kept_tar, batch.extension)
        except (ValueError, KeyError, OSError, tarfile.TarError, pa.ArrowException):
            return None
        candidates = [_record(row, log_row.get(row["row"]), members, f"tars/{kept_tar.name}") for row in asked]
        records = [record for record in candidates if record is not None]
        if count != len(asked) or any(record.status == SUCCESS and not record.size for record in records):
            return None
        if len(log_row) < count and shutil.disk_usage(store.folder).free < NEARLY_FULL:
            return None  # img2dataset goes on when it cannot write a picture
        if tar.exists() and members:
            to_disk(tar)
            tar.rename(kept_tar)
        store.add(name, records)
        causes = [record.error for record in records if record.error]
        adopted = Adopted(len(records) - len(causes), causes)
    for path in (statistics, tar, table):
        remove(path)
    return adopted


def _asked(folder: Path, batch: DeliveryBatch, shard: int) -> list[dict]:
    """The rows of a shard as they were listed."""
    import pyarrow.parquet as pq

    index, start = divmod(shard * batch.rows_per_shard, batch.rows_per_list)
    return pq.read_table(folder / "lists" / f"{index:05d}.parquet").slice(start, batch.rows_per_shard).to_pylist()


def _members(path: Path, extension: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every image in a tar, by img2dataset's key. Raises TarError when it is cut off."""
    places = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            if suffix == extension:
                places[key] = (member.offset_data, member.size)
    return places


def _record(asked: dict, log_row: dict | None, members: dict[str, tuple[int, int]], tar: str) -> DownloadRecord | None:
    """What became of a row; None if nobody asked for its picture."""
    what = DownloadRecord(asked[KEY], asked["source_url"], asked[ORDER], asked[SHA256], asked["attempt"], FAILED)
    if log_row is None:
        return what._replace(error="other", message="img2dataset lost this row; its log holds an exception")
    if log_row["status"] != "success":
        message = log_row["error_message"] or ""
        cause = cause_of(message)
        return None if cause is None else what._replace(error=cause, message=message[:200])
    offset, size = members.get(log_row["key"], (None, None))
    return what._replace(
        status=SUCCESS,
        tar=tar,
        offset=offset,
        size=size,
        stored_width=log_row["width"],
        stored_height=log_row["height"],
        width=log_row["original_width"],
        height=log_row["original_height"],
        sha256=log_row["sha256"],
    )


def cause_of(message: str) -> str | None:
    """The class of img2dataset's message; None if the proxy was gone."""
    if match := HTTP_ERROR.match(message):
        status, reason = match.groups()
        if reason.startswith(PREFIX):
            return reason.removeprefix(PREFIX)
        if "Redirection to url" in reason:
            return "scheme refused"
        return "redirect loop" if "infinite loop" in reason else f"http {status}"
    return next((cause for part, cause in CAUSES if part in message), "other")
