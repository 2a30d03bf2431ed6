"""Pictures in parquet: named columns of any number of files, each with types of its own.

A picture in a parquet file cannot be read alone, so each file's are laid end to end in a file of the same name, with a
list of what is said about them beside it. Files are read a few rows at a time.

    en/train-0.parquet         the pictures of en/train-0.parquet
    en/train-0.parquet.rows    one row each: digest, size, name, label and captions
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vtp.artefact import whole_file
from vtp.config import did_you_mean
from vtp.curation.ingest.folders import VALIDATION_NAMES, holds, read_text
from vtp.curation.ingest.listing import require_inside
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.texts import listed, shown, text_problem

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH, BATCH_BYTES = 1 << 8, 1 << 26  # rows that are read together: so many, or fewer when they are large
BUFFER = 1 << 20  # bytes of a column that are read together, or a whole row group would be in memory
LIST_ROWS = 1 << 14  # of a list, that are written together
FEATURES = b"huggingface"  # key of a schema's metadata


class PictureColumns(NamedTuple):
    """What the columns of pictures in parquet are called."""

    image: str  # a struct with bytes and, if there is one, path; or plain bytes
    caption: str | None  # texts, or lists of texts
    label: str | None  # numbers or texts


class ParquetFile(NamedTuple):
    """A parquet file with pictures."""

    path: Path
    name: str  # relative to the source
    split: str


class UnpackedPicture(NamedTuple):
    """A row of a list."""

    digest: str | None  # of its bytes; None: the row has none
    size: int
    name: str | None  # file name that the row gives the picture
    label: str | None
    captions: list[str]
    problem: str | None  # why it cannot be used


class ClassNames(NamedTuple):
    """Names of classes: label n is that of the n-th name, counted from 0."""

    names: list[str]
    where: str  # they stand

    def number(self, label: str, place: str) -> int | None:
        """The place of a label among the names; -1 stands for no label. Raises IngestError for one without a name."""
        number = int(label) if label.lstrip("-").isascii() and label.lstrip("-").isdecimal() else None
        if number == -1:
            return None
        if number is None or not 0 <= number < len(self.names):
            raise IngestError(
                f"{place}: label {shown(label)!r}, and {self.where} names classes 0 to {len(self.names) - 1}"
            )
        return number


def parquet_files(source: Path, patterns: dict[str, str], *, root: Path | None) -> list[ParquetFile]:
    """The files of every split, by name: a pattern is a file, a folder of files, or has * for any letters.

    Raises IngestError when a split has none or a file is in two, and for a file that links lead out of `root`, unless that
    is None.
    """
    files: dict[Path, ParquetFile] = {}
    for split, pattern in patterns.items():
        paths = _matching(source, pattern)
        names = {_split_of(path.relative_to(source)) for path in paths} - {None}
        if "train" in names and len(names) > 1:
            raise IngestError(
                f"{source}: {pattern!r} takes files of {' and '.join(sorted(filter(None, names)))} as one split; name them "
                "apart in prepare_data.source: train: data/train-*.parquet, and its validation {name: files, files: "
                "data/validation-*.parquet}"
            )
        for path in paths:
            require_inside(root, path)
            if path in files:
                raise IngestError(f"{path}: both {files[path].split} and {split} take it; let their patterns differ")
            files[path] = ParquetFile(path, path.relative_to(source).as_posix(), split)
    return list(files.values())


def class_names(files: list[ParquetFile], column: str) -> ClassNames | None:
    """The names that Hugging Face's ClassLabel has in the metadata of schemas; None where there are none.

    Raises IngestError for files with different names.
    """
    known: ClassNames | None = None
    for path, _, _ in files:
        found = _class_label(path, column)
        if known is not None and found is not None and known.names != found:
            raise IngestError(
                f"{path}: names other classes of {column!r} than {known.where}; give all of them names by a file "
                "(prepare_data.source.names), or write one of them again"
            )
        if known is None and found is not None:
            known = ClassNames(found, f"the metadata of {path}")
    return known


def read_names(source: Path, file: str, *, root: Path | None) -> ClassNames:
    """Names of classes from a file with one a line. Raises IngestError for another file."""
    names = [name.strip() for name in read_text(source, file, root=root).rstrip("\n").split("\n")]
    if not all(names):
        raise IngestError(f"{source / file}:{names.index('') + 1}: no name; expected one a line, that of label 0 first")
    return ClassNames(names, str(source / file))


def require_columns(files: list[ParquetFile], columns: PictureColumns) -> None:
    """Raises IngestError for a file without one of the columns, or where its type cannot be what it should."""
    for path, _, _ in files:
        schema = _schema(path)
        for name, needed, fits in (
            (columns.image, "bytes, or a struct with a field `bytes`", _holds_pictures),
            (columns.caption, "texts, or lists of texts", _holds_captions),
            (columns.label, "numbers or texts", _holds_labels),
        ):
            if name is None:
                continue
            there = len(schema.get_all_field_indices(name))
            if there != 1:
                what = "no column" if there == 0 else f"{there} columns"
                near = "" if there else did_you_mean(name, schema.names)
                raise IngestError(f"{path}: {what} {name!r}{near}; it has {listed(list(map(shown, schema.names)))}")
            if not fits(kind := schema.field(name).type):
                raise IngestError(f"{path}: column {name!r} is {kind}; expected {needed}")


def distinct_labels(files: list[ParquetFile], column: str) -> set[str]:
    """All labels that files have; their pictures are not read."""
    return {
        label
        for path, _, _ in files
        for batch in _batches(path, [column])
        for label in _labels(batch[column])
        if label is not None
    }


def unpack(
    file: ParquetFile, columns: PictureColumns, folder: Path, stop: Callable[[], bool]
) -> Iterator[tuple[int, UnpackedPicture]]:
    """Lay the pictures of a file end to end in `folder`, unless they are there; where each begins, and what it is.

    Raises IngestError for a damaged file, and Stopped when asked to stop.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = folder / file.name
    rows = target.with_name(f"{target.name}.rows")
    if not rows.exists():
        kinds = {"size": pa.int64(), "captions": pa.list_(pa.large_binary())}
        schema = pa.schema([(name, kinds.get(name, pa.large_binary())) for name in UnpackedPicture._fields])
        with (
            whole_file(rows) as listing,
            whole_file(target) as binary,
            pq.ParquetWriter(listing, schema) as writer,
            binary.open("wb") as opened,
        ):
            pictures = _copy_pictures(file, columns, opened, stop)
            while chunk := list(islice(pictures, LIST_ROWS)):
                writer.write_table(pa.table(list(map(list, zip(*chunk, strict=True))), schema=schema))
    offset = 0
    with pq.ParquetFile(rows) as opened:
        for batch in opened.iter_batches(BATCH):
            for row in zip(*(map(_text, column.to_pylist()) for column in batch.columns), strict=True):
                picture = UnpackedPicture._make(row)
                yield offset, picture
                offset += picture.size


