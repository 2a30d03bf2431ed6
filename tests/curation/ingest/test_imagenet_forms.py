"""Forms of ImageNet that people hold: other orders, Kaggle's, Tiny-ImageNet, tars without a devkit, names that repeat."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation.ingest.test_imagenet import (
    CAPTION,
    COMPLETE_NAMES,
    OFFICIAL,
    PER_CLASS,
    SYNSETS,
    TRAINING,
    TRUTH,
    VALIDATING,
    packed,
    write_folders,
    write_parquet,
    write_tars,
)
from curation.ingest.test_ingest import every, picture, prepare, rows_of

from vtp.artefact import digest
from vtp.config import ConfigError
from vtp.curation.ingest.archives import TRAIN, VALIDATION
from vtp.curation.ingest.imagenet import DEVKIT
from vtp.curation.ingest.shard_workers import IngestError
from vtp.data.imagenet import imagenet_classes, synsets_of
from vtp.data.shards import Manifest

OTHER_ORDER = [SYNSETS[2], SYNSETS[0], SYNSETS[1]]  # soccer ball, tench, cock
NAMED = ["tench", "rooster", "soccer ball"]


def source(layout, **more):
    return {"name": "imagenet", "layout": layout, "caption": CAPTION} | more


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The digest of the shards of plain folders, which every other form of these pictures gives too."""
    root = tmp_path_factory.mktemp("expected")
    write_folders(root / "source", flat=False)
    prepare(root / "shards", source("folders"), root / "source")
    assert Manifest.load(root / "shards").classes == NAMED
    return digest(root / "shards")


def named(synsets):
    return [COMPLETE_NAMES[OFFICIAL.index(synset)] for synset in synsets]


@pytest.mark.parametrize(
    "names",
    [
        OTHER_ORDER,
        named(OTHER_ORDER),
        ["Soccer_ball", "tench", "cock"],
        [f"{synset} {name}" for synset, name in zip(OTHER_ORDER, named(OTHER_ORDER), strict=True)],
    ],
    ids=["synsets", "complete names", "one name each", "both"],
)
def test_parquet_in_another_order_says_its_classes_in_the_metadata(tmp_path, expected, names):
    write_parquet(tmp_path / "source", OTHER_ORDER, names=names)
    prepare(tmp_path / "shards", source("parquet"), tmp_path / "source")
    assert digest(tmp_path / "shards") == expected


def test_parquet_without_names_takes_them_from_a_file(tmp_path, expected):
    root = tmp_path / "source"
    write_parquet(root, OTHER_ORDER, names=None)
    with pytest.raises(
        IngestError, match=r"3 labels and no names of classes .*Set prepare_data.source.names to a file"
    ):
        prepare(tmp_path / "refused", source("parquet"), root)
    assert not any((tmp_path / ".refused").rglob("*.parquet"))  # before anything was unpacked
    (root / "classes.txt").write_text("\n".join(named(OTHER_ORDER)) + "\n")
    prepare(tmp_path / "shards", source("parquet", names="classes.txt"), root)
    assert digest(tmp_path / "shards") == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ant", "dog", "maillot"], r"'dog' \(none\), 'maillot' \(n03710637 or n03710721\)"),
        (["crane", "tench", "cock"], r"'crane' \(n02012849 or n03126707\)"),
        (["tench", "Tinca tinca", "cock"], r"'tench' \(as another name\), 'Tinca tinca' \(as another name\)"),
    ],
)
def test_names_that_mean_no_class_or_several_are_refused(tmp_path, names, said):
    write_parquet(tmp_path / "source", OTHER_ORDER, names=names)
    with pytest.raises(IngestError, match=rf"metadata of .*{said}.*prepare_data.source.names"):
        prepare(tmp_path / "shards", source("parquet"), tmp_path / "source")


def test_all_classes_are_known_by_any_of_their_names():
    """Two are called crane, and two missile by CLIP; neither is lost in the official order and among complete names."""
    names = imagenet_classes().names
    for each in (
        COMPLETE_NAMES,
        [names[s] for s in OFFICIAL],
        [name.split(",")[0] for name in COMPLETE_NAMES],
        OFFICIAL,
    ):
        assert synsets_of(each) == OFFICIAL
    rest = [synset for synset in OFFICIAL if COMPLETE_NAMES[OFFICIAL.index(synset)] != "crane"][::-1]
    assert synsets_of(named(rest)) == rest


def test_parquet_labels_may_be_texts_and_all_1000_numbers_need_no_names(tmp_path, expected):
    root = tmp_path / "texts"
    write_parquet(root, OTHER_ORDER, names=None)
    for path in (root / "data").iterdir():
        table = pq.read_table(path)
        texts = pa.array([OTHER_ORDER[label] for label in table["label"].to_pylist()])
        pq.write_table(table.set_column(1, "label", texts.dictionary_encode()), path)
    prepare(tmp_path / "shards", source("parquet"), root)
    assert digest(tmp_path / "shards") == expected
    root = tmp_path / "all"
    write_parquet(root, OFFICIAL, names=None)
    rows = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(1000)]
    table = pa.table({"image": rows, "label": list(range(1000))})
    pq.write_table(table, root / "data" / "train-00000-of-00002.parquet")
    prepare(tmp_path / "all_shards", source("parquet"), root, samples_per_shard=500)
    assert Manifest.load(tmp_path / "all_shards").class_ids == OFFICIAL
    labels = {row["image"]: row["label"] for row in rows_of(tmp_path / "all_shards", "train")}
    assert all(labels[picture(number)] == number for number in range(0, 1000, 99))


