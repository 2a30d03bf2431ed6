"""What a selection asks for and a store does not know: the rows of every shard, in a file that `fetch_shard` reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vtp.curation.download.opener import plain_url
from vtp.curation.download.shard import ATTEMPT, SOURCE_URL
from vtp.curation.download.store import FAILED, Store, expected_sha256, fetchable, readable, selected, texts
from vtp.curation.rows import CAPTION, KEY, ORDER, SHA256, URL

if TYPE_CHECKING:
    import pyarrow as pa


class Terms(NamedTuple):
    """Which rows are missing, and how many of them make a shard."""

    verify_sha256: bool
    retry_failed: int
    rows_per_shard: int


class Missing(NamedTuple):
    """Rows to fetch, of `total` that the selection has."""

    total: int
    rows: int
    shards: list[Path]


def list_missing(selection: Path, store: Store, terms: Terms) -> Missing:
    """Write the rows to fetch into the store's `incoming`, a file for each shard.

    To fetch are rows with an http(s) URL of which the store knows nothing valid, or a failure after fewer attempts
    than `retry_failed` + 1.
    """
    import pyarrow.parquet as pq

    total = rows = 0
    shards: list[Path] = []
    delivery = store.next_delivery()
    store.incoming.mkdir(exist_ok=True)

    def asked() -> Iterator["pa.Table"]:
        nonlocal total
        for _, part in selected(selection):
            total += len(part)
            yield _asked(part, store, terms)

    for shard in _of_size(asked(), terms.rows_per_shard):
        shards.append(store.incoming / f"{delivery}-{len(shards):05d}.parquet")
        pq.write_table(shard, shards[-1])
        rows += len(shard)
    return Missing(total, rows, shards)


def _asked(rows: "pa.Table", store: Store, terms: Terms) -> "pa.Table":
    """Those of some rows that are to be fetched."""
    import pyarrow as pa

    known = store.lookup(rows, verify=terms.verify_sha256)
    status, attempts = texts(known["status"]), known["attempt"].fill_null(0).to_numpy()
    again = (status == FAILED) & (attempts <= terms.retry_failed)
    columns = {
        URL: pa.array([plain_url(url) for url in rows[URL].to_pylist()], pa.string()),
        CAPTION: readable(rows[CAPTION]) if CAPTION in rows.column_names else pa.nulls(len(rows), "string"),
        SHA256: pa.array(expected_sha256(rows, verify=terms.verify_sha256), pa.string()),
        KEY: rows[KEY],
        SOURCE_URL: rows[URL],
        ORDER: rows[ORDER],
        ATTEMPT: pa.array(attempts + 1, pa.int32()),
    }
    return pa.table(columns).filter(pa.array(fetchable(rows) & ((status == "") | again)))


def _of_size(tables: Iterable["pa.Table"], size: int) -> Iterator["pa.Table"]:
    """The same rows in tables of `size` rows; the last may have fewer."""
    import pyarrow as pa

    rest: list[pa.Table] = []
    for table in tables:
        rows = pa.concat_tables([*rest, table])
        whole = len(rows) // size * size
        for start in range(0, whole, size):
            yield rows.slice(start, size)
        rest = [rows.slice(whole)]
    if rest and len(rest[0]):
        yield rest[0]
