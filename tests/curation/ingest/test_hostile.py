"""Sources of strangers: names that are no text, links that lead away, offsets that are none, files that fill memory."""

import csv
import gzip
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.ingest.test_imagenet import devkit
from curation.ingest.test_ingest import FOLDER, TABLE, every, picture, prepare, table_source, write_pool
from PIL import Image

from vtp.artefact import digest, read_json
from vtp.config import ConfigError
from vtp.curation.ingest import imagenet
from vtp.curation.ingest.imagenet import DEVKIT, read_devkit
from vtp.curation.ingest.shard_workers import IngestError
from vtp.data.shards import KEY, Manifest

ACTING = ("\x1b[31m\nerror: x", "\x85", "\u202egnp", "=1+1", "tab\t", "\r")


def listed(shards):
    with (shards / "unreadable.csv").open(newline="", encoding="utf-8") as file:
        return {row["place"]: row["reason"] for row in csv.DictReader(file)}


def make(root, names, content=None):
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(picture(number) if content is None else content)
    return root


def test_names_need_not_be_utf8(tmp_path):
    """Read where they can be, counted and listed where they cannot; all that is written can be read again."""
    source = make(tmp_path / "source", [b"caf\xe9/%d-\xfc.png" % n for n in range(8)])
    make(source, [b"caf\xe9/none-\xff.png"], b"no picture")
    host = prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.2)
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.class_ids == [r"caf\xe9"]
    rows = every(tmp_path / "shards")
    assert {row["image"] for row in rows} == {picture(number) for number in range(8)}
    assert all(KEY.fullmatch(row["key"]) for row in rows)
    assert host.facts["unreadable"] == 1
    (place,) = listed(tmp_path / "shards")
    assert place == r"caf\xe9/none-\xff.png"
    assert digest(source) != digest(make(tmp_path / "other", [b"caf\xe9/none-\xff.png"], b"no picture"))


def test_two_folders_are_no_class_by_chance(tmp_path):
    source = make(tmp_path / "source", [b"caf\xe9/a.png", rb"caf\xe9/b.png"])
    with pytest.raises(IngestError, match="two folders are called"):
        prepare(tmp_path / "shards", FOLDER, source)


@pytest.mark.parametrize("name", ACTING)
def test_names_are_escaped_in_messages_and_tables(tmp_path, name):
    source = make(tmp_path / "source", [b"a/%d.png" % n for n in range(8)])
    make(source, [os.fsencode(f"{name}.png")], b"no picture")
    with pytest.raises(IngestError) as raised:
        prepare(tmp_path / "refused", FOLDER, source)
    assert f"{name}.png" not in str(raised.value) or name == "=1+1"
    assert not set(str(raised.value)) & set("\x1b\x85\u202e\t\r")
    assert "\nerror" not in str(raised.value)
    prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.2)
    (place,) = listed(tmp_path / "shards")
    assert place.isprintable()
    assert not place.startswith(("=", "\t", "\r"))


def test_paths_and_texts_of_tables_that_are_none(tmp_path):
    """NUL, half characters, links to nothing: left out, counted, named."""
    source = table_source(tmp_path / "source")
    (source / "pipe.png").symlink_to("nowhere.png")
    odd = [
        {"file": "0.png\0", "text": "nul", "class": "1"},
        {"file": "\ud800.png", "text": "half", "class": "1"},
        {"file": "1.png", "text": "half \ud83d", "class": "1"},
        {"file": "2.png", "text": "half", "class": "\udc00"},
        {"file": "pipe.png", "text": "a", "class": "1"},
        {"file": "x" * 5000, "text": "a", "class": "1"},
        {"file": ["a"], "text": "a", "class": "1"},
        {"file": "4.png", "text": {"a": 1}, "class": "1"},
        {"file": "5.png", "text": "a", "class": 1.5},
    ]
    with (source / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in odd)
    host = prepare(tmp_path / "shards", TABLE | {"train": "rows.jsonl"}, source, max_unreadable=0.5)
    assert host.facts["unreadable"] == len(odd)
    reasons = listed(tmp_path / "shards")
    assert reasons[r"0.png\x00"] == "path holds NUL (rows.jsonl:15)"
    assert "half of a character" in reasons[r"\ud800.png"]
    assert reasons["1.png"] == "caption is not UTF-8 (rows.jsonl:17)"
    assert reasons["2.png"] == "label is not UTF-8 (rows.jsonl:18)"
    assert "No such file" in reasons["pipe.png"]
    with (source / "rows.csv").open("ab") as file:
        file.write(b"0.png\0,text,1\n")
    with pytest.raises(IngestError, match=r"rows.csv:16: holds NUL"):
        prepare(tmp_path / "other", TABLE, source, max_unreadable=0.5)


