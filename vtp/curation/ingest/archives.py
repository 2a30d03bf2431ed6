"""ImageNet in archives: the official tars, read where they are, and the parquet files of Hugging Face."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vtp.curation.ingest.folders import holds
from vtp.curation.ingest.imagenet import DEVKIT, OTHER_CLASS, ImageNetSource, key_of, read_synsets, read_truth
from vtp.curation.ingest.listing import Entry, require_inside, safe_key
from vtp.curation.ingest.parquet_pictures import (
    ClassNames,
    ParquetFile,
    PictureColumns,
    class_names,
    distinct_labels,
    parquet_files,
    require_columns,
    unpack,
)
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.tars import members, size_of
from vtp.data.imagenet import imagenet_classes, synset_names, synsets_of
from vtp.layers.decode import EXTENSIONS
from vtp.texts import shown

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
PARQUET_VALIDATION = ("validation", "val", "valid")  # what the files of that split may begin with
PARQUET_COLUMNS = PictureColumns("image", None, "label")


def list_imagenet_tars(
    config: ImageNetSource, source: Path, ignored: Counter[str], *, root: Path | None
) -> Iterator[Entry]:
    """Pictures of a tar of one tar per synset, and of a tar with all for validation.

    Raises IngestError for tars of another kind, and for one that links lead out of `root`, unless that is None.
    """
    labels = [] if config.labels else [f"{DEVKIT}.tar.gz"]
    for name in (TRAIN, VALIDATION, *labels):
        if not (source / name).is_file():
            raise IngestError(
                f"{source}: expected {TRAIN}, {VALIDATION} and {DEVKIT}.tar.gz, or a file of the validation labels "
                f"(prepare_data.source.labels), found {holds(source)}"
            )
        require_inside(root, source / name)
    truth = read_truth(config, source, root=root)
    synsets = set[str]()
    with (source / TRAIN).open("rb") as file:
        for synset, start, end in _tars_of_synsets(source / TRAIN, file, ignored):
            synsets.add(synset)
            for member, offset in members(source / TRAIN, file, start, end):
                if _is_picture(member.name, ignored):
                    yield Entry("train", key_of(member.name), TRAIN, offset, member.size, class_id=synset)
    with (source / VALIDATION).open("rb") as file:
        for member, offset in members(source / VALIDATION, file, 0, size_of(file)):
            if not _is_picture(member.name, ignored):
                continue
            synset = truth(member.name)
            if synset in synsets:
                yield Entry("validation", key_of(member.name), VALIDATION, offset, member.size, class_id=synset)
            else:
                ignored[OTHER_CLASS] += 1


def list_imagenet_parquet(
    config: ImageNetSource,
    source: Path,
    unpacked: Path,
    ignored: Counter[str],
    stop: Callable[[], bool],
    *,
    root: Path | None,
) -> Iterator[Entry]:
    """Pictures of data/train-*.parquet and data/validation-*.parquet, with columns image {bytes, path} and label.

    Label n is the n-th name of the metadata or of the file `names`. Without either it is the n-th of the 1,000 classes, if
    all of them are there. `unpacked` needs as much space as the data set. Raises Stopped when asked to stop, and IngestError
    for files of another kind, for classes that are not known and for a file that links lead out of `root`, unless that is
    None.
    """
    folder = "data/" if (source / "data").is_dir() else ""
    validation = next((name for name in PARQUET_VALIDATION if any((source / folder).glob(f"{name}-*.parquet"))), None)
    if validation is None or not any((source / folder).glob("train-*.parquet")):
        raise IngestError(
            f"{source}: expected data/train-*.parquet and data/validation-*.parquet, found {holds(source / folder)}"
        )
    patterns = {"train": f"{folder}train-*.parquet", "validation": f"{folder}{validation}-*.parquet"}
    files = parquet_files(source, patterns, root=root)
    require_columns(files, PARQUET_COLUMNS)
    synset_of, there = _synset_of_label(config, source, files, root=root), set[str]()
    for file in files:
        for number, (offset, picture) in enumerate(unpack(file, PARQUET_COLUMNS, unpacked, stop)):
            synset = None if picture.label is None else synset_of(picture.label, f"{file.path}, row {number}")
            if synset is None:
                raise IngestError(f"{file.path}, row {number}: no label; expected one of every picture")
            if file.split == "train":
                there.add(synset)
            if synset not in there:
                ignored[OTHER_CLASS] += 1
                continue
            key = key_of(shown(picture.name)) if picture.name else safe_key(f"{file.path.stem}-{number:07d}")
            place = (file.split, key, file.name, offset, picture.size)
            yield Entry(*place, class_id=synset, problem=picture.problem, picture=picture.digest)


def _synset_of_label(
    config: ImageNetSource, source: Path, files: list[ParquetFile], *, root: Path | None
) -> Callable[[str, str], str | None]:
    """The synset of a label at a place, both as text; None for no label. Raises IngestError for classes unknown."""
    if config.names is not None:
        names = ClassNames(read_synsets(source, config.names, root=root), str(source / config.names))
    elif (names := class_names(files, "label")) is not None:
        names = ClassNames(_synsets(names.names, names.where), names.where)
    else:
        labels = distinct_labels([file for file in files if file.split == "train"], "label")
        official = imagenet_classes().synsets
        if not all(map(str.isdecimal, labels)):
            texts = sorted(labels | distinct_labels(files, "label"))
            by_text = dict(zip(texts, _synsets(texts, f"{source}: column 'label'"), strict=True))
            return lambda label, _: by_text[label]
        if labels != set(map(str, range(len(official)))):
            raise IngestError(
                f"{source}: {len(labels)} labels and no names of classes in the files' metadata: which of ImageNet's 1,000 "
                "classes are they? Set prepare_data.source.names to a file with the synset of label 0 in its first line, "
                "that of label 1 in the second and so on"
            )
        names = ClassNames(official, "ImageNet")

    def synset_of(label: str, place: str) -> str | None:
        number = names.number(label, place)
        return None if number is None else names.names[number]

    return synset_of


def _synsets(names: list[str], where: str) -> list[str]:
    try:
        return synsets_of(names)
    except ValueError as error:
        raise IngestError(
            f"{where}: {error}; set prepare_data.source.names to a file of their synsets, that of label 0 in its first "
            "line, or read the files as source parquet"
        ) from None


def _tars_of_synsets(path: Path, file: BinaryIO, ignored: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """The tars in a tar: synset, first byte and the byte behind the last. Raises IngestError for one of something else."""
    known = synset_names()
    for inner, start in members(path, file, 0, size_of(file)):
        name = inner.name.rpartition("/")[2]
        if name.startswith("."):  # such as those that macOS adds
            ignored[shown(name)] += 1
        elif (synset := name.removesuffix(".tar")) in known:
            yield synset, start, start + inner.size
        else:
            raise IngestError(
                f"{path}: holds {shown(inner.name)!r}; expected one tar per synset, such as n01440764.tar"
            )


def _is_picture(name: str, ignored: Counter[str]) -> bool:
    base = name.rpartition("/")[2]
    extension = os.path.splitext(base)[1].lower()
    picture = extension in EXTENSIONS and not base.startswith(".")
    if not picture:
        ignored[shown(extension or name)] += 1
    return picture
