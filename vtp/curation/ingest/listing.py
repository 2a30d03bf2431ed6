"""A sorted list of pictures that lie in files: where each one is, and what is said about it.

    listing.json          classes, and what was passed over
    train-rows.parquet    key, order, file, offset, size, label, caption, problem; sorted by (order, key)

`order` is a hash of the key (see rows), so shards mix classes and do not depend on the order in which files were found.
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
    picture: str | None = None  # what entries of one picture have in common; None: the key


class Listing(Config):
    """What is known of a list besides its rows."""

    splits: dict[str, int]
    class_ids: list[str]
    duplicates: int  # entries that came twice
    ignored: dict[str, int]  # files that are no pictures, by extension


class Naming(NamedTuple):
    """How captions are made of classes."""

    template: str | None  # {} stands for the name; None: no captions but those of the entries
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

    `held_out`: share of the pictures, those with the smallest hashes, that becomes the split validation; entries of one
    `picture` go together. `ignored` is read when all entries are. Raises IngestError when two pictures have one key, and
    Stopped when it was asked to stop.
    """
    path = folder / "listing.json"
    if path.exists():
        return Listing.parse(read_json(path), where=str(path))
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pa.concat_tables([pa.Table.from_batches([], _schema()), *_packed(entries, stop)])
    class_ids = sorted_ids(table["class_id"].unique().drop_null().to_pylist())
    table = _with_labels(table, class_ids, naming)
    if held_out is not None:
        pictures = pc.coalesce(table["picture"], table["key"])  # pyright: ignore[reportAttributeAccessIssue]
        validation = order_of(pictures.to_pylist()) < np.uint64(held_out * 2**64)
        table = table.set_column(0, "split", pa.array(np.where(validation, "validation", "train")))
    splits, duplicates = {}, 0
    with whole_folder(folder) as temporary:
        for split in ("train", "validation"):
            rows, twice = _sorted(table.filter(pc.field("split") == split).drop_columns(["split", "picture"]))
            pq.write_table(rows, temporary / f"{split}-rows.parquet", row_group_size=ROW_GROUP)
            splits[split], duplicates = len(rows), duplicates + twice
        listing = Listing(
            splits=splits, class_ids=class_ids, duplicates=duplicates, ignored=dict(sorted(ignored.items()))
        )
        write_json(temporary / path.name, listing.model_dump())
    return listing


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Names of classes in order; numbers by value."""
    names = list(ids)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else sorted(names)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    # Names of files are bytes: not every one is UTF-8.
    types = {"file": pa.binary(), "offset": pa.int64(), "size": pa.int64()}
    return pa.schema([(name, types.get(name, pa.string())) for name in Entry._fields])


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

    places = pc.index_in(table["class_id"], pa.array(class_ids, pa.string()))  # pyright: ignore[reportAttributeAccessIssue]
    table = table.append_column(ORDER, pa.array(order_of(table["key"].to_pylist())))
    table = table.append_column("label", pc.fill_null(places.cast(pa.int64()), NO_LABEL))
    if naming.template is not None and class_ids:
        texts = pa.array([naming.template.replace("{}", naming.name(name)) for name in class_ids])
        captions = pc.fill_null(texts.take(places.combine_chunks()), "")
        table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
    return table.drop_columns(["class_id"])


def _sorted(table: "pa.Table") -> "tuple[pa.Table, int]":
    """In order, without entries that come twice, and how many did."""
    import pyarrow as pa

    table = table.sort_by([(ORDER, "ascending"), ("key", "ascending")]).combine_chunks()
    order = table[ORDER].to_numpy()
    twice = [i for i in np.flatnonzero(order[1:] == order[:-1]).tolist() if table["key"][i] == table["key"][i + 1]]
    for i in twice:
        if table["file"][i] != table["file"][i + 1]:
            files = " and ".join(shown(os.fsdecode(table["file"][row].as_py())) for row in (i, i + 1))
            raise IngestError(f"{files} have one key, {table['key'][i].as_py()!r}; rename one of them")
    keep = np.ones(len(table), dtype=bool)
    keep[np.array(twice, dtype=np.int64) + 1] = False
    return table.filter(pa.array(keep)), len(twice)
