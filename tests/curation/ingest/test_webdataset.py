"""WebDataset tars that people hold: whatever form they have, what webdataset reads is read, from here or elsewhere."""

import csv
import io
import json
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset
from curation.ingest.test_ingest import Many, every, picture, prepare, rows_of
from test_stages import QuietHost

from vtp.artefact import digest, read_json
from vtp.config import Config, ConfigError
from vtp.curation.ingest import tar_places, tar_samples, tars
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.tar_places import RemoteFolder
from vtp.curation.ingest.tar_samples import JsonField, MemberText
from vtp.curation.ingest.webdataset import ClassCaption, NamesFile, OwnTars, WebDatasetSource
from vtp.data.shards import KEY, Manifest

TXT, CLS = {"name": "member", "endings": ["txt"]}, {"name": "member", "endings": ["cls"]}
HELD_OUT = {"name": "held_out", "share": 0.3}
SOURCE = {"name": "webdataset", "remote": None, "train": ["*.tar"], "validation": HELD_OUT, "key_ends": "first_dot"}
SOURCE |= {"image": ["jpg", "png"], "caption": TXT, "captions": "one", "label": None, "class_names": None}
SOURCE |= {"templates": []}


def field(name, *endings):
    return {"name": "field", "endings": list(endings or ["json"]), "field": name}