def _matching(source: Path, pattern: str) -> list[Path]:
    try:
        found = [source / pattern] if (source / pattern).exists() else list(source.glob(pattern))
    except ValueError as error:  # such as two stars in a name
        raise IngestError(f"{source}: {pattern!r} is no pattern of files ({error})") from None
    files = {file for path in found for file in (path.rglob("*.parquet") if path.is_dir() else [path])}
    files = sorted(file for file in files if file.is_file() and not file.name.startswith((".", "_")))
    if not files:
        place = next(place for place in (source / pattern, *(source / pattern).parents) if place.is_dir())
        raise IngestError(
            f"{source}: {pattern!r} is no parquet file, no folder of some and no pattern that fits one; "
            f"{place} holds {holds(place)}"
        )
    return files


def _split_of(name: Path) -> str | None:
    """The split that a path speaks of, such as data/train-00000-of-00002.parquet or default/test/0000.parquet."""
    known = {"train", *VALIDATION_NAMES}
    words = (part.removeprefix("partial-").partition("-")[0].partition(".")[0] for part in reversed(name.parts))
    return next((word for word in words if word in known), None)


def _open(path: Path) -> "pq.ParquetFile":
    """Raises IngestError for a file that is no parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise IngestError(f"{path}: no whole parquet file ({error}); fetch it again") from None


def _schema(path: Path) -> "pa.Schema":
    with _open(path) as file:
        return file.schema_arrow


def _class_label(path: Path, column: str) -> list[str] | None:
    """What Hugging Face says of a column of classes: {"info": {"features": {"label": {"names": [...]}}}}."""
    said = (_schema(path).metadata or {}).get(FEATURES)
    if said is None:
        return None
    try:
        feature = json.loads(said)["info"]["features"].get(column)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise IngestError(
            f"{path}: its schema's metadata `{FEATURES.decode()}` hold no features; write the file again without them, and "
            "give names of classes by a file (prepare_data.source.names)"
        ) from None
    names = feature.get("names") if isinstance(feature, dict) else None
    if not names:
        return None
    if not isinstance(names, list) or any(text_problem(name) or not name for name in names):
        raise IngestError(f"{path}: its schema's metadata give {column!r} names that are no list of texts")
    return names


def _batches(path: Path, columns: list[str]) -> "Iterator[pa.RecordBatch]":
    """Rows of some columns, so few at a time that their bytes fit. Raises IngestError for a damaged file."""
    import pyarrow as pa

    with _open(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
        count = max(1, min(BATCH, int(BATCH_BYTES / max(1, largest))))
        try:
            for batch in file.iter_batches(count, columns=columns, use_threads=False):
                yield batch.select(columns)
        except (pa.ArrowException, OSError) as error:
            raise IngestError(f"{path}: no whole parquet file ({error}); fetch it again") from None


def _copy_pictures(
    file: ParquetFile, columns: PictureColumns, target: BinaryIO, stop: Callable[[], bool]
) -> Iterator[tuple[Any, ...]]:
    """Write all pictures of a file; rows of its list."""
    for batch in _batches(file.path, list(dict.fromkeys(filter(None, columns)))):
        if stop():
            raise Stopped
        contents, names = _pictures(batch[columns.image])
        nothing = [None] * len(batch)
        labels = nothing if columns.label is None else _labels(batch[columns.label])
        captions = nothing if columns.caption is None else _captions(batch[columns.caption])
        for content, name, label, said in zip(contents, names, labels, captions, strict=True):
            written = content.as_buffer() if content.is_valid else b""
            target.write(written)
            digest = blake2b(written, digest_size=16).hexdigest().encode() if content.is_valid else None
            problem = None if content.is_valid else b"holds no bytes of a picture"
            yield digest, len(written), name, label and os.fsencode(label), said or [], problem


def _pictures(column: "pa.Array") -> "tuple[pa.Array, Sequence[bytes | None]]":
    """Contents, and names of files. Names are bytes: not all are UTF-8, and all can be keys."""
    import pyarrow as pa

    column = _plain(column)
    if not pa.types.is_struct(column.type):
        return column.cast(pa.large_binary()), [None] * len(column)
    fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
    path = fields.get("path")
    names = (
        [None] * len(column) if path is None or not _is_text(path.type) else path.cast(pa.large_binary()).to_pylist()
    )
    return fields["bytes"].cast(pa.large_binary()), names


def _captions(column: "pa.Array") -> "list[list[bytes] | None]":
    import pyarrow as pa

    column = _plain(column)
    if _is_text(column.type):
        return [None if text is None else [text] for text in column.cast(pa.large_binary()).to_pylist()]
    lists = column.cast(pa.large_list(pa.large_binary())).to_pylist()
    return [None if texts is None else [text for text in texts if text is not None] for texts in lists]


def _labels(column: "pa.Array") -> list[str | None]:
    import pyarrow as pa

    column = _plain(column)
    if _is_text(column.type):
        return [os.fsdecode(label) if label else None for label in column.cast(pa.large_binary()).to_pylist()]
    return [None if label is None or label != label else _whole(label) for label in column.to_pylist()]  # noqa: PLR0124


def _whole(label: Any) -> str:  # noqa: ANN401 - whatever numbers a column holds
    """A number as text, without a fraction where it has none."""
    return str(label if isinstance(label, bool) or label % 1 else int(label))


def _plain(column: "pa.Array") -> "pa.Array":
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _storage(kind: "pa.DataType") -> "pa.DataType":
    """The type that `_plain` gives a column."""
    import pyarrow as pa

    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def _becomes(kind: "pa.DataType", target: "pa.DataType") -> bool:
    import pyarrow as pa

    try:
        pa.array([], kind).cast(target)
    except pa.ArrowException:
        return False
    return True


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return _becomes(_storage(kind), pa.large_binary())


def _holds_pictures(kind: "pa.DataType") -> bool:
    import pyarrow as pa
    from pyarrow import types

    kind = _storage(kind)
    if isinstance(kind, pa.StructType):
        return kind.get_field_index("bytes") >= 0 and _holds_pictures(kind.field("bytes").type)
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return _is_text(kind) and not any(fits(kind) for fits in texts)


def _holds_captions(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = _storage(kind)
    lists = isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
    return _is_text(kind.value_type if lists else kind)


def _holds_labels(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return _is_text(kind) or _becomes(_storage(kind), pa.float64())


def _text(value: Any) -> Any:  # noqa: ANN401 - of any column of a list
    if isinstance(value, list):
        return list(map(_text, value))
    return os.fsdecode(value) if isinstance(value, bytes) else value
