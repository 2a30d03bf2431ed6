"""Tables of pictures: every form that people hold, and nothing wrong in silence."""

import csv
import gzip
import json
import os
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.ingest.test_hostile import listed
from curation.ingest.test_ingest import every, picture, prepare, rows_of

from vtp.artefact import digest
from vtp.config import ConfigError
from vtp.curation.ingest import table_rows
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.ingest.tables import TableSource, list_table
from vtp.data.shards import Manifest

HELD_OUT = {"name": "held_out", "share": 0.3}
TABLE = {"name": "table", "train": "rows.tsv", "validation": HELD_OUT, "path": "path", "caption": "caption"}
TABLE |= {"captions": "all", "label": None, "templates": []}
BY_IMAGE = {picture(number): number for number in range(40)}


@pytest.fixture
def source(tmp_path):
    """Twenty pictures."""
    root = tmp_path / "source"
    root.mkdir()
    for number in range(20):
        (root / f"{number}.png").write_bytes(picture(number))
    return root


def write(path, rows, *, delimiter=None, names=("path", "caption")):
    """Rows as a table without any quoting, unless it is a .csv."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    else:
        lines = [
            "\t".join(row) if delimiter is None else delimiter.join(row) for row in ([names] if names else []) + rows
        ]
        path.write_text("\n".join(lines) + "\n")


def said(shards):
    """What is said of each picture: numbers with sorted captions."""
    found = {}
    for row in every(shards):
        found.setdefault(BY_IMAGE[row["image"]], []).append(row["caption"])
    return {number: sorted(captions) for number, captions in sorted(found.items())}


def pictures_of(shards, split):
    return {BY_IMAGE[row["image"]] for row in rows_of(shards, split)}


# Quotes, and rows that are none


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
def test_a_quote_is_a_letter_of_a_caption(tmp_path, source, name):
    captions = ['"a', 'b"', '"c" d', '"', 'e, "f", g'] * 4
    write(source / name, [[f"{number}.png", caption] for number, caption in enumerate(captions)])
    prepare(tmp_path / "shards", TABLE | {"train": name}, source)
    assert said(tmp_path / "shards") == {number: [caption] for number, caption in enumerate(captions)}


def test_quoting_is_a_choice(tmp_path, source):
    write(source / "rows.tsv", [[f"{number}.png", f'"tab\t""{number}"""'] for number in range(20)])
    prepare(tmp_path / "shards", TABLE | {"quoting": True}, source)
    assert said(tmp_path / "shards")[3] == ['tab\t"3"']
    (source / "rows.csv").write_text("path,caption\n" + "".join(f'{number}.png,"a"\n' for number in range(20)))
    prepare(tmp_path / "plain", TABLE | {"train": "rows.csv", "quoting": False}, source)
    assert said(tmp_path / "plain")[3] == ['"a"']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('1.png,"unclosed', r"rows.csv:3: the row that begins here: .*put \" around fields"),
        ('1.png,"unclosed\n2.png,"b"', r"rows.csv:3: the row that begins here: "),
        (r'1.png,"a \"b\" c"', r"rows.csv:3: the row that begins here: "),
        ("1.png,a dog, running", r"rows.csv:3: 3 fields in place of 2; .*quoting"),
        ('1.png, "a dog, running"', r"rows.csv:3: 3 fields in place of 2; .*quoting"),
        ("1.png", r"rows.csv:3: 1 field in place of 2; "),
        ("1.png,a\0b", r"rows.csv:3: holds NUL, .*UTF-8"),
        (f"1.png,{'x' * 200_000}", r"rows.csv:3: the row that begins here: field larger"),
    ],
)
def test_csv_is_strict(tmp_path, source, line, message):
    """A wrong quote swallows other rows, so no share of them may be passed over; rows of two lines count as two."""
    (source / "rows.csv").write_text(f"path,caption\n0.png,fine\n{line}\n" + "3.png,fine\n" * 3)
    with pytest.raises(IngestError, match=message):
        prepare(tmp_path / "shards", TABLE | {"train": "rows.csv"}, source, max_unreadable=1.0)
    (source / "rows.csv").write_text(f'path,caption\n0.png,"two\nlines"\n{line}\n')
    with pytest.raises(IngestError, match=message.replace("csv:3", "csv:4")):
        prepare(tmp_path / "shards", TABLE | {"train": "rows.csv"}, source, max_unreadable=1.0)


