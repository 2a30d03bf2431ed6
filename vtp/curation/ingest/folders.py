"""Own pictures as a source: a folder per class."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from vtp.artefact import ArtefactError, walk
from vtp.config import Config
from vtp.curation.ingest.listing import Entry, require_inside, safe_key
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.places import inside, path_problem
from vtp.layers.decode import EXTENSIONS
from vtp.texts import listed, shown

LARGEST_TEXT = 1 << 26  # bytes of a file of labels or names
VALIDATION_NAMES = frozenset(("dev", "test", "val", "valid", "validation"))


def _stays_inside(path: str) -> str:
    if path_problem(path) is not None or not inside(path):
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


class FolderSource(Config):
    """A folder with a sub-folder per class; pictures that lie in no sub-folder have no class."""

    name: Literal["folder"]
    train: RelativePath = Field(description="folder of the classes within the source; . is the source itself")
    validation: HeldOut | OwnFolder = Field(discriminator="name")
    caption: str | None = Field(description="caption of every picture, {} stands for the class; null: none")
    templates: Templates
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")

    @model_validator(mode="after")
    def _splits_are_apart(self) -> Self:
        if isinstance(self.validation, OwnFolder):
            train, validation = Path(self.train), Path(self.validation.folder)
            if train.is_relative_to(validation) or validation.is_relative_to(train):
                raise ValueError(f"train {train} and validation.folder {validation}: one lies in the other")
        return self


def class_name(class_id: str) -> str:
    """What a class is called in captions: its id with spaces for underscores."""
    return class_id.replace("_", " ")


def list_folder(config: FolderSource, source: Path, ignored: Counter[str]) -> Iterator[Entry]:
    """All pictures of a folder per class. Raises IngestError when a folder has none, and for a link to a folder outside."""
    if isinstance(config.validation, HeldOut) and (splits := _splits_in(source / config.train)):
        raise IngestError(
            f"{source / config.train}: {' and '.join(splits)} are names of splits, and a sub-folder is a class; set "
            f"prepare_data.source.train to {splits[0]} and its validation to {{name: folder, folder: {splits[1]}}}, or "
            "rename them"
        )
    classes: dict[str, str] = {}
    folders = {"train": config.train}
    if isinstance(config.validation, OwnFolder):
        folders["validation"] = config.validation.folder
    for split, folder in folders.items():
        if not (source / folder).is_dir():
            raise IngestError(f"{source / folder}: no such folder; {source} holds {holds(source)}")
        seen = False
        root = None if config.outside_links else source
        for path in pictures_under(source / folder, ignored, root=root):
            seen = True
            class_folder, _, rest = path.partition("/")
            class_id = text_of(class_folder)
            if classes.setdefault(class_id, class_folder) != class_folder:
                raise IngestError(f"{source / folder}: two folders are called {class_id!r} as text; rename one of them")
            name = path if folder == "." else f"{folder}/{path}"
            yield Entry(split, safe_key(name), name, class_id=class_id if rest else None)
        if not seen:
            raise IngestError(
                f"{source / folder}: no pictures; expected a folder per class, found {holds(source / folder)}"
            )


def _splits_in(folder: Path) -> list[str]:
    """The sub-folders of a data set whose splits are folders, those of training first; none in other data sets."""
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir()} if folder.is_dir() else set()
    return ["train", *sorted(names & VALIDATION_NAMES)] if "train" in names and names & VALIDATION_NAMES else []


def pictures_under(folder: Path, ignored: Counter[str], *, root: Path | None) -> Iterator[str]:
    """Files below a folder that are pictures by their extension, as relative paths, in any order.

    Links are followed, those to a folder that leads to them once; other files are counted in `ignored` by extension. A
    file that cannot be one, such as a link to nothing, is for whoever reads it to tell.

    Raises IngestError for a folder that links lead out of `root`, unless that is None, and for links without an end.
    """

    def enter(entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith("."):
            return False
        require_inside(root, Path(entry.path))
        return True

    require_inside(root, folder)
    try:
        for path, entry in walk(folder, enter):
            extension = os.path.splitext(entry.name)[1].lower()
            picture = extension in EXTENSIONS and not entry.name.startswith(".")
            if picture and not path.is_dir():
                yield path.relative_to(folder).as_posix()
            else:
                ignored[text_of(extension or entry.name)] += 1
    except ArtefactError as error:
        raise IngestError(str(error)) from None


def holds(folder: Path) -> str:
    """The names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(map(shown, os.listdir(folder)))
    return listed(names)


def read_text(source: Path, file: str, *, root: Path | None) -> str:
    """A file of labels or names. Raises IngestError when it is missing, no text or far too large."""
    path = source / file
    require_inside(root, path)
    if not path.is_file():
        raise IngestError(f"{path}: no such file; {path.parent} holds {holds(path.parent)}")
    if path.stat().st_size > LARGEST_TEXT:
        raise IngestError(f"{path}: more than {LARGEST_TEXT} bytes; expected a line for every picture or class")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise IngestError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def text_of(name: str) -> str:
    """A file name as text for data, which keep all but bytes that are not UTF-8; those become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