def test_lines_without_an_end_are_refused(tmp_path, monkeypatch):
    source = table_source(tmp_path / "source")
    monkeypatch.setattr("vtp.curation.ingest.table_rows.LONGEST_LINE", 1000)
    for name in ("rows.csv", "rows.jsonl"):
        with (source / name).open("a") as file:
            file.write("x" * 2000)
        with pytest.raises(IngestError, match=rf"{name}:\d+: a line of more than 1,000 characters"):
            prepare(tmp_path / "shards", TABLE | {"train": name}, source)


@pytest.mark.parametrize("name", ["b\0", "\ud800"])
def test_parameters_hold_no_such_texts(tmp_path, name):
    with pytest.raises(ConfigError, match="within the source folder"):
        prepare(tmp_path / "shards", FOLDER | {"train": name}, tmp_path)


ODD_PLACES = {
    "negative offset": {"offset": -1},
    "negative size": {"size": -5},
    "the sign of a whole file": {"offset": 0, "size": -1},
    "no offset": {"offset": None},
    "no size": {"size": None},
    "far away": {"offset": 2**62},
    "overflow": {"offset": 2**63 - 1, "size": 2**63 - 1},
    "NUL": {"tar": "tars/a.tar\0"},
    "outside": {"tar": "../secret"},
    "absolute": {"tar": "/etc/hostname"},
    "folder": {"tar": "tars"},
    "link": {"tar": "tars/link.tar"},
    "caption": {"caption": b"caf\xe9"},
    "problem": {"error": b"caf\xe9\x1b[31m"},
}


@pytest.mark.parametrize("change", ODD_PLACES.values(), ids=ODD_PLACES)
def test_rows_of_a_pool_that_cannot_be_used_are_counted(tmp_path, change):
    write_pool(tmp_path)
    (tmp_path / "secret").write_bytes(picture(0))
    (tmp_path / "pool" / "tars" / "link.tar").symlink_to(tmp_path / "secret")
    part = tmp_path / "selection" / "part-00002.parquet"
    table = pq.read_table(part)
    for name, value in change.items():
        column = table[name].to_pylist()
        index = table.schema.get_field_index(name)
        column[5] = value
        kind = table.schema.field(name).type
        if isinstance(value, bytes):
            column = [one.encode() if isinstance(one, str) else one for one in column]
            changed = pa.array(column, pa.binary()).view(pa.string())
        else:
            changed = pa.array(column, kind)
        table = table.set_column(index, name, changed)
    pq.write_table(table, part)
    source = {"name": "pool", "validation_samples": 6}
    host = prepare(tmp_path / "shards", source, tmp_path / "pool", selection=tmp_path / "selection", max_unreadable=0.1)
    assert host.facts["unreadable"] == 2  # and the failed download
    assert len(listed(tmp_path / "shards")) == 2
    assert (tmp_path / "shards" / "unreadable.csv").read_text().isascii()


def test_offsets_of_any_type_are_counted(tmp_path):
    """Decimals, texts and floats with NaN in the place of whole numbers."""
    write_pool(tmp_path)
    for part in sorted((tmp_path / "selection").iterdir()):
        table = pq.read_table(part)
        sizes = [
            float(size) if size is not None and place % 2 else None
            for place, size in enumerate(table["size"].to_pylist())
        ]
        index = table.schema.get_field_index("size")
        pq.write_table(table.set_column(index, "size", pa.array(sizes, pa.float64())), part)
    source = {"name": "pool", "validation_samples": 6}
    host = prepare(tmp_path / "shards", source, tmp_path / "pool", selection=tmp_path / "selection", max_unreadable=0.9)
    assert 0 < host.facts["unreadable"] < 32
    assert any("no whole number" in reason for reason in listed(tmp_path / "shards").values())


