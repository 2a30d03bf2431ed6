"""Whole filters against the same ones written plainly, for any files, processes and parts."""

import json
import random
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sifting import SCHEMA, by_role, ordered, plainly, random_rows, removed, section, selected, sift, write

from vtp.artefact import ArtefactError, digest, read_json
from vtp.config import ConfigError
from vtp.curation.filter.engine import FilterError
from vtp.curation.rows import counts, parts

ROWS = random_rows(3000)
SIZE = {"name": "size", "min_side": 20, "max_side": 850, "min_area": 900, "max_area": None, "missing": "keep"}
ASPECT = {"name": "aspect_ratio", "max": 8.0, "missing": "keep"}
LENGTH = {"min_words": 1, "max_words": 8, "min_characters": 2, "max_characters": 40}
CAPTION = {"name": "caption_length", **LENGTH, "missing": "drop"}
SCORE = {"name": "number", "column": "score", "min": -1.5, "max": None, "missing": "keep"}
NSFW = {"name": "category", "column": "nsfw", "allowed": ["UNLIKELY", "UNSURE"], "missing": "keep"}
PATTERN = {"name": "pattern", "column": "caption", "regex": "stock photo|^ein", "matches": "drop", "missing": "keep"}
URL = {"name": "duplicates", "by": "url", "missing": "drop"}
SHA = {"name": "duplicates", "by": "sha256", "missing": "keep"}
TOP = {"name": "top_fraction", "column": "score", "fraction": 0.7, "best": "highest", "missing": "keep"}
LOW = {"name": "top_fraction", "column": "score", "fraction": 0.5, "best": "lowest", "missing": "drop"}
SUBSET = {"name": "subset", "size": 300}
LANGUAGE = {"name": "language", "allowed": ["eng"], "min_probability": 0.5, "missing": "drop"}
HASHES = {"name": "hash_list", "column": "sha256", "file": "a", "action": "block", "missing": "keep"}
LISTS = {
    "nothing": [],
    "row rules": [SIZE, ASPECT, CAPTION, SCORE, NSFW, PATTERN],
    "duplicates": [URL, SHA],
    "shares": [TOP, LOW],
    "mixed": [SIZE, CAPTION, URL, NSFW, ASPECT, TOP, SHA, PATTERN, SUBSET],
    "subset of a subset": [{"name": "subset", "size": 1000}, SCORE, {"name": "subset", "size": 500}, URL],
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("vtp.curation.filter.engine.span_of", lambda rows: 400)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "metadata.parquet"
    write(ROWS, path, row_group_size=700)
    return path


@pytest.mark.parametrize("rules", LISTS.values(), ids=LISTS)
def test_leaves_what_a_plain_filter_leaves(one_file, tmp_path, rules):
    folder = sift(section(rules), one_file, tmp_path)
    expected = [{k: v for k, v in ordered(row).items() if k != "nsfw"} for row in plainly(ROWS, rules)]
    assert repr(selected(folder)) == repr(expected)  # NaN equals itself so
    lines = removed(folder)
    assert len(ROWS) - sum(lines.values()) == len(expected)
    assert [len(pq.read_table(path)) for path in parts(folder / "selection")[:-1]] == [200] * (
        (len(expected) - 1) // 200
    )
    assert sum(counts(parts(folder / "selection"))) == len(expected)


def test_funnel_counts_each_rule_on_what_those_before_it_left(one_file, tmp_path):
    rules = LISTS["mixed"]
    folder = sift(section(rules), one_file, tmp_path)
    lefts = [len(plainly(ROWS, rules[:end])) for end in range(2, len(rules) + 1)]
    lines = list(read_json(folder / "funnel")["filter"]["removed"].values())
    assert lines[-len(rules) + 2 :] == [before - after for before, after in pairwise(lefts)]
    assert removed(folder)["no_key"] == removed(folder)["unreadable_text"] == 0
    shown = (folder / "examples").read_text()
    for number in range(4, len(rules) + 4):
        assert f"## {number:02}_" in shown or lines[number - 1] == 0
    dropped = {row["key"] for row in plainly(ROWS, [SIZE, CAPTION])} - {
        row["key"] for row in plainly(ROWS, [SIZE, CAPTION, URL])
    }
    first = sorted(dropped, key=lambda key: by_role({**ROWS[0], "uid": key})["order"])[:3]
    assert [
        line.split("`")[1] for line in shown.split("duplicates_url\n")[1].split("\n##")[0].split("\n")[1:4]
    ] == first


@pytest.mark.parametrize(("files", "processes"), [(1, 0), (7, 0), (3, 2), (40, 0)])
def test_equal_bytes_for_any_files_and_processes(tmp_path, files, processes):
    """The content alone decides, also which of several rows with one key stays and what is shown."""
    whole = {}
    for name, number, workers in (("plain", 1, 0), ("other", files, processes)):
        rows = list(ROWS)
        random.Random(number).shuffle(rows)
        for part in range(number):
            encode = {"use_dictionary": part % 2 == 0, "row_group_size": 100 + 77 * part}
            write(rows[part::number], tmp_path / name / "rows" / f"{part % 3}" / f"x{part}.parquet", **encode)
        sift(section(LISTS["mixed"]), tmp_path / name / "rows", tmp_path / name, processes=workers)
        whole[name] = [digest(tmp_path / name / path) for path in ("selection", "funnel", "examples")]
    assert whole["plain"] == whole["other"]


def test_subsets_lie_within_each_other(one_file, tmp_path):
    keys = []
    for size in (50, 400, 2000):
        rules = [NSFW, {"name": "subset", "size": size}]
        keys.append([row["key"] for row in selected(sift(section(rules), one_file, tmp_path / str(size)))])
    assert keys[0] == keys[1][:50]
    assert keys[1] == keys[2][:400]


def test_faulty_rows_are_counted(tmp_path):
    good = random_rows(300, seed=3)
    rows = [*good, *({**row, "uid": None if i % 2 else ""} for i, row in enumerate(random_rows(20)))]
    table = pa.Table.from_pylist(rows, SCHEMA)
    captions = [text and text.encode() for text in table["text"].to_pylist()]
    for index in range(0, 40, 2):
        captions[index] = b"caf\xe9 " + str(index).encode()
    raw = pa.array(captions, pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(table.set_column(2, "text", broken), tmp_path / "rows.parquet")
    folder = sift(section([SHA]), tmp_path / "rows.parquet", tmp_path)
    assert removed(folder)["unreadable_text"] == 20
    assert removed(folder)["no_key"] == 20
    left = [row for index, row in enumerate(good) if index not in range(0, 40, 2)]
    assert [row["key"] for row in selected(folder)] == [row["key"] for row in plainly(left, [SHA])]
    with pytest.raises(FilterError, match=r"40 of 320 rows have no key or a text that is not UTF-8.*max_unreadable"):
        sift(section([SHA], max_unreadable=0.1), tmp_path / "rows.parquet", tmp_path / "strict")


def test_nothing_left_is_an_error_that_shows_the_funnel(one_file, tmp_path):
    none = {"name": "pattern", "column": "caption", "regex": "^never$", "matches": "keep", "missing": "drop"}
    with pytest.raises(FilterError, match="(?s)no row is left of 3000.*03_pattern_caption"):
        sift(section([none]), one_file, tmp_path)


def test_files_of_other_types_agree(tmp_path):
    """Strings as dictionaries or large strings, sides as floats with NaN, scores of two widths."""
    other = SCHEMA
    for name, kind in (("url", pa.large_string()), ("original_width", pa.float64()), ("score", pa.float64())):
        other = other.set(other.get_field_index(name), pa.field(name, kind))
    rows = random_rows(200, seed=5)
    write(rows[:100], tmp_path / "rows" / "a.parquet")
    table = pa.Table.from_pylist(rows[100:], other)
    table = table.set_column(7, "nsfw", table["nsfw"].dictionary_encode())
    pq.write_table(table, tmp_path / "rows" / "b.parquet")
    folder = sift(section([NSFW, ASPECT]), tmp_path / "rows", tmp_path)
    assert [row["key"] for row in selected(folder)] == [row["key"] for row in plainly(rows, [NSFW, ASPECT])]


def test_laion_has_keys_of_its_content(tmp_path):
    rows = [
        {"URL": f"http://host/{i % 5}", "TEXT": f"caption {i % 6}", "WIDTH": i, "HEIGHT": 9, "LANGUAGE": "en"}
        for i in range(60)
    ]
    rows[7]["URL"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "laion.parquet")
    config = section([], columns={"name": "laion"}, keep_columns="all")
    folder = sift(config, tmp_path / "laion.parquet", tmp_path)
    assert (removed(folder)["no_key"], removed(folder)["duplicate_key"]) == (1, 29)
    assert {(row["url"], row["caption"]) for row in selected(folder)} == {
        (r["URL"], r["TEXT"]) for r in rows if r["URL"]
    }
    assert all(len(row["key"]) == 32 and row["LANGUAGE"] == "en" for row in selected(folder))


def test_mapped_columns_and_the_own_output_as_a_pool(one_file, tmp_path):
    mapped = {"key": "uid", "url": "url", "caption": "nsfw", "width": None, "height": None, "sha256": None}
    first = sift(section([], columns={"name": "mapped", **mapped}, keep_columns=[]), one_file, tmp_path / "a")
    assert {row["caption"] for row in selected(first)} == {"UNLIKELY", "UNSURE", "NSFW", None}
    again = sift(section([SUBSET], columns={"name": "pool"}, keep_columns="all"), first / "selection", tmp_path / "b")
    assert selected(again) == selected(first)[:300]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": [SCORE | {"column": "scor"}]}, r"metadata.parquet: no column 'scor'; it has uid, url.*mean 'score'"),
        ({"rules": [SCORE | {"column": "nsfw"}]}, r"column 'nsfw' holds string, expected numbers"),
        ({"rules": [PATTERN | {"column": "score"}]}, r"column 'score' holds float, expected texts"),
        ({"keep_columns": ["url"]}, r"keep_columns: 'url' is the name of a role"),
        ({"columns": {"name": "laion"}}, r"no column 'TEXT'.*|no column 'URL'; it has uid"),
        ({"rules": [{"name": "perceptual_duplicates", "max_distance": 1}]}, r"rule perceptual_duplicates looks at a pool"),
        ({"rules": [LANGUAGE]}, "no language eng"),
        ({"rules": [HASHES]}, "give the command --lists"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_the_work(one_file, tmp_path, changes, message):
    values = {"rules": []} | changes
    with pytest.raises(ConfigError, match=message):
        sift(section(values.pop("rules"), **values), one_file, tmp_path)
    assert not (tmp_path / "scratch" / "folder" / "read").exists()


def test_damaged_files_are_named(one_file, tmp_path):
    (tmp_path / "rows").mkdir()
    content = one_file.read_bytes()
    (tmp_path / "rows" / "good.parquet").write_bytes(content)
    cut = tmp_path / "rows" / "cut.parquet"
    cut.write_bytes(content[:-2000])
    with pytest.raises(ArtefactError, match=r"cut\.parquet: not a whole parquet file"):
        sift(section([]), tmp_path / "rows", tmp_path)
    cut.write_bytes(content[:3000] + bytes(9000) + content[12000:])
    with pytest.raises(ArtefactError, match=r"cut\.parquet, row groups \d to \d: cannot be read"):
        sift(section([]), tmp_path / "rows", tmp_path)
    with pytest.raises(ArtefactError, match="no .parquet file in it"):
        sift(section([]), tmp_path / "scratch", tmp_path)


def test_interrupted_work_goes_on(one_file, tmp_path, monkeypatch):
    """The same bytes, and chunks that were done are not done again."""
    from vtp.curation.filter import engine

    whole = sift(section(LISTS["mixed"]), one_file, tmp_path / "whole")
    for name, after in (("read_chunk", 2), ("sort_part", 3), ("emit", 9), ("drop_rows", 4), ("write_file", 1)):
        calls, function = [], getattr(engine, name)

        def failing(job, calls=calls, function=function, after=after):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(engine.done(job))
            function(job)

        folder = tmp_path / name
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine, name, failing)
            sift(section(LISTS["mixed"]), one_file, folder)
        times = {path: path.stat().st_mtime_ns for path in calls}
        assert len(times) == after
        sift(section(LISTS["mixed"]), one_file, folder)
        assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.exists())
        for output in ("selection", "funnel", "examples"):
            assert digest(folder / output) == digest(whole / output)
    assert json.loads((whole / "funnel").read_text())["filter"]["rows_in"] == 3000
