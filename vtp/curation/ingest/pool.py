"""A download as a source: the rows of a selection, each saying where in the pool's tars its picture lies."""

from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import Field

from vtp.config import Config
from vtp.curation.ingest.encode import ImageConfig
from vtp.curation.ingest.listed import Columns, ListedPictures, Rows
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description
from vtp.curation.rows import CAPTION, KEY, ORDER, counts, parts

POOLED = Columns(file="tar", problem="error", label=None, whole=False)
REQUIRED = (KEY, ORDER, CAPTION, *POOLED[:2], "offset", "size")


class PoolSource(Config):
    """Pictures that `download` fetched and `filter` selected."""

    name: Literal["pool"]
    validation_samples: int = Field(ge=1, description="the first rows of the selection, which are a random subset")
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")


def pooled_pictures(config: PoolSource, pool: Path, selection: Path, image: ImageConfig) -> ListedPictures:
    """The selected pictures; rows are read a shard at a time, however many there are."""
    import pyarrow.parquet as pq

    files = tuple(parts(selection))
    names = pq.read_schema(files[0]).names
    if missing := [name for name in REQUIRED if name not in names]:
        raise IngestError(
            f"{files[0]}: no column {', '.join(missing)}; expected what the stage filter selected of a pool, "
            "with the columns that the stage download wrote"
        )
    ends = tuple(accumulate(counts(files)))
    total = ends[-1]
    if total <= config.validation_samples:
        raise IngestError(f"{selection}: {total} rows, of which validation_samples takes {config.validation_samples}")
    rows = {
        "validation": Rows(files, ends, 0, config.validation_samples),
        "train": Rows(files, ends, config.validation_samples, total),
    }
    description = Description("pool", [], [], [], [], [], "")
    return ListedPictures(pool, rows, description, image, POOLED, outside_links=config.outside_links)
