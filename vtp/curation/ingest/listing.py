"""A sorted list of pictures that lie in files: where each one is, and what is said about it.

    listing.json          classes, and what was passed over
    train-rows.parquet    key, order, file, offset, size, label, caption, problem; sorted by (order, key)

`order` is a hash of the key (see rows), so shards mix classes and do not depend on the order in which files were found.

Two entries are one picture when key, class and place are equal, or key, class and content where an entry says its content.
Equal keys of other pictures are names that repeat, such as `0.jpg` in every folder: all of them get a digest of where they
lie, and keys that come once stay as they are.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtp.artefact import read_json, whole_folder, write_json
from vtp.config import Config
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.places import REMEDY, leads_out
from vtp.curation.rows import ORDER, order_of
from vtp.data.shards import KEY, NO_LABEL
from vtp.texts import shown

if TYPE_CHECKING:
    import pyarrow as pa

WHOLE = -1  # size of an entry that is a file of its own
CHUNK = 1 << 16  # entries that are packed together
ROW_GROUP = 1 << 13
IDENTITY = "identity"  # of a picture, while a list is made
INTEGER = re.compile(r"-?[0-9]+")


class Entry(NamedTuple):
    """Where a picture lies, and what is said about it."""

    split: str
    key: str
    file: str  # relative to the root of the source
    offset: int = 0
    size: int = WHOLE
    class_id: str | None = None
    caption: str = ""
    problem: str | None = None  # why it cannot be used, when that is known already
    picture: str | None = None  # what equal pictures have in common, such as a digest; None: where it lies


class Listing(Config):
    """What is known of a list besides its rows."""

    splits: dict[str, int]
    class_ids: list[str]
    duplicates: int  # entries that came again
    ignored: dict[str, int]  # files that are no pictures, by extension


class Naming(NamedTuple):
    """How captions are made of classes."""

    template: str | None  # for entries without a caption, {} stands for the name; None: those have none
    name: Callable[[str], str]  # of a class, from its id


def safe_key(name: str, *more: str) -> str:
    """`name` where it can be a key, else what can be kept of it and a digest; `more` sets equal names apart."""
    if KEY.fullmatch(name) and not more:
        return name
    digest = hashlib.blake2b("\0".join((name, *more)).encode("utf-8", "surrogateescape"), digest_size=8)
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', name)[:64]}-{digest.hexdigest()}"


def require_inside(root: Path | None, path: Path) -> None:
    """Raises IngestError for a path that links lead out of the folder of a source, unless that is None."""
    if root is not None and leads_out(root, path):
        raise IngestError(f"{shown(str(path))}: a link leads outside of {root}; {REMEDY}")


def list_pictures(
    entries: Iterable[Entry],
    folder: Path,
    *,
    naming: Naming,
    held_out: float | None,
    ignored: Counter[str],
    stop: Callable[[], bool],
) -> Listing:
    """Write the list of all entries to `folder`; one that is already there is kept.

    `held_out`: share of the pictures, those with the smallest hashes, that becomes the split validation; entries that say
    the same `picture` go together. `ignored` is read when all entries are. Raises Stopped when it was asked to stop.
    """
    path = folder / "listing.json"
    if path.exists():
        return Listing.parse(read_json(path), where=str(path))
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pa.concat_tables([pa.Table.from_batches([], _schema()), *_packed(entries, stop)])
    table, duplicates = _apart(table)
    class_ids = sorted_ids(table["class_id"].unique().drop_null().to_pylist())
    table = _with_labels(table, class_ids, naming)
    if held_out is not None:
        pictures = pc.coalesce(table["picture"], table["key"])  # pyright: ignore[reportAttributeAccessIssue]
        validation = _orders(pictures) < np.uint64(held_out * 2**64)
        table = table.set_column(0, "split", pa.array(np.where(validation, "validation", "train")))
    splits = {}
    with whole_folder(folder) as temporary:
        for split in ("train", "validation"):
            rows = table.filter(pc.field("split") == split).drop_columns(["split", "picture"])
            rows = rows.sort_by([(ORDER, "ascending"), ("key", "ascending")])
            pq.write_table(rows, temporary / f"{split}-rows.parquet", row_group_size=ROW_GROUP)
            splits[split] = len(rows)
        listing = Listing(
            splits=splits, class_ids=class_ids, duplicates=duplicates, ignored=dict(sorted(ignored.items()))
        )
        write_json(temporary / path.name, listing.model_dump())
    return listing


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Names of classes in order; numbers by value."""
    names = sorted(ids)
    return sorted(names, key=int) if all(map(INTEGER.fullmatch, names)) else names


