"""WebDataset shards that people hold, as a source: read where they lie, on this machine or elsewhere, never unpacked.

Each tar is read once, from its start to its end, and what it holds is kept: an interrupted run goes on with the next.

    index/<digest of its name>.parquet  every sample: where its picture lies, what is said about it
    index/<digest of its name>.json     counts, names of classes and, of a tar elsewhere, size and digest
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from vtp.artefact import read_json, whole_file, write_json
from vtp.config import Config
from vtp.curation.ingest.folders import HeldOut, RelativePath, Template, Templates, class_name
from vtp.curation.ingest.listing import Entry, Naming, safe_key
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.ingest.tar_places import LocalTars, Mark, RemoteFolder, RemotePieces, RemoteTars
from vtp.curation.ingest.tar_samples import (
    LARGEST_TEXT,
    Endings,
    JsonField,
    MemberText,
    Reading,
    TarContents,
    TarRow,
    add_class_name,
    read_tar,
)
from vtp.texts import listed, shown

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 4  # tars that are read at the same time
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_NAMES = 1_000_000  # that a range stands for
AGAIN = "samples that came before"  # among what was passed over

Patterns = Annotated[list[RelativePath], Field(min_length=1)]


class ClassCaption(Config):
    """A caption that is made of the class."""

    name: Literal["template"]
    template: Template = Field(description="caption of every picture, {} stands for the class")


class NamesFile(Config):
    """Names of the classes in a file."""

    name: Literal["file"]
    file: RelativePath = Field(description="text beside the tars; its first line is the name of class 0, and so on")


class OwnTars(Config):
    """Validation has tars of its own."""

    name: Literal["tars"]
    tars: Patterns = Field(description="as `train` says its own")


class WebDatasetSource(Config):
    """Tars of samples, each a picture and texts under one key: those of img2dataset, of Hugging Face, of anyone."""

    name: Literal["webdataset"]
    remote: RemoteFolder | None = Field(description="where the tars are; null: in the folder --source")
    train: Patterns = Field(description="tars in the folder: 00000.tar, **/*.tar, imagenet1k-train-{0000..1023}.tar")
    validation: HeldOut | OwnTars = Field(discriminator="name")
    key_ends: Literal["first_dot", "last_dot"] = Field(
        description="where the key ends in a member's file name; WebDataset's own rule is first_dot"
    )
    image: Endings = Field(
        description="endings of the pictures, such as [jpg, png]; of several, a sample's first counts"
    )
    caption: Annotated[MemberText | JsonField | ClassCaption, Field(discriminator="name")] | None = Field(
        description="where captions are; null: none"
    )
    captions: Literal["one", "all"] = Field(
        description="what a list of captions in JSON gives: its first, or for each a sample with the same picture"
    )
    label: Annotated[MemberText | JsonField, Field(discriminator="name")] | None = Field(
        description="where classes are: numbers from 0, or in JSON texts; null: none"
    )
    class_names: Annotated[NamesFile | JsonField, Field(discriminator="name")] | None = Field(
        description="where names of classes are; null: a class is called as its label"
    )
    templates: Templates
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")

    def reading(self, classes: int | None) -> Reading:
        """What is read of every sample; labels are numbers below `classes`, None: any."""
        texts = {"caption": self.caption, "label": self.label, "class_names": self.class_names}
        told = {name: text for name, text in texts.items() if isinstance(text, MemberText | JsonField)}
        endings = frozenset((*self.image, *(ending for text in told.values() for ending in text.endings)))
        return Reading(self.key_ends, self.image, told, self.captions == "all", classes, endings)

    @model_validator(mode="after")
    def _classes_are_told(self) -> Self:
        if self.label is None and (self.class_names is not None or isinstance(self.caption, ClassCaption)):
            raise ValueError("label: null, so that there are no classes for class_names or caption.template")
        return self


class TarSummary(Config):
    """What is known of a tar besides its rows."""

    name: str
    contents: TarContents
    mark: Mark | None  # of one elsewhere


class Tars(NamedTuple):
    """The tars of a source, all of them read."""

    config: WebDatasetSource
    place: LocalTars | RemoteTars
    folder: Path  # of their index
    splits: dict[str, list[TarSummary]]
    class_names: dict[str, str]

    @property
    def naming(self) -> Naming:
        """How classes are called in captions."""
        template = self.config.caption.template if isinstance(self.config.caption, ClassCaption) else None
        return Naming(template, lambda class_id: self.class_names.get(class_id, class_name(class_id)))

    @property
    def elsewhere(self) -> RemotePieces | None:
        """Reads tars that are not in the folder of the place; None when all are."""
        return RemotePieces(self.place.url, self._marks) if isinstance(self.place, RemoteTars) else None

    @property
    def sha256(self) -> str | None:
        """Of tars elsewhere: SHA-256 of the lines `<sha256 of a tar> <name>`."""
        lines = [f"{mark.sha256} {shown(name)}\n".encode() for name, mark in sorted(self._marks.items())]
        return hashlib.sha256(b"".join(lines)).hexdigest() if lines else None

    @property
    def _marks(self) -> dict[str, Mark]:
        return {tar.name: tar.mark for tars in self.splits.values() for tar in tars if tar.mark is not None}

    def entries(self, ignored: Counter[str]) -> Iterator[Entry]:
        """All samples. A key that comes several times becomes several, made of what is there; equal samples are one."""
        repeated = self._repeated()
        share = self.config.validation.share if isinstance(self.config.validation, HeldOut) else 0.0
        seen: set[tuple[str, str]] = set()
        for split, tar in self._by_split():
            ignored.update(tar.contents.ignored)
            for row in _rows(_paths(self.folder, tar.name)[0]):
                # By the picture: equal ones are in one split, whatever their keys and captions.
                part = "validation" if int.from_bytes(row.digest[:8]) < share * 2**64 else split
                text = row.key.decode("utf-8", "surrogateescape")
                if row.key in repeated:
                    key = safe_key(text, row.digest.hex(), row.caption, row.class_id or "")
                    if (part, key) in seen:
                        ignored[AGAIN] += 1
                        continue
                    seen.add((part, key))
                else:
                    key = safe_key(text)
                yield Entry(part, key, tar.name, row.offset, row.size, row.class_id, row.caption, row.problem)

    def _by_split(self) -> Iterator[tuple[str, TarSummary]]:
        return ((split, tar) for split, tars in self.splits.items() for tar in tars)

    def _repeated(self) -> set[bytes]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        tables = [pq.read_table(_paths(self.folder, tar.name)[0], columns=["key"]) for _, tar in self._by_split()]
        values, counts = pc.value_counts(pa.concat_tables(tables)["key"]).flatten()  # pyright: ignore[reportAttributeAccessIssue]
        return set(values.filter(pc.greater(counts, 1)).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]


def read_tars(
    config: WebDatasetSource, source: Path | None, scratch: Path, *, room: float, stop: Callable[[], bool]
) -> Tars:
    """Read all tars of a source; of those elsewhere at most `room` bytes stay in `scratch`.

    Raises IngestError for what is missing or no tar, and for parameters that name nothing in them, and Stopped when asked
    to stop.
    """
    if config.remote is not None:
        place = RemoteTars(config.remote.url, scratch / "tars", room=room)
    else:
        assert source is not None
        place = LocalTars(source, outside_links=config.outside_links)
    names = _names(config, place)
    lines = _lines(place, config.class_names.file) if isinstance(config.class_names, NamesFile) else None
    reading, index = config.reading(None if lines is None else len(lines)), scratch / "index"
    index.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            read = partial(_read, place, index, reading, stop)
            splits = {split: list(pool.map(read, some)) for split, some in names.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    everything = [tar.contents for tars in splits.values() for tar in tars]
    _require_told(reading, everything)
    class_names = {str(number): line for number, line in enumerate(lines or ())}
    for tars in splits.values():
        for tar in tars:
            for class_id, name in tar.contents.class_names.items():
                add_class_name(class_names, class_id, name, tar.name)
    found = Tars(config, place, index, splits, class_names)
    if config.remote is not None and config.remote.sha256 not in (None, found.sha256):
        raise IngestError(
            f"{config.remote.url}: the tars have sha256 {found.sha256}, and prepare_data.source.remote.sha256 is "
            f"{config.remote.sha256}; they were changed: give back what was there, or set what is there now"
        )
    return found


def _names(config: WebDatasetSource, place: LocalTars | RemoteTars) -> dict[str, list[str]]:
    """Names of tars by split. Raises IngestError for a pattern that nothing matches, and for a tar of two splits."""
    patterns = {"train": config.train}
    if isinstance(config.validation, OwnTars):
        patterns["validation"] = config.validation.tars
    names: dict[str, list[str]] = {}
    for split, some in patterns.items():
        found = {pattern: place.matching(pattern) for given in some for pattern in _expanded(given)}
        if missing := [pattern for pattern, matching in found.items() if not matching]:
            raise IngestError(f"no tar matches {listed(missing)}; expected some, found {place.holds()}")
        names[split] = sorted({name for matching in found.values() for name in matching})
    if twice := sorted({*names["train"]} & {*names.get("validation", ())}):
        raise IngestError(
            f"{listed(list(map(shown, twice)))}: of both splits, by prepare_data.source.train and its validation; make "
            "the patterns match different tars"
        )
    return names


def _expanded(pattern: str) -> list[str]:
    """Names that a pattern with a range such as {0000..1023} stands for; itself when it has none."""
    if (match := RANGE.search(pattern)) is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_NAMES:
        raise IngestError(f"{pattern}: expected a range of 1 to {MOST_NAMES:,} numbers, the smaller one first")
    middle = (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    return [name for each in middle for name in _expanded(pattern[: match.start()] + each + pattern[match.end() :])]


def _lines(place: LocalTars | RemoteTars, name: str) -> list[str]:
    try:
        lines = [line.strip() for line in place.content(name, LARGEST_TEXT).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise IngestError(f"{name}: names of classes that are not UTF-8") from None
    if not all(lines):
        raise IngestError(f"{name}: line {lines.index('') + 1} is empty; expected the name of a class in each")
    return lines


def _paths(index: Path, name: str) -> tuple[Path, Path]:
    stem = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return index / f"{stem}.parquet", index / f"{stem}.json"


def _read(
    place: LocalTars | RemoteTars, index: Path, reading: Reading, stop: Callable[[], bool], name: str
) -> TarSummary:
    """What a tar holds; its rows go to the index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if stop():
        raise Stopped
    table, summary = _paths(index, name)
    if summary.exists():
        known = TarSummary.parse(read_json(summary), where=str(summary))
        place.require_same(name, known.mark)
        return known
    with place.tar(name, stop) as (path, mark):
        rows, contents = read_tar(path, name, reading, stop)
    columns = dict(zip(TarRow._fields, zip(*rows, strict=True), strict=True)) if rows else {}
    with whole_file(table) as temporary:
        pq.write_table(pa.table({field.name: columns.get(field.name, ()) for field in _schema()}, _schema()), temporary)
    found = TarSummary(name=name, contents=contents, mark=mark)
    write_json(summary, found.model_dump())
    return found


