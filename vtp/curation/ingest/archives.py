"""ImageNet in archives: the official tars, read where they are, and the parquet files of Hugging Face."""
# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported.)

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vtp.artefact import whole_file
from vtp.curation.ingest.folders import holds
from vtp.curation.ingest.imagenet import DEVKIT, OTHER_CLASS, read_devkit, truth_of
from vtp.curation.ingest.listing import Entry, require_inside, safe_key
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.ingest.tars import members, size_of
from vtp.data.imagenet import imagenet_classes
from vtp.layers.decode import EXTENSIONS
from vtp.texts import shown

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
BATCH = 256  # rows of a parquet file in memory
# Hugging Face puts the synset behind the official name.
SYNSET_BEHIND = re.compile(r"^(n\d{8}_\d+|ILSVRC2012_val_\d{8})_n\d{8}$")


def list_imagenet_tars(source: Path, ignored: Counter[str], *, root: Path | None) -> Iterator[Entry]:
    """Pictures of a tar of one tar per synset, and of a tar with all for validation.

    Raises IngestError for tars of another kind, and for one that links lead out of `root`, unless that is None.
    """
    for name in (TRAIN, VALIDATION, f"{DEVKIT}.tar.gz"):
        if not (source / name).is_file():
            raise IngestError(f"{source}: expected {TRAIN}, {VALIDATION} and {DEVKIT}.tar.gz, found {holds(source)}")
        require_inside(root, source / name)
    known = set(imagenet_classes().synsets)
    synsets = set()
    with (source / TRAIN).open("rb") as file:
        for inner, start in members(source / TRAIN, file, 0, size_of(file)):
            synset = inner.name.removesuffix(".tar")
            if synset not in known:
                raise IngestError(
                    f"{source / TRAIN}: holds {inner.name!r}; expected one tar per synset, such as n01440764.tar"
                )
            synsets.add(synset)
            for member, offset in members(source / TRAIN, file, start, start + inner.size):
                if _is_picture(member.name, ignored):
                    yield Entry("train", _key(member.name), TRAIN, offset, member.size, class_id=synset)
    truth = read_devkit(source)
    with (source / VALIDATION).open("rb") as file:
        for member, offset in members(source / VALIDATION, file, 0, size_of(file)):
            if not _is_picture(member.name, ignored):
                continue
            synset = truth_of(member.name, truth)
            if synset in synsets:
                yield Entry("validation", _key(member.name), VALIDATION, offset, member.size, class_id=synset)
            else:
                ignored[OTHER_CLASS] += 1


def list_imagenet_parquet(
    source: Path, unpacked: Path, ignored: Counter[str], stop: Callable[[], bool], *, root: Path | None
) -> Iterator[Entry]:
    """Pictures of data/train-*.parquet and data/validation-*.parquet, with columns image {bytes, path} and label.

    A picture in a parquet file cannot be read alone, so each file's are laid end to end in a file of `unpacked`, which
    needs as much space as the data set; files that are there are kept. Raises Stopped when asked to stop, and
    IngestError for files of another kind and for one that links lead out of `root`, unless that is None.
    """
    folder = source / "data" if (source / "data").is_dir() else source
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "validation")}
    if not all(files.values()):
        raise IngestError(
            f"{source}: expected data/train-*.parquet and data/validation-*.parquet, found {holds(folder)}"
        )
    synsets = imagenet_classes().synsets
    there: set[str] = set()
    for split, paths in files.items():
        for path in paths:
            require_inside(root, path)
            offset = 0
            for number, (name, size, label) in enumerate(_unpack(path, unpacked, stop)):
                if not isinstance(label, int) or not 0 <= label < len(synsets):
                    raise IngestError(f"{path}, row {number}: label {label!r}; expected 0 to {len(synsets) - 1}")
                if split == "train":
                    there.add(synsets[label])
                if synsets[label] in there:
                    key = _key(name) if name else safe_key(f"{path.stem}-{number:07d}")
                    yield Entry(split, key, f"{path.stem}.bin", offset, size, class_id=synsets[label])
                else:
                    ignored[OTHER_CLASS] += 1
                offset += size


def _is_picture(name: str, ignored: Counter[str]) -> bool:
    extension = os.path.splitext(name)[1].lower()
    if extension not in EXTENSIONS:
        ignored[shown(extension or name)] += 1
    return extension in EXTENSIONS


def _key(name: str) -> str:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    match = SYNSET_BEHIND.match(stem)
    return safe_key(match[1] if match else stem)


class _Unpacked(NamedTuple):
    """A picture of a parquet file."""

    name: str | None
    size: int
    label: int | None


def _unpack(path: Path, folder: Path, stop: Callable[[], bool]) -> Iterator[_Unpacked]:
    """Lay the pictures of a parquet file end to end in `folder`; what each is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = folder / f"{path.stem}.parquet"
    if not table.exists():
        try:
            with whole_file(folder / f"{path.stem}.bin") as binary:
                rows = list(_copy_pictures(path, binary, stop))
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise IngestError(f"{path}: expected columns image (bytes, path) and label ({error})") from None
        columns = list(map(list, zip(*rows, strict=True))) or [[], [], []]
        schema = pa.schema([("name", pa.string()), ("size", pa.int64()), ("label", pa.int64())])
        with whole_file(table) as temporary:
            pq.write_table(pa.table(columns, schema=schema), temporary)
    for batch in pq.ParquetFile(table).iter_batches():
        yield from map(_Unpacked._make, zip(*batch.to_pydict().values(), strict=True))


def _copy_pictures(path: Path, target: Path, stop: Callable[[], bool]) -> Iterator[_Unpacked]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file, target.open("wb") as binary:
        for batch in file.iter_batches(BATCH, columns=["image", "label"]):
            if stop():
                raise Stopped
            # Names as bytes: not all are UTF-8, and all can be keys.
            columns = [pc.struct_field(batch["image"], name).cast(pa.binary()) for name in ("path", "bytes")]
            for name, content, label in zip(
                *(column.to_pylist() for column in (*columns, batch["label"])), strict=True
            ):
                binary.write(content or b"")  # none: unreadable later on, and counted
                yield _Unpacked(shown(os.fsdecode(name)) if name else None, len(content or b""), label)