def _schema() -> "pa.Schema":
    import pyarrow as pa

    # Names of files are bytes: not every one is UTF-8. Large: captions of a whole set may be more than 2 GB.
    types = {"file": pa.large_binary(), "offset": pa.int64(), "size": pa.int64()}
    return pa.schema([(name, types.get(name, pa.large_string())) for name in Entry._fields])


def _packed(entries: Iterable[Entry], stop: Callable[[], bool]) -> "Iterator[pa.Table]":
    """Entries as columns, a chunk at a time: a list of a million records would take gigabytes."""
    import pyarrow as pa

    stream = iter(entries)
    while chunk := list(islice(stream, CHUNK)):
        columns = dict(zip(Entry._fields, zip(*chunk, strict=True), strict=True))
        if stop():
            raise Stopped
        columns["file"] = tuple(map(os.fsencode, columns["file"]))
        yield pa.table(columns, schema=_schema())


def _with_labels(table: "pa.Table", class_ids: list[str], naming: Naming) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    places = pc.index_in(table["class_id"], pa.array(class_ids, pa.large_string()))  # pyright: ignore[reportAttributeAccessIssue]
    table = table.append_column("label", pc.fill_null(places.cast(pa.int64()), NO_LABEL))
    if naming.template is not None and class_ids:
        texts = pa.array([naming.template.replace("{}", naming.name(name)) for name in class_ids], pa.large_string())
        made = pc.fill_null(texts.take(places.combine_chunks()), "")
        captions = pc.if_else(pc.equal(table["caption"], ""), made, table["caption"])  # pyright: ignore[reportAttributeAccessIssue]
        table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
    return table.drop_columns(["class_id"])


def _apart(table: "pa.Table") -> "tuple[pa.Table, int]":
    """With `order`, without entries that come again, and with keys that differ within a split; how many came again."""
    import pyarrow as pa

    orders = _orders(table["key"])
    table = table.append_column(ORDER, pa.array(orders))
    ranks = np.sort(orders)
    repeats = np.isin(orders, ranks[1:][ranks[1:] == ranks[:-1]])
    if not repeats.any():
        return table, 0
    kept = _renamed(table.filter(pa.array(repeats)).drop_columns([ORDER]))
    kept = kept.append_column(ORDER, pa.array(_orders(kept["key"])))
    return pa.concat_tables([table.filter(pa.array(~repeats)), kept]), int(repeats.sum()) - len(kept)


def _renamed(table: "pa.Table") -> "pa.Table":
    """Of entries whose keys repeat: the first of equal ones, those of different pictures under keys of their own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Whatever the order in which they were found, the first of equal entries stays.
    table = table.append_column(IDENTITY, _identities(table)).sort_by([("file", "ascending"), ("offset", "ascending")])
    table = table.append_column("row", pa.array(np.arange(len(table))))
    pictures = table.group_by(["split", "key", IDENTITY]).aggregate([("row", "min")])
    kept = table.take(pictures["row_min"]).drop_columns(["row"])
    named = pictures.group_by(["split", "key"]).aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    repeated = set(zip(named["split"].to_pylist(), named["key"].to_pylist(), strict=True))
    keys = [_keys(batch, repeated) for batch in kept.to_batches(max_chunksize=CHUNK)]
    kept = kept.set_column(kept.schema.get_field_index("key"), "key", pa.chunked_array(keys))
    return kept.drop_columns([IDENTITY])


def _identities(table: "pa.Table") -> "pa.ChunkedArray":
    """What entries of one key have in common when they are one picture of one class: its content, or where it lies."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.large_binary()
    offset, picture = (table[name].cast(pa.large_string()).cast(kind) for name in ("offset", "picture"))
    class_id = pc.fill_null(table["class_id"], "").cast(kind)
    join = pc.binary_join_element_wise  # pyright: ignore[reportAttributeAccessIssue]
    place = join(table["file"], offset, pa.scalar(b"\0", kind))
    return join(pc.coalesce(picture, place), class_id, pa.scalar(b"\0", kind))  # pyright: ignore[reportAttributeAccessIssue]


def _keys(batch: "pa.RecordBatch", repeated: set[tuple[str, str]]) -> "pa.Array":
    """Keys of entries; those that are `repeated` with a digest of what tells the entries apart."""
    import pyarrow as pa

    rows = zip(*(batch[name].to_pylist() for name in ("split", "key", IDENTITY)), strict=True)
    keys = [safe_key(key, os.fsdecode(identity)) if (split, key) in repeated else key for split, key, identity in rows]
    return pa.array(keys, pa.large_string())


def _orders(keys: "pa.ChunkedArray") -> np.ndarray:
    """`order_of` many texts, a chunk at a time."""
    import pyarrow as pa

    chunks = pa.table({"key": keys}).to_batches(max_chunksize=CHUNK)
    return np.concatenate([np.empty(0, np.uint64), *(order_of(chunk["key"].to_pylist()) for chunk in chunks)])