def test_wrong_rows_of_other_tables_are_counted_by_their_line(tmp_path, source):
    good = [[f"{number}.png", "a"] for number in range(18)]
    write(source / "rows.tsv", [*good, ["18.png", "a", "b"], ["19.png"], ["18.png", "nul\0"]])
    host = prepare(tmp_path / "shards", TABLE, source, max_unreadable=0.2)
    assert listed(tmp_path / "shards") == {
        "rows.tsv:20": "3 fields in place of 2",
        "rows.tsv:21": "1 field in place of 2",
        "18.png": "caption holds NUL (rows.tsv:22)",
    }
    assert (host.facts["unreadable"], len(every(tmp_path / "shards"))) == (3, 18)
    lines = [json.dumps(dict(zip(("path", "caption"), row, strict=True))) for row in good]
    (source / "rows.jsonl").write_text("\n".join([*lines, "", '{"path": "18.png", "caption": "a"', "3"]))
    prepare(tmp_path / "lines", TABLE | {"train": "rows.jsonl"}, source, max_unreadable=0.2)
    reasons = listed(tmp_path / "lines")
    assert reasons["rows.jsonl:20"].startswith("no JSON (Expecting ',' delimiter")
    assert reasons["rows.jsonl:21"] == "no JSON object"


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_marks_of_windows_and_bytes_that_are_no_text(tmp_path, source, name):
    rows = [(f"{number}.png", f"é {number}") for number in range(20)]
    if name == "rows.jsonl":
        lines = [json.dumps({"path": path, "caption": text}, ensure_ascii=False) for path, text in rows]
    else:
        mark = "," if name == "rows.csv" else "\t"
        lines = [f"path{mark}caption", *(mark.join(row) for row in rows)]
    content = "\r\n".join([*lines, ""])
    (source / name).write_bytes(b"\xef\xbb\xbf" + content.encode().replace("é 7".encode(), b"\xe9 7"))
    prepare(tmp_path / "shards", TABLE | {"train": name}, source, max_unreadable=0.05)
    assert said(tmp_path / "shards") == {number: [f"é {number}"] for number in range(20) if number != 7}
    assert "caption is not UTF-8 (rows." in listed(tmp_path / "shards")["7.png"]
    (source / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(IngestError, match=rf"{name}: a text in UTF-16; save it as UTF-8"):
        prepare(tmp_path / "wide", TABLE | {"train": name}, source, max_unreadable=1.0)


# Several rows of one picture


def test_all_captions_of_a_picture_go_to_one_split(tmp_path, source):
    rows = [[f"{'./' * (turn % 2)}{number}.png", f"{number} {turn}"] for turn in range(5) for number in range(20)]
    write(source / "rows.tsv", [*rows, ["3.png", "3 1"], [".//3.png", "3 1"]])
    host = prepare(tmp_path / "shards", TABLE, source)
    assert said(tmp_path / "shards") == {n: [f"{n} {turn}" for turn in range(5)] for n in range(20)}
    assert not pictures_of(tmp_path / "shards", "train") & pictures_of(tmp_path / "shards", "validation")
    assert 5 <= len(rows_of(tmp_path / "shards", "validation")) < 60
    assert len({row["key"] for row in every(tmp_path / "shards")}) == 100
    assert (host.facts["duplicates"], host.facts["other_captions"], host.facts["ignored_files"]) == (2, 0, 0)
    write(source / "rows.tsv", [row for row in rows if "0" in row[1]] + rows[::-1])
    prepare(tmp_path / "again", TABLE, source)
    assert digest(tmp_path / "again") == digest(tmp_path / "shards")  # keys follow from what is said


def test_the_first_caption_alone(tmp_path, source):
    first = [[f"{number}.png", "" if number == 4 else f"first {number}"] for number in range(20)]
    more = [[f"./{number}.png", f"second {number}"] for number in range(0, 20, 2)]
    write(source / "rows.tsv", [*first, *more, first[3]])
    host = prepare(tmp_path / "shards", TABLE | {"captions": "one"}, source)
    wanted = {number: [f"first {number}"] for number in range(20)} | {4: ["second 4"]}
    assert said(tmp_path / "shards") == wanted
    assert (host.facts["other_captions"], host.facts["duplicates"]) == (10, 1)
    train = pictures_of(tmp_path / "shards", "train")
    prepare(tmp_path / "all", TABLE, source)
    assert said(tmp_path / "all")[4] == ["second 4"]  # none is no caption beside another
    assert pictures_of(tmp_path / "all", "train") == train


def test_a_second_caption_means_what_is_said(tmp_path, source):
    write(source / "rows.tsv", [["0.png", "a"]])
    without = {name: value for name, value in TABLE.items() if name != "captions"}
    with pytest.raises(ConfigError, match=r"source\.captions: Field required"):
        prepare(tmp_path / "shards", without, source)


def test_a_picture_is_in_one_table(tmp_path, source):
    write(source / "rows.tsv", [[f"{number}.png", f"{number}"] for number in range(12)])
    write(source / "held.tsv", [[f"./{number}.png", "else"] for number in (15, 7, 16, 3)])
    own = TABLE | {"validation": {"name": "table", "table": "held.tsv"}}
    message = r"held.tsv:3: 7.png is a training picture too \(rows.tsv:9\), one of 2 .*leave them out"
    with pytest.raises(IngestError, match=message):
        prepare(tmp_path / "shards", own, source)
    write(source / "held.tsv", [[f"./{number}.png", "else"] for number in (15, 16)])
    prepare(tmp_path / "shards", own, source)
    assert pictures_of(tmp_path / "shards", "validation") == {15, 16}


def test_a_picture_has_one_class(tmp_path, source):
    table = TABLE | {"train": "rows.csv", "label": "class"}
    rows = [[f"{number}.png", f"{number}", "owl"] for number in range(20)]
    names = ("path", "caption", "class")
    write(source / "rows.csv", [*rows, ["5.png", "again", ""], ["./6.png", "again", "fox"]], names=names)
    with pytest.raises(IngestError, match=r"rows.csv:8 and rows.csv:23: 6.png is 'owl' in one and 'fox' in the other"):
        prepare(tmp_path / "shards", table, source, max_unreadable=1.0)
    write(source / "rows.csv", [["5.png", "again", ""], *rows], names=names)
    prepare(tmp_path / "shards", table, source)
    assert [row["label"] for row in every(tmp_path / "shards")] == [0] * 21  # none is no other class


# Forms


def test_tables_of_all_forms_say_the_same(tmp_path, source):
    """Captions in rows of their own, or as a list in one row."""
    pairs = [(f"{number}.png", f"{turn} of {number}", number % 3) for number in range(20) for turn in range(3)]
    names = ("path", "caption", "label")
    flat = [dict(zip(names, pair, strict=True)) for pair in pairs]
    nested = [
        {"path": f"{n}.png", "caption": [f"{turn} of {n}" for turn in range(3)], "label": n % 3} for n in range(20)
    ]
    texts = [[path, caption, str(label)] for path, caption, label in pairs]
    write(source / "a.csv", texts, names=names)
    write(source / "b.tsv", texts, names=names)
    write(source / "c.tsv", texts, names=None)
    write(source / "d.txt", texts, names=names, delimiter="|")
    (source / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    (source / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested))
    (source / "g.json").write_text(json.dumps(flat))
    (source / "h.json").write_text(json.dumps(nested))
    pq.write_table(pa.Table.from_pylist(flat), source / "i.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(nested), source / "j.parquet")
    (source / "m.parquet").mkdir()
    (source / "m.parquet/_SUCCESS").touch()
    for part in range(3):
        path = source / f"m.parquet/part-{part}.parquet"
        pq.write_table(pa.Table.from_pylist(flat[20 * part : 20 * part + 20]), path)
    floats = [row | {"label": float(row["label"]), "caption": row["caption"].encode()} for row in flat]
    pq.write_table(pa.Table.from_pylist(floats), source / "k.parquet")
    write(source / "l.csv", [[r["path"], json.dumps(r["caption"]), str(r["label"])] for r in nested], names=names)
    for name in ("a.csv", "b.tsv", "e.jsonl", "g.json"):
        (source / f"{name}.gz").write_bytes(gzip.compress((source / name).read_bytes()))
    table = TABLE | {"label": "label"}
    how = {"c.tsv": {"header": list(names)}, "d.txt": {"delimiter": "|"}}
    found = {}
    for path in sorted(source.glob("[a-z].*")):
        config = TableSource.parse(table | {"train": path.name} | how.get(path.name, {}), where="test")
        found[path.name] = list(list_table(config, source, Counter(), lambda: False))
    assert len(found) == 17
    assert all(entries == found["a.csv"] for entries in found.values())
    prepare(tmp_path / "shards", table | {"train": "a.csv"}, source)
    assert said(tmp_path / "shards") == {n: [f"{turn} of {n}" for turn in range(3)] for n in range(20)}
    assert Manifest.load(tmp_path / "shards").class_ids == ["0", "1", "2"]


def test_captions_of_coco(tmp_path, source):
    """Each split with its table in one folder and its pictures in another."""
    (source / "annotations").mkdir()
    for split, numbers in (("train2017", range(12)), ("val2017", range(12, 20))):
        (source / split).mkdir()
        for number in numbers:
            (source / f"{number}.png").rename(source / split / f"{number:012d}.png")
        images = [{"id": n, "file_name": f"{n:012d}.png", "license": 3} for n in numbers]
        notes = [{"id": 100 * n + k, "image_id": n, "caption": f"{n} {k}"} for n in numbers if n != 3 for k in range(5)]
        content = {"info": {}, "images": images, "annotations": notes}
        (source / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    coco = TABLE | {"train": "annotations/captions_train2017.json", "folder": "train2017", "path": "file_name"}
    held = {"name": "table", "table": "annotations/captions_val2017.json", "folder": "val2017"}
    prepare(tmp_path / "shards", coco | {"validation": held}, source)
    assert said(tmp_path / "shards") == {n: [f"{n} {k}" for k in range(5)] if n != 3 else [""] for n in range(20)}
    assert pictures_of(tmp_path / "shards", "validation") == set(range(12, 20))
    prepare(tmp_path / "own", coco, source)  # without a table for validation
    assert len(every(tmp_path / "own")) == 56

    path = source / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 99, "caption": "of none"}, None]
    path.write_text(json.dumps(content))
    prepare(tmp_path / "lost", coco, source, max_unreadable=0.1)
    assert set(listed(tmp_path / "lost")) == {f"{coco['train']} annotations[{n}]" for n in (55, 56)}
    path.write_text(json.dumps(content | {"images": [*content["images"], content["images"][0]]}))
    with pytest.raises(IngestError, match=r"images\[12\] has no id of its own"):
        prepare(tmp_path / "twice", coco, source, max_unreadable=1.0)


def test_objects_may_leave_out_what_is_null(tmp_path, source):
    rows = [{"path": f"{number}.png"} | ({"caption": "a"} if number > 2 else {}) for number in range(20)]
    (source / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "shards", TABLE | {"train": "rows.jsonl"}, source)
    assert said(tmp_path / "shards") == {n: ["a"] if n > 2 else [""] for n in range(20)}
    (source / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        with pytest.raises(IngestError, match=rf"{name}: no column 'pth'; did you mean 'path'\?; it has path"):
            prepare(tmp_path / "other", TABLE | {"train": name, "path": "pth"}, source, max_unreadable=1.0)


NULLS = [None, float("nan"), "", []]
NO_TEXTS = [
    3,
    0.5,
    True,
    {"a": 1},
    ["a", 3],
    [["a"]],
    "['a', 'b']",
    "['a' 'b']",
    b"\xe9".decode(errors="surrogateescape"),
]


def test_captions_that_are_no_texts(tmp_path, source):
    """Null is no caption; what is no text is left out and counted, never turned into one."""
    values = ["fine", *NULLS, *NO_TEXTS, "[1]", "[sic]"]
    rows = [json.dumps({"path": f"{number}.png", "caption": value}) for number, value in enumerate(values)]
    (source / "rows.jsonl").write_text("\n".join(rows), errors="surrogateescape")
    host = prepare(tmp_path / "shards", TABLE | {"train": "rows.jsonl"}, source, max_unreadable=0.9)
    assert host.facts["unreadable"] == len(NO_TEXTS)
    assert said(tmp_path / "shards") == {0: ["fine"], 1: [""], 2: [""], 3: [""], 4: [""], 14: ["[1]"], 15: ["[sic]"]}
    assert listed(tmp_path / "shards")["5.png"] == "caption is no text (rows.jsonl:6)"
    assert (
        listed(tmp_path / "shards")["11.png"]
        == "caption is a list as Python prints it; write it as JSON (rows.jsonl:12)"
    )


def test_classes_are_texts_and_integers(tmp_path, source):
    values = ["a", "3", 3, 3.0, -1, None, "", float("nan"), True, False, 0.5, [], 2.0**60]
    rows = [json.dumps({"path": f"{number}.png", "label": value}) for number, value in enumerate(values)]
    (source / "old.tsv.jsonl").write_text("\n".join(rows))
    table = TABLE | {"train": "old.tsv.jsonl", "caption": None, "label": "label"}
    prepare(tmp_path / "shards", table, source, max_unreadable=0.9)
    names = [*Manifest.load(tmp_path / "shards").class_ids, None]
    assert {BY_IMAGE[row["image"]]: names[row["label"]] for row in every(tmp_path / "shards")} == (
        {0: "a", 1: "3", 2: "3", 3: "3", 4: "-1"} | dict.fromkeys((5, 6, 7))
    )
    assert set(listed(tmp_path / "shards").values()) == {
        f"label is no text (old.tsv.jsonl:{line})" for line in range(9, 14)
    }


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_of_parquet_need_not_be_utf8(tmp_path, source, kind):
    values = [f"{number}".encode() for number in range(20)]
    values[3] = b"caf\xe9"
    # Written unchecked, as other writers do.
    captions = pa.array(values, pa.binary()).view(pa.string()) if kind == pa.string() else pa.array(values, pa.binary())
    captions = captions.cast(pa.large_binary()).view(kind) if kind == pa.large_string() else captions
    if pa.types.is_dictionary(kind):
        captions = pa.DictionaryArray.from_arrays(pa.array(range(20), pa.int32()), captions.view(pa.string()))
    paths = [f"{number}.png" for number in range(20)]
    pq.write_table(pa.table({"path": paths, "caption": captions}), source / "rows.parquet")
    prepare(tmp_path / "shards", TABLE | {"train": "rows.parquet"}, source, max_unreadable=0.05)
    assert listed(tmp_path / "shards") == {"3.png": "caption is not UTF-8 (rows.parquet[3])"}
    assert said(tmp_path / "shards")[4] == ["4"]


def test_lists_of_parquet_need_not_be_utf8(tmp_path, source):
    texts = pa.array([b"a", b"caf\xe9", *(b"c" for _ in range(18))], pa.binary()).view(pa.string())
    lists = pa.ListArray.from_arrays(pa.array(range(21), pa.int32()), texts)
    pq.write_table(pa.table({"path": [f"{n}.png" for n in range(20)], "caption": lists}), source / "rows.parquet")
    prepare(tmp_path / "shards", TABLE | {"train": "rows.parquet"}, source, max_unreadable=0.05)
    assert listed(tmp_path / "shards") == {"1.png": "caption is not UTF-8 (rows.parquet[1])"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"", "an empty table"),
        (
            "rows.csv",
            b"0.png,a\n",
            r"no column 'path'; it has 0.png, a; where the first line is a row already, set header",
        ),
        ("rows.tsv", b"path\tcaption\tpath\n", "2 columns are called 'path'; rename them"),
        (
            "rows.json",
            b'{"path": {"0": "0.png"}}',
            r"expected a list of objects \(pandas: orient='records'\).*keys path",
        ),
        ("rows.json", b'{"path": "0.png"}\n{"path": "1.png"}\n', "no JSON .*one object per line is a .jsonl"),
        ("rows.json", b"3", "expected a list of objects"),
        ("rows.json", b"[" * 100_000, "no JSON"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read to its end"),
        ("rows.csv.gz", gzip.compress(b"path,caption\n0.png,a\n" * 1000, mtime=0)[:-20], "cannot be read to its end"),
        ("rows.jsonl.gz", gzip.compress(b"\n" * 10_000_000, mtime=0), "unpacks to over 200 times its size"),
        ("rows.parquet", b"PAR1 no parquet", "no whole parquet file"),
    ],
)
def test_tables_that_are_none(tmp_path, source, name, content, message):
    (source / name).write_bytes(content)
    with pytest.raises(IngestError, match=rf"source/{name}.*{message}"):
        prepare(tmp_path / "shards", TABLE | {"train": name}, source, max_unreadable=1.0)


def test_pictures_within_a_table_are_of_another_source(tmp_path, source):
    image = pa.array([{"bytes": picture(0), "path": "0.png"}])
    pq.write_table(pa.table({"path": image, "caption": ["a"]}), source / "rows.parquet")
    with pytest.raises(IngestError, match=r"column 'path' holds struct<.*The source parquet reads pictures"):
        prepare(tmp_path / "shards", TABLE | {"train": "rows.parquet"}, source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "rows.txt"}, r"rows.txt: a table is a .csv, .*any other text needs a delimiter"),
        ({"train": "rows.parquet.gz"}, r"rows.parquet.gz: a table is a"),
        ({"train": "rows.json", "header": ["path", "caption"]}, r"rows.json has no header"),
        ({"train": "rows.parquet", "delimiter": "|", "quoting": True}, r"has no delimiter and no quoting"),
        ({"header": ["path", "captoin"]}, r"no column 'caption' in header; did you mean 'captoin'"),
        ({"header": ["path", "path"]}, r"header: 'path' comes twice"),
        ({"delimiter": "||"}, r"delimiter: expected one letter"),
        ({"roots": ["images"]}, r"roots.0: expected a path from the root /"),
        ({"folder": "../images"}, r"folder: expected a path within the source folder"),
        ({"validation": {"name": "table", "table": "held.xml"}}, r"held.xml: a table is a"),
    ],
)
def test_wrong_parameters_are_named_before_anything_is_read(changes, message):
    with pytest.raises(ConfigError, match=message):
        TableSource.parse(TABLE | changes, where="test")


