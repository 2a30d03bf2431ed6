"""Any source to shards: awkward pictures, limits, interruptions, tables, pools, places elsewhere."""

import csv
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_stages import QuietHost
from tiny import ROOT, merged, wait_for, write_params

from stages import prepare_data
from stages.prepare_data import PrepareData
from stages.runner.environment import Interrupted, Runtime
from vtp.artefact import digest
from vtp.config import Config, ConfigError
from vtp.curation.ingest.encode import CentreCrop
from vtp.curation.ingest.folders import FolderSource, HeldOut, OwnFolder
from vtp.curation.ingest.listed import LISTED, Rows, read_listed_rows
from vtp.curation.ingest.parquet import OwnFiles, ParquetSource
from vtp.curation.ingest.pool import PoolSource
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.tables import OwnTable, TableSource
from vtp.curation.rows import order_of
from vtp.data.shards import KEY, Manifest
from vtp.layers.decode import decode_rgb
from vtp.processes import WorkerDied

FOLDER = {"name": "folder", "train": ".", "validation": {"name": "held_out", "share": 0.25}}
FOLDER |= {"caption": "a {}", "templates": ["a {}"]}
TABLE = {"name": "table", "train": "rows.csv", "validation": {"name": "held_out", "share": 0.3}}
TABLE |= {"path": "file", "caption": "text", "captions": "all", "label": "class", "templates": []}


class Many(QuietHost):
    """Two processes."""

    processes = property(lambda self: 2)


def prepare(shards, source, folder=None, *, selection=None, kind=QuietHost, **changes):
    """Run the stage in this process; what it was given to work with."""
    values = {"source": source, "samples_per_shard": 4, "image": {"name": "keep"}}
    values |= {"max_unreadable": 0.0, "location": None} | changes
    host = kind(shards.with_name(f".{shards.name}") / "folder", shards.parent, Runtime())
    host.folder.mkdir(parents=True, exist_ok=True)
    config = PrepareData.parse(values, where="test")
    prepare_data.run(config, source=folder, selection=selection, shards=shards, host=host)
    return host


def rows_of(shards, split):
    """All samples of a split, read through the tables."""
    found = []
    for shard in Manifest.load(shards).splits[split].shards:
        content = (shards / shard.name).read_bytes()
        for row in pq.read_table((shards / shard.name).with_suffix(".parquet")).to_pylist():
            row["image"] = content[row["offset"] : row["offset"] + row["size"]]
            assert decode_rgb(row["image"]).size == (row["width"], row["height"])
            found.append(row)
    return found


def every(shards):
    return rows_of(shards, "train") + rows_of(shards, "validation")


def picture(number, size=(12, 10), mode="RGB", form="PNG", **how):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form, **how)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of pictures; names that no tar member may have."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    for number in range(24):
        path = root / ("red_fox", "owl", "10")[number % 3] / f"a b.{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("made") / "shards"
    prepare(made, FOLDER, folder)
    return made


def test_a_folder_per_class(shards):
    manifest = Manifest.load(shards)
    assert (manifest.class_ids, manifest.classes) == (["10", "owl", "red_fox"], ["10", "owl", "red fox"])
    assert sum(split.samples for split in manifest.splits.values()) == 24
    assert 0 < manifest.splits["validation"].samples < 12
    rows = every(shards)
    assert all(KEY.fullmatch(row["key"]) for row in rows)
    assert len({row["key"] for row in rows}) == 24
    by_image = {row["image"]: row for row in rows}
    for number in range(24):
        row = by_image[picture(number)]
        name = ("red fox", "owl", "10")[number % 3]
        assert (manifest.classes[row["label"]], row["caption"]) == (name, f"a {name}")
    train = manifest.splits["train"]
    captions = [row["caption"] for row in rows_of(shards, "train")]
    assert train.mean_caption_length == pytest.approx(sum(map(len, captions)) / len(captions))
    assert train.class_counts == np.bincount([row["label"] for row in rows_of(shards, "train")], minlength=3).tolist()
    assert [shard.sha256 for shard in train.shards] == [digest(shards / shard.name) for shard in train.shards]


