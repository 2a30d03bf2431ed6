"""Pictures in parquet with named columns: labels, names, captions and splits are right, whatever the types of a file."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.ingest.test_ingest import every, picture, prepare, rows_of

from vtp.artefact import digest
from vtp.config import ConfigError
from vtp.curation.ingest.shard_workers import IngestError
from vtp.data.shards import Manifest

COUNT = 20
NAMES = ["tabby_cat", "dog", "axolotl"]
SOURCE = {"name": "parquet", "train": "data/train-*.parquet", "image": "image", "caption": None, "captions": "one"}
SOURCE |= {"label": "label", "names": None, "class_caption": None, "templates": ["a {}"]}
SOURCE |= {"validation": {"name": "files", "files": "data/validation-*.parquet"}}
HELD_OUT = {"validation": {"name": "held_out", "share": 0.3}}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HELD = [*range(100, 104)]  # pictures of validation


def images(numbers, kind=STRUCT):
    """Every file name is `0.png`: what names say does not matter."""
    if pa.types.is_struct(kind):
        return pa.array([{"bytes": picture(number), "path": "0.png"} for number in numbers], kind)
    return pa.array([picture(number) for number in numbers]).cast(kind)


def write(path, columns, *, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=3)


def write_split(root, *, names=NAMES, labels=lambda number: number % 3):
    """20 pictures of training in two files, four of validation."""
    for part in range(2):
        numbers = range(part, COUNT, 2)
        columns = {"image": images(numbers), "label": [labels(number) for number in numbers]}
        write(root / f"data/train-{part:05d}-of-00002.parquet", columns, names=names)
    columns = {"image": images(HELD), "label": [labels(number) for number in HELD]}
    write(root / "data/validation-00000-of-00001.parquet", columns, names=names)
    return root


def by_picture(shards, split="train"):
    return {row["image"]: row for row in rows_of(shards, split)}


def test_label_n_is_the_nth_name_of_the_metadata(tmp_path):
    source = write_split(tmp_path / "source")
    prepare(tmp_path / "shards", SOURCE | {"class_caption": "a photo of a {}"}, source)
    manifest = Manifest.load(tmp_path / "shards")
    assert (manifest.classes, manifest.class_ids) == (["tabby cat", "dog", "axolotl"], ["0", "1", "2"])
    assert (manifest.source, manifest.templates) == ("parquet", ["a {}"])
    for split, numbers in {"train": range(COUNT), "validation": HELD}.items():
        rows = by_picture(tmp_path / "shards", split)
        assert len(rows) == len(numbers)
        for number in numbers:
            row = rows[picture(number)]
            assert row["label"] == number % 3
            assert row["caption"] == f"a photo of a {manifest.classes[number % 3]}"


@pytest.mark.parametrize(
    ("label", "ids"), [(lambda n: (10, 9, 100)[n % 3], ["9", "10", "100"]), (lambda n: "cab"[n % 3], ["a", "b", "c"])]
)
def test_labels_without_names_are_the_classes_themselves(tmp_path, label, ids):
    prepare(tmp_path / "shards", SOURCE, write_split(tmp_path / "source", names=None, labels=label))
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.class_ids == manifest.classes == ids
    rows = by_picture(tmp_path / "shards")
    assert all(ids[rows[picture(number)]["label"]] == str(label(number)) for number in range(COUNT))


def test_names_come_from_a_file_before_the_metadata(tmp_path):
    source = write_split(tmp_path / "source")
    (source / "names.txt").write_text("猫\ndog\nax olotl\n", encoding="utf-8")
    prepare(tmp_path / "shards", SOURCE | {"names": "names.txt"}, source)
    assert Manifest.load(tmp_path / "shards").classes == ["猫", "dog", "ax olotl"]
    (source / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(IngestError, match=r"row \d: label '2', and .*names.txt names classes 0 to 1"):
        prepare(tmp_path / "few", SOURCE | {"names": "names.txt"}, source)


def test_files_with_other_types_are_one_data_set(tmp_path):
    """Every file is cast by itself; the same pictures in one file of plain types give equal bytes."""
    kinds = [
        (STRUCT, pa.int32(), pa.string()),
        (pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]), pa.int64(), pa.large_string()),
        (pa.binary(), pa.string(), pa.binary()),
        (pa.dictionary(pa.int32(), pa.binary()), pa.float64(), pa.dictionary(pa.int8(), pa.string())),
        (pa.large_binary(), pa.decimal128(20, 1), pa.list_(pa.string())),
    ]
    whole = {"image": [], "label": [], "text": []}
    for part, (image, label, text) in enumerate(kinds):
        numbers = range(4 * part, 4 * part + 4)
        texts = [f"number {number}" for number in numbers]
        labels = [number % 3 for number in numbers]
        whole["image"] += [{"bytes": picture(number), "path": None} for number in numbers]
        whole["label"], whole["text"] = whole["label"] + labels, whole["text"] + texts
        texts = pa.array([[each] for each in texts] if pa.types.is_list(text) else texts)
        columns = {"image": images(numbers, image), "label": pa.array(labels).cast(label), "text": texts.cast(text)}
        write(tmp_path / f"parts/{part}.parquet", columns)
    write(tmp_path / "whole/all.parquet", whole)
    source = SOURCE | HELD_OUT | {"train": ".", "caption": "text"}
    for name in ("parts", "whole"):
        prepare(tmp_path / f"{name}_shards", source, tmp_path / name)
    rows = {row["image"]: row for row in every(tmp_path / "parts_shards")}
    assert [(rows[picture(n)]["label"], rows[picture(n)]["caption"]) for n in range(COUNT)] == [
        (n % 3, f"number {n}") for n in range(COUNT)
    ]
    assert digest(tmp_path / "parts_shards") == digest(tmp_path / "whole_shards")


def test_any_files_are_the_splits(tmp_path):
    """Other folders of a configuration are left out, and files of one name in two folders are two."""
    for number, name in enumerate(("en/train-0", "en/dev-0", "fr/train-0", "fr/dev-0")):
        columns = {"image": images(range(10 * number, 10 * number + 3)), "label": [0, 1, 2]}
        write(tmp_path / f"source/{name}.parquet", columns)
    english = {"train": "en/train-*.parquet", "validation": {"name": "files", "files": "en/dev-*.parquet"}}
    prepare(tmp_path / "english", SOURCE | english, tmp_path / "source")
    assert set(by_picture(tmp_path / "english")) == {picture(number) for number in (0, 1, 2)}
    assert set(by_picture(tmp_path / "english", "validation")) == {picture(number) for number in (10, 11, 12)}
    both = {"train": "*/train-*.parquet", "validation": {"name": "files", "files": "*/dev-*.parquet"}}
    prepare(tmp_path / "both", SOURCE | both, tmp_path / "source")
    assert set(by_picture(tmp_path / "both")) == {picture(number) for number in (0, 1, 2, 20, 21, 22)}
    with pytest.raises(IngestError, match="'en' takes files of dev and train as one split; name them apart"):
        prepare(tmp_path / "mixed", SOURCE | HELD_OUT | {"train": "en"}, tmp_path / "source")
    with pytest.raises(IngestError, match=r"en/train-0.parquet: both train and validation take it"):
        twice = {"train": "en/train-0.parquet", "validation": {"name": "files", "files": "*/train-*.parquet"}}
        prepare(tmp_path / "twice", SOURCE | twice, tmp_path / "source")
    with pytest.raises(IngestError, match=r"'de/\*.parquet' is no parquet file, .*source holds en, fr"):
        prepare(tmp_path / "none", SOURCE | HELD_OUT | {"train": "de/*.parquet"}, tmp_path / "source")
    with pytest.raises(ConfigError, match="within the source folder"):
        prepare(tmp_path / "out", SOURCE | {"train": "../*.parquet"}, tmp_path / "source")


def captioned(root):
    """A picture in every row, two pictures in two rows each, and rows of several captions."""
    numbers = [*range(COUNT), 3, 5]
    texts = [[f"{number} a", f"{number} b"] for number in range(COUNT)] + [["3 c"], ["5 a"]]
    write(root / "data/train-0.parquet", {"image": images(numbers), "text": texts})
    return root


def test_a_second_caption_is_a_sample_or_none(tmp_path):
    source = captioned(tmp_path / "source")
    plain = SOURCE | HELD_OUT | {"caption": "text", "label": None}
    host = prepare(tmp_path / "one", plain, source)
    assert sorted(row["caption"] for row in every(tmp_path / "one")) == sorted(f"{n} a" for n in range(COUNT))
    assert host.facts["duplicates"] == 2
    prepare(tmp_path / "all", plain | {"captions": "all"}, source)
    texts = {f"{number} {letter}" for number in range(COUNT) for letter in "ab"} | {"3 c"}
    rows = every(tmp_path / "all")
    assert sorted(row["caption"] for row in rows) == sorted(texts)
    assert all(row["image"] == picture(int(row["caption"].split()[0])) for row in rows)


def test_held_out_pictures_are_in_no_training_row(tmp_path):
    source = captioned(tmp_path / "source")
    prepare(tmp_path / "shards", SOURCE | HELD_OUT | {"caption": "text", "label": None, "captions": "all"}, source)
    train, held = (set(by_picture(tmp_path / "shards", split)) for split in ("train", "validation"))
    assert held
    assert train
    assert not train & held


def test_a_column_that_is_not_there_is_named_with_its_file(tmp_path):
    source = write_split(tmp_path / "source")
    with pytest.raises(IngestError, match=r"train-00000-of-00002.parquet: no column 'imgae'; did you mean 'image'\?"):
        prepare(tmp_path / "a", SOURCE | {"image": "imgae"}, source)
    write(source / "data/train-00001-of-00002.parquet", {"image": images([1]), "fine_label": [1], "id": ["a"]})
    with pytest.raises(
        IngestError, match=r"train-00001-of-00002.parquet: no column 'label'.*it has image, fine_label, id"
    ):
        prepare(tmp_path / "b", SOURCE, source)
    write(source / "data/train-00001-of-00002.parquet", {"image": ["a.png"], "label": [1]})
    with pytest.raises(IngestError, match=r"train-00001.*column 'image' is string; expected bytes"):
        prepare(tmp_path / "c", SOURCE, source)
    write(source / "data/train-00001-of-00002.parquet", {"image": images([1]), "label": [[1]]})
    with pytest.raises(IngestError, match=r"train-00001.*column 'label' is list<.*expected numbers or texts"):
        prepare(tmp_path / "d", SOURCE, source)
    (source / "data/train-00001-of-00002.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(IngestError, match=r"train-00001-of-00002.parquet: no whole parquet file .*fetch it again"):
        prepare(tmp_path / "e", SOURCE, source)
    write(source / "data/train-00001-of-00002.parquet", {"image": images([1]), "label": [1]}, names=NAMES[::-1])
    with pytest.raises(
        IngestError, match=r"train-00001.*names other classes of 'label' than the metadata of .*train-00000"
    ):
        prepare(tmp_path / "f", SOURCE, source)


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    """No bytes, no UTF-8; a label of -1 or none is no label."""
    image = pa.array([None, {"bytes": None, "path": "a.png"}, *images(range(8)).to_pylist()], STRUCT)
    texts = pa.array([b"a", b"b", b"caf\xe9", *([b"fine"] * 7)])
    columns = {"image": image, "label": [0, 1, 2, None, -1, 0, 1, 2, 0, 1], "text": texts}
    write(tmp_path / "source/data/train-0.parquet", columns, names=NAMES)
    source = SOURCE | {"validation": {"name": "held_out", "share": 0.5}, "caption": "text"}
    host = prepare(tmp_path / "shards", source, tmp_path / "source", max_unreadable=0.3)
    assert host.facts["unreadable"] == 3
    with (tmp_path / "shards/unreadable.csv").open(newline="") as file:
        reasons = sorted(row["reason"] for row in csv.DictReader(file))
    assert reasons == [
        "row 0: holds no bytes of a picture",
        "row 1: holds no bytes of a picture",
        "row 2: caption is not UTF-8",
    ]
    labels = {row["image"]: row["label"] for row in every(tmp_path / "shards")}
    assert [labels[picture(number)] for number in range(1, 8)] == [-1, -1, 0, 1, 2, 0, 1]


def test_an_interrupted_unpacking_begins_with_the_file_it_broke_off(tmp_path):
    source = write_split(tmp_path / "source")
    prepare(tmp_path / "shards", SOURCE, source)
    unpacked = tmp_path / ".shards/folder/unpacked/data"
    assert sorted(path.name for path in unpacked.iterdir() if path.suffix == ".rows") == sorted(
        f"{path.name}.rows" for path in (source / "data").iterdir()
    )
    first, second = (unpacked / f"train-{part:05d}-of-00002.parquet" for part in range(2))
    stamp = first.stat().st_mtime_ns
    (unpacked / f"{second.name}.rows").unlink()
    for path in ((tmp_path / ".shards/folder/rows"), (tmp_path / ".shards/folder/state")):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (tmp_path / "shards").rename(tmp_path / "before")
    prepare(tmp_path / "shards", SOURCE, source)
    assert digest(tmp_path / "shards") == digest(tmp_path / "before")
    assert first.stat().st_mtime_ns == stamp


UNPACK = """
from pathlib import Path
import pyarrow as pa
from vtp.curation.ingest import parquet_pictures
parquet_pictures.BATCH_BYTES = 1 << 20
file = parquet_pictures.ParquetFile(Path("all.parquet"), "all.parquet", "train")
columns = parquet_pictures.PictureColumns("image", None, None)
print(sum(1 for _ in parquet_pictures.unpack(file, columns, Path("unpacked"), lambda: False)))
print(pa.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """32 MB of pictures in one row group are read a few rows at a time."""
    column = pa.array([np.random.default_rng(number).bytes(1 << 17) for number in range(256)])
    pq.write_table(pa.table({"image": column}), tmp_path / "all.parquet", use_dictionary=False, write_batch_size=4)
    done = subprocess.run([sys.executable, "-c", UNPACK], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows, most = map(int, done.stdout.split())
    assert rows == 256
    assert most < 12 << 20