def _rows(path: Path) -> Iterator[TarRow]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from map(TarRow._make, zip(*batch.to_pydict().values(), strict=True))


def _schema() -> "pa.Schema":
    import pyarrow as pa

    types = {"key": pa.binary(), "digest": pa.binary(), "offset": pa.int64(), "size": pa.int64()}
    return pa.schema([(name, types.get(name, pa.string())) for name in TarRow._fields])


def _require_told(reading: Reading, tars: list[TarContents]) -> None:
    """Raises IngestError when a parameter names what no sample has."""
    told: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    for contents in tars:
        told.update(contents.told)
        endings.update(contents.endings)
    there = listed([f"{ending} ({count})" for ending, count in endings.most_common()])
    if not told["image"]:
        raise IngestError(
            f"no sample has a picture, prepare_data.source.image is [{', '.join(reading.image)}]; members end in {there}. "
            f"Name one of them, or set key_ends to {'last' if reading.key_ends == 'first_dot' else 'first'}_dot"
        )
    for what, text in reading.texts.items():
        if not told[what]:
            field = f"a field {text.field!r} in " if isinstance(text, JsonField) else ""
            raise IngestError(
                f"no sample has {field}{' or '.join(text.endings)}, which prepare_data.source.{what} names; members end in "
                f"{there}. Name one of them, or set it to null"
            )