def test_webdataset_reads_the_tars(shards):
    import webdataset

    paths = sorted(map(str, shards.glob("*.tar")))
    read = {s["__key__"]: s for s in webdataset.WebDataset(paths, shardshuffle=False).decode("pil")}
    rows = every(shards)
    assert len(read) == len(rows)
    for row in rows:
        sample = read[row["key"]]
        assert sample["txt"] == row["caption"]
        assert sample["json"] == {name: row[name] for name in ("key", "width", "height", "label", "category", "kind")}
        assert sample["png"].size == (row["width"], row["height"])


def test_equal_bytes_whatever_the_processes_and_the_order_of_listing(folder, shards, tmp_path):
    copy = tmp_path / "pictures"
    for path in sorted(folder.rglob("*.png"), reverse=True):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    prepare(tmp_path / "shards", FOLDER, copy, kind=Many)
    assert digest(tmp_path / "shards") == digest(shards)


def test_links_are_followed_and_circles_end(folder, shards, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for entry in folder.iterdir():
        (source / entry.name).symlink_to(entry)
    (source / "circle").symlink_to(source)
    with pytest.raises(IngestError, match=r"source/\w+: a link leads outside of .*`outside_links: true`"):
        prepare(tmp_path / "refused", FOLDER, source)
    prepare(tmp_path / "shards", FOLDER | {"outside_links": True}, source)
    assert digest(tmp_path / "shards") == digest(shards)
    assert digest(source) == digest(folder)  # so that a run knows its input behind links


AWKWARD = {
    "rgb.jpg": picture(1, form="JPEG"),
    "grey.jpg": picture(2, mode="L", form="JPEG"),
    "webp.webp": picture(3, form="WEBP"),
    "wrong-name.gif": picture(4, form="JPEG"),
    "cmyk.jpg": picture(5, mode="CMYK", form="JPEG"),
    "alpha.png": picture(6, mode="RGBA", form="PNG"),
    "palette.png": picture(7, mode="P", form="PNG"),
    "animated.webp": picture(8, form="WEBP", save_all=True, append_images=[Image.new("RGB", (12, 10))]),
    "gif.gif": picture(9, mode="P", form="GIF"),
    "bitmap.bmp": picture(10, form="BMP"),
    "tiff.tif": picture(11, form="TIFF"),
}
UNTOUCHED = {"rgb.jpg": "jpg", "grey.jpg": "jpg", "webp.webp": "webp", "wrong-name.gif": "jpg"}


def deep_png():
    """RGB with 16 bits, which Pillow reads and cannot write."""
    lines = np.linspace(0, 65535, 10 * 12 * 3).astype(">u2").reshape(10, 36)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 12, 10, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def awkward(root):
    root.mkdir()
    for name, content in AWKWARD.items():
        (root / name).write_bytes(content)
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "turned.jpg").write_bytes(picture(12, size=(16, 8), form="JPEG", exif=exif))
    wide = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)).save(wide, "PNG")
    (root / "wide.png").write_bytes(wide.getvalue())
    (root / "deep.png").write_bytes(deep_png())
    (root / "cut.jpg").write_bytes(picture(13, size=(90, 90), form="JPEG")[:-900])
    (root / "empty.png").write_bytes(b"")
    bomb = bytearray(picture(14))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # a PNG's header says its size there, and has a checksum
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(bomb)
    (root / "page.jpg").write_bytes(b"<html>not found</html>")
    (root / "notes.txt").write_bytes(b"x")
    (root / ".hidden.png").write_bytes(b"x")
    return root


