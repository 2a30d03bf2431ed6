"""Where a source keeps what: columns of DataComp, LAION, a pool or anything else, by role; checked before work starts.

Folders named `lang=en` are a column `lang` of all files below them, as Hive and Spark write it: whole numbers if all of
its values are, texts otherwise. A file's own column of that name comes first.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self
from urllib.parse import unquote

from pydantic import Field, model_validator

from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError
from vtp.curation.filter.rules import IMAGE_COLUMNS, STATUS, ColumnKind, Need
from vtp.curation.rows import CAPTION, HEIGHT, KEY, ORDER, ROLES, SHA256, URL, WIDTH

if TYPE_CHECKING:
    import pyarrow as pa

POOL_COLUMNS = (STATUS, "error", *IMAGE_COLUMNS, "stored_width", "stored_height")
OPENERS = 16  # footers read at the same time
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # of a partition, by its folder's name
LARGEST_WHOLE = 1 << 63  # above the numbers of a partition
EXPECTED: dict[ColumnKind, str] = {"text": "texts", "number": "numbers", "single": "single values"}


class DatacompColumns(Config):
    """Metadata of DataComp's pools."""

    name: Literal["datacomp"]


class LaionColumns(Config):
    """Metadata of LAION-400M, 2B-en and their kin. They have no key: it is a digest of URL and caption."""

    name: Literal["laion"]


class PoolColumns(Config):
    """A folder written by the stage download, or by this one."""

    name: Literal["pool"]
    outside_links: bool = Field(default=False, description="follow links that lead out of the pool's folder")


class MappedColumns(Config):
    """The source's own names; null for what it does not have."""

    name: Literal["mapped"]
    key: str | None = Field(description="column of the keys; null: a digest of URL and caption")
    url: str | None = Field(description="column of the URLs; null: none")
    caption: str | None = Field(description="column of the captions; null: none")
    width: str | None = Field(description="column of the widths in pixels; null: none")
    height: str | None = Field(description="column of the heights in pixels; null: none")
    sha256: str | None = Field(description="column of the pictures' digests; null: none")

    @model_validator(mode="after")
    def _rows_can_be_told_apart(self) -> Self:
        if self.key is None and self.url is None:
            raise ValueError("key and url are both null: rows could not be told apart")
        return self


ColumnsConfig = Annotated[DatacompColumns | LaionColumns | PoolColumns | MappedColumns, Field(discriminator="name")]


class Layout(NamedTuple):
    """Which column of the source is what."""

    roles: dict[str, str | None]  # role -> column
    kept: tuple[str, ...]  # further columns of the output
    aside: tuple[str, ...]  # columns that rules read and the output does not have

    @property
    def extras(self) -> tuple[str, ...]:
        """Columns under their own names."""
        return (*self.kept, *self.aside)

    @property
    def wanted(self) -> list[str]:
        """Columns to read."""
        return sorted({*(column for column in self.roles.values() if column), *self.extras})


Partitions = dict[str, int | str | None]  # what a file's folders say of all its rows


class MetadataFile(NamedTuple):
    """A parquet file."""

    path: Path
    group_rows: tuple[int, ...]  # rows of each row group
    partitions: Partitions


class MetadataSource(NamedTuple):
    """Parquet files with one schema."""

    files: tuple[MetadataFile, ...]
    layout: Layout
    schema: "pa.Schema"  # of rows by role: key, order, url, ..., extras

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(sum(file.group_rows) for file in self.files)


class _Footer(NamedTuple):
    file: MetadataFile
    schema: "pa.Schema"  # with its partitions


def open_metadata(
    rows: Path,
    columns: DatacompColumns | LaionColumns | PoolColumns | MappedColumns,
    wanted: Iterable[Need],
    keep: Sequence[str] | Literal["all"],
) -> MetadataSource:
    """Open every file and check that it has all columns, of a usable type.

    Raises ArtefactError for a file that is not parquet, ConfigError for a column.
    """
    files = [rows] if rows.is_file() else sorted(path for path in rows.rglob("*.parquet") if path.is_file())
    if not files:
        raise ArtefactError(f"{rows}: no .parquet file in it; expected metadata, or a pool of the stage download")
    partitions = _partitions([path.relative_to(rows).parts[:-1] for path in files])
    with ThreadPoolExecutor(OPENERS) as pool:
        footers = list(pool.map(_open, files, partitions))
    roles = _roles(columns)
    needs = _needs(roles, columns, wanted)
    kept = _kept(footers, columns, roles, keep)
    for name in kept:
        if name in (*ROLES, ORDER):
            raise ConfigError(f"keep_columns: {name!r} is the name of a role, which every output has")
    needs += [Need(name, "any") for name in kept]
    for footer in footers:
        for need in needs:
            _check(footer, need)
    own = {need.column for need in needs} - {column for column in roles.values() if column} - set(kept)
    layout = Layout(roles, kept, tuple(sorted(own)))
    return MetadataSource(tuple(footer.file for footer in footers), layout, _schema(footers, layout))


def _partitions(folders: Sequence[Sequence[str]]) -> list[Partitions]:
    """What the names of each file's folders say."""
    texts = [dict(name.split("=", 1) for name in names if "=" in name) for names in folders]
    of_column: dict[str, set[str]] = {}
    for each in texts:
        for column, text in each.items():
            of_column.setdefault(column, set()).add(text)
    whole = {column for column, values in of_column.items() if all(map(_is_whole, values - {NO_VALUE}))}

    def value(column: str, text: str) -> int | str | None:
        return None if text == NO_VALUE else int(text) if column in whole else unquote(text)

    return [{unquote(column): value(column, text) for column, text in each.items()} for each in texts]


