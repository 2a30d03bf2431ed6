"""The stage at tiny size: it learns, stops and goes on exactly, and its folder is what it was measured by."""

import json

import pytest
import torch
from detecting import scenes_of
from generating import work_in
from tiny import tiny_params

from stages.plans.rules import disagreements
from stages.prepare_data import PrepareData
from stages.runner.environment import Interrupted
from stages.train_detector import TrainDetector, measure, run
from vtp.artefact import digest
from vtp.curation.ingest.compose import Composer
from vtp.models.scene_detector import SceneDetector

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIM = tiny_params()["train_generator"]["optim"]
SECTION = {
    "seed": 0,
    "source": scenes_of(classes=3, scene_fraction=0.0, image_size=24, scenes=["places"]).model_dump(),
    "batch_size": 8,
    "model": {"width": 8, "stride": 4},
    "imperfections": {"shift": 0.06, "blur": 0.03, "noise": 20.0},
    "optim": OPTIM | {"lr": 1e-2, "final_lr": 1e-4},
    "training": {
        "length": {"name": "samples", "samples": 64},
        "precision": "float32",
        "communication": "float32",
        "log_every": 2,
        "max_skipped": 0,
    },
    "validation_samples": 20,
}


def train(root, name="out", *, stop_after=None, **changes):
    out = root / name
    out.mkdir(parents=True)
    paths = {"detector": out / "detector", "metrics": out / "metrics.json", "curves": out / "curves.csv"}
    config = TrainDetector.parse(SECTION | changes, where="train_detector")
    run(config, **paths, host=work_in(root, stop_after=stop_after))
    return out


def figures_of(out):
    return json.loads((out / "metrics.json").read_text())["train_detector"]


def test_it_learns(tmp_path):
    """Three drawings, in a second of work; what is measured is what its folder finds."""
    length = SECTION["training"] | {"length": {"name": "samples", "samples": 640}}
    out = train(tmp_path, training=length, validation_samples=60)
    figures = figures_of(out)
    assert figures["object_accuracy"] > 0.9
    assert figures["object_prompts"] == figures["scene_prompts"] == 60
    assert figures["background_accuracy"] == 1.0
    assert (figures["steps"], figures["samples"]) == (80, 640)
    model = SceneDetector.from_pretrained(out / "detector")
    config = TrainDetector.parse(SECTION | {"validation_samples": 60}, where="train_detector")
    again = measure(model, Composer(config.source), config, work_in(tmp_path / "again"))
    assert {name: figures[name] for name in again} == again


def test_resume_is_bit_identical(tmp_path):
    through = train(tmp_path / "one")
    with pytest.raises(Interrupted):
        train(tmp_path / "two", "stopped", stop_after=3)
    resumed = train(tmp_path / "two")
    assert digest(resumed) == digest(through)


def test_its_pictures_are_those_of_the_data():
    def said(**changes):
        section = tiny_params()["prepare_data"]
        data = PrepareData.parse(section | {"source": section["source"] | changes}, where="prepare_data")
        return disagreements({"prepare_data": data, "train_detector": detector}, [])

    source = tiny_params()["prepare_data"]["source"]
    detector = TrainDetector.parse(SECTION | {"source": source}, where="train_detector")
    assert said() == said(train_samples=9) == []
    message = "has other classes or sizes than prepare_data.source; write `source: {base: prepare_data.source}`"
    assert said(classes=5) == said(image_size=8) == [f"train_detector.source: {message}"]


def test_weights_are_those_of_the_seed(tmp_path):
    one, other = (train(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    weights = [SceneDetector.from_pretrained(out / "detector").head.weight for out in (one, other)]
    assert not torch.equal(*weights)
