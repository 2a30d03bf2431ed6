"""Columns of every type that tables come with: compared rightly, or named with their type, and folders that are columns."""

from datetime import date
from decimal import Decimal
from pathlib import Path
from tempfile import mkdtemp

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sifting import removed, section, selected, sift

from vtp.artefact import ArtefactError
from vtp.config import ConfigError

NAMES = {"key": "id", "url": "url", "caption": None, "width": None, "height": None, "sha256": None}
COLUMNS = {"name": "mapped", **NAMES}
COUNT = 6


def table(**columns):
    """Six rows, their keys in the order of the rows unless given."""
    urls = [f"http://host/{index}" for index in range(COUNT)]
    return pa.table({"id": [f"{index}" for index in range(COUNT)], "url": urls} | columns)


def write(rows, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, **options)


def filtered(folder, rules=(), *, keep=(), **changes):
    """Each time in a scratch folder of its own."""
    config = section(list(rules), columns=COLUMNS, keep_columns=keep if keep == "all" else list(keep), **changes)
    return sift(config, folder / "rows", Path(mkdtemp(dir=folder)))


def keys(folder):
    return sorted(row["key"] for row in selected(folder))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1.0, 0.0, -0.0 + 12, 1.2e15, 2.0**53 - 1, -7.0]), "1 0 12 1200000000000000 9007199254740991 -7"),
        (pa.array([1.0, 2.0, 3.0, 4.0, 5.0, 2.0**24 - 1], pa.float32()), "1 2 3 4 5 16777215"),
        (pa.array([1, 2, 3, 4, 2**64 - 1, 2**53 + 1], pa.uint64()), "1 2 3 4 18446744073709551615 9007199254740993"),
        (pa.array([*map(Decimal, "123456"[:5]), Decimal(10**19)], pa.decimal128(20)), f"1 2 3 4 5 {10**19}"),
        (
            pa.array([Decimal(n) for n in ["1.00", "2.50", "30.00", "4", "5", "6"]], pa.decimal128(9, 2)),
            "1 2.5 30 4 5 6",
        ),
        (pa.array(list("abcdef"), pa.large_string()).dictionary_encode(), "a b c d e f"),
        (pa.array([letter.encode() for letter in "abcdef"], pa.large_binary()), "a b c d e f"),
    ],
    ids=["doubles", "floats", "uint64", "decimals", "decimals with a point", "dictionary", "large binary"],
)
def test_whole_numbers_are_keys_without_point_or_exponent(tmp_path, values, expected):
    write(table(id=values), tmp_path / "rows" / "a.parquet")
    assert keys(filtered(tmp_path)) == sorted(expected.split())


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (2.0**53, pa.float64(), r"the key 9007199254740992\.0 is no whole number below 2\^53 in column 'id'.* double"),
        (-1.2e18, pa.float64(), r"the key -1\.2e\+18 is no whole number below 2\^53"),
        (2.0**24, pa.float32(), r".* no whole number below 2\^24 in column 'id', which holds float:"),
        (0.5, pa.float64(), r"the key 0\.5 is no whole number"),
        (float("inf"), pa.float64(), r"the key inf is no whole number"),
    ],
)
def test_keys_that_other_keys_may_have_become_are_refused(tmp_path, bad, kind, message):
    """By file and row; the rows before may lie in other row groups."""
    write(table(), tmp_path / "rows" / "good.parquet")
    write(table(id=pa.array([1, 2, 3, 4, bad, 6], kind)), tmp_path / "rows" / "of.floats.parquet", row_group_size=2)
    with pytest.raises(ArtefactError, match=rf"of\.floats\.parquet, row 4: {message}"):
        filtered(tmp_path)


def test_keys_of_several_types_are_the_same_keys(tmp_path):
    for name, values in {
        "a": pa.array(range(COUNT), pa.float64()),
        "b": pa.array(range(3, COUNT + 3), pa.int32()),
        "c": pa.array([Decimal(n) for n in range(6, COUNT + 6)], pa.decimal128(20)),
        "d": pa.array([float("nan"), None, 0, 1, 2, 3], pa.float64()),
    }.items():
        write(table(id=values), tmp_path / "rows" / f"{name}.parquet")
    folder = filtered(tmp_path, max_unreadable=0.5)
    assert keys(folder) == sorted(map(str, range(12)))
    assert removed(folder)["no_key"] == 2


TAGS = [["a", "b"], ["a"], ["a", "b"], [], None, ["a"]]
PLACES = [{"x": 1, "y": "p"}, {"x": 2, "y": "p"}, {"x": 1, "y": "p"}, {"x": None, "y": "p"}, None, {"x": 2, "y": "q"}]


