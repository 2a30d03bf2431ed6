"""Shards: WebDataset tars of images, captions and labels, described by a manifest.

    manifest.json        splits with their shards, classes, statistics, digests
    train-00000.tar      <key>.json, <key>.<jpg|png|webp>, <key>.txt per sample
    train-00000.parquet  one row per sample: where its image lies in the tar, its size, caption and labels
    unreadable.csv       what was left out and why, when there was anything

Any WebDataset reader streams the tars. The tars may lie elsewhere (`Manifest.location`); tables stay beside the manifest.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np

from vtp.artefact import ArtefactError, digest, read_json, whole_file, write_json
from vtp.config import Config, ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 3
COLUMNS = ("key", "offset", "size", "width", "height", "caption", "label", "category", "kind")
NO_LABEL = -1  # a sample of no class, or of no category
Learnt = Literal["classes", "categories"]
WHOLE_SET = "all"  # the one class of data without classes, whose generator is unconditional
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # a file name without a dot: WebDataset splits names at the first one


class Shard(Config):
    """One tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    table_sha256: str  # of the table beside it


class Split(Config):
    """What a split holds; everything is derived from its shards."""

    shards: list[Shard]
    samples: int
    bytes: int
    digest: str  # SHA-256 of the lines `<sha256 of a shard> <name>`
    class_counts: list[int]  # samples per class
    mean_caption_length: float  # characters, of the captions that are there
    share_without_caption: float