def write_tar(path, contents, **how):
    """Members in the order given; None is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT} | how) as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def samples(numbers, *, ending="png", key="{:05d}"):
    for number in numbers:
        name = key.format(number)
        yield f"{name}.{ending}", picture(number)
        yield f"{name}.txt", f"number {number}".encode()
        yield f"{name}.json", json.dumps({"caption": f"json {number}", "label": number % 3}).encode()


def read_by_webdataset(folder):
    """Samples as the webdataset library gives them, by the bytes of the picture."""
    paths = sorted(map(str, folder.glob("[!.]*.tar")))
    every_sample = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    return {sample["png"]: sample for sample in every_sample if "png" in sample}


def reasons(shards):
    with (shards / "unreadable.csv").open(newline="", encoding="utf-8") as file:
        return [row["reason"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """What img2dataset leaves behind."""
    root = tmp_path_factory.mktemp("pool") / "laion"
    for shard in range(3):
        write_tar(root / f"{shard:05d}.tar", samples(range(shard * 8, shard * 8 + 8), key="{:09d}"))
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    (root / "._00000.tar").write_bytes(b"\0\5\x16\7")
    return root


@pytest.fixture(scope="module")
def shards(pool, tmp_path_factory):
    made = tmp_path_factory.mktemp("made") / "shards"
    prepare(made, SOURCE, pool)
    return made


def test_the_shards_of_img2dataset_are_what_webdataset_reads(pool, shards):
    rows, read = every(shards), read_by_webdataset(pool)
    assert len(rows) == len(read) == 24
    for row in rows:
        assert row["key"] == read[row["image"]]["__key__"]
        assert row["caption"] == read[row["image"]]["txt"].decode()
    manifest = Manifest.load(shards)
    assert (manifest.source, manifest.classes) == ("webdataset", [])
    assert 0 < manifest.splits["validation"].samples < 14


def test_hugging_face_imagenet(tmp_path):
    """Keys with folders, .cls, JSON, splits by patterns, names of classes by their number."""
    source = tmp_path / "source"
    for split, first in (("train", 0), ("validation", 30)):
        for shard in range(2):
            contents = []
            for number in range(first + shard * 6, first + shard * 6 + 6):
                key = f"n0144{number % 3}/n0144{number % 3}_{number}"
                contents += [(f"{key}.cls", b"%d" % (9 + number % 3)), (f"{key}.png", picture(number))]
                contents.append(
                    (f"{key}.json", json.dumps({"label": 9 + number % 3, "name": "xyz"[number % 3]}).encode())
                )
            write_tar(source / f"imagenet1k-{split}-{shard:04d}.tar", contents)
    (source / "names.txt").write_text("".join(f"name of {number}\n" for number in range(12)))
    own = {"name": "tars", "tars": ["imagenet1k-validation-*.tar"]}
    changes = {"train": ["imagenet1k-train-{0000..0001}.tar"], "validation": own, "label": CLS}
    changes |= {"caption": {"name": "template", "template": "a {}"}, "templates": ["a photo of {}"]}
    changes |= {"class_names": {"name": "file", "file": "names.txt"}}
    prepare(tmp_path / "shards", SOURCE | changes, source)
    manifest, read = Manifest.load(tmp_path / "shards"), read_by_webdataset(source)
    assert (manifest.class_ids, manifest.classes) == (["9", "10", "11"], ["name of 9", "name of 10", "name of 11"])
    assert manifest.templates == ["a photo of {}"]
    assert [split.samples for split in manifest.splits.values()] == [12, 12]
    assert {row["image"] for row in rows_of(tmp_path / "shards", "train")} == {picture(number) for number in range(12)}
    for row in every(tmp_path / "shards"):
        assert manifest.class_ids[row["label"]] == read[row["image"]]["cls"].decode()
        assert row["caption"] == f"a {manifest.classes[row['label']]}"
        assert KEY.fullmatch(row["key"])
    by_json = {"label": field("label"), "class_names": field("name")}
    prepare(tmp_path / "other", SOURCE | changes | by_json, source)
    assert Manifest.load(tmp_path / "other").classes == ["x", "y", "z"]
    assert [row["label"] for row in every(tmp_path / "other")] == [row["label"] for row in every(tmp_path / "shards")]
    prepare(tmp_path / "third", SOURCE | changes | {"label": field("name"), "class_names": None}, source)
    assert Manifest.load(tmp_path / "third").class_ids == ["x", "y", "z"]


LONG = "folder/" * 30 + "a" * 150
ODD = {
    "folders and a leading ./": (
        [("./", None), ("./a/", None), *((f"./a/{name}", content) for name, content in samples(range(8)))],
        {},
    ),
    "PAX": (samples(range(8), key=LONG + "-é-{}"), {"format": tarfile.PAX_FORMAT}),
    "GNU": (samples(range(8), key=LONG + "-{}"), {"format": tarfile.GNU_FORMAT}),
    "upper case": ([(name.upper(), content) for name, content in samples(range(8))], {}),
    "dots in folders": (samples(range(8), key="v1.0/{}"), {}),
    "of macOS": (
        [
            *((f"a/._{name}", b"\0\5\x16\7") for name, _ in samples(range(8))),
            *((f"__MACOSX/a/{name}", b"x") for name, _ in samples(range(8))),
            ("a/.DS_Store", b"x"),
            *((f"a/{name}", content) for name, content in samples(range(8))),
        ],
        {},
    ),
    "notes": ([("README.md", b"x"), ("LICENSE", b"x"), ("__info__.json", b"x"), *samples(range(8))], {}),
}


@pytest.mark.parametrize(("contents", "how"), ODD.values(), ids=ODD)
def test_odd_tars_are_what_webdataset_reads(tmp_path, contents, how):
    contents = list(contents)
    source = write_tar(tmp_path / "source" / "a.tar", contents, **how).parent
    prepare(tmp_path / "shards", SOURCE, source)
    rows, read = every(tmp_path / "shards"), read_by_webdataset(source)
    assert len(rows) == len({row["key"] for row in rows}) == 8
    for row in rows:
        assert row["caption"] == read[row["image"]]["txt"].decode()
        assert KEY.fullmatch(row["key"])


def test_members_of_a_sample_may_lie_apart(tmp_path):
    contents = sorted(samples(range(8)), key=lambda item: item[0].rpartition(".")[::-1])
    write_tar(tmp_path / "apart" / "a.tar", contents)
    write_tar(tmp_path / "together" / "a.tar", samples(range(8)))
    for name in ("apart", "together"):
        prepare(tmp_path / f"{name}_shards", SOURCE, tmp_path / name)
    assert digest(tmp_path / "apart_shards") == digest(tmp_path / "together_shards")


def test_a_sample_may_have_several_pictures_and_texts(tmp_path):
    contents = []
    for number in range(8):
        contents += [(f"{number}.mask.png", b"x"), (f"{number}.png", picture(number)), (f"{number}.caption", b"short")]
        contents += [(f"{number}.txt", b"long\n")] * (number % 2)
        contents += [(f"{number}.thumb.png", picture(100 + number))]
    source = write_tar(tmp_path / "source" / "a.tar", contents).parent
    caption = {"name": "member", "endings": ["txt", "caption"]}
    host = prepare(tmp_path / "a", SOURCE | {"caption": caption}, source)
    assert host.facts["ignored_files"] == 16  # of masks and thumbnails
    found = {row["image"]: row["caption"] for row in every(tmp_path / "a")}
    assert found == {picture(number): "long" if number % 2 else "short" for number in range(8)}
    prepare(tmp_path / "b", SOURCE | {"caption": caption, "image": ["thumb.png", "png"]}, source)
    assert {row["image"] for row in every(tmp_path / "b")} == {picture(100 + number) for number in range(8)}


def test_keys_may_have_dots(tmp_path):
    source = write_tar(tmp_path / "source" / "a.tar", samples(range(8), key="photo.1.{}")).parent
    with pytest.raises(IngestError, match=r"image is \[jpg, png\]; members end in 1\.0\.png.*set key_ends to last_dot"):
        prepare(tmp_path / "refused", SOURCE, source, max_unreadable=1.0)
    prepare(tmp_path / "shards", SOURCE | {"key_ends": "last_dot"}, source)
    assert {row["caption"] for row in every(tmp_path / "shards")} == {f"number {number}" for number in range(8)}
    write_tar(source / "b.tar", [("._photo.1.9.png", b"x"), (".photo.png", b"x")])
    prepare(tmp_path / "hidden", SOURCE | {"key_ends": "last_dot"}, source)
    assert digest(tmp_path / "hidden") == digest(tmp_path / "shards")


def test_equal_keys_are_no_loss_and_equal_samples_are_one(tmp_path):
    source = tmp_path / "source"
    write_tar(source / "a.tar", [*samples(range(8)), *(("again.png", picture(60)), ("again.txt", b"first"))])
    write_tar(source / "b.tar", samples(range(3)))  # the same
    other = [*samples([3, 4]), ("00005.png", picture(50)), ("00005.txt", b"other"), ("00006.png", picture(6))]
    other += [("00006.txt", b"another caption"), ("again.png", picture(61)), ("again.txt", b"second")]
    write_tar(source / "c.tar", [*other, ("again.png", picture(62)), ("again.txt", b"third")])
    host = prepare(tmp_path / "shards", SOURCE, source)
    rows = every(tmp_path / "shards")
    assert len({row["key"] for row in rows}) == len(rows) == 8 + 3 + 2
    pairs = {(row["image"], row["caption"]) for row in rows}
    assert pairs >= {(picture(number), f"number {number}") for number in range(8)}
    assert pairs >= {(picture(50), "other"), (picture(6), "another caption")}
    assert pairs >= {(picture(60), "first"), (picture(61), "second"), (picture(62), "third")}
    assert host.facts["duplicates"] == 5
    names = {name: source / f"{name}.tar" for name in "abc"}
    for old, new in zip("abc", "xzy", strict=True):
        names[old].rename(source / f"{new}.tar")
    prepare(tmp_path / "renamed", SOURCE, source)
    assert digest(tmp_path / "renamed") == digest(tmp_path / "shards")


def test_a_picture_is_in_one_split_whatever_its_key(tmp_path):
    source = tmp_path / "source"
    for copy in range(3):
        write_tar(source / f"{copy}.tar", samples(range(20), key=f"{copy}-{{}}"))
    contents = []
    for number in range(20, 40):
        captions = {"captions": [f"first {number}", f"second {number}", f"first {number}"]}
        contents += [(f"{number}.png", picture(number)), (f"{number}.json", json.dumps(captions).encode())]
    write_tar(source / "captions.tar", contents)
    changes = {"caption": field("captions"), "validation": {"name": "held_out", "share": 0.4}}
    prepare(tmp_path / "all", SOURCE | changes | {"captions": "all"}, source)
    train, validation = (rows_of(tmp_path / "all", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 60 + 40
    assert not {row["image"] for row in train} & {row["image"] for row in validation}
    prepare(tmp_path / "one", SOURCE | changes, source)
    texts = [row["caption"] for row in every(tmp_path / "one") if row["caption"]]
    assert sorted(texts) == [f"first {number}" for number in range(20, 40)]


BROKEN = {
    "label": b'{"caption": "a", "label": -1}',
    "half": b'{"caption": "a", "label": 1.5}',
    "nan": b'{"caption": "a", "label": NaN}',
    "text": b'{"caption": "a", "label": "-3"}',
    "truth": b'{"caption": "a", "label": true}',
    "huge": b'{"caption": "a", "label": 1e300}',
    "number": b'{"caption": 7, "label": 1}',
    "surrogate": b'{"caption": "\\ud83d", "label": 1}',
    "bytes": b'{"caption": "caf\xe9", "label": 1}',
    "list": b"[1]",
    "cut": b'{"caption": "a"',
    "deep": b"[" * 100_000,
    "digits": b'{"caption": "a", "label": ' + b"1" * 5000 + b"}",
    "large": b'{"caption": "' + b"a" * 3000 + b'"}',
}


def test_broken_samples_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "LARGEST_TEXT", 200_000)
    monkeypatch.setitem(BROKEN, "large", b" " * 200_001)
    contents = list(samples(range(12)))
    for number, (name, content) in enumerate(BROKEN.items()):
        contents += [(f"{name}.png", picture(50 + number)), (f"{name}.json", content)]
    contents += [("alone.txt", b"no picture"), ("forgotten.tiff", b"x"), ("broken.png", b"<html>")]
    good = {"plain": b"{}", "null": b'{"caption": null, "label": null}', "double": b'{"caption": "", "label": 2.0}'}
    good |= {"other": b'{"score": NaN, "label": "002"}', "bom": b'\xef\xbb\xbf{"label": 2}'}
    for number, (name, content) in enumerate(good.items()):
        contents += [(f"{name}.png", picture(80 + number)), (f"{name}.json", content)]
    contents.append(("nothing.png", picture(90)))
    source = write_tar(tmp_path / "source" / "a.tar", contents).parent
    changes = {"caption": field("caption"), "label": field("label")}
    host = prepare(tmp_path / "shards", SOURCE | changes, source, max_unreadable=0.6)
    found = reasons(tmp_path / "shards")
    assert host.facts["unreadable"] == len(found) == len(BROKEN) + 2  # without text alone: JSON is read, txt is not
    said = {reason.partition(": ")[0]: reason.partition(": ")[2] for reason in found}
    assert {*BROKEN, "forgotten"} <= said.keys()
    assert said["label"] == "label '-1'; expected a number from 0"
    assert said["half"] == "label is no text: 1.5"
    assert said["number"] == "caption is no text"
    assert (said["list"], said["cut"], said["deep"]) == ("json is no JSON object", *["json is no JSON"] * 2)
    assert (said["bytes"], said["surrogate"]) == ("json is not UTF-8", "caption is not UTF-8")
    assert said["large"] == "json of 200001 bytes, more than 200000"
    assert said["forgotten"] == "no jpg or png, only tiff"
    manifest = Manifest.load(tmp_path / "shards")
    rows = {row["image"]: row for row in every(tmp_path / "shards")}
    assert len(rows) == 12 + len(good) + 1
    labels = [rows[picture(80 + number)]["label"] for number in range(len(good))]
    assert [manifest.class_ids[label] if label >= 0 else None for label in labels] == [None, None, "2", "2", "2"]
    assert rows[picture(90)]["label"] == -1
    with pytest.raises(IngestError, match=r"max_unreadable allows 0.*\n  a\.tar: \w+: "):
        prepare(tmp_path / "refused", SOURCE | changes, source)


@pytest.mark.parametrize("label", [b"-1", b"cat", b"1.5", b"1e2", b"\xff", b"12", "\uff13".encode()])
def test_labels_that_are_no_number_are_refused_by_name(tmp_path, label):
    contents = [*samples(range(8)), *((f"{number:05d}.cls", b"%d\n" % number) for number in range(8))]
    contents += [("odd.png", picture(9)), ("odd.cls", label)]
    source = write_tar(tmp_path / "source" / "a.tar", contents).parent
    (source / "names.txt").write_text("name\n" * 8)
    names = {"label": CLS, "class_names": {"name": "file", "file": "names.txt"}}
    with pytest.raises(IngestError, match=r"a\.tar: odd: (label|cls) .*(expected a number|names for 0 to 7|UTF-8)"):
        prepare(tmp_path / "shards", SOURCE | names, source)


def test_a_class_has_one_name(tmp_path):
    contents = [("a.png", picture(0)), ("a.json", b'{"label": 1, "name": "cat"}')]
    write_tar(tmp_path / "source" / "a.tar", contents)
    write_tar(tmp_path / "source" / "b.tar", [("b.png", picture(1)), ("b.json", b'{"label": 1, "name": "dog"}')])
    changes = {"label": field("label"), "class_names": field("name"), "caption": None}
    with pytest.raises(IngestError, match=r"b\.tar: class 1 is called 'dog', and 'cat' elsewhere"):
        prepare(tmp_path / "shards", SOURCE | changes, tmp_path / "source")


def test_damaged_tars_are_named_with_the_byte(tmp_path):
    source = tmp_path / "source"
    whole = write_tar(source / "a.tar", samples(range(8))).read_bytes()
    with tarfile.open(source / "a.tar") as tar:
        starts = [member.offset for member in tar]

    def said(content):
        (source / "a.tar").write_bytes(content)
        with pytest.raises(IngestError) as raised:
            prepare(tmp_path / "shards", SOURCE, source, max_unreadable=1.0)
        assert "a.tar" in str(raised.value)
        return str(raised.value)

    assert f"ends at byte {starts[3] + 600}, within 00001.png from byte {starts[3]}" in said(whole[: starts[3] + 600])
    assert f"at byte {starts[3]}" in said(whole[: starts[3]])
    assert f"at byte {starts[3]}" in said(whole[: starts[3] + 100])
    assert f"at byte {starts[3]}" in said(whole[: starts[3]] + b"x" * 512 + whole[starts[3] + 512 :])
    assert "no whole tar" in said(b"")
    assert "goes on behind the end of its tar" in said(whole + whole)
    import bz2
    import gzip
    import lzma

    assert "compressed with gzip" in said(gzip.compress(whole))
    assert "compressed with bzip2" in said(bz2.compress(whole))
    assert "compressed with xz" in said(lzma.compress(whole))


def test_headers_that_fill_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST_HEADER", 2000)
    contents = [("a" * 3000 + ".png", picture(0))]
    source = write_tar(tmp_path / "source" / "a.tar", contents, format=tarfile.PAX_FORMAT).parent
    with pytest.raises(IngestError, match=r"a\.tar: no whole tar.*a header of \d+ bytes"):
        prepare(tmp_path / "shards", SOURCE, source)


def test_names_of_members_never_become_paths(tmp_path):
    contents = [(name, b"x") for name in (".", "/", "..", "a/", "...", ".png", "../.png", "__x__/a.png")]
    contents += [(f"../../out/{number}.{end}", content) for number in range(8) for end, content in _parts(number)]
    contents += [(f"/etc/{number}.{end}", content) for number in range(8, 16) for end, content in _parts(number)]
    contents += [(f"caf\udce9-{number}.{end}", content) for number in range(16, 24) for end, content in _parts(number)]
    source = write_tar(tmp_path / "source" / "a.tar", contents).parent
    prepare(tmp_path / "shards", SOURCE, source)
    rows = every(tmp_path / "shards")
    assert {row["image"] for row in rows} == {picture(number) for number in range(24)}
    assert all(KEY.fullmatch(row["key"]) for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "shards", ".shards"}


def _parts(number):
    return [("png", picture(number)), ("txt", b"a")]


def test_tars_lie_in_the_source(tmp_path):
    write_tar(tmp_path / "elsewhere" / "a.tar", samples(range(8)))
    source = tmp_path / "source"
    source.mkdir()
    (source / "link.tar").symlink_to(tmp_path / "elsewhere" / "a.tar")
    with pytest.raises(IngestError, match=r"link\.tar: a link leads outside of .*`outside_links: true`"):
        prepare(tmp_path / "refused", SOURCE, source)
    prepare(tmp_path / "shards", SOURCE | {"outside_links": True}, source)
    assert len(every(tmp_path / "shards")) == 8
    for pattern in ("../elsewhere/*.tar", "/etc/*.tar"):
        with pytest.raises(ConfigError, match=r"train\.0: expected a path within the source folder"):
            prepare(tmp_path / "refused", SOURCE | {"train": [pattern]}, source)
    os.mkfifo(source / "pipe.tar")
    (source / "link.tar").unlink()
    with pytest.raises(IngestError, match=r"pipe\.tar: no such file"):
        prepare(tmp_path / "refused", SOURCE, source)


def test_what_is_wrong_with_the_parameters_is_named(tmp_path, pool):
    def said(source=pool, **changes):
        with pytest.raises((IngestError, ConfigError)) as raised:
            prepare(tmp_path / f"shards{len(list(tmp_path.iterdir()))}", SOURCE | changes, source)
        return str(raised.value)

    assert "no tar matches *.tgz; expected some, found ._00000.tar, 00000.parquet" in said(train=["*.tgz"])
    assert "no tar matches 00003.tar; expected some" in said(train=["{00002..00003}.tar"])
    assert "expected a range" in said(train=["{9..1}.tar"])
    overlap = {"name": "tars", "tars": ["00001.tar"]}
    assert "00001.tar: of both splits" in said(validation=overlap)
    assert "set key_ends to last_dot" in said(image=["webp"])
    assert "no sample has caption, which prepare_data.source.caption names; members end in png (24)" in said(
        caption={"name": "member", "endings": ["caption"]}
    )
    assert "no sample has a field 'class' in json, which prepare_data.source.label" in said(label=field("class"))
    assert "no such file" in said(label=field("label"), class_names={"name": "file", "file": "missing.txt"})
    assert "label: null, so that there are no classes" in said(class_names=field("name"))
    assert "expected what stands behind the dot" in said(image=[".jpg"])
    assert "reads --source: add it" in said(source=None)
    assert "reads no --source" in said(remote={"url": f"file://{pool}", "sha256": None})
    assert "no URL" in said(source=None, remote={"url": "bucket/folder", "sha256": None})
    assert "is not shared by processes" in said(source=None, remote={"url": "memory://x", "sha256": None})


def test_names_of_classes_are_whole(tmp_path):
    contents = [*samples(range(8)), *((f"{number:05d}.cls", b"0") for number in range(8))]
    source = write_tar(tmp_path / "source" / "a.tar", contents).parent
    changes = {"label": CLS, "class_names": {"name": "file", "file": "names.txt"}}
    for content, message in ((b"cat\n\ndog\n", "line 2 is empty"), (b"caf\xe9\n", "not UTF-8")):
        (source / "names.txt").write_bytes(content)
        with pytest.raises(IngestError, match=message):
            prepare(tmp_path / "shards", SOURCE | changes, source)


class Plain(SimpleHTTPRequestHandler):
    """A web server of files, without pieces of them, that remembers what was asked and fails when told to."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        with self.server.lock:
            self.server.asked.append(self.path)
            failure = self.server.failures.pop(0) if self.server.failures and self.path.endswith(".tar") else None
        if failure in ("cut", "short"):
            content = Path(self.translate_path(self.path)).read_bytes()
            half = content[: len(content) // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(len(half if failure == "short" else content)))
            self.end_headers()
            self.wfile.write(half)
            self.close_connection = True
        elif failure is not None:
            self.send_error(failure)
        else:
            self.answer()

    def answer(self):
        super().do_GET()


class Pieces(Plain):
    """And with pieces."""

    def answer(self):
        if not (wanted := self.headers.get("Range")):
            return super().answer()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        content = Path(self.translate_path(self.path)).read_bytes()
        piece = content[int(first) : int(last) + 1]
        self.server.pieces += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)


