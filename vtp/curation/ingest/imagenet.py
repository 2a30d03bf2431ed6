"""ImageNet (ILSVRC 2012) as a source: classes in the official order, labels of both splits, names and prompts.

A source may hold some of the synsets only: labels are then positions among those that are there, still sorted, and
validation pictures of others are passed over.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from vtp.config import Config
from vtp.curation.ingest.folders import EXTENSIONS, RelativePath, holds, pictures_under, read_text
from vtp.curation.ingest.listing import Entry, safe_key
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description
from vtp.data.imagenet import SYNSET, openai_templates, synset_names, synsets_of
from vtp.texts import shown

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"
LARGEST_META = 1 << 22  # bytes of a file of the devkit
LARGEST_DEVKIT = 1 << 26  # bytes of all of it
LABEL = r"n\d{8}|\d{1,4}"
LISTED_LABEL = re.compile(LABEL)
NAMED_LABEL = re.compile(rf"([^,\t]+?)[,\t ] *({LABEL})\b")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})$")
OTHER_CLASS = "validation of other classes"  # among what was passed over
# Hugging Face puts the synset behind the official name.
SYNSET_BEHIND = re.compile(r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})_n\d{8}")
ATTRIBUTION = "ImageNet (ILSVRC 2012), https://image-net.org; for non-commercial research and education\n"


Truth = Callable[[str], str]  # the synset of a validation picture, by its path; IngestError for one that has none


class ImageNetSource(Config):
    """ImageNet as its owners or others hand it out."""

    name: Literal["imagenet"]
    layout: Literal["folders", "tars", "parquet", "kaggle", "tiny"] = Field(
        description="folders: train/<synset>/ and val/; tars: the official ones, never unpacked; parquet: data/*.parquet of "
        "Hugging Face; kaggle: the competition's ILSVRC/ and LOC_val_solution.csv; tiny: Tiny-ImageNet"
    )
    labels: RelativePath | None = Field(
        default=None,
        description="file of the validation pictures' synsets within the source, a name and a synset a line, or synsets "
        "in the official order; null: the layout's own",
    )
    names: RelativePath | None = Field(
        default=None,
        description="file of the classes that numbers stand for within the source, a synset or a name of ImageNet a line; "
        "null: the metadata of parquet files, or all 1,000 in the official order",
    )
    caption: str | None = Field(description="caption of every picture, {} stands for the class; null: none")
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")

    @model_validator(mode="after")
    def _files_are_read(self) -> Self:
        if self.layout == "parquet" and self.labels is not None:
            raise ValueError("labels: parquet files have a column of labels; set it to null")
        if self.layout != "parquet" and self.labels is None and self.names is not None:
            raise ValueError(f"names: {self.layout} have no numbers as labels; set it to null")
        return self


class _Folders(NamedTuple):
    """Where a layout has its pictures, and the labels of validation."""

    train: str
    validation: tuple[str, ...]  # the first that is there
    labels: str | None


FOLDERS = {
    "folders": _Folders("train", ("val", "validation"), None),
    "kaggle": _Folders("ILSVRC/Data/CLS-LOC/train", ("ILSVRC/Data/CLS-LOC/val",), "LOC_val_solution.csv"),
    "tiny": _Folders("train", ("val",), "val/val_annotations.txt"),
}


def describe_imagenet(synsets: list[str]) -> Description:
    """What the manifest says."""
    names = synset_names()
    return Description(
        source="imagenet",
        classes=[names[synset] for synset in synsets],
        class_ids=synsets,
        templates=openai_templates(),
        categories=[],
        category_of_class=[],
        attribution=ATTRIBUTION,
    )


def list_imagenet_folders(
    config: ImageNetSource, source: Path, ignored: Counter[str], *, root: Path | None
) -> Iterator[Entry]:
    """Pictures of a folder of synsets and of one for validation, which has such folders too or labels elsewhere.

    Raises IngestError for folders of another kind, and for one that links lead out of `root`, unless that is None.
    """
    layout = FOLDERS[config.layout]
    train, validation = source / layout.train, next((n for n in layout.validation if (source / n).is_dir()), None)
    if not train.is_dir() or validation is None:
        raise IngestError(
            f"{source}: expected {layout.train}/<synset>/ and {layout.validation[0]}/, found {holds(source)}"
        )
    known, synsets = synset_names(), set[str]()
    for path in pictures_under(train, ignored, root=root):
        synset = path.partition("/")[0]
        if synset not in known:
            raise IngestError(
                f"{shown(str(train / path))}: expected {layout.train}/<synset>/, such as {layout.train}/n01440764/; "
                f"{train} holds {holds(train)}"
            )
        synsets.add(synset)
        yield Entry("train", key_of(path), f"{layout.train}/{path}", class_id=synset)
    truth: Truth | None = None
    for path in pictures_under(source / validation, ignored, root=root):
        synset = path.partition("/")[0]
        if synset not in known:
            truth = truth or read_truth(config, source, root=root)
            synset = truth(path)
        if synset in synsets:
            yield Entry("validation", key_of(path), f"{validation}/{path}", class_id=synset)
        else:
            ignored[OTHER_CLASS] += 1


def key_of(path: str) -> str:
    """The key of a picture: its official name."""
    match = SYNSET_BEHIND.fullmatch(stem := _stem(path))
    return safe_key(match[1] if match else stem)


def read_truth(config: ImageNetSource, source: Path, *, root: Path | None) -> Truth:
    """The labels of validation pictures that lie in no folders of synsets. Raises IngestError for what is none."""
    layout = FOLDERS.get(config.layout)
    file = config.labels or (layout and layout.labels)
    if file is None:
        return _in_order(read_devkit(source))
    path, said = source / file, _read_labels(read_text(source, file, root=root), source / file)
    synsets = [label for _, label in said]
    if not all(map(SYNSET.fullmatch, synsets)):
        synsets = _numbered(config, source, synsets, root=root)
    if all(name is None for name, _ in said):
        return _in_order(synsets)
    by_name: dict[str | None, str] = {}
    for (name, _), synset in zip(said, synsets, strict=True):
        if name is None or by_name.setdefault(name, synset) != synset:
            raise IngestError(f"{path}: {shown(name or 'a line')} has {'two labels' if name else 'no name'}")

    def truth(picture: str) -> str:
        if (synset := by_name.get(_stem(picture))) is None:
            raise IngestError(f"{shown(picture)}: {path} has no label for it")
        return synset

    return truth


def read_synsets(source: Path, file: str, *, root: Path | None) -> list[str]:
    """The classes that a file lists. Raises IngestError for names that are none of ImageNet's or several."""
    lines = read_text(source, file, root=root).rstrip("\n").split("\n")
    try:
        return synsets_of(lines)
    except ValueError as error:
        raise IngestError(f"{source / file}: {error}; give synsets, one a line, such as n01440764") from None