def _is_whole(text: str) -> bool:
    """Whether nothing is lost when it becomes a number: 007 is a name."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and text == str(int(text)) and abs(int(text)) < LARGEST_WHOLE


def _open(path: Path, partitions: Partitions) -> _Footer:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = tuple(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
            schema = file.schema_arrow.remove_metadata()
        added = {name: value for name, value in partitions.items() if name not in schema.names}
        for name, value in added.items():
            schema = schema.append(pa.field(name, pa.scalar(value).type))
        return _Footer(MetadataFile(path, groups, added), schema)
    except (OSError, pa.ArrowException) as error:
        raise ArtefactError(f"{path}: not a whole parquet file ({error}); fetch it again or take it out") from None


def _roles(columns: DatacompColumns | LaionColumns | PoolColumns | MappedColumns) -> dict[str, str | None]:
    match columns:
        case DatacompColumns():
            names = ("uid", "url", "text", "original_width", "original_height", "sha256")
        case LaionColumns():
            names = (None, "URL", "TEXT", "WIDTH", "HEIGHT", None)
        case PoolColumns():
            names = ROLES
        case MappedColumns():
            given = columns
            names = (given.key, given.url, given.caption, given.width, given.height, given.sha256)
    return dict(zip(ROLES, names, strict=True))


def _needs(
    roles: dict[str, str | None],
    columns: DatacompColumns | LaionColumns | PoolColumns | MappedColumns,
    wanted: Iterable[Need],
) -> list[Need]:
    """What the files must have, under their own names."""
    kinds: dict[str, ColumnKind] = {KEY: "single", URL: "text", CAPTION: "text", WIDTH: "number", HEIGHT: "number"}
    needs = [Need(column, kinds.get(role, "text")) for role, column in roles.items() if column]
    for need in wanted:
        if need.column in roles and roles[need.column] is None:
            known = ", ".join(role for role, column in roles.items() if column)
            raise ConfigError(f"a rule reads {need.column!r}, which columns {columns.name!r} lacks; there is {known}")
        if need.column not in roles and need.column != ORDER:
            needs.append(need)
    return needs


def _kept(
    footers: Sequence[_Footer],
    columns: DatacompColumns | LaionColumns | PoolColumns | MappedColumns,
    roles: dict[str, str | None],
    keep: Sequence[str] | Literal["all"],
) -> tuple[str, ...]:
    names = set(footers[0].schema.names)
    own = [name for name in POOL_COLUMNS if name in names] if isinstance(columns, PoolColumns) else []
    if keep == "all":
        taken = {*roles, ORDER, *(column for column in roles.values() if column), *own}
        return (*own, *sorted(names - taken))
    return tuple(dict.fromkeys((*own, *keep)))


def _check(footer: _Footer, need: Need) -> None:
    names = footer.schema.names
    if need.column not in names:
        near = get_close_matches(need.column, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{footer.file.path}: no column {need.column!r}; it has {', '.join(names)}{hint}")
    kind = plain_type(footer.schema.field(need.column).type)
    if need.kind != "any" and not _fits(kind, need.kind):
        expected = EXPECTED[need.kind]
        raise ConfigError(f"{footer.file.path}: column {need.column!r} holds {kind}, expected {expected}")
    if "dictionary<" in str(kind):  # within a list or struct: arrow cannot read it from several row groups
        raise ConfigError(f"{footer.file.path}: column {need.column!r} holds {kind}; write its values as they are")


def _fits(kind: "pa.DataType", wanted: ColumnKind) -> bool:
    from pyarrow import types

    is_text = types.is_string(kind) or types.is_binary(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)
    fits = {"text": is_text, "number": is_number, "single": is_text or is_number or types.is_temporal(kind)}
    return fits[wanted] or types.is_null(kind)


def plain_type(kind: "pa.DataType") -> "pa.DataType":
    """The type that equal values have, however a file encodes them."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    return kind


def _schema(footers: Sequence[_Footer], layout: Layout) -> "pa.Schema":
    """Of rows by role; where files differ in a further column, the type that holds the values of all."""
    import pyarrow as pa

    fields = [
        pa.field(KEY, pa.string()),
        pa.field(ORDER, pa.uint64()),
        pa.field(URL, pa.string()),
        pa.field(CAPTION, pa.string()),
        pa.field(WIDTH, pa.int32()),
        pa.field(HEIGHT, pa.int32()),
        pa.field(SHA256, pa.string()),
    ]
    for name in layout.extras:
        kinds = {plain_type(footer.schema.field(name).type) for footer in footers}
        if pa.uint64() in kinds and any(map(pa.types.is_signed_integer, kinds)):
            kinds = kinds - {pa.uint64()} | {pa.decimal128(20)}  # arrow would choose int64, which half of them exceed
        singles = [pa.schema([pa.field(name, kind)]) for kind in sorted(kinds, key=str)]
        try:
            fields.append(pa.unify_schemas(singles, promote_options="permissive").field(0))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            types = ", ".join(sorted(map(str, kinds)))
            raise ConfigError(f"column {name!r} is of other types in other files: {types}; make them agree") from None
    return pa.schema(fields)