def write_kaggle(root):
    write_folders(root / "plain")
    (root / "source/ILSVRC/Data").mkdir(parents=True)
    (root / "plain").rename(root / "source/ILSVRC/Data/CLS-LOC")
    (root / "source/ILSVRC/Data/CLS-LOC" / f"{DEVKIT}.tar.gz").unlink()
    names = [name.removesuffix(".JPEG") for name in VALIDATING]
    rows = [f"{name},{synset} 85 1 499 272 {synset} 3 4 50 60 " for name, synset in zip(names, TRUTH, strict=True)]
    (root / "source/LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    (root / "source/LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    return root / "source"


def test_kaggles_folders(tmp_path, expected):
    root = write_kaggle(tmp_path)
    prepare(tmp_path / "shards", source("kaggle"), root)
    assert digest(tmp_path / "shards") == expected
    solution = root / "LOC_val_solution.csv"
    solution.write_text("\n".join(solution.read_text().splitlines()[:-1]))
    with pytest.raises(IngestError, match=r"ILSVRC2012_val_00000001.JPEG: .*LOC_val_solution.csv has no label for it"):
        prepare(tmp_path / "short", source("kaggle"), root)
    solution.unlink()
    with pytest.raises(IngestError, match=r"LOC_val_solution.csv: no such file; .* holds ILSVRC, LOC_synset"):
        prepare(tmp_path / "none", source("kaggle"), root)
    with pytest.raises(IngestError, match=r"expected ILSVRC/Data/CLS-LOC/train/<synset>/"):
        prepare(tmp_path / "deep", source("kaggle"), root / "ILSVRC")


def test_tiny_imagenet(tmp_path):
    """Pictures lie in folders of their own below the synsets; one synset is none of the 1,000."""
    root, synsets = tmp_path / "source", [*SYNSETS[:2], "n02691156"]
    for number, synset in enumerate(synsets):
        (root / "train" / synset / "images").mkdir(parents=True)
        (root / "train" / synset / f"{synset}_boxes.txt").write_text(f"{synset}_0.JPEG\t0\t0\t9\t9\n")
        for each in range(3):
            (root / "train" / synset / "images" / f"{synset}_{each}.JPEG").write_bytes(picture(10 * number + each))
    (root / "val/images").mkdir(parents=True)
    for number in range(6):
        (root / f"val/images/val_{number}.JPEG").write_bytes(picture(100 + number))
    lines = "".join(f"val_{number}.JPEG\t{synsets[number % 3]}\t0\t32\t44\t62\n" for number in range(6))
    (root / "val/val_annotations.txt").write_text(lines)
    (root / "wnids.txt").write_text("\n".join(synsets))
    prepare(tmp_path / "shards", source("tiny"), root)
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.class_ids == sorted(synsets)
    assert manifest.classes == ["tench", "rooster", "airplane"]
    train, validation = ({row["key"]: row for row in rows_of(tmp_path / "shards", each)} for each in manifest.splits)
    assert len(train) == 9
    for number, synset in enumerate(synsets):
        for each in range(3):
            row = train[f"{synset}_{each}"]
            assert (row["image"], manifest.class_ids[row["label"]]) == (picture(10 * number + each), synset)
    for number in range(6):
        row = validation[f"val_{number}"]
        assert (row["image"], manifest.class_ids[row["label"]]) == (picture(100 + number), synsets[number % 3])


NUMBERS = {"count from 0": 0, "count from 1": 1}


@pytest.mark.parametrize("form", ["csv", "names", "in order", *NUMBERS])
def test_tars_need_no_devkit_where_a_file_has_the_labels(tmp_path, expected, form):
    root = tmp_path / "source"
    write_tars(root)
    (root / f"{DEVKIT}.tar.gz").unlink()
    more = {"labels": "labels.txt"}
    match form:
        case "csv":
            lines = [f"{name},{synset} 1 2 3 4" for name, synset in zip(VALIDATING, TRUTH, strict=True)]
            lines.insert(0, "ImageId,PredictionString")
        case "names":
            lines = [f"val/{name} {synset}" for name, synset in zip(VALIDATING, TRUTH, strict=True)]
        case "in order":
            lines = TRUTH
        case _:
            lines = [str(NUMBERS[form] + OTHER_ORDER.index(synset)) for synset in TRUTH]
            (root / "classes.txt").write_text("\n".join(OTHER_ORDER))
            (root / "labels.txt").write_text("\n".join(lines))
            with pytest.raises(
                IngestError, match=r"labels are numbers, whose order the devkit alone knows; give synsets"
            ):
                prepare(tmp_path / "refused", source("tars", **more), root)
            more["names"] = "classes.txt"
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    prepare(tmp_path / "shards", source("tars", **more), root)
    assert digest(tmp_path / "shards") == expected


def test_labels_that_cannot_be_right_are_refused(tmp_path):
    root = tmp_path / "source"
    write_tars(root)
    first = next(iter(VALIDATING))
    for text, said in (
        (f"{first} {SYNSETS[0]}\n{first} {SYNSETS[1]}\n", "ILSVRC2012_val_00000001 has two labels"),
        (f"{first} {SYNSETS[0]}\nwhat is this\n", r"labels.txt:2: 'what is this'; expected a name and a synset"),
        (f"{first} {SYNSETS[0]}\n{SYNSETS[0]}\n", "a line has no name"),
        ("", "no labels"),
        ("\n".join(TRUTH[:3]), r"ILSVRC2012_val_00000004.JPEG: expected ILSVRC2012_val_00000001.JPEG to 00000003"),
    ):
        (root / "labels.txt").write_text(text)
        with pytest.raises(IngestError, match=said):
            prepare(tmp_path / "shards", source("tars", labels="labels.txt"), root)
    (root / "labels.txt").write_text("\n".join("0112201"))
    (root / "classes.txt").write_text("\n".join([*OTHER_ORDER, "n01443537"]))
    with pytest.raises(IngestError, match="numbers from 0 to 2; expected 0 to 3 or 1 to 4"):
        prepare(tmp_path / "shards", source("tars", labels="labels.txt", names="classes.txt"), root)
    for more in ({"layout": "parquet", "labels": "a"}, {"names": "a"}):
        with pytest.raises(ConfigError, match="set it to null"):
            prepare(tmp_path / "shards", source("folders") | more, root)


def repeating(layout, root):
    """20 pictures `0.jpg` to `4.jpg` in each of four classes; what a tar, a folder and parquet hold of it."""
    synsets = OFFICIAL[:4]
    pictures = {s: {f"{each}.JPEG": picture(10 * c + each) for each in range(5)} for c, s in enumerate(synsets)}
    held = {"ILSVRC2012_val_00000001.JPEG": picture(99)}
    root.mkdir()
    match layout:
        case "tars":
            inner = {f"./{synset}.tar": packed(each) for synset, each in pictures.items()}
            (root / TRAIN).write_bytes(packed(inner | {"./._n01440764.tar": b"x"}))
            (root / VALIDATION).write_bytes(packed(held))
            (root / "labels.txt").write_text(synsets[0])
        case "folders":
            for synset, each in pictures.items():
                (root / "train" / synset).mkdir(parents=True)
                for name, content in each.items():
                    (root / "train" / synset / name).write_bytes(content)
            (root / "val").mkdir()
            (root / "val" / next(iter(held))).write_bytes(picture(99))
            (root / "labels.txt").write_text(synsets[0])
        case "parquet":
            (root / "data").mkdir()
            rows = [({"bytes": b, "path": n}, s) for s, each in pictures.items() for n, b in each.items()]
            rows.append(rows[3])  # the same once more
            images, labels = zip(*rows, strict=True)
            pq.write_table(pa.table({"image": images, "label": labels}), root / "data/train-0.parquet")
            held = [{"bytes": picture(99), "path": None}]
            pq.write_table(pa.table({"image": held, "label": synsets[:1]}), root / "data/val-0.parquet")
    return pictures


@pytest.mark.parametrize("layout", ["tars", "folders", "parquet"])
def test_pictures_of_one_name_are_all_there(tmp_path, layout):
    pictures = repeating(layout, tmp_path / "source")
    more = {} if layout == "parquet" else {"labels": "labels.txt"}
    host = prepare(tmp_path / "shards", source(layout, **more), tmp_path / "source")
    rows = rows_of(tmp_path / "shards", "train")
    assert sorted(row["image"] for row in rows) == sorted(b for each in pictures.values() for b in each.values())
    assert len({row["key"] for row in rows}) == 20
    assert {row["key"].partition("-")[0] for row in rows} == set("01234")  # they keep their name in front
    ids = Manifest.load(tmp_path / "shards").class_ids
    assert all(row["image"] in pictures[ids[row["label"]]].values() for row in rows)
    assert host.facts["duplicates"] == (1 if layout == "parquet" else 0)
    prepare(tmp_path / "again", source(layout, **more), tmp_path / "source")
    assert digest(tmp_path / "again") == digest(tmp_path / "shards")


def test_keys_that_come_once_are_the_names(tmp_path):
    """Whatever else repeats: the key of a picture with a name of its own is that name."""
    root = tmp_path / "source"
    write_folders(root, flat=False)
    for synset in SYNSETS[:2]:
        (root / "train" / synset / "same.JPEG").write_bytes(picture(len(synset) + int(synset[-1])))
    prepare(tmp_path / "shards", source("folders"), root)
    keys = {row["key"] for row in rows_of(tmp_path / "shards", "train")}
    once = {name.removesuffix(".JPEG") for each in TRAINING.values() for name in each}
    assert once < keys
    assert len(keys) == len(once) + 2 == 3 * PER_CLASS + 2
    assert len(every(tmp_path / "shards")) == len(keys) + len(VALIDATING)
