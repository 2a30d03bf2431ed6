"""Own pictures with captions, labels, both or neither, through every stage that trains, draws and measures."""

import csv
import logging

import pytest
import torch
from generating import cache, draw, train, work_in
from PIL import Image
from tiny import ROOT, merged, tiny_params

from stages.evaluate_generator import EvaluateGenerator
from stages.evaluate_generator import run as evaluate_generator
from stages.evaluate_understanding import EvaluateUnderstanding
from stages.evaluate_understanding import run as evaluate_understanding
from stages.prepare_data import PrepareData
from stages.prepare_data import run as prepare_data
from stages.pretrain import Pretrain
from stages.pretrain import run as pretrain
from stages.reference import ReferenceStatistics
from stages.reference import run as measure
from vtp import load_generator
from vtp.artefact import ArtefactError, read_json
from vtp.config import ConfigError, read_yaml
from vtp.curation.ingest.shard_workers import IngestError
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.evaluation.samples import Samples
from vtp.models.tokenizer import VisualTokenizer
from vtp.params import read_parameters

pytestmark = pytest.mark.usefixtures("one_thread")
OVERLAYS = ROOT / "pipelines/overlays"
CLASSES = ("собака", "猫")
COUNT = 48
KINDS = {"captions": (True, False), "labels": (False, True), "both": (True, True), "neither": (False, False)}
TINY = tiny_params()


