"""ImageNet's three layouts, as small stand-ins: equal shards for equal pictures, labels in the official order."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.ingest.test_ingest import prepare, rows_of
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo

from vtp.artefact import digest
from vtp.curation.ingest.archives import TRAIN, VALIDATION
from vtp.curation.ingest.imagenet import DEVKIT
from vtp.curation.ingest.shard_workers import IngestError
from vtp.data.imagenet import imagenet_classes
from vtp.data.shards import Manifest

SYNSETS = ["n01440764", "n01514668", "n04254680"]  # tench, cock, soccer ball; not sorted where they are written
PER_CLASS, VALIDATED = 5, 7
CAPTION = "a photo of a {}"
OFFICIAL = imagenet_classes().synsets
COMPLETE_NAMES = [ImageNetInfo("imagenet-1k").label_name_to_description(synset) for synset in OFFICIAL]


def jpeg(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


TRAINING = {
    synset: {f"{synset}_{10 * i + 3}.JPEG": jpeg(i + 10 * c) for i in range(PER_CLASS)}
    for c, synset in enumerate(SYNSETS)
}
TRUTH = [SYNSETS[i % 3] for i in range(VALIDATED)]
VALIDATING = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(50 + i) for i in range(VALIDATED)}


def devkit(path, *, synsets=SYNSETS, truth=TRUTH):
    """meta.mat as in the official one: leaves and inner nodes, numbered in another order than that of the names."""
    numbers = {synset: 3 - i for i, synset in enumerate(synsets)}
    names = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    names += [("children", "O"), ("wordnet_height", "f8"), ("num_train_images", "f8")]
    nodes = [(float(n), synset, "words", "gloss", 0.0, np.zeros(0), 0.0, 5.0) for synset, n in numbers.items()]
    nodes += [(float(len(nodes) + 1), "n00001740", "entity", "gloss", 3.0, np.array([1.0, 2.0, 3.0]), 1.0, 0.0)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(nodes, dtype=names).reshape(-1, 1)}, do_compression=True)
    lines = "".join(f"{numbers[synset]}\n" for synset in truth).encode()
    contents = {f"{DEVKIT}/readme.txt": b"", f"{DEVKIT}/data/meta.mat": meta.getvalue()}
    contents[f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"] = lines
    path.write_bytes(packed(contents, "w:gz"))


def packed(contents, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_folders(root, *, flat=True):
    for synset, pictures in reversed(TRAINING.items()):
        (root / "train" / synset).mkdir(parents=True)
        for name, content in pictures.items():
            (root / "train" / synset / name).write_bytes(content)
    (root / "train" / SYNSETS[0] / ".DS_Store").write_bytes(b"x")
    (root / "README").write_bytes(b"x")
    for (name, content), synset in zip(VALIDATING.items(), TRUTH, strict=True):
        folder = root / "val" if flat else root / "val" / synset
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if flat:
        devkit(root / f"{DEVKIT}.tar.gz")


def write_tars(root):
    root.mkdir()
    inner = {f"{synset}.tar": packed(pictures) for synset, pictures in reversed(TRAINING.items())}
    (root / TRAIN).write_bytes(packed(inner))
    (root / VALIDATION).write_bytes(packed(VALIDATING))
    devkit(root / f"{DEVKIT}.tar.gz")


def with_names(table, names):
    """As Hugging Face writes them: of a class label in the metadata of the schema."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(root, official=OFFICIAL, *, names=COMPLETE_NAMES):
    """Labels are positions in `official`; `names` say what they are."""
    (root / "data").mkdir(parents=True)
    rows = [
        ({"bytes": content, "path": f"{name.removesuffix('.JPEG')}_{synset}.JPEG"}, official.index(synset))
        for synset, pictures in TRAINING.items()
        for name, content in pictures.items()
    ]
    parts = {"train-00000-of-00002": rows[::2], "train-00001-of-00002": rows[1::2]}
    parts["validation-00000-of-00001"] = [
        ({"bytes": content, "path": name}, official.index(synset))
        for (name, content), synset in zip(VALIDATING.items(), TRUTH, strict=True)
    ]
    for name, part in parts.items():
        images, labels = zip(*part, strict=True)
        table = pa.table({"image": list(images), "label": list(labels)})
        table = table if names is None else with_names(table, names)
        pq.write_table(table, root / "data" / f"{name}.parquet", row_group_size=2)


