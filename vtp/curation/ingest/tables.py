"""Own pictures as a source: tables of paths with captions and labels.

A picture is a file, however its path is written. Whatever rows say of it goes to one split: its captions are samples of
their own or all but one of them are left out, and its class is one.

A table is read twice. The first time leaves 24 bytes per row, digests of picture and caption and the number of a class, and
some 80 while they are sorted to see which rows are kept; the second time gives those, so memory does not grow with what
millions of rows say.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from math import isnan
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from vtp.artefact import contains
from vtp.config import Config, Distinct, did_you_mean
from vtp.curation.ingest.folders import HeldOut, RelativePath, Templates, holds
from vtp.curation.ingest.listing import Entry, require_inside, safe_key
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.ingest.table_rows import TableFile, form_of, read_rows
from vtp.curation.places import path_problem
from vtp.texts import shown, text_problem

OTHER_CAPTIONS = "rows of pictures whose other captions are kept"  # among what was passed over
EXACT = 1 << 53  # up to it every integer has a float of its own
ASKED = 1 << 16  # rows between two questions whether to stop


def _is_absolute(path: str) -> str:
    if not os.path.isabs(path) or path_problem(path) is not None:
        raise ValueError("expected a path from the root /")
    return os.path.normpath(path)


def _delimits(text: str) -> str:
    if len(text) != 1 or text in '"\r\n':
        raise ValueError("expected one letter, such as | or \\t in double quotes")
    return text


class OwnTable(Config):
    """Validation has a table of its own."""

    name: Literal["table"]
    table: RelativePath = Field(description="table of the validation pictures within the source")
    folder: RelativePath | None = Field(
        default=None,
        description="folder within the source from which its paths are seen; null: that of the training table",
    )


class TableSource(Config):
    """Tables (.csv, .tsv, .jsonl, .json, COCO's captions, .parquet) of pictures that lie in the source folder."""

    name: Literal["table"]
    train: RelativePath = Field(description="table within the source")
    validation: HeldOut | OwnTable = Field(discriminator="name")
    folder: RelativePath = Field(default=".", description="folder within the source from which paths are seen")
    roots: list[Annotated[str, AfterValidator(_is_absolute)]] = Field(
        default=[], description="folders elsewhere in which absolute paths may lie; DVC does not watch them"
    )
    path: str = Field(description="column of the paths")
    caption: str | None = Field(description="column of the captions, each a text or a list of texts; null: none")
    captions: Literal["one", "all"] = Field(
        description="what a second caption of a picture means: one takes the first in the table, all makes each a sample"
    )
    label: str | None = Field(description="column of the classes; null: none")
    header: Annotated[list[str], Distinct] | None = Field(
        default=None,
        description="names of all columns of a text whose first line is a row; null: its first line has them",
    )
    delimiter: Annotated[str, AfterValidator(_delimits)] | None = Field(
        default=None, description="between the fields of a text; null: comma of a .csv, tab of a .tsv"
    )
    quoting: bool | None = Field(
        default=None, description='whether " may enclose the fields of a text; null: where the delimiter is a comma'
    )
    templates: Templates
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")

    @model_validator(mode="after")
    def _fits_the_tables(self) -> Self:
        own = [self.validation.table] if isinstance(self.validation, OwnTable) else []
        of_text = {"header": self.header, "delimiter": self.delimiter, "quoting": self.quoting}
        given = [name for name, value in of_text.items() if value is not None]
        for table in (self.train, *own):
            if form_of(table, self.delimiter) != "text" and given:
                raise ValueError(f"{table} has no {' and no '.join(given)}; set to null what is of .csv and .tsv alone")
        for column in (self.path, self.caption, self.label):
            if self.header is not None and column is not None and column not in self.header:
                raise ValueError(f"no column {column!r} in header{did_you_mean(column, self.header)}")
        return self


def list_table(config: TableSource, source: Path, ignored: Counter[str], stop: Callable[[], bool]) -> Iterator[Entry]:
    """Samples of all rows that are kept; other captions of their pictures are counted in `ignored`.

    Raises IngestError for a column that is not there, for a path out of the source, for a picture of two classes and for
    one in both tables, and Stopped when asked to stop.
    """
    for root in config.roots:
        if not os.path.isdir(root):
            raise IngestError(f"{root}: no such folder; correct prepare_data.source.roots")
    choice = _choose(config, source, stop)
    number = 0
    for sample in _samples(config, source):
        if sample.problem is not None:
            yield Entry(sample.split, safe_key(sample.file, sample.place), sample.file, problem=sample.problem)
            continue
        if choice.kept[number]:
            picture = safe_key(sample.file)
            key = picture if config.captions == "one" else safe_key(sample.file, sample.caption)
            class_id = choice.classes[choice.labels[number]]
            yield Entry(sample.split, key, sample.file, class_id=class_id, caption=sample.caption, picture=picture)
        else:
            ignored[OTHER_CAPTIONS] += 1
        number += 1


class _TableSample(NamedTuple):
    """A caption of a picture, or none, as a row of a table has it."""

    split: str
    place: str  # of the row
    file: str
    caption: str = ""
    class_id: str | None = None
    problem: str | None = None


class _KeptRows(NamedTuple):
    """What becomes of samples, in their order."""

    kept: np.ndarray
    labels: np.ndarray  # places in `classes`: of all that is said of the picture
    classes: list[str | None]  # None comes first


def _choose(config: TableSource, source: Path, stop: Callable[[], bool]) -> _KeptRows:
    """Read all rows, and see which are kept."""
    pictures, captions, labels = array("Q"), array("Q"), array("q")
    classes: dict[str | None, int] = {None: 0}
    trained = 0
    for number, sample in enumerate(_samples(config, source)):
        if number % ASKED == 0 and stop():
            raise Stopped
        if sample.problem is None:
            pictures.append(_digest(sample.file))
            captions.append(_digest(sample.caption) if sample.caption.strip() else 0)
            labels.append(classes.setdefault(sample.class_id, len(classes)))
            trained += sample.split == "train"
    said = _Said(np.array(pictures), np.array(captions), np.array(labels), trained)
    if not len(pictures):
        return _KeptRows(np.empty(0, bool), said.labels, list(classes))
    _require_apart(said, config, source)
    kept = _kept(said.pictures, said.captions, one=config.captions == "one")
    return _KeptRows(kept, _labels(said, config, source), list(classes))


class _Said(NamedTuple):
    """What rows say: digests of pictures and captions (0: none), numbers of classes (0: none)."""

    pictures: np.ndarray
    captions: np.ndarray
    labels: np.ndarray
    trained: int  # rows of the training table; the others are of that of validation


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _kept(pictures: np.ndarray, captions: np.ndarray, *, one: bool) -> np.ndarray:
    """Whether samples stay. Those that say the same twice have one fate: the list counts them as duplicates."""
    order = np.lexsort((captions, pictures))
    new = _changes(pictures[order], captions[order])
    first = order[new]  # of each pair of picture and caption that which comes first, for the sort is stable
    pictures, bare = pictures[first], captions[first] == 0
    ranks = np.lexsort((first, bare, pictures))
    leads = np.empty(len(first), dtype=bool)
    leads[ranks] = _changes(pictures[ranks])
    kept = np.empty(len(order), dtype=bool)
    kept[order] = (leads if one else leads | ~bare)[np.cumsum(new) - 1]
    return kept


def _labels(said: _Said, config: TableSource, source: Path) -> np.ndarray:
    """The class of the picture of every row. Raises IngestError where rows say two."""
    order = np.argsort(said.pictures, kind="stable")
    begins = np.flatnonzero(_changes(said.pictures[order]))
    labels, sizes = said.labels[order], np.diff(begins, append=len(order))
    highest = np.maximum.reduceat(labels, begins)
    lowest = np.minimum.reduceat(np.where(labels == 0, np.iinfo(labels.dtype).max, labels), begins)
    wrong = np.sort(order[np.repeat((highest > 0) & (lowest != highest), sizes) & (labels > 0)])
    if len(wrong):
        same = wrong[said.pictures[wrong] == said.pictures[wrong[0]]]
        other = same[said.labels[same] != said.labels[same[0]]][0]
        first, second = _samples_at([same[0], other], config, source)
        raise IngestError(
            f"{first.place} and {second.place}: {shown(first.file)} is {shown(repr(first.class_id))} in one and "
            f"{shown(repr(second.class_id))} in the other; a picture has one class, correct the table"
        )
    labels = np.empty_like(said.labels)
    labels[order] = np.repeat(highest, sizes)
    return labels


def _require_apart(said: _Said, config: TableSource, source: Path) -> None:
    """Raises IngestError when a picture is in the tables of both splits."""
    both = np.intersect1d(said.pictures[: said.trained], said.pictures[said.trained :])
    if len(both):
        held = said.trained + np.flatnonzero(np.isin(said.pictures[said.trained :], both))[0]
        trained = np.flatnonzero(said.pictures == said.pictures[held])[0]
        first, second = _samples_at([trained, held], config, source)
        raise IngestError(
            f"{second.place}: {shown(second.file)} is a training picture too ({first.place}), one of {len(both)} that are "
            "in the tables of both splits; leave them out of one of the tables, or take {name: held_out} for validation"
        )


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Whether rows differ from those before them; the first does."""
    changes = np.ones(len(columns[0]), dtype=bool)
    changes[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changes


def _samples_at(numbers: list[Any], config: TableSource, source: Path) -> list[_TableSample]:
    """The samples with these numbers among those that can be used, in the order of the numbers."""
    usable = (sample for sample in _samples(config, source) if sample.problem is None)
    found = {number: sample for number, sample in enumerate(usable) if number in numbers}
    return [found[number] for number in numbers]


def _samples(config: TableSource, source: Path) -> Iterator[_TableSample]:
    """The captions of all rows, and rows that have none, in the order of the tables."""
    tables = {"train": (config.train, config.folder)}
    if isinstance(own := config.validation, OwnTable):
        tables["validation"] = own.table, config.folder if own.folder is None else own.folder
    columns = (config.path, config.caption, config.label)
    own_roots = tuple({os.path.abspath(source), os.path.realpath(source)})
    for split, (name, folder) in tables.items():
        reader = _Reader(split, folder, own_roots, tuple(config.roots))
        for part in _parts(source, name):
            table = TableFile(source, part, columns, config.delimiter, config.quoting, config.header)
            if not table.path.is_file():
                raise IngestError(f"{table.path}: no such table; {table.path.parent} holds {holds(table.path.parent)}")
            require_inside(None if config.outside_links else source, table.path)
            for place, values in read_rows(table):
                yield from reader.samples(place, values)


def _parts(source: Path, table: str) -> list[str]:
    """The files of a table: engines write a .parquet as a folder of several."""
    if table.lower().endswith(".parquet") and (source / table).is_dir():
        return sorted(f"{table}/{path.name}" for path in (source / table).glob("*.parquet")) or [table]
    return [table]


class _Reader(NamedTuple):
    """Makes samples of the rows of one table."""

    split: str
    folder: str
    own_roots: tuple[str, ...]  # what absolute paths call the source folder
    roots: tuple[str, ...]

    def samples(self, place: str, values: tuple[Any, ...] | str) -> list[_TableSample]:
        """One per caption. Raises IngestError for a path that leads out."""
        if isinstance(values, str):
            return [_TableSample(self.split, place, place, problem=values)]
        path, caption, label = map(_plain, values)
        if not isinstance(path, str) or not path:
            return [_TableSample(self.split, place, place, problem="no path")]
        if (problem := path_problem(path)) is not None:
            return [_TableSample(self.split, place, shown(path), problem=f"path {problem} ({place})")]
        file, captions, class_id = self._file(place, path), _captions(caption), _class_id(label)
        for what, text in (*(("caption", text) for text in captions), ("label", "" if class_id is None else class_id)):
            if (problem := _problem(text)) is not None:
                return [_TableSample(self.split, place, file, problem=f"{what} {problem} ({place})")]
        return [_TableSample(self.split, place, file, text, class_id or None) for text in captions]

    def _file(self, place: str, path: str) -> str:
        """Relative to the source or, in another root, absolute; the same for all ways to write a path."""
        file = os.path.normpath(os.path.join(self.folder, path))
        if not os.path.isabs(file):
            if file != ".." and not file.startswith("../"):
                return file
        elif (root := next((root for root in self.own_roots if contains(root, file)), None)) is not None:
            return os.path.relpath(file, root)
        elif any(contains(root, file) for root in self.roots):
            return file
        raise IngestError(
            f"{place}: path {shown(path)!r} leaves the source folder; paths are relative to it, and absolute ones may lie "
            "in the folders of prepare_data.source.roots"
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a table holds
    """Without what writers make of texts and of nulls: bytes, and the NaN of pandas."""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return None if isinstance(value, float) and isnan(value) else value


def _captions(value: Any) -> list[Any]:  # noqa: ANN401
    """The captions in a cell, which may be a list or a list written as JSON; [""] when there is none."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            texts = json.loads(value)
        except (ValueError, RecursionError):
            texts = None
        value = texts if isinstance(texts, list) and all(isinstance(text, str | None) for text in texts) else value
    values = value if isinstance(value, list) else [value]
    return [text for each in values if (text := _plain(each)) is not None] or [""]


def _problem(text: Any) -> str | None:  # noqa: ANN401
    """Why a value can be no caption and no class; None when it can."""
    if (problem := text_problem(text)) is not None:
        return problem
    if text.startswith(("['", '["')) and text.endswith(("']", '"]')):
        return "is a list as Python prints it; write it as JSON"  # numpy's has no commas
    return "holds NUL" if "\0" in text else None


def _class_id(value: Any) -> Any:  # noqa: ANN401
    """Texts and integers name a class; integers that pandas made floats, in a column with nulls, are integers again."""
    whole = type(value) is int or (isinstance(value, float) and value.is_integer() and abs(value) <= EXACT)
    return str(int(value)) if whole else value
