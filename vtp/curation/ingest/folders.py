"""Own pictures as a source: a folder per class, or a table of paths with captions and labels."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vtp.config import Config
from vtp.curation.ingest.listing import Entry, inside, safe_key
from vtp.curation.ingest.shard_workers import IngestError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
SHOWN = 8  # names that an error shows


def _stays_inside(path: str) -> str:
    if not inside(path):
        raise ValueError("expected a path within the source folder, without ..")
    return path


def _names_the_class(template: str) -> str:
    if "{}" not in template:
        raise ValueError("expected {} where the class stands: without it all classes have one prompt")
    return template


RelativePath = Annotated[str, AfterValidator(_stays_inside)]
Template = Annotated[str, AfterValidator(_names_the_class)]
Templates = Annotated[
    list[Template], Field(description="prompts for zero-shot classification; {} stands for the class")
]


class HeldOut(Config):
    """Validation is a share of the pictures, chosen by a hash of their names."""

    name: Literal["held_out"]
    share: float = Field(gt=0, lt=1, description="share of the pictures that becomes the validation split")


class OwnFolder(Config):
    """Validation has a folder of its own."""

    name: Literal["folder"]
    folder: RelativePath = Field(description="folder of the validation pictures within the source")


class OwnTable(Config):
    """Validation has a table of its own."""

    name: Literal["table"]
    table: RelativePath = Field(description="table of the validation pictures within the source")


class FolderSource(Config):
    """A folder with a sub-folder per class; pictures that lie in no sub-folder have no class."""

    name: Literal["folder"]
    train: RelativePath = Field(description="folder of the classes within the source; . is the source itself")
    validation: HeldOut | OwnFolder = Field(discriminator="name")
    caption: str | None = Field(description="caption of every picture, {} stands for the class; null: none")
    templates: Templates

    @model_validator(mode="after")
    def _splits_are_apart(self) -> Self:
        if isinstance(self.validation, OwnFolder):
            train, validation = Path(self.train), Path(self.validation.folder)
            if train.is_relative_to(validation) or validation.is_relative_to(train):
                raise ValueError(f"train {train} and validation.folder {validation}: one lies in the other")
        return self


class TableSource(Config):
    """Tables (.csv, .tsv, .jsonl) of pictures; paths are relative to the source folder."""

    name: Literal["table"]
    train: RelativePath = Field(description="table within the source")
    validation: HeldOut | OwnTable = Field(discriminator="name")
    path: str = Field(description="column of the paths")
    caption: str | None = Field(description="column of the captions; null: none")
    label: str | None = Field(description="column of the classes; null: none")
    templates: Templates


def class_name(class_id: str) -> str:
    """What a class is called in captions: its id with spaces for underscores."""
    return class_id.replace("_", " ")


def list_folder(config: FolderSource, source: Path, ignored: Counter[str]) -> Iterator[Entry]:
    """All pictures of a folder per class. Raises IngestError when a folder has none."""
    folders = {"train": config.train}
    if isinstance(config.validation, OwnFolder):
        folders["validation"] = config.validation.folder
    for split, folder in folders.items():
        if not (source / folder).is_dir():
            raise IngestError(f"{source / folder}: no such folder; {source} holds {holds(source)}")
        seen = False
        for path in pictures_under(source / folder, ignored):
            seen = True
            class_id, _, rest = path.partition("/")
            name = path if folder == "." else f"{folder}/{path}"
            yield Entry(split, safe_key(name), name, class_id=text_of(class_id) if rest else None)
        if not seen:
            raise IngestError(
                f"{source / folder}: no pictures; expected a folder per class, found {holds(source / folder)}"
            )


def list_table(config: TableSource, source: Path) -> Iterator[Entry]:
    """All rows of the tables. Raises IngestError for a column that is not there and for a path out of the source."""
    tables = {"train": config.train}
    if isinstance(config.validation, OwnTable):
        tables["validation"] = config.validation.table
    for split, name in tables.items():
        path = source / name
        if not path.is_file():
            raise IngestError(f"{path}: no such table; {source} holds {holds(source)}")
        for place, row in _read_table(path):
            yield _entry(config, split, place, row)


def pictures_under(folder: Path, ignored: Counter[str]) -> Iterator[str]:
    """Files below a folder that are pictures by their extension, as relative paths, in any order.

    Links are followed, a link to one of its own parents once. Other files are counted in `ignored` by extension.
    """
    stack: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    while stack:
        prefix, parents = stack.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                extension, hidden = os.path.splitext(entry.name)[1].lower(), entry.name.startswith(".")
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in parents and not hidden:
                        stack.append((f"{prefix}{entry.name}/", (*parents, real)))
                elif extension in EXTENSIONS and not hidden and entry.is_file():
                    yield prefix + entry.name
                else:
                    ignored[text_of(extension or entry.name)] += 1


def holds(folder: Path) -> str:
    """The names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(text_of(entry) for entry in os.listdir(folder))
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") or "nothing"


def text_of(name: str) -> str:
    """A file name as text that can be written anywhere; bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Place and values of every row, or why it has none. What is not UTF-8 comes as surrogates."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _json_object(line)
        return
    if path.suffix not in (".csv", ".tsv"):
        raise IngestError(f"{path}: a table is a file .csv, .tsv or .jsonl")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
        try:
            for row in reader:
                yield f"{path.name}:{reader.line_num}", row
        except csv.Error as error:
            raise IngestError(f"{path}:{reader.line_num}: {error}") from None


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON"
    return values if isinstance(values, dict) else "no JSON object"


def _entry(config: TableSource, split: str, place: str, row: dict[str, Any] | str) -> Entry:
    if isinstance(row, str):
        return Entry(split, safe_key(place), text_of(place), problem=row)
    for column in (config.path, config.caption, config.label):
        if column is not None and column not in row:
            raise IngestError(f"{place}: no column {column!r}; it has {', '.join(map(str, row))}")
    path = row[config.path]
    if not isinstance(path, str) or not path:
        return Entry(split, safe_key(place), text_of(place), problem="no path")
    if not inside(path):
        raise IngestError(f"{place}: path {text_of(path)!r} leaves the source folder; paths are relative to it")
    texts = []
    for what, column in (("caption", config.caption), ("label", config.label)):
        value = "" if column is None or row[column] is None else row[column]
        value = str(value) if what == "label" and type(value) is int else value
        if (problem := _problem(value)) is not None:
            return Entry(split, safe_key(path, place), path, problem=f"{what} {problem}")
        texts.append(value)
    caption, label = texts
    # One picture may come with several captions.
    return Entry(split, safe_key(path, caption, label), path, class_id=label or None, caption=caption)


def _problem(value: object) -> str | None:
    """Why a value of a table cannot stand in a shard."""
    if not isinstance(value, str):
        return "is no text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None