WRITE = {"folders": write_folders, "tars": write_tars, "parquet": write_parquet}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of every layout."""
    root = tmp_path_factory.mktemp("imagenet")
    for layout, write in WRITE.items():
        write(root / layout)
        source = {"name": "imagenet", "layout": layout, "caption": CAPTION}
        prepare(root / f"{layout}_shards", source, root / layout, samples_per_shard=6)
    return root


def test_three_layouts_give_equal_bytes(made):
    assert len({digest(made / f"{layout}_shards") for layout in WRITE}) == 1


def test_pictures_labels_and_names_are_the_official_ones(made):
    manifest = Manifest.load(made / "tars_shards")
    assert manifest.class_ids == SYNSETS
    assert manifest.classes == ["tench", "rooster", "soccer ball"]
    assert len(manifest.templates) == 80
    assert manifest.templates[0] == "a bad photo of a {}."
    assert manifest.image_size is None
    assert manifest.splits["train"].class_counts == [PER_CLASS] * 3
    assert manifest.splits["train"].share_without_caption == 0
    assert "image-net.org" in (made / "tars_shards" / "ATTRIBUTION.txt").read_text()
    train = {row["key"]: row for row in rows_of(made / "tars_shards", "train")}
    for label, (synset, pictures) in enumerate(TRAINING.items()):
        for name, content in pictures.items():
            row = train.pop(name.removesuffix(".JPEG"))
            assert (row["label"], row["image"]) == (label, content), synset
            assert row["caption"] == f"a photo of a {manifest.classes[label]}"
    assert not train
    validation = {row["key"]: row for row in rows_of(made / "tars_shards", "validation")}
    assert [SYNSETS[validation[name.removesuffix(".JPEG")]["label"]] for name in VALIDATING] == TRUTH
    classes = {row["label"] for row in rows_of(made / "tars_shards", "train")[:6]}
    assert len(classes) > 1  # a shard mixes classes


def test_validation_may_lie_in_folders(made, tmp_path):
    write_folders(tmp_path / "source", flat=False)
    source = {"name": "imagenet", "layout": "folders", "caption": CAPTION}
    prepare(tmp_path / "shards", source, tmp_path / "source", samples_per_shard=6)
    assert digest(tmp_path / "shards") == digest(made / "tars_shards")


def test_a_subset_of_synsets_has_labels_of_its_own(made, tmp_path):
    """Validation of the other classes is passed over."""
    root = tmp_path / "source"
    write_folders(root)
    for path in (root / "train" / SYNSETS[1]).iterdir():
        path.unlink()
    source = {"name": "imagenet", "layout": "folders", "caption": None}
    host = prepare(tmp_path / "shards", source, root)
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.class_ids == [SYNSETS[0], SYNSETS[2]]
    assert manifest.splits["validation"].class_counts == [3, 2]
    assert manifest.splits["train"].share_without_caption == 1
    assert host.facts["ignored_files"] == 3  # two of another class and .DS_Store


def test_what_is_wrong_is_named(tmp_path):
    def said(root, layout):
        with pytest.raises(IngestError) as error:
            prepare(
                root.with_name(f"{root.name}_shards"), {"name": "imagenet", "layout": layout, "caption": None}, root
            )
        return str(error.value)

    (tmp_path / "empty" / "pictures").mkdir(parents=True)
    for layout, expected in {"folders": "train/<synset>/", "tars": TRAIN, "parquet": "data/train-*.parquet"}.items():
        message = said(tmp_path / "empty", layout)
        assert expected in message
        assert "found pictures" in message
    write_folders(tmp_path / "other")
    (tmp_path / "other" / "train" / SYNSETS[0]).rename(tmp_path / "other" / "train" / "fish")
    assert "such as train/n01440764/" in said(tmp_path / "other", "folders")
    write_folders(tmp_path / "unlabelled")
    (tmp_path / "unlabelled" / f"{DEVKIT}.tar.gz").unlink()
    assert f"expected {DEVKIT}.tar.gz" in said(tmp_path / "unlabelled", "folders")
    write_tars(tmp_path / "cut")
    whole = (tmp_path / "cut" / TRAIN).read_bytes()
    (tmp_path / "cut" / TRAIN).write_bytes(whole[: len(whole) // 2])
    assert "fetch it again" in said(tmp_path / "cut", "tars")
    write_tars(tmp_path / "damaged")
    damaged = bytearray(whole)
    header = whole.index(f"{SYNSETS[1]}_33.JPEG".encode())
    damaged[header + 20 : header + 40] = bytes(range(20))
    (tmp_path / "damaged" / TRAIN).write_bytes(damaged)
    assert "fetch it again" in said(tmp_path / "damaged", "tars")
    write_tars(tmp_path / "nokit")
    (tmp_path / "nokit" / f"{DEVKIT}.tar.gz").write_bytes(packed({"a.txt": b""}, "w:gz"))
    assert f"expected {DEVKIT}/data" in said(tmp_path / "nokit", "tars")
    write_parquet(tmp_path / "columns")
    pq.write_table(pa.table({"jpg": [b""]}), tmp_path / "columns" / "data" / "train-00000-of-00002.parquet")
    assert "no column 'image'; it has jpg" in said(tmp_path / "columns", "parquet")