def _read_labels(text: str, path: Path) -> list[tuple[str | None, str]]:
    """Names of pictures without endings, None where lines are labels alone, and their labels."""
    labels: list[tuple[str | None, str]] = []
    for number, line in enumerate(text.replace('"', "").splitlines(), 1):
        if named := NAMED_LABEL.match(line):
            labels.append((_stem(named[1]), named[2]))
        elif LISTED_LABEL.fullmatch(line.strip()):
            labels.append((None, line.strip()))
        elif line.strip() and number > 1:  # the first may name columns
            raise IngestError(
                f"{path}:{number}: {shown(line[:100])!r}; expected a name and a synset, or a synset alone"
            )
    if not labels:
        raise IngestError(f"{path}: no labels; expected a name and a synset a line, or a synset alone")
    return labels


def _numbered(config: ImageNetSource, source: Path, labels: list[str], *, root: Path | None) -> list[str]:
    """The synsets that numbers stand for, counted from 0 or from 1, whichever all of them tell."""
    if config.names is None or not all(map(str.isdecimal, labels)):
        raise IngestError(
            f"{source / str(config.labels)}: labels are numbers, whose order the devkit alone knows; give synsets, or the "
            "synsets in the order of the numbers by a file (prepare_data.source.names)"
        )
    synsets, numbers = read_synsets(source, config.names, root=root), list(map(int, labels))
    first = {(0, len(synsets) - 1): 0, (1, len(synsets)): 1}.get((min(numbers), max(numbers)))
    if first is None:
        raise IngestError(
            f"{source / str(config.labels)}: numbers from {min(numbers)} to {max(numbers)}; expected 0 to "
            f"{len(synsets) - 1} or 1 to {len(synsets)}, as {source / config.names} has {len(synsets)} classes"
        )
    return [synsets[number - first] for number in numbers]