class Manifest(Config):
    """What a folder of shards holds."""

    format_version: int
    source: str
    image_size: int | None  # side when all pictures are squares of one size; None: pictures have their own sizes
    classes: list[str]  # names for people and for zero-shot classification; a label is a position here
    class_ids: list[str]  # what the source calls them, such as synsets
    templates: list[str]  # prompts for zero-shot classification; {} stands for the class
    categories: list[str]  # a coarser second label, or empty
    category_of_class: list[int]
    learnt: Learnt = "classes"  # the labels that a generator is given; probes and prompts ask for classes either way
    location: str | None  # URL of the folder of the tars, for fsspec; None: beside the manifest
    attribution: str
    splits: dict[str, Split]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `manifest.json`. Raises ArtefactError when it is missing, damaged or of another format."""
        path = folder / "manifest.json"
        values = read_json(path)
        if values.get("format_version") != FORMAT_VERSION:
            version = values.get("format_version")
            raise ArtefactError(f"{path}: shards of format {version!r}, this code reads {FORMAT_VERSION}")
        try:
            return cls.parse(values, where=str(path))
        except ConfigError as error:
            raise ArtefactError(f"{error}; write the shards again with prepare_data") from None

    @property
    def learnt_classes(self) -> list[str]:
        """Names of the labels that a generator learns: data without classes are one."""
        return (self.classes if self.learnt == "classes" else self.categories) or [WHOLE_SET]

    def learnt_labels(self, labels: np.ndarray) -> np.ndarray:
        """Places [N] in `learnt_classes` of the classes [N] of samples."""
        return labels if self.learnt == "classes" else np.asarray(self.category_of_class, labels.dtype)[labels]

    @property
    def unprobed(self) -> str | None:
        """Why no probe has anything to say; None where there are classes to tell apart."""
        counts = {name: sum(count > 0 for count in split.class_counts) for name, split in self.splits.items()}
        if len(self.classes) < 2:
            found = "the data are all of one class" if self.classes else "the data have no classes"
        elif counts.get("train", 0) < 2:
            found = (
                "the training pictures are all of one class"
                if counts.get("train")
                else "no training picture has a class"
            )
        elif not counts.get("validation"):
            found = "no validation picture has a class"
        else:
            return None
        return f"{found}, and a probe tells classes apart"

    def summary(self, split: str) -> str:
        """What a split is, in words."""
        classes = f" of {len(self.classes):,} classes" if self.classes else ""
        side = f", {self.image_size} px" if self.image_size else ""
        return f"{self.source} ({split}): {self.splits[split].samples:,} pictures{classes}{side}"

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / "manifest.json", self.model_dump())


class SampleRecord(NamedTuple):
    """One sample as it is written."""

    key: str
    image: bytes
    extension: str  # by the true format of `image`: jpg, png, webp
    width: int  # of the upright picture, pixels
    height: int
    caption: str  # empty: none
    label: int  # NO_LABEL: none
    category: int  # NO_LABEL: none
    kind: str  # single, scene, image


class ShardSummary(Config):
    """What a manifest needs to know of a finished shard."""

    shard: Shard
    class_counts: list[int]
    caption_characters: int
    without_caption: int
    side: int | None  # of every picture, when all are squares of one size


def write_shard(path: Path, records: Iterable[SampleRecord], *, classes: int) -> ShardSummary:
    """One tar and its table, equal bytes for equal records: fixed order, owner, mode and time.

    Raises ValueError for a key that is no file name without dots or that comes twice.
    """
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[tuple] = []
    seen: set[str] = set()
    with whole_file(path) as temporary, temporary.open("wb") as file:
        target = _Hashed(file)
        with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for record in records:
                _check_key(path, record.key, seen)
                labels = record._asdict()
                image, extension, caption = (labels.pop(name) for name in ("image", "extension", "caption"))
                _add(tar, f"{record.key}.json", json.dumps(labels).encode())
                offset = _add(tar, f"{record.key}.{extension}", image)
                _add(tar, f"{record.key}.txt", caption.encode())
                rows.append((record.key, offset, len(image), record.width, record.height, caption, *record[6:]))
        file.flush()
        size, sha256 = file.tell(), target.state.hexdigest()
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    table = pa.table(list(map(list, columns)), schema=_schema())
    with whole_file(path.with_suffix(".parquet")) as beside:
        pq.write_table(table, beside)
    beside = digest(path.with_suffix(".parquet"))
    shard = Shard(name=path.name, samples=len(rows), bytes=size, sha256=sha256, table_sha256=beside)
    return _summary(shard, table, classes)


def describe_split(summaries: Sequence[ShardSummary]) -> Split:
    """The statistics of all shards of a split together."""
    shards = [summary.shard for summary in summaries]
    samples = sum(shard.samples for shard in shards)
    without = sum(summary.without_caption for summary in summaries)
    characters = sum(summary.caption_characters for summary in summaries)
    lines = "".join(f"{shard.sha256} {shard.name}\n" for shard in shards)
    return Split(
        shards=shards,
        samples=samples,
        bytes=sum(shard.bytes for shard in shards),
        digest=hashlib.sha256(lines.encode()).hexdigest(),
        class_counts=[sum(counts) for counts in zip(*(s.class_counts for s in summaries), strict=True)],
        mean_caption_length=characters / max(1, samples - without),
        share_without_caption=without / max(1, samples),
    )


class _Hashed:
    """A file that is written once, from start to end, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.state = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.state.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member; the offset of its content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(content))
    return offset


def _check_key(path: Path, key: str, seen: set[str]) -> None:
    if not KEY.fullmatch(key):
        raise ValueError(f"{path.name}: key {key!r} is no file name without dots of 1 to 90 letters, digits, _ and -")
    if key in seen:
        raise ValueError(f"{path.name}: key {key!r} comes twice")
    seen.add(key)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    types = {name: pa.int64() for name in ("offset", "size", "label", "category")}
    types |= {name: pa.int32() for name in ("width", "height")}
    return pa.schema([pa.field(name, types.get(name, pa.string()), nullable=False) for name in COLUMNS])


def _summary(shard: Shard, table: "pa.Table", classes: int) -> ShardSummary:
    labels = table["label"].to_numpy()
    captions = table["caption"].to_pylist()
    sides = set(table["width"].to_pylist()) | set(table["height"].to_pylist())
    return ShardSummary(
        shard=shard,
        class_counts=np.bincount(labels[labels != NO_LABEL], minlength=classes).tolist(),
        caption_characters=sum(map(len, captions)),
        without_caption=sum(not caption.strip() for caption in captions),
        side=sides.pop() if len(sides) == 1 else None,
    )