# Paths


def test_absolute_paths_lie_under_a_root(tmp_path, source):
    away = tmp_path / "away"
    away.mkdir()
    for number in range(20, 30):
        (away / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "linked").symlink_to(source)
    paths = [f"{number}.png" for number in range(18)] + [f"{source}/18.png", f"{tmp_path}/linked/sub/../19.png"]
    paths += [f"{away}/{number}.png" for number in range(20, 30)] + [f"{source}//3.png", f"{away}/./20.png"]
    write(source / "rows.tsv", [[path, "a"] for path in paths])
    with pytest.raises(
        IngestError, match=r"rows.tsv:22: path .*away/20.png' leaves the source.*prepare_data.source.roots"
    ):
        prepare(tmp_path / "refused", TABLE, tmp_path / "linked", max_unreadable=1.0)
    table = TABLE | {"roots": [str(away)]}
    host = prepare(tmp_path / "shards", table, tmp_path / "linked")
    assert sorted(said(tmp_path / "shards")) == list(range(30))
    assert host.facts["duplicates"] == 2
    (away / "20.png").unlink()
    (away / "20.png").symlink_to(source / "0.png")
    prepare(tmp_path / "links", table, tmp_path / "linked", max_unreadable=0.1)
    assert "a link leads outside of" in listed(tmp_path / "links")[f"{away}/20.png"]
    prepare(tmp_path / "allowed", table | {"outside_links": True}, tmp_path / "linked")
    with pytest.raises(IngestError, match="gone: no such folder; correct prepare_data.source.roots"):
        prepare(tmp_path / "gone", TABLE | {"roots": [str(tmp_path / "gone")]}, source)


