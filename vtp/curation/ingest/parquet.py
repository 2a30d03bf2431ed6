"""Pictures in parquet as a source, such as data sets of Hugging Face: columns and files by their names."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from vtp.config import Config
from vtp.curation.ingest.folders import HeldOut, RelativePath, Templates, class_name
from vtp.curation.ingest.listing import Entry, safe_key
from vtp.curation.ingest.parquet_pictures import (
    ClassNames,
    ParquetFile,
    PictureColumns,
    UnpackedPicture,
    class_names,
    parquet_files,
    read_names,
    require_columns,
    unpack,
)
from vtp.texts import text_problem


class OwnFiles(Config):
    """Validation has files of its own."""

    name: Literal["files"]
    files: RelativePath = Field(description="parquet files of the validation pictures, as those of train")


class ParquetSource(Config):
    """Parquet files that hold the pictures themselves, with captions or labels beside them."""

    name: Literal["parquet"]
    train: RelativePath = Field(
        description="parquet files within the source: one, a folder of some, or a pattern such as data/train-*.parquet"
    )
    validation: HeldOut | OwnFiles = Field(discriminator="name")
    image: str = Field(description="column of the pictures: their bytes, or structs with a field `bytes`")
    caption: str | None = Field(description="column of the captions, each a text or a list of texts; null: none")
    captions: Literal["one", "all"] = Field(
        description="what a second caption of a picture means: one takes the first, all makes each a sample"
    )
    label: str | None = Field(description="column of the classes, numbers or texts; null: none")
    names: RelativePath | None = Field(
        description="file within the source with the name of label 0 in its first line, and so on; null: the names that the "
        "files' metadata give, or the labels themselves"
    )
    class_caption: str | None = Field(
        description="caption of a picture that has a class and no other, {} stands for the class; null: none"
    )
    templates: Templates
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")


class ParquetListing(NamedTuple):
    """What parquet files hold."""

    entries: Iterator[Entry]
    name: Callable[[str], str]  # of a class, from its id


def list_parquet(config: ParquetSource, source: Path, unpacked: Path, stop: Callable[[], bool]) -> ParquetListing:
    """All rows. Their pictures are laid end to end in `unpacked`, which needs as much space as the data set.

    A class is its label, a number where labels have names. Keys are digests of the picture and of what is said about it:
    equal pictures come once, and neither names nor the cut into files matter. Raises IngestError for files without the
    columns, and for labels that have no name though others have, and Stopped when asked to stop.
    """
    root = None if config.outside_links else source
    patterns = {"train": config.train}
    if isinstance(config.validation, OwnFiles):
        patterns["validation"] = config.validation.files
    files = parquet_files(source, patterns, root=root)
    columns = PictureColumns(config.image, config.caption, config.label)
    require_columns(files, columns)
    names = None
    if config.names is not None:
        names = read_names(source, config.names, root=root)
    elif config.label is not None:
        names = class_names(files, config.label)

    def name(class_id: str) -> str:
        return class_name(class_id if names is None else names.names[int(class_id)])

    return ParquetListing(_entries(config, files, columns, names, unpacked, stop), name)


def _entries(
    config: ParquetSource,
    files: list[ParquetFile],
    columns: PictureColumns,
    names: ClassNames | None,
    unpacked: Path,
    stop: Callable[[], bool],
) -> Iterator[Entry]:
    for file in files:
        for number, (offset, picture) in enumerate(unpack(file, columns, unpacked, stop)):
            place = f"{file.name}, row {number}"
            class_id = picture.label
            if names is not None and class_id is not None:
                label = names.number(class_id, str(file.path.parent / f"{file.path.name}, row {number}"))
                class_id = None if label is None else str(label)
            problem = picture.problem or _problem(class_id, picture)
            if problem is not None or picture.digest is None:
                yield Entry(
                    file.split, safe_key(place), file.name, offset, picture.size, problem=f"row {number}: {problem}"
                )
                continue
            one = config.captions == "one"
            for caption in (picture.captions[:1] if one else picture.captions) or [""]:
                said = [class_id or "", "" if one else caption]
                key = safe_key(picture.digest, *said) if any(said) else picture.digest
                yield Entry(file.split, key, file.name, offset, picture.size, class_id, caption, picture=picture.digest)


def _problem(class_id: str | None, picture: UnpackedPicture) -> str | None:
    for what, text in (("label", class_id or ""), *(("caption", caption) for caption in picture.captions)):
        if (problem := text_problem(text)) is not None:
            return f"{what} {problem}"
    return None