def write_pictures(
    folder, *, captions=lambda index: f"{CLASSES[index % 2]}, {index}", labels=lambda index: CLASSES[index % 2]
):
    """Pictures of odd sizes, and a table of them whose cells may be empty."""
    folder.mkdir(parents=True)
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption", "label"])
        for index in range(COUNT):
            name = f"{index}.{'png' if index % 3 else 'jpg'}"
            torch.manual_seed(index)
            pixels = torch.randint(0, 256, (17 + index % 9, 21 + index % 5, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name)
            table.writerow([name, captions(index), labels(index)])
    return folder


def source(*, captions, labels):
    """That of overlays/own/table.yaml."""
    record = read_yaml(OVERLAYS / "own/table.yaml")["prepare_data"]["source"]
    return record | ({} if captions else {"caption": None}) | ({} if labels else {"label": None})


def prepare(root, pictures, record):
    params = TINY["prepare_data"] | {"source": record, "max_unreadable": 0.0}
    paths = {"source": pictures, "shards": root / "shards"}
    prepare_data(PrepareData.parse(params, where="test"), **paths, host=work_in(root / "prepare"))
    return root / "shards"


def own(section, **changes):
    """A section of the tiny recipe, with what the overlay of own data says of captions and labels."""
    said = read_parameters(OVERLAYS / "own/64.yaml").values
    if section == "pretrain":
        rule = said["pretrain"]["without_captions"]
        changes = merged(changes, {"without_captions": rule, "monitor": {"probe": None, "milestones": []}}, new=True)
    if section == "evaluate_generator":
        changes = {name: said[section][name] for name in ("kernel", "class_probe")} | changes
    return merged(TINY[section], changes)


def pretrained(root, shards, params):
    files = {name: root / name for name in ("tokenizer", "state", "milestones", "metrics", "curves", "picture")}
    pretrain(Pretrain.parse(params, where="test"), shards=[shards], **files, host=work_in(root / "pretrain"))
    return root / "tokenizer"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_comes_to_samples_and_figures(tmp_path, caplog, kind):
    captions, labels = KINDS[kind]
    pictures = write_pictures(tmp_path / "pictures")
    shards = prepare(tmp_path, pictures, source(captions=captions, labels=labels))
    splits = {"train": {"samples": None, "kept": None}}
    config = ReferenceStatistics.parse(own("reference", splits=splits), where="test")
    measure(config, shards=shards, reference=tmp_path / "reference", host=work_in(tmp_path / "measured"))
    with caplog.at_level(logging.WARNING):
        tokenizer = pretrained(tmp_path, shards, own("pretrain"))
    assert ("goes on without clip" in caplog.text) is not captions
    assert ("clip_loss" in (tmp_path / "curves").read_text()) is captions

    latents = LatentDataset(cache(tmp_path, tmp_path))
    classes = [*CLASSES] if labels else ["all"]
    assert latents.classes == classes
    assert len(latents) == len(ShardDataset(shards, "train"))
    out = train(tmp_path, tmp_path, {"monitor": {"milestones": []}})
    generator = load_generator(out / "generator", tokenizer)
    assert generator.classes == classes
    assert generator.sample(classes[0], count=2)[1].size == (16, 16)

    draw(out / "generator", tmp_path)
    judged = EvaluateGenerator.parse(own("evaluate_generator"), where="test")
    paths = {name: tmp_path / name for name in ("reference", "tokenizer", "samples")}
    paths |= {name: tmp_path / f"generated_{name}" for name in ("metrics", "curves", "pictures")}
    evaluate_generator(judged, **paths, host=work_in(tmp_path / "judged"))
    assert any(name.startswith("gfid") for name in read_json(paths["metrics"])["generation"]["unguided"])

    probed = EvaluateUnderstanding.parse(own("evaluate_understanding", neighbours=3), where="test")
    paths = {"shards": shards, "tokenizer": tokenizer, "metrics": tmp_path / "m.json", "curves": tmp_path / "c.csv"}
    caplog.clear()
    evaluate_understanding(probed, **paths, host=work_in(tmp_path / "probed"))
    figures = read_json(tmp_path / "m.json")["understanding"]
    if labels:
        assert figures["chance"] == 0.5
        assert ("zero_shot_top1_squash" in figures) is captions
        assert "linear_probe_bottleneck" in figures
    else:
        assert figures == {"not_measured": "the data have no classes, and a probe tells classes apart"}
        assert "give the source labels" in caplog.text


def test_no_captions_are_refused_before_anything_is_trained(tmp_path):
    shards = prepare(tmp_path, write_pictures(tmp_path / "pictures"), source(captions=False, labels=True))
    with pytest.raises(ConfigError, match=r"no training picture has a caption.*without_captions to no_clip"):
        pretrained(tmp_path, shards, TINY["pretrain"])
    assert not any((tmp_path / "pretrain").rglob("*.safetensors"))
    params = merged(TINY["pretrain"], {"objective": {"weights": {"clip": 0.0}}})
    pretrained(tmp_path, shards, params)  # what it says helps


@pytest.mark.parametrize("rule", ["refuse", "no_clip"])
def test_some_missing_captions_are_refused(tmp_path, rule):
    """Of blanks alone is none; going on without clip would leave out the captions that there are."""
    pictures = write_pictures(tmp_path / "pictures", captions=lambda index: "  " if index % 4 == 0 else "a cat")
    shards = prepare(tmp_path, pictures, source(captions=True, labels=True))
    params = merged(TINY["pretrain"], {"without_captions": rule})
    with pytest.raises(
        ConfigError, match=r"% of the training pictures have no caption.*max_replaced to 0\.\d+ or more"
    ):
        pretrained(tmp_path, shards, params)


def test_a_probe_needs_classes_to_tell_apart(tmp_path):
    for name, labels, said in (
        ("none", lambda index: "", "no classes"),
        ("one", lambda index: "cat", "all of one class"),
    ):
        root = tmp_path / name
        shards = prepare(root, write_pictures(root / "pictures", labels=labels), source(captions=True, labels=True))
        with pytest.raises(ConfigError, match=rf"{said}.*set pretrain.monitor.probe to null"):
            pretrained(root, shards, TINY["pretrain"])


def test_labels_for_none_of_a_split_are_told_as_they_are(tmp_path):
    """No collapse of the encoder: the split of validation has classes, and no sample of them."""
    pictures = write_pictures(tmp_path / "pictures")
    rows = (pictures / "rows.csv").read_text().splitlines()
    (pictures / "rows.csv").write_text("\n".join([rows[0], *rows[1:30]]))
    (pictures / "held.csv").write_text("\n".join([rows[0], *(f"{row.rsplit(',', 1)[0]}," for row in rows[30:])]))
    record = source(captions=True, labels=True) | {"validation": {"name": "table", "table": "held.csv"}}
    shards = prepare(tmp_path, pictures, record)
    pretrained(tmp_path, shards, own("pretrain"))
    with pytest.raises(ArtefactError, match="2 classes, and none of the 19 samples of split 'validation' has one"):
        cache(tmp_path, tmp_path)


def held_apart(root, split_of):
    """Shards of pictures of three classes; `split_of` says the split of each class, by turns without one."""
    pictures, classes = root / "pictures", ("ant", "bee", "cat")
    write_pictures(pictures, captions=lambda index: "", labels=lambda index: classes[index % 3] if index < 42 else "")
    head, *rows = (pictures / "rows.csv").read_text().splitlines()
    for split in ("train", "validation"):
        turns = [["train", "validation"][number // 3 % 2] for number in range(len(rows))]
        of_rows = [split_of.get(row.rsplit(",", 1)[1], [turn]) for row, turn in zip(rows, turns, strict=True)]
        own = [row for row, splits in zip(rows, of_rows, strict=True) if split in splits]
        (pictures / f"{split}.csv").write_text("\n".join([head, *own]))
    record = source(captions=False, labels=True) | {"train": "train.csv"}
    return prepare(root, pictures, record | {"validation": {"name": "table", "table": "validation.csv"}})


def test_a_class_without_training_pictures_is_not_drawn(tmp_path, caplog):
    """Every picture of `bee` is held out: a generator has seen none, and samples of it would be of nothing."""
    shards = held_apart(tmp_path, {"ant": ["train"], "bee": ["validation"]})
    torch.manual_seed(0)
    VisualTokenizer(Pretrain.parse(TINY["pretrain"], where="test").architecture).save_pretrained(tmp_path / "tokenizer")
    cache(tmp_path, tmp_path)
    config = ReferenceStatistics.parse(
        own("reference", splits={"train": {"samples": None, "kept": None}}), where="test"
    )
    measure(config, shards=shards, reference=tmp_path / "reference", host=work_in(tmp_path / "measured"))
    generator = train(tmp_path, tmp_path, {"monitor": {"milestones": [0.5]}}) / "generator"
    for labels in ("random", "balanced"):
        with caplog.at_level(logging.WARNING):
            samples = Samples(draw(generator, tmp_path / labels, labels=labels))
        assert set(samples.of("unguided").labels.tolist()) == {0, 2}
        assert "1 classes had no training picture and are not drawn: bee" in caplog.text
        caplog.clear()
    assert torch.bincount(samples.of("unguided").labels).tolist() == [len(samples) // 2, 0, len(samples) // 2]

    judged = EvaluateGenerator.parse(own("evaluate_generator"), where="test")
    paths = {"reference": tmp_path / "reference", "tokenizer": tmp_path / "tokenizer", "samples": samples.folder}
    paths |= {name: tmp_path / f"generated_{name}" for name in ("metrics", "curves", "pictures")}
    evaluate_generator(judged, **paths, host=work_in(tmp_path / "judged"))
    for folder in (generator, generator / "at-0.5"):
        loaded = load_generator(folder, tmp_path / "tokenizer")
        assert (loaded.classes, loaded.space.labels) == (["ant", "bee", "cat"], [0, 2])
        with pytest.raises(ValueError, match="class 'bee' had no training picture"):
            loaded.sample("bee")
        assert len(loaded.sample(["ant", 2])) == 2


@pytest.mark.parametrize(
    ("split_of", "said"),
    [
        (
            {"ant": ["train"], "bee": ["validation"], "cat": ["validation"]},
            "the training pictures are all of one class",
        ),
        ({"ant": ["validation"], "bee": ["validation"], "cat": ["validation"]}, "no training picture has a class"),
        ({"ant": ["train"], "bee": ["train"], "cat": ["train"]}, "no validation picture has a class"),
    ],
)
def test_what_no_probe_can_tell_is_told_before_any_is_fitted(tmp_path, caplog, split_of, said):
    shards = held_apart(tmp_path, split_of)
    config = EvaluateUnderstanding.parse(own("evaluate_understanding"), where="test")
    paths = {
        "shards": shards,
        "tokenizer": tmp_path / "none",
        "metrics": tmp_path / "m.json",
        "curves": tmp_path / "c.csv",
    }
    with caplog.at_level(logging.WARNING):
        evaluate_understanding(config, **paths, host=work_in(tmp_path / "probed"))
    reason = f"{said}, and a probe tells classes apart"
    assert read_json(tmp_path / "m.json")["understanding"] == {"not_measured": reason}
    assert f"{reason}: nothing is measured" in caplog.text


@pytest.mark.parametrize("held", ["val", "test"])
def test_folders_of_splits_are_no_classes(tmp_path, held):
    for split in ("train", held):
        for name in CLASSES:
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / split / name / "0.png")
    record = read_parameters(OVERLAYS / "own.yaml").values["prepare_data"]["source"]
    with pytest.raises(IngestError, match=rf"train and {held} are names of splits.*folder: {held}"):
        prepare(tmp_path, tmp_path / "pictures", record)
    split = {"train": "train", "validation": {"name": "folder", "folder": held}}
    assert ShardDataset(prepare(tmp_path, tmp_path / "pictures", record | split), "train").manifest.classes == [
        *CLASSES
    ]