@pytest.mark.parametrize("path", ["/etc/hostname", "{away}/../secret.png", "{away}x/0.png", "../source-2/0.png"])
def test_roots_end_where_they_end(tmp_path, source, path):
    for name in ("away", "awayx"):
        (tmp_path / name).mkdir()
    write(source / "rows.tsv", [[path.format(away=tmp_path / "away"), "a"]])
    with pytest.raises(IngestError, match=r"rows.tsv:2: path .* leaves the source folder"):
        prepare(tmp_path / "shards", TABLE | {"roots": [str(tmp_path / "away")]}, source, max_unreadable=1.0)


def test_paths_are_seen_from_a_folder(tmp_path, source):
    (source / "in").mkdir()
    os.rename(source / "0.png", source / "in" / "0.png")
    write(source / "rows.tsv", [["0.png", "a"], *([f"../{n}.png", "b"] for n in range(1, 20)), ["../in/0.png", "c"]])
    prepare(tmp_path / "shards", TABLE | {"folder": "in"}, source)
    assert said(tmp_path / "shards") == {0: ["a", "c"]} | {number: ["b"] for number in range(1, 20)}


# Size


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet"])
def test_memory_does_not_grow_with_what_rows_say(tmp_path, name):
    rows = [[f"{number % 500}.png", f"{number} " * 700] for number in range(1500)]
    if name == "rows.parquet":
        pq.write_table(pa.table(list(zip(*rows, strict=True)), names=["path", "caption"]), tmp_path / name)
    elif name == "rows.jsonl":
        with (tmp_path / name).open("w") as file:
            file.writelines(json.dumps({"path": path, "caption": caption}) + "\n" for path, caption in rows)
    else:
        write(tmp_path / name, rows)
    size = sum(len(caption) for _, caption in rows)
    del rows
    config = TableSource.parse(TABLE | {"train": name}, where="test")
    tracemalloc.start()
    entries = sum(1 for _ in list_table(config, tmp_path, Counter(), lambda: False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entries == 1500
    assert peak < size / 2


def test_a_json_is_read_whole_up_to_a_limit(tmp_path, source, monkeypatch):
    monkeypatch.setattr(table_rows, "LARGEST_JSON", 1000)
    content = json.dumps([{"path": "0.png", "caption": "x" * 1000}])
    (source / "rows.json").write_text(content)
    (source / "rows.json.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("rows.json", "rows.json.gz"):
        with pytest.raises(
            IngestError, match=rf"{name}: more than 1,000 characters.*write one object per line to a .jsonl"
        ):
            prepare(tmp_path / "shards", TABLE | {"train": name}, source)


def test_a_request_to_stop_is_heard_while_rows_are_read(tmp_path):
    write(tmp_path / "rows.tsv", [["0.png", "a"]])
    with pytest.raises(Stopped):
        next(list_table(TableSource.parse(TABLE, where="test"), tmp_path, Counter(), lambda: True))