@pytest.fixture(params=[Plain], ids=lambda kind: kind.__name__)
def web(request, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=tmp_path / "web"))
    server.asked, server.failures, server.pieces, server.lock = [], [], 0, threading.Lock()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "web").mkdir()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3(monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = f"http://127.0.0.1:{server._server.server_port}"
    values = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in (values | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    tar_places._filesystem.cache_clear()
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="tars")
    yield client
    server.stop()


def remote(url, sha256=None, **changes):
    return SOURCE | {"remote": {"url": url, "sha256": sha256}} | changes


class Little(QuietHost):
    """Room for one tar."""

    shard_cache_bytes = property(lambda self: 40_000)


class LittleForMany(Many, Little): ...


def fill(root, pool):
    root.mkdir(exist_ok=True)
    for path in pool.glob("0*.tar"):
        (root / path.name).write_bytes(path.read_bytes())


def kept(shards):
    return sum(path.stat().st_size for path in shards.with_name(f".{shards.name}").glob("folder/tars/*.tar"))


def test_tars_of_a_web_server_are_fetched_once(pool, shards, web, tmp_path):
    """Also without a listing: by names."""
    fill(tmp_path / "web" / "laion", pool)
    host = prepare(tmp_path / "a", remote(f"{web.url}/laion/", train=["{00000..00002}.tar"]))
    assert digest(tmp_path / "a") == digest(shards)
    assert sorted(path for path in web.asked if path.endswith(".tar")) == [f"/laion/{n:05d}.tar" for n in range(3)]
    write_tar(tmp_path / "web" / "large" / "a.tar", [("large.bin", bytes(12_000_000)), *samples(range(8))])
    web.asked.clear()
    prepare(tmp_path / "large", remote(f"{web.url}/large", train=["a.tar"]))
    assert web.asked == ["/large/a.tar"]
    prepare(tmp_path / "b", remote(f"{web.url}/laion", host.facts["source_sha256"]))  # its index page
    assert digest(tmp_path / "b") == digest(shards)
    (tmp_path / "web" / "laion" / "00001.tar").write_bytes((pool / "00000.tar").read_bytes())
    with pytest.raises(IngestError, match=r"remote.sha256 is \w{64}; they were changed"):
        prepare(tmp_path / "c", remote(f"{web.url}/laion", host.facts["source_sha256"]))


def test_failures_that_pass_are_tried_again(pool, shards, web, tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.transfer.FIRST_WAIT", 0.001)
    monkeypatch.setattr(tar_places, "PATIENCE", 0.5)
    fill(tmp_path / "web", pool)
    web.failures += ["cut", 503, "short", 429, "cut"]
    prepare(tmp_path / "a", remote(web.url))
    assert digest(tmp_path / "a") == digest(shards)
    asked = len(web.asked)
    with pytest.raises(IngestError, match=r"missing\.tar: not fetched in 1 attempts"):
        prepare(tmp_path / "b", remote(web.url, train=["missing.tar"]))
    assert len(web.asked) <= asked + 2
    with pytest.raises(IngestError, match="no tar matches nothing"):
        prepare(tmp_path / "c", remote(web.url, train=["nothing*"]))
    web.failures += [503] * 100
    with pytest.raises(IngestError, match=r"00000\.tar: not fetched in \d+ attempts .*see that it exists"):
        prepare(tmp_path / "d", remote(web.url, train=["00000.tar"]))


@pytest.mark.parametrize("web", [Pieces], indirect=True)
def test_a_disk_with_little_room_reads_pieces(pool, shards, web, tmp_path):
    fill(tmp_path / "web", pool)
    prepare(tmp_path / "a", remote(web.url), kind=LittleForMany)
    assert digest(tmp_path / "a") == digest(shards)
    assert 0 < kept(tmp_path / "a") <= 40_000
    assert web.pieces >= 16


def test_a_server_without_pieces_needs_room(pool, web, tmp_path):
    fill(tmp_path / "web", pool)
    with pytest.raises(IngestError, match=r"more than 4e\+04 bytes of tars, and no pieces .*set VTP_CACHE_GIGABYTES"):
        prepare(tmp_path / "a", remote(web.url), kind=Little)


def test_tars_of_s3(pool, shards, s3, tmp_path):
    for path in pool.iterdir():
        s3.upload_file(str(path), "tars", f"laion/{path.name}")
    (tmp_path / "names.txt").write_text("name\n" * 3)
    s3.upload_file(str(tmp_path / "names.txt"), "tars", "laion/names.txt")
    prepare(tmp_path / "a", remote("s3://tars/laion"))
    assert digest(tmp_path / "a") == digest(shards)
    prepare(tmp_path / "b", remote("s3://tars/laion"), kind=Little)
    assert digest(tmp_path / "b") == digest(shards)
    assert 0 < kept(tmp_path / "b") <= 40_000
    names = {"label": field("label"), "class_names": {"name": "file", "file": "names.txt"}}
    prepare(tmp_path / "c", remote("s3://tars/laion", **names))
    assert Manifest.load(tmp_path / "c").classes == ["name"] * 3
    with pytest.raises(IngestError, match=r"gone\.tar: not fetched in 1 attempts"):
        prepare(tmp_path / "d", remote("s3://tars/laion", train=["gone.tar"]))


def test_an_interrupted_run_goes_on_and_sees_changes(pool, shards, tmp_path, monkeypatch):
    """What is read stays read; a tar that was changed meanwhile is noticed."""
    store = tmp_path / "store"
    fill(store, pool)
    source = remote(f"file://{store}")
    whole = (store / "00002.tar").read_bytes()
    (store / "00002.tar").write_bytes(whole[:-20_000])
    made = tmp_path / "shards"
    with pytest.raises(IngestError, match=r"00002\.tar"):
        prepare(made, source)
    index = made.with_name(".shards") / "folder" / "index"
    first = {path: path.stat().st_mtime_ns for path in index.glob("*.json")}
    assert sorted(read_json(path)["name"] for path in first) == ["00000.tar", "00001.tar"]
    (store / "00002.tar").write_bytes(whole)
    fetched = []
    monkeypatch.setattr(
        tar_places, "_copy", lambda *args, real=tar_places._copy: fetched.append(args[1]) or real(*args)
    )
    (store / "00001.tar").write_bytes((store / "00001.tar").read_bytes() + bytes(512))
    with pytest.raises(IngestError, match=r"00001\.tar: changed since it was read.*delete .* and start again"):
        prepare(made, source)
    (store / "00001.tar").write_bytes((pool / "00001.tar").read_bytes())
    for path in index.glob("*.json"):
        if read_json(path)["name"] == "00001.tar":
            path.unlink()
    fetched.clear()
    prepare(made, source)
    assert "00001.tar" in fetched
    assert "00000.tar" not in fetched
    assert digest(made) == digest(shards)
    monkeypatch.undo()
    changing = tar_places.RemotePieces(
        f"file://{store}", {"00000.tar": tar_places.Mark(bytes=1, sha256="", version={})}
    )
    with pytest.raises(IngestError, match=r"00000\.tar: changed since it was read"):
        changing.piece("00000.tar", 0, 1)


def test_every_parameter_is_read(tmp_path, monkeypatch, pool):
    reads = set()
    plain = Config.__getattribute__
    monkeypatch.setattr(
        Config, "__getattribute__", lambda self, name: reads.add((type(self), name)) or plain(self, name)
    )
    (pool / "names.txt").write_text("name\n" * 3)
    names = {"name": "file", "file": "names.txt"}
    template = {"name": "template", "template": "a {}"}
    own = {"name": "tars", "tars": ["00000.tar"]}
    changes = {"train": ["00001.tar"], "validation": own, "label": field("label"), "class_names": names}
    prepare(tmp_path / "a", SOURCE | changes | {"caption": template}, pool)
    prepare(tmp_path / "b", remote(f"file://{pool}"))
    records = (WebDatasetSource, RemoteFolder, MemberText, JsonField, ClassCaption, NamesFile, OwnTars)
    wanted = {(record, name) for record in records for name in record.model_fields if name != "name"}
    assert wanted - reads == set()