def _in_order(synsets: Sequence[str]) -> Truth:
    """Labels of pictures that the official names count from 1."""

    def truth(picture: str) -> str:
        match = VALIDATION_NAME.search(_stem(picture))
        if match is None or not 1 <= int(match[1]) <= len(synsets):
            raise IngestError(
                f"{shown(picture)}: expected ILSVRC2012_val_00000001.JPEG to {len(synsets):08d}, or folders of synsets"
            )
        return synsets[int(match[1]) - 1]

    return truth


def read_devkit(source: Path) -> list[str]:
    """Synsets of the validation pictures in their order, from the devkit, unpacked or not; nothing is extracted.

    Raises IngestError for one that is damaged, or becomes far larger than a devkit when it is unpacked.
    """
    from scipy.io import loadmat

    archive = source / f"{DEVKIT}.tar.gz"
    contents = _from_archive(archive) if archive.is_file() else _from_folder(source)
    try:
        truth = [int(line) for line in contents[TRUTH].decode("ascii").split()]
        synsets = loadmat(io.BytesIO(contents[META]), squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        return [leaves[number] for number in truth]
    except Exception as error:  # of scipy, whatever a file of strangers makes it raise
        raise IngestError(f"{archive}: not the devkit of ILSVRC 2012 ({type(error).__name__}: {error})") from None


def _from_archive(path: Path) -> dict[str, bytes]:
    contents = {}
    try:
        # A stream: what is passed over is unpacked too, and so are headers of any size.
        with gzip.open(path) as unpacked, tarfile.open(fileobj=_LimitedStream(unpacked, path), mode="r|") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for member in tar:
                if member.name in (TRUTH, META) and member.isreg() and member.size <= LARGEST_META:
                    file = tar.extractfile(member)
                    assert file is not None
                    contents[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise IngestError(f"{path}: not a whole .tar.gz ({error}); fetch it again") from None
    if len(contents) < 2:
        raise IngestError(f"{path}: expected {TRUTH} and {META} in it")
    return contents


class _LimitedStream:
    """What a stream of tarfile needs of a file, up to LARGEST_DEVKIT bytes."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        self._file, self._path, self._left = file, path, LARGEST_DEVKIT

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise IngestError(
                f"{self._path}: unpacks to more than {LARGEST_DEVKIT} bytes; no devkit does, fetch it again"
            )
        return content


def _from_folder(source: Path) -> dict[str, bytes]:
    files = {name: source / name for name in (TRUTH, META)}
    for file in files.values():
        if not file.is_file() or file.stat().st_size > LARGEST_META:
            raise IngestError(
                f"{source}: validation pictures lie in no folders of synsets; expected {DEVKIT}.tar.gz, or {DEVKIT}/ "
                f"unpacked, for their labels, or a file of them (prepare_data.source.labels); found {holds(source)}"
            )
    return {name: file.read_bytes() for name, file in files.items()}


def _stem(path: str) -> str:
    """A name without folders, and without an ending of pictures."""
    stem, ending = os.path.splitext(path.rpartition("/")[2])
    return stem if ending.lower() in EXTENSIONS else stem + ending
