"""Rows of tables of any form: delimited text, .jsonl, .json (COCO's too) and .parquet."""

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from vtp.config import did_you_mean
from vtp.curation.ingest.shard_workers import IngestError
from vtp.texts import listed, shown

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST_LINE = 1 << 24  # characters of a line of a table
LARGEST_JSON = 1 << 28  # characters of a .json, which is read whole and takes some five times as many bytes of memory
MOST_UNPACKED = 200  # times its size may a .gz become; texts are seldom packed to a tenth
BATCH = 256  # rows of a parquet file in memory
UTF16 = (b"\xff\xfe", b"\xfe\xff")
FORMS = {".csv": "text", ".tsv": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
QUOTES = (
    'put " around fields that hold a delimiter, double a " within them, or set quoting to false where " is a letter'
)

Values = tuple[Any, ...]
Row = tuple[str, Values | str]  # its place, and what the wanted columns hold or why it cannot be used


class TableFile(NamedTuple):
    """A table of a source, how its text is to be read, and the columns that are wanted; None stands for no column."""

    source: Path
    name: str  # path within the source
    columns: tuple[str | None, ...]
    delimiter: str | None = None
    quoting: bool | None = None
    header: Sequence[str] | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.source / self.name

    @property
    def wanted(self) -> list[str]:
        """The names of the columns that there must be."""
        return [column for column in self.columns if column is not None]


def form_of(table: str, delimiter: str | None) -> Literal["text", "jsonl", "json", "parquet"]:
    """What a table is by its name. Raises ValueError for names that say nothing."""
    form = FORMS.get(_suffix(table), None if delimiter is None else "text")
    if form is None or (form == "parquet" and _packed(table)):
        raise ValueError(
            f"{table}: a table is a .csv, .tsv, .jsonl, .json (each of them also as .gz) or .parquet; "
            "any other text needs a delimiter"
        )
    return form  # pyright: ignore[reportReturnType]


def read_rows(table: TableFile) -> Iterator[Row]:
    """All rows in order; bytes of texts that are not UTF-8 come as surrogates. Memory holds a few rows, or one .json.

    Raises IngestError for a column that is not there and for what is no whole table, with the line where that is known.
    """
    match form_of(table.name, table.delimiter):
        case "text":
            return _text_rows(table)
        case "jsonl":
            return _object_rows(table, _json_lines(table))
        case "json":
            return _object_rows(table, _json_objects(table))
        case "parquet":
            return _parquet_rows(table)


def _text_rows(table: TableFile) -> Iterator[Row]:
    delimiter = table.delimiter or ("\t" if _suffix(table.name) == ".tsv" else ",")
    quoting = delimiter == "," if table.quoting is None else table.quoting
    names, places = table.header, _places(table, table.header) if table.header else []
    for line, cells in (_quoted if quoting else _plain)(table, delimiter):
        if names is None:
            names, places = cells, _places(table, cells)
            continue
        here = f"{table.name}:{line}"
        if len(cells) == len(names):
            yield here, tuple(None if place is None else cells[place] for place in places)
        elif quoting:
            # What is wrong with quotes in one row swallows others: nothing behind it can be trusted.
            raise IngestError(f"{table.source / here}: {_fields(cells)} in place of {len(names)}; {QUOTES}")
        else:
            yield here, f"{_fields(cells)} in place of {len(names)}"
    if names is None:
        raise IngestError(f"{table.path}: an empty table; expected a first line with the names of its columns")


def _fields(cells: list[str]) -> str:
    return f"{len(cells)} field{'s' * (len(cells) != 1)}"


def _quoted(table: TableFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line where a row begins, and its fields, which quotes may enclose."""
    with _opened(table, newline="") as file:
        reader = csv.reader(_lines(table, file, nul=False), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise IngestError(f"{table.path}:{line}: the row that begins here: {error}; {QUOTES}") from None
            if cells:
                yield line, cells


def _plain(table: TableFile, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line of a row, and its fields, in which a quote is a letter."""
    with _opened(table, newline="\n") as file:
        for line, text in enumerate(_lines(table, file), 1):
            if text := text.removesuffix("\n").removesuffix("\r"):
                yield line, text.split(delimiter)


def _places(table: TableFile, names: Sequence[str]) -> list[int | None]:
    """Where the wanted columns are. Raises IngestError for one that is not there, or twice."""
    for column in table.wanted:
        if column not in names:
            raise _no_column(table, column, names)
        if names.count(column) > 1:
            raise IngestError(f"{table.path}: {names.count(column)} columns are called {column!r}; rename them")
    return [None if column is None else names.index(column) for column in table.columns]


def _no_column(table: TableFile, column: str, names: Iterable[object]) -> IngestError:
    known = [shown(str(name)) for name in names]
    text = form_of(table.name, table.delimiter) == "text" and table.header is None
    remedy = "; where the first line is a row already, set header to the names of the columns" if text else ""
    return IngestError(
        f"{table.path}: no column {column!r}{did_you_mean(column, known)}; it has {listed(known)}{remedy}"
    )


def _json_lines(table: TableFile) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with _opened(table, newline="\n") as file:
        for line, text in enumerate(_lines(table, file), 1):
            if text.strip():
                yield f"{table.name}:{line}", _object(text)


def _object(line: str) -> dict[str, Any] | str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"
    return values if isinstance(values, dict) else "no JSON object"


def _json_objects(table: TableFile) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with _opened(table, newline="\n") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise IngestError(
            f"{table.path}: more than {LARGEST_JSON:,} characters, and a .json is read whole; write one object per line "
            "to a .jsonl, which is read line by line"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IngestError(f"{table.path}: no JSON ({error}); a file with one object per line is a .jsonl") from None
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        yield from _coco_objects(table, content["images"], content.get("annotations", []))
    elif isinstance(content, list):
        for number, values in enumerate(content):
            yield f"{table.name}[{number}]", values if isinstance(values, dict) else "no JSON object"
    else:
        found = f"keys {listed([shown(key) for key in content])}" if isinstance(content, dict) else "neither"
        raise IngestError(
            f"{table.path}: expected a list of objects (pandas: orient='records'), or images and annotations as COCO "
            f"has them; found {found}"
        )


def _coco_objects(
    table: TableFile, images: list[Any], annotations: list[Any]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Each annotation with what is said of its image, and images without any."""
    by_id: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(images):
        name = image.get("id") if isinstance(image, dict) else None
        if not isinstance(name, int | str) or name in by_id:
            raise IngestError(
                f"{table.path}: images[{number}] has no id of its own; every image has one in COCO's form"
            )
        by_id[name] = image
    bare = set(by_id)
    for number, annotation in enumerate(annotations if isinstance(annotations, list) else []):
        name = annotation.get("image_id") if isinstance(annotation, dict) else None
        known = isinstance(name, int | str) and name in by_id
        bare.discard(name if known else None)
        yield f"{table.name} annotations[{number}]", by_id[name] | annotation if known else "no image has its image_id"
    for number, (name, image) in enumerate(by_id.items()):
        if name in bare:
            yield f"{table.name} images[{number}]", image


def _object_rows(table: TableFile, objects: Iterable[tuple[str, dict[str, Any] | str]]) -> Iterator[Row]:
    """Writers of JSON leave out what is null: a column may be missing from rows, and not from all of them."""
    missing, names = set(table.wanted), {}
    for place, values in objects:
        if isinstance(values, dict):
            missing -= values.keys() if missing else set()
            names = names or values
            yield place, tuple(None if column is None else values.get(column) for column in table.columns)
        else:
            yield place, values
    for column in table.wanted:
        if column in missing and names:
            raise _no_column(table, column, names)


def _parquet_rows(table: TableFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(table.path) as file:
            _places(table, file.schema_arrow.names)
            for column in table.wanted:
                if pa.types.is_struct(kind := file.schema_arrow.field(column).type):
                    raise IngestError(
                        f"{table.path}: column {column!r} holds {shown(str(kind))}; expected paths and texts. The source "
                        "parquet reads pictures that lie within a table"
                    )
            for batch in file.iter_batches(BATCH, columns=sorted(set(table.wanted))):
                columns = [
                    [None] * len(batch) if column is None else _values(batch[column]) for column in table.columns
                ]
                for values in zip(*columns, strict=True):
                    yield f"{table.name}[{number}]", values
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise IngestError(
            f"{table.path}: no whole parquet file, seen at row {number} ({error}); write it again"
        ) from None


def _values(column: "pa.Array") -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(map(_value, column))


def _value(scalar: "pa.Scalar") -> Any:  # noqa: ANN401 - whatever parquet holds
    """A text with surrogates for bytes that are not UTF-8, and lists of such."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
        return os.fsdecode(scalar.as_buffer().to_pybytes())
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return list(map(_value, scalar.values))
    return scalar.as_py()


@contextmanager
def _opened(table: TableFile, *, newline: str) -> Iterator[TextIO]:
    """The text of a table, packed or not; it is closed at the end."""
    opener = gzip.open if _packed(table.name) else open
    try:
        with opener(table.path, "rb") as binary:
            if binary.peek(2)[:2] in UTF16:  # pyright: ignore[reportAttributeAccessIssue]
                raise IngestError(f"{table.path}: a text in UTF-16; save it as UTF-8")
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=newline)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (OSError, EOFError, zlib.error) as error:
        raise IngestError(f"{table.path}: cannot be read to its end ({error}); fetch or pack it again") from None


def _packed(table: str) -> bool:
    return table.lower().endswith(".gz")


def _suffix(table: str) -> str:
    return os.path.splitext(table.lower().removesuffix(".gz"))[1]


def _lines(table: TableFile, file: TextIO, *, nul: bool = True) -> Iterator[str]:
    """The lines of a table. Raises IngestError for one that would fill memory or, unless `nul`, holds NUL."""
    number, left = 0, MOST_UNPACKED * table.path.stat().st_size if _packed(table.name) else math.inf
    while line := file.readline(LONGEST_LINE + 1):
        number, left = number + 1, left - len(line)
        if len(line) > LONGEST_LINE:
            raise IngestError(f"{table.path}:{number}: a line of more than {LONGEST_LINE:,} characters; is it a table?")
        if left < 0:
            raise IngestError(
                f"{table.path}:{number}: unpacks to over {MOST_UNPACKED} times its size; unpack it yourself"
            )
        if not nul and "\0" in line:
            raise IngestError(f"{table.path}:{number}: holds NUL, which no text does; save the table as UTF-8")
        yield line
