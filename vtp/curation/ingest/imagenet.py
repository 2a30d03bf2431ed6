"""ImageNet (ILSVRC 2012) as a source: classes in the official order, labels of both splits, names and prompts.

A source may hold some of the 1,000 synsets only: labels are then positions among those that are there, still sorted, and
validation pictures of others are passed over.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from vtp.config import Config
from vtp.curation.ingest.folders import holds, pictures_under
from vtp.curation.ingest.listing import Entry, safe_key
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description
from vtp.data.imagenet import imagenet_classes, openai_templates
from vtp.texts import shown

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"
LARGEST_META = 1 << 22  # bytes of a file of the devkit
LARGEST_DEVKIT = 1 << 26  # bytes of all of it
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})$")
OTHER_CLASS = "validation of other classes"  # among what was passed over
ATTRIBUTION = "ImageNet (ILSVRC 2012), https://image-net.org; for non-commercial research and education\n"


class ImageNetSource(Config):
    """ImageNet as its owners or others hand it out."""

    name: Literal["imagenet"]
    layout: Literal["folders", "tars", "parquet"] = Field(
        description="train/<synset>/ and val/; the official tars, never unpacked; or data/*.parquet of Hugging Face"
    )
    caption: str | None = Field(description="caption of every picture, {} stands for the class; null: none")
    outside_links: bool = Field(default=False, description="follow links that lead out of the source's folder")


def describe_imagenet(synsets: list[str]) -> Description:
    """What the manifest says."""
    names = imagenet_classes().names
    return Description(
        source="imagenet",
        classes=[names[synset] for synset in synsets],
        class_ids=synsets,
        templates=openai_templates(),
        categories=[],
        category_of_class=[],
        attribution=ATTRIBUTION,
    )


def list_imagenet_folders(source: Path, ignored: Counter[str], *, root: Path | None) -> Iterator[Entry]:
    """Pictures of train/<synset>/ and of val/<synset>/ or, with the devkit beside it, a flat val/.

    Raises IngestError for folders of another kind, and for one that links lead out of `root`, unless that is None.
    """
    train, validation = source / "train", next((p for p in (source / "val", source / "validation") if p.is_dir()), None)
    if not train.is_dir() or validation is None:
        raise IngestError(f"{source}: expected train/<synset>/ and val/, found {holds(source)}")
    known = set(imagenet_classes().synsets)
    synsets = set()
    for path in pictures_under(train, ignored, root=root):
        synset = path.partition("/")[0]
        if synset not in known:
            raise IngestError(
                f"{shown(str(train / path))}: expected train/<synset>/, such as train/n01440764/; "
                f"{train} holds {holds(train)}"
            )
        synsets.add(synset)
        yield Entry("train", safe_key(_stem(path)), f"train/{path}", class_id=synset)
    truth: list[str] | None = None
    for path in pictures_under(validation, ignored, root=root):
        synset = path.partition("/")[0]
        if synset not in known:
            truth = truth or read_devkit(source)
            synset = truth_of(path, truth)
        if synset in synsets:
            yield Entry("validation", safe_key(_stem(path)), f"{validation.name}/{path}", class_id=synset)
        else:
            ignored[OTHER_CLASS] += 1


def truth_of(name: str, truth: list[str]) -> str:
    """The synset of a validation picture. Raises IngestError for a name that is none of ImageNet's."""
    match = VALIDATION_NAME.search(_stem(name))
    if match is None or not 1 <= int(match[1]) <= len(truth):
        raise IngestError(
            f"{shown(name)}: expected ILSVRC2012_val_00000001.JPEG to {len(truth):08d}, or folders of synsets"
        )
    return truth[int(match[1]) - 1]


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
                f"unpacked, for their labels; found {holds(source)}"
            )
    return {name: file.read_bytes() for name, file in files.items()}


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]