@pytest.mark.parametrize("kind", ["file", "folder", "nested"])
def test_links_out_of_a_folder_are_refused_unless_they_may(tmp_path, kind):
    source = make(tmp_path / "source", [b"a/%d.png" % n for n in range(8)])
    away = make(tmp_path / "away", [b"b/secret.png"], picture(99))
    (source / "inner").symlink_to("a")
    match kind:
        case "file":
            (source / "a" / "link.png").symlink_to(away / "b" / "secret.png")
        case "folder":
            (source / "link").symlink_to(away)
        case "nested":
            (source / "a" / "one").symlink_to("../two")
            (source / "two").symlink_to(away / "b")
    with pytest.raises(IngestError, match=r"(link|one|two).*a link leads outside of .*`outside_links: true`"):
        prepare(tmp_path / "refused", FOLDER, source)
    prepare(tmp_path / "shards", FOLDER | {"outside_links": True}, source)
    images = [row["image"] for row in every(tmp_path / "shards")]
    assert picture(99) in images
    assert sum(image != picture(99) for image in images) == 16  # those behind the link inside count twice
    if kind == "file":
        host = prepare(tmp_path / "counted", FOLDER, source, max_unreadable=0.2)
        assert host.facts["unreadable"] == 2
        assert all("`outside_links: true`" in reason for reason in listed(tmp_path / "counted").values())


def test_links_of_tables_and_splits_stay_inside_too(tmp_path):
    source = table_source(tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(picture(99))
    (source / "rows.csv").rename(tmp_path / "rows.csv")
    (source / "rows.csv").symlink_to(tmp_path / "rows.csv")
    with pytest.raises(IngestError, match=r"rows.csv: a link leads outside .*outside_links"):
        prepare(tmp_path / "shards", TABLE, source)
    (source / "0.png").unlink()
    (source / "0.png").symlink_to(tmp_path / "secret.png")
    prepare(tmp_path / "allowed", TABLE | {"outside_links": True}, source)
    with pytest.raises(IngestError, match=r"0.png: a link leads outside of the source; .*outside_links"):
        prepare(tmp_path / "second", TABLE | {"train": "rows.jsonl"}, source)
    (source / "train").symlink_to(tmp_path)
    with pytest.raises(IngestError, match=r"train: a link leads outside .*outside_links"):
        prepare(tmp_path / "third", FOLDER | {"train": "train"}, source)


def test_links_end(tmp_path):
    """To themselves, to a folder above, crosswise: in listings and in digests."""
    source = make(tmp_path / "source", [b"a/%d.png" % n for n in range(8)])
    (source / "a" / "self.png").symlink_to("self.png")
    (source / "a" / "above").symlink_to("..")
    host = prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.2)
    assert len(every(tmp_path / "shards")) == 8
    assert "symbolic links" in listed(tmp_path / "shards")["a/self.png"]
    assert host.facts["ignored_files"] == 1
    digest(source)
    for number in range(12):
        (source / f"c{number}").mkdir()
        for other in range(12):
            (source / f"c{number}" / f"l{other}").symlink_to(f"../c{other}")
    for work in (lambda: prepare(tmp_path / "other", FOLDER, source), lambda: digest(source)):
        with pytest.raises(ValueError, match="links lead to .* on more than 100 ways; take some out"):
            work()


def test_a_devkit_does_not_fill_memory(tmp_path, monkeypatch):
    devkit(tmp_path / f"{DEVKIT}.tar.gz")
    truth = read_devkit(tmp_path)
    assert len(truth) == 7
    monkeypatch.setattr(imagenet, "LARGEST_DEVKIT", 1 << 20)
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo(f"{DEVKIT}/large")
            info.type, info.size = kind, 8 << 20
            tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT))
            tar.fileobj.write(bytes(8 << 20))
        (tmp_path / f"{DEVKIT}.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
        with pytest.raises(IngestError, match="unpacks to more than 1048576 bytes"):
            read_devkit(tmp_path)


def test_every_kind_of_failing_decoder_is_counted(tmp_path, monkeypatch):
    source = make(tmp_path / "source", [b"a/%d.png" % n for n in range(30)])
    plain, errors = Image.open, [TypeError, KeyError, ZeroDivisionError, MemoryError, OverflowError]

    def failing(*arguments, **more):
        if errors:
            raise errors.pop()
        return plain(*arguments, **more)

    monkeypatch.setattr(Image, "open", failing)
    host = prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.9)
    assert host.facts["unreadable"] == 5
    assert len(listed(tmp_path / "shards")) == 5
    assert read_json(tmp_path / "shards" / "manifest.json")
