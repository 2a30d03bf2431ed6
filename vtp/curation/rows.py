"""Rows of metadata: one line per picture, from the list of URLs to the shards.

A folder of rows holds `part-00000.parquet` and so on. Columns are named by role, whatever the source called them, and
rows are sorted by `order`, a hash of their key: the first N rows of a list are the same random subset whatever files
they came from and in which order, so that smaller subsets lie within larger ones (paper 4.5).
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vtp.artefact import ArtefactError

KEY, URL, CAPTION, WIDTH, HEIGHT, SHA256, ORDER = "key", "url", "caption", "width", "height", "sha256", "order"
ROLES = (KEY, URL, CAPTION, WIDTH, HEIGHT, SHA256)
PART = "part-{:05d}.parquet"


def order_of(keys: Iterable[str]) -> np.ndarray:
    """Where each key stands among all keys: uint64, uniform and fixed for ever."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def parts(folder: Path) -> list[Path]:
    """The parquet files of a folder of rows, in order. Raises ArtefactError when there are none."""
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise ArtefactError(f"{folder}: no part-*.parquet; expected rows written by the stage filter or download")
    return parts


def counts(files: Sequence[Path]) -> list[int]:
    """Rows of each of some parquet files, from their footers."""
    import pyarrow.parquet as pq

    return [pq.read_metadata(path).num_rows for path in files]