@pytest.mark.parametrize(
    ("values", "left"),
    [
        (pa.array(TAGS), 4),
        (pa.array(PLACES), 5),
        (pa.array([[("k", 1)], [("k", 1)], [("k", 2)], None, [], []], pa.map_(pa.string(), pa.int8())), 4),
        (pa.array([b"\xff1", b"\xff1", b"\xff2", None, b"ab", b"ab"], pa.binary(2)), 4),
        (pa.array([b"\xff1", b"\xff1", b"\xff2", None, b"ab", b"ab"], pa.large_binary()), 4),
        (pa.array([Decimal("1.50"), Decimal("1.5"), Decimal("0.1"), None, Decimal(2), Decimal(2)]), 4),
        (pa.array([date(2020, 1, 1)] * 3 + [None] * 3), 4),
        (pa.array([b"0123456789abcdef"] * 3 + [b"fedcba9876543210"] * 3, pa.uuid()), 2),
        (pa.array([True, True, False, None, False, True]), 3),
        (pa.nulls(COUNT), COUNT),
    ],
    ids=lambda values: str(values.type) if isinstance(values, pa.Array | pa.ExtensionArray) else "",
)
def test_equal_values_of_any_type_are_duplicates(tmp_path, values, left):
    """In any row group and file; what is kept is written as it was."""
    rows = table(value=values)
    write(rows.slice(0, 3), tmp_path / "rows" / "a.parquet", row_group_size=1)
    write(rows.slice(3), tmp_path / "rows" / "b.parquet")
    by_value = [{"name": "duplicates", "by": "value", "missing": "keep"}]
    folder = filtered(tmp_path, by_value, keep=["value"])
    assert len(keys(folder)) == left
    given = {str(row["id"]): row["value"] for row in rows.to_pylist()}
    assert all(row["value"] == given[row["key"]] for row in selected(folder))


def test_decimals_are_compared_as_they_are_written(tmp_path):
    """0.3 is no more than 0.3, and 1.50 is 1.5."""
    cents = pa.array([Decimal(n) for n in ["0.30", "0.60", "0.70", "1.50", "2.00", "2.30"]], pa.decimal128(8, 2))
    write(table(cents=cents, also=cents), tmp_path / "rows" / "a.parquet")
    for bounds, expected in (((None, 0.3), "0"), ((0.6, 0.7), "12"), ((2.3, None), "5")):
        rule = {"name": "number", "column": "cents", "min": bounds[0], "max": bounds[1], "missing": "drop"}
        assert keys(filtered(tmp_path, [rule])) == list(expected)
    rule = {"name": "category", "column": "also", "allowed": ["1.5", "2", "0.600"], "missing": "drop"}
    assert keys(filtered(tmp_path, [rule])) == ["1", "3", "4"]
    best = {"name": "top_fraction", "column": "cents", "fraction": 0.5, "best": "lowest", "missing": "drop"}
    assert keys(filtered(tmp_path, [best])) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "number", "column": "tags", "min": 1, "max": None}, "'tags' holds list<.*>, expected numbers"),
        ({"name": "number", "column": "place", "min": 1, "max": None}, "'place' holds struct<.*>, expected numbers"),
        ({"name": "category", "column": "tags", "allowed": ["a"]}, "'tags' holds list<.*>, expected single values"),
        ({"name": "category", "column": "place", "allowed": ["a"]}, "'place' holds struct<.*>, expected single values"),
        ({"name": "pattern", "column": "tags", "regex": "a", "matches": "keep"}, "'tags' holds list<.*>, expected texts"),
    ],
)  # fmt: skip
def test_lists_and_structs_are_named_where_a_rule_wants_values(tmp_path, rule, message):
    write(table(tags=pa.array(TAGS), place=pa.array(PLACES)), tmp_path / "rows" / "a.parquet")
    with pytest.raises(ConfigError, match=rf"a\.parquet: column {message}"):
        filtered(tmp_path, [rule | {"missing": "keep"}])


def test_a_list_is_no_key(tmp_path):
    write(table(id=pa.array([["a"]] * COUNT)), tmp_path / "rows" / "a.parquet")
    with pytest.raises(ConfigError, match="column 'id' holds list<.*>, expected single values"):
        filtered(tmp_path)


def test_bytes_that_are_no_text_are_no_value_of_a_rule_for_texts(tmp_path):
    """Nor do they end the stage; a column that is kept is kept as bytes."""
    raw = pa.array([b"en", b"caf\xe9", b"de", None, b"en", b"\xff"], pa.binary())
    write(table(raw=raw), tmp_path / "rows" / "a.parquet")
    for missing, expected in (("drop", "04"), ("keep", "01345")):
        rule = {"name": "category", "column": "raw", "allowed": ["en"], "missing": missing}
        folder = filtered(tmp_path, [rule], keep=["raw"])
        assert keys(folder) == list(expected)
        assert {row["raw"] for row in selected(folder)} <= set(raw.to_pylist())


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (pa.array([1, 2, 3], pa.uint64()), pa.array([-1, -2, 2], pa.int64()), pa.decimal128(20)),
        (pa.array([2**64 - 1, 2, 3], pa.uint64()), pa.array([-1, -2, 2], pa.int8()), pa.decimal128(20)),
        (pa.array([Decimal("0.3"), None, None]), pa.array([0.3, 1.0, 2.5]), pa.float64()),
        (pa.nulls(3), pa.array([["a"], ["b"], None]), pa.list_(pa.string())),
        (pa.array([1, 2, 3], pa.int32()), pa.array([1.5, 2.5, 3.5], pa.float32()), pa.float64()),
    ],
)
def test_files_of_other_column_types_share_one_that_holds_all(tmp_path, first, second, together):
    rows = table()
    for name, part, values in (("a", rows.slice(0, 3), first), ("b", rows.slice(3), second)):
        write(part.append_column("value", values), tmp_path / "rows" / f"{name}.parquet")
    folder = filtered(tmp_path, keep=["value"])
    written = pq.read_table(next((folder / "selection").iterdir()))
    assert written.schema.field("value").type.equals(together)
    given = dict(zip(rows["id"].to_pylist(), first.to_pylist() + second.to_pylist(), strict=True))
    assert {row["key"]: row["value"] for row in written.to_pylist()} == {
        key: float(value) if together == pa.float64() and value is not None else value for key, value in given.items()
    }