def test_awkward_pictures(tmp_path):
    host = prepare(tmp_path / "shards", FOLDER, awkward(tmp_path / "source"), max_unreadable=0.3)
    names = {row["image"]: row for row in every(tmp_path / "shards")}
    for name in UNTOUCHED:
        assert AWKWARD[name] in names, name
    rows = every(tmp_path / "shards")
    assert len(rows) == len(AWKWARD) + 3
    by_name = {row["key"].rpartition("-")[0]: row for row in rows}
    for name, row in by_name.items():
        opened = Image.open(io.BytesIO(row["image"]))
        assert (opened.mode in ("RGB", "L"), getattr(opened, "n_frames", 1)) == (True, 1), name
        assert opened.size == (row["width"], row["height"])  # upright without any tag
        assert (row["label"], row["image"][24] if row["image"].startswith(b"\x89PNG") else 8) == (-1, 8)  # bits
    turned = by_name["turned_jpg"]
    assert (turned["width"], turned["height"]) == (8, 16)
    wide = np.asarray(Image.open(io.BytesIO(by_name["wide_png"]["image"])))
    assert wide[0, 0, 0] == 0
    assert wide[-1, -1, 0] == 255
    with (tmp_path / "shards" / "unreadable.csv").open(newline="") as file:
        reasons = {row["place"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"cut.jpg", "empty.png", "bomb.png", "page.jpg"}
    assert "too many pixels" in reasons["bomb.png"]
    assert host.facts["unreadable"] == 4
    assert host.facts["ignored_files"] == 2


def test_too_many_unreadable_pictures_stop_the_stage(tmp_path):
    source = awkward(tmp_path / "source")
    with pytest.raises(IngestError, match=r"\d of 18 pictures are unreadable.*max_unreadable allows 3") as error:
        prepare(tmp_path / "shards", FOLDER, source, max_unreadable=0.2)
    assert "page.jpg: not an image" in str(error.value)
    assert not (tmp_path / "shards").exists()
    for number in range(2000):
        (source / f"page{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(IngestError, match="unreadable so far"):
        prepare(tmp_path / "other", FOLDER, source, max_unreadable=0.002, samples_per_shard=50)
    assert len(list((tmp_path / ".other" / "folder" / "state").glob("*.json"))) < 30  # it did not go on to the end


def test_centre_crops_are_of_one_size(folder, tmp_path):
    prepare(tmp_path / "shards", FOLDER, folder, image={"name": "centre_crop", "size": 8})
    assert Manifest.load(tmp_path / "shards").image_size == 8
    assert {(row["width"], row["height"]) for row in every(tmp_path / "shards")} == {(8, 8)}


def table_source(root, lines=None):
    root.mkdir(exist_ok=True)
    for number in range(12):
        (root / f"{number}.png").write_bytes(picture(number))
    rows = [{"file": f"{i}.png", "text": f"number {i}", "class": str(i % 3)} for i in range(12)]
    rows.append({"file": "3.png", "text": "once more", "class": "0"})
    rows.append(rows[0])
    with (root / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "text", "class"])
        writer.writeheader()
        writer.writerows(rows)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_tables_of_any_form_give_equal_samples(tmp_path):
    source = table_source(tmp_path / "source")
    host = prepare(tmp_path / "a", TABLE, source)
    prepare(tmp_path / "b", TABLE | {"train": "rows.jsonl"}, source)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert host.facts["duplicates"] == 1
    assert sorted((row["caption"], row["label"]) for row in every(tmp_path / "a")) == sorted(
        [(f"number {i}", i % 3) for i in range(12)] + [("once more", 0)]
    )


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    source = table_source(tmp_path / "source")
    with (source / "rows.csv").open("ab") as file:
        file.write(b"4.png,caf\xe9,1\nmissing.png,gone,1\n,no path,1\n")
    prepare(tmp_path / "shards", TABLE, source, max_unreadable=0.3)
    with (tmp_path / "shards" / "unreadable.csv").open(newline="") as file:
        reasons = {row["place"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons["4.png"] == "caption is not UTF-8 (rows.csv:16)"
    assert "No such file" in reasons["missing.png"]
    assert reasons["rows.csv:18"] == "no path"
    (source / "rows.jsonl").write_text('{"file": "1.png", "text": null, "class": 2}\n[1]\n{"file"\n')
    with pytest.raises(IngestError, match="2 of 3 pictures") as error:
        prepare(tmp_path / "other", TABLE | {"train": "rows.jsonl"}, source, max_unreadable=0.3)
    assert "no JSON" in str(error.value)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "a/../../secret.png"])
def test_paths_stay_in_the_source(tmp_path, path):
    source = table_source(tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(picture(0))
    with (source / "rows.csv").open("a") as file:
        file.write(f"{path},text,1\n")
    with pytest.raises(IngestError, match="rows.csv:16: path .* leaves the source folder"):
        prepare(tmp_path / "shards", TABLE, source, max_unreadable=1.0)
    with pytest.raises(ConfigError, match="within the source folder"):
        prepare(tmp_path / "shards", TABLE | {"train": path}, source)


def test_validation_of_its_own(tmp_path):
    source = table_source(tmp_path / "source")
    for name in ("a.png", "b.png"):
        (source / name).write_bytes(picture(0))
    (source / "held.csv").write_text("file,text,class\na.png,zero,0\nb.png,one,9\n")
    prepare(tmp_path / "a", TABLE | {"validation": {"name": "table", "table": "held.csv"}}, source)
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.class_ids == ["0", "1", "2", "9"]
    assert (manifest.splits["train"].samples, manifest.splits["validation"].samples) == (13, 2)
    for name in ("train/x", "val/x"):
        (source / name).mkdir(parents=True)
        (source / name / "0.png").write_bytes(picture(0))
    own = FOLDER | {"train": "train", "validation": {"name": "folder", "folder": "val"}}
    prepare(tmp_path / "b", own, source)
    assert len(every(tmp_path / "b")) == 2
    with pytest.raises(ConfigError, match=r"templates\.0: expected \{\} where the class stands"):
        prepare(tmp_path / "c", own | {"templates": ["a class"]}, source)
    with pytest.raises(ConfigError, match="one lies in the other"):
        prepare(tmp_path / "c", own | {"train": "."}, source)


def test_what_is_wrong_with_a_source_is_named(folder, tmp_path):
    with pytest.raises(IngestError, match="reads --source: add it"):
        prepare(tmp_path / "a", FOLDER)
    with pytest.raises(IngestError, match="reads no --selection: remove it"):
        prepare(tmp_path / "a", FOLDER, folder, selection=folder)
    with pytest.raises(IngestError, match="pictures/train: no such folder; .* holds 10, owl, red_fox"):
        prepare(tmp_path / "a", FOLDER | {"train": "train"}, folder)
    with pytest.raises(IngestError, match="no such table"):
        prepare(tmp_path / "b", TABLE, folder)
    source = table_source(tmp_path / "source")
    with pytest.raises(IngestError, match="no column 'caption'; it has file, text, class"):
        prepare(tmp_path / "c", TABLE | {"caption": "caption"}, source)
    with pytest.raises(ConfigError, match="no URL; give one such as s3://bucket/folder"):
        prepare(tmp_path / "d", FOLDER, folder, location="bucket/folder")


def write_pool(root, count=40):
    """A pool with its selection: `filter` took every row but the fifth ones."""
    (root / "pool" / "tars").mkdir(parents=True)
    (root / "selection").mkdir()
    contents, rows, offset = [], [], 0
    for number in range(count):
        content = picture(number, form="JPEG")
        contents.append(content)
        key = f"key.{number}" if number % 2 else f"{number:032x}"
        row = {"key": key, "order": int(order_of([key])[0]), "url": "http://x", "caption": f"picture {number}"}
        rows.append(row | {"tar": "tars/a.tar", "offset": offset, "size": len(content), "error": None})
        offset += len(content)
    rows[7] |= {"caption": None}
    rows[8] |= {"tar": None, "offset": None, "size": None, "error": "http 404"}
    (root / "pool" / "tars" / "a.tar").write_bytes(b"".join(contents))
    rows = sorted((row for i, row in enumerate(rows) if i % 5), key=lambda row: (row["order"], row["key"]))
    types = {"offset": pa.int64(), "size": pa.int64()}
    names = ("key", "url", "caption", "tar", "offset", "size", "error")
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    for part, some in enumerate((rows[:10], rows[10:11], rows[11:])):
        orders = pa.array([row.pop("order") for row in some], pa.uint64())
        table = pa.Table.from_pylist(some, schema=schema).append_column("order", orders)
        pq.write_table(table, root / "selection" / f"part-{part:05d}.parquet", row_group_size=3)
    return [row["caption"] for row in rows], contents


def test_a_pool_is_sliced_in_the_order_of_its_selection(tmp_path):
    captions, contents = write_pool(tmp_path)
    source = {"name": "pool", "validation_samples": 6}
    prepare(tmp_path / "shards", source, tmp_path / "pool", selection=tmp_path / "selection", max_unreadable=0.1)
    rows = rows_of(tmp_path / "shards", "validation") + rows_of(tmp_path / "shards", "train")
    assert [row["caption"] for row in rows] == [caption or "" for caption in captions if caption != "picture 8"]
    assert {row["image"] for row in rows} == {c for i, c in enumerate(contents) if i % 5 and i != 8}
    assert all(KEY.fullmatch(row["key"]) for row in rows)
    manifest = Manifest.load(tmp_path / "shards")
    assert sum(split.samples for split in manifest.splits.values()) == 31
    assert (manifest.classes, manifest.splits["train"].class_counts) == ([], [])
    assert "http 404" in (tmp_path / "shards" / "unreadable.csv").read_text()
    (tmp_path / "pool" / "tars" / "a.tar").unlink()
    with pytest.raises(IngestError, match="a.tar: No such file"):
        prepare(tmp_path / "other", source, tmp_path / "pool", selection=tmp_path / "selection", max_unreadable=0.1)
    parts = tmp_path / "selection"
    (parts / "part-00000.parquet").rename(parts / "part-00009.parquet")
    with pytest.raises(IngestError, match="not sorted|No such file"):
        prepare(tmp_path / "third", source, tmp_path / "pool", selection=parts, max_unreadable=0.1)
    pq.write_table(pa.table({"key": ["a"]}), parts / "part-00000.parquet")
    with pytest.raises(IngestError, match="no column order, caption, tar"):
        prepare(tmp_path / "fourth", source, tmp_path / "pool", selection=parts)


def test_any_rows_of_many_files_are_found(tmp_path):
    sizes, ends, files = (3, 0, 5, 1), (3, 3, 8, 9), []
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        files.append(tmp_path / f"{number}.parquet")
        values = {"key": [str(row) for row in range(end - size, end)], "order": range(end - size, end)}
        values |= dict.fromkeys(("caption", "file", "offset", "size", "problem", "label"), [None] * size)
        pq.write_table(pa.table(values), files[-1], row_group_size=2)
    part = Rows(tuple(files), ends, 0, 9)
    for start in range(9):
        for stop in range(start + 1, 10):
            found = [row["order"] for row in read_listed_rows(part, range(start, stop), LISTED)]
            assert found == list(range(start, stop))


@pytest.mark.parametrize("kind", [QuietHost, Many])
def test_tars_may_lie_elsewhere(folder, shards, tmp_path, kind):
    location = f"file://{tmp_path}/remote/set"
    prepare(tmp_path / "shards", FOLDER, folder, location=location, kind=kind)
    manifest, here = Manifest.load(tmp_path / "shards"), Manifest.load(shards)
    assert manifest == here.model_copy(update={"location": location})
    names = {shard.name for split in manifest.splits.values() for shard in split.shards}
    assert {path.name for path in (tmp_path / "remote" / "set").iterdir()} == names
    for name in names:
        assert digest(tmp_path / "remote" / "set" / name) == digest(shards / name)
    assert not list((tmp_path / "shards").glob("*.tar"))
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == len(names)


def test_a_worker_that_is_killed_is_told(folder, tmp_path):
    class Killing(Many):
        def update(self, count):
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(WorkerDied, match="VTP_PROCESSES"):
        prepare(tmp_path / "shards", FOLDER, folder, kind=Killing)


def test_every_parameter_is_read(folder, tmp_path, monkeypatch):
    reads = set()
    plain = Config.__getattribute__
    monkeypatch.setattr(
        Config, "__getattribute__", lambda self, name: reads.add((type(self), name)) or plain(self, name)
    )
    source = table_source(tmp_path / "source")
    (source / "own" / "train").mkdir(parents=True)
    (source / "own" / "train" / "0.png").write_bytes(picture(0))
    write_pool(tmp_path)
    pool = {"name": "pool", "validation_samples": 6}
    prepare(tmp_path / "a", FOLDER, folder, image={"name": "centre_crop", "size": 8})
    own = {"name": "folder", "folder": "own/train"}
    (source / "train").mkdir()
    (source / "train" / "1.png").write_bytes(picture(1))
    prepare(tmp_path / "b", FOLDER | {"train": "train", "validation": own}, source)
    prepare(tmp_path / "c", TABLE, source)
    (source / "held.jsonl").write_text('{"file": "own/train/0.png", "text": "", "class": "1"}')
    prepare(tmp_path / "d", TABLE | {"validation": {"name": "table", "table": "held.jsonl"}}, source)
    rows = [{"image": picture(number), "text": "a", "class": number % 2} for number in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), source / "rows.parquet")
    (source / "names.txt").write_text("a\nb\n")
    parquet = {"name": "parquet", "train": "rows.parquet", "image": "image", "caption": "text", "captions": "one"}
    parquet |= {"label": "class", "names": "names.txt", "class_caption": None, "templates": []}
    prepare(tmp_path / "f", parquet | {"validation": TABLE["validation"] | {"share": 0.5}}, source)
    pq.write_table(pa.Table.from_pylist(rows), source / "held.parquet")
    prepare(tmp_path / "g", parquet | {"validation": {"name": "files", "files": "held.parquet"}}, source)
    prepare(tmp_path / "e", pool, tmp_path / "pool", selection=tmp_path / "selection", max_unreadable=0.1)
    records = (PrepareData, CentreCrop, FolderSource, OwnFolder, HeldOut, TableSource, OwnTable, PoolSource)
    records += (ParquetSource, OwnFiles)
    wanted = {(record, name) for record in records for name in record.model_fields if name != "name"}
    assert wanted - reads == set()


def test_a_request_to_stop_is_followed(folder, shards, tmp_path):
    host = QuietHost(tmp_path / ".shards" / "folder", tmp_path, Runtime())
    host.folder.mkdir(parents=True)
    host.signalled = True
    values = {"source": FOLDER, "samples_per_shard": 4, "image": {"name": "keep"}}
    config = PrepareData.parse(values | {"max_unreadable": 0.0, "location": None}, where="test")
    with pytest.raises(Interrupted):
        prepare_data.run(config, source=folder, shards=tmp_path / "shards", host=host)
    prepare(tmp_path / "shards", FOLDER, folder)
    assert digest(tmp_path / "shards") == digest(shards)


def test_killed_stopped_and_resumed_on_the_command_line(tmp_path):
    """Kill -9 or SIGTERM in the middle: no worker goes on, finished shards stay, and the end is the same."""
    source = tmp_path / "source"
    for number in range(600):
        path = source / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 30:
            path.write_bytes(picture(number, size=(300, 300), form="JPEG"))
        else:
            path.hardlink_to(source / f"{number % 2}" / f"{number % 30}.jpg")
    values = {"source": FOLDER, "samples_per_shard": 6, "image": {"name": "keep"}}
    values |= {"max_unreadable": 0.0, "location": None}
    (tmp_path / "run" / ".dvc").mkdir(parents=True)
    write_params({"prepare_data": merged(values, {})}, tmp_path / "run" / "params.yaml")
    command = [sys.executable, "-m", "stages.prepare_data", "params.yaml:prepare_data", "--source", str(source)]
    command += ["--shards", "shards", "--provenance", "provenance.json"]

    def start(processes):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "VTP_PROCESSES": str(processes)}
        how = {"cwd": tmp_path / "run", "env": environment, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **how)

    def finished():
        return list(tmp_path.glob("run/.scratch/prepare_data/*/folder/state/train-*.json"))

    process = start(2)
    wait_for(finished, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)  # workers that lived on would hold the pipe
    kept = {path: path.stat().st_mtime_ns for path in finished()}
    assert 0 < len(kept) < 50
    time.sleep(1)
    assert len(finished()) == len(kept)  # its workers are gone
    process = start(1)
    wait_for(lambda: len(finished()) > len(kept), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert (process.returncode, "stopping" in said) == (130, True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(kept) < len(finished()) < 70  # of some 75
    assert not (tmp_path / "run" / "shards").exists()
    process = start(0)
    _, said = process.communicate()
    assert process.returncode == 0, said
    prepare(tmp_path / "whole", FOLDER, source, samples_per_shard=6)
    assert digest(tmp_path / "run" / "shards") == digest(tmp_path / "whole")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())["facts"]
    assert facts["train"] + facts["validation"] == 600