def test_a_value_that_the_common_type_cannot_hold_is_named(tmp_path):
    rows = table()
    write(rows.append_column("value", pa.array([0.5] * COUNT)), tmp_path / "rows" / "a.parquet")
    write(rows.append_column("value", pa.array([2**53 + 1] * COUNT)), tmp_path / "rows" / "b.parquet")
    with pytest.raises(ArtefactError, match=r"b\.parquet: column 'value' holds int64, and with the other files double"):
        filtered(tmp_path, keep=["value"])


def hive(folder):
    """Rows of two languages and of none, over years."""
    for language, year in (("en", 2019), ("en", 2020), ("de", 2020), ("__HIVE_DEFAULT_PARTITION__", 2021)):
        rows = table(id=[f"{language}-{year}-{index}" for index in range(COUNT)])
        write(rows, folder / "rows" / f"lang={language}" / f"year={year}" / "part-0.parquet")


def test_folders_of_hive_are_columns(tmp_path):
    hive(tmp_path)
    english = {"name": "category", "column": "lang", "allowed": ["en"], "missing": "drop"}
    recent = {"name": "number", "column": "year", "min": 2020, "max": None, "missing": "drop"}
    folder = filtered(tmp_path, [english, recent], keep=["lang", "year"])
    assert keys(folder) == [f"en-2020-{index}" for index in range(COUNT)]
    assert {(row["lang"], row["year"]) for row in selected(folder)} == {("en", 2020)}
    folder = filtered(tmp_path, [english | {"missing": "keep"}], keep="all")
    assert {(row["lang"], row["year"]) for row in selected(folder)} == {("en", 2019), ("en", 2020), (None, 2021)}
    assert len(keys(filtered(tmp_path, [{"name": "duplicates", "by": "lang", "missing": "drop"}]))) == 2


def test_names_of_folders_are_what_they_stand_for(tmp_path):
    """Escaped letters are read, 007 stays a text, and a file's own column comes first."""
    for index, name in enumerate(("shard=007/tag=a%2Fb", "shard=8/tag=c")):
        write(table(id=[f"{index}{n}" for n in range(COUNT)], tag=["own"] * COUNT).drop_columns(["tag"] * (index == 0)),
              tmp_path / "rows" / name / "part.parquet")  # fmt: skip
    rows = selected(filtered(tmp_path, keep=["shard", "tag"]))
    assert {(row["key"][0], row["shard"], row["tag"]) for row in rows} == {("0", "007", "a/b"), ("1", "8", "own")}


def test_a_partition_that_some_files_lack_is_named(tmp_path):
    hive(tmp_path)
    write(table(), tmp_path / "rows" / "loose.parquet")
    rule = {"name": "category", "column": "lang", "allowed": ["en"], "missing": "drop"}
    with pytest.raises(ConfigError, match=r"loose\.parquet: no column 'lang'; it has id, url"):
        filtered(tmp_path, [rule])


def test_nested_types_are_kept(tmp_path):
    """Beside repeated keys, whose rows are compared as a whole."""
    nested = pa.array([{"a": [{"b": i}], "c": {"d": b"\xff"}} for i in range(COUNT)])
    rows = table(nested=nested, id=list("aabbcc"))
    for name in "xy":
        write(rows, tmp_path / "rows" / f"{name}.parquet", row_group_size=2)
    folder = filtered(tmp_path, keep="all")
    assert keys(folder) == ["a", "b", "c"]
    assert removed(folder)["duplicate_key"] == 9
    assert all(row["nested"]["c"] == {"d": b"\xff"} for row in selected(folder))


def test_dictionaries_within_lists_are_named(tmp_path):
    words = pa.array([["a"], ["b"]] * 3, pa.list_(pa.dictionary(pa.int32(), pa.string())))
    write(table(words=words), tmp_path / "rows" / "a.parquet", row_group_size=2)
    with pytest.raises(ConfigError, match="column 'words' holds list<.*dictionary<.*; write its values as they are"):
        filtered(tmp_path, keep=["words"])
    assert len(keys(filtered(tmp_path))) == COUNT
