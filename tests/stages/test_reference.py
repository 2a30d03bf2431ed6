"""The artefact of real images: ranks, batches and interruptions do not matter, it knows its data, mistakes are told."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from launching import on_two_ranks
from tiny import merged, tiny_params, write_shards

import stages.reference as stage
from stages.runner.environment import Interrupted, LocalHost, Runtime
from vtp.artefact import ArtefactError, digest, load_tensors, read_json, save_tensors, write_json
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.data.shards import NO_LABEL
from vtp.evaluation.features import RandomVggFeaturesConfig
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.networks import RandomVgg
from vtp.evaluation.reference import Reference

VGG = {"name": "random_vgg16", "seed": 0}
EFFICIENTNET = {"name": "efficientnet_lite0", "side": 64}
SPLITS = {
    "train": {"samples": 37, "labelled": True, "kept": 15},
    "validation": {"samples": None, "labelled": False, "kept": 0},
}


class QuietHost(LocalHost):
    """Without bars; asks to stop when that many images were seen."""

    stop_at = None
    seen = 0

    def progress(self, total, description, unit, done=0):
        self.total, self.done = total, done
        return nullcontext(self)

    def update(self, count):
        self.seen += count
        if self.stop_at is not None and self.seen >= self.stop_at:
            self.signalled = True


def params_of(**changes):
    return merged(tiny_params()["reference"] | {"splits": SPLITS, "features": [VGG]}, {"batch_size": 8} | changes)


def work_in(folder):
    host = QuietHost(folder / "scratch" / "folder", folder, Runtime(device="cpu"))
    host.folder.mkdir(parents=True, exist_ok=True)
    return host


def make(shards, folder, host=None, **changes):
    folder.mkdir(exist_ok=True)
    config = stage.ReferenceStatistics.parse(params_of(**changes), where="test")
    stage.run(config, shards=shards, reference=folder / "reference", host=host or work_in(folder))
    return Reference.load(folder / "reference")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    return make(shards, tmp_path_factory.mktemp("here"))


def same(one, other, rel=1e-5):
    """Equal within what a network rounds for another batch."""
    for name in SPLITS:
        a, b = one.of(name), other.of(name)
        assert np.array_equal(a.rows, b.rows)
        assert torch.equal(a.labels, b.labels)
        assert list(a.networks) == list(b.networks)
        for network, ours in a.networks.items():
            theirs = b.networks[network]
            torch.testing.assert_close(ours.features, theirs.features, rtol=rel, atol=1e-6)
            for x, y in ((ours.statistics, theirs.statistics), (ours.spatial, theirs.spatial)):
                torch.testing.assert_close(x.mean, y.mean, rtol=rel, atol=1e-7)
                torch.testing.assert_close(x.covariance, y.covariance, rtol=10 * rel, atol=1e-5)


def test_statistics_are_those_of_the_images(shards, reference):
    """By hand: the first labelled ones of train, all of validation."""
    network = RandomVgg(0)
    for name, rows in (("train", ShardDataset(shards, "train").singles(37).rows), ("validation", np.arange(32))):
        of_split, found = reference.of(name), network(ShardDataset(shards, name).images(rows, 16))
        own = of_split.networks["random-vgg16"]
        assert of_split.count == own.statistics.count == own.spatial.count == len(rows)
        assert np.array_equal(of_split.rows, rows)
        labels = ShardDataset(shards, name).singles(37).labels if name == "train" else np.full(32, NO_LABEL)
        assert np.array_equal(of_split.labels, labels)
        kept = SPLITS[name]["kept"]
        torch.testing.assert_close(own.features, found.pooled[:kept], rtol=1e-5, atol=1e-6)
        for ours, features in ((own.statistics, found.pooled), (own.spatial, found.spatial)):
            assert frechet_distance(ours, GaussianStatistics.of(features)) < 1e-8


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_any_batch_size(shards, reference, tmp_path, batch_size):
    same(make(shards, tmp_path, batch_size=batch_size), reference)


def test_equal_runs_write_equal_bytes(shards, reference, tmp_path):
    assert digest(make(shards, tmp_path).folder) == digest(reference.folder)


@pytest.mark.parametrize(("batch_size", "networks"), [(3, [EFFICIENTNET, VGG]), (64, [VGG])])
def test_two_ranks_are_one_process(shards, tmp_path, batch_size, networks):
    """Two real ones, by the command line. 37 images in batches of 64: one of them has nothing to do."""
    paths = {"shards": shards, "reference": "reference"}
    on_two_ranks(tmp_path, "reference", params_of(batch_size=batch_size, features=networks), paths)
    facts = json.loads((tmp_path / "provenance.json").read_text())["facts"]
    assert (facts["images"], facts["imagenet"]) == (69, False)
    assert facts["data"].startswith("openmoji (train): 64 pictures of 6 classes, 16 px; openmoji (validation): 32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    alone = make(shards, tmp_path / "alone", batch_size=batch_size, features=networks)
    torch.set_num_threads(threads)
    together = Reference.load(tmp_path / "reference")
    same(together, alone, rel=1e-11)
    assert len(together.of("train").networks) == len(networks)
    for network, own in together.of("train").networks.items():
        assert torch.equal(own.features, alone.of("train").networks[network].features)


@pytest.mark.parametrize("stop_at", [1, 20, 45])
def test_an_interrupted_run_goes_on(shards, tmp_path, monkeypatch, stop_at):
    """After any chunk of batches, in any split; with the same bits."""
    monkeypatch.setattr(stage, "BATCHES", 2)
    through = make(shards, tmp_path / "through")
    first = work_in(tmp_path)
    first.stop_at = stop_at
    with pytest.raises(Interrupted):
        make(shards, tmp_path, first)
    assert not (tmp_path / "reference").exists()
    second = work_in(tmp_path)
    again = make(shards, tmp_path, second)
    assert second.done == first.seen == {1: 16, 20: 32, 45: 53}[stop_at]
    assert second.done + second.seen == second.total == 69
    assert digest(again.folder) == digest(through.folder)


def test_what_it_says_of_itself(shards, reference):
    assert reference.features == [RandomVggFeaturesConfig(name="random_vgg16", seed=0)]
    assert reference.classes == ShardDataset(shards, "train").manifest.classes
    assert reference.image_size == 16
    assert reference.data == digest(shards / "manifest.json")
    config = read_json(reference.folder / "config.json")
    assert config["crop"] == "adm_centre"
    assert config["splits"]["train"] == {"count": 37, "labelled": True, "kept": 15}


def test_it_belongs_to_its_data(shards, reference, tmp_path):
    data = ShardDataset(shards, "train")
    reference.require_data(data)
    reference.require_size(16)
    with pytest.raises(ArtefactError, match="statistics of 16 x 16 images, those to compare are 32 x 32"):
        reference.require_size(32)
    with pytest.raises(ArtefactError, match="no split 'test', it has train, validation; add it to reference.splits"):
        reference.of("test")
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").unlink()
    manifest = read_json(shards / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"attribution": "somebody else"})
    with pytest.raises(ArtefactError, match="statistics of other data than"):
        reference.require_data(ShardDataset(tmp_path, "train"))


def copy_of(reference, folder):
    folder.mkdir()
    for path in reference.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_damaged_and_foreign_folders(reference, tmp_path):
    with pytest.raises(ArtefactError, match=r"config\.json: no such file"):
        Reference.load(tmp_path)
    folder = copy_of(reference, tmp_path / "copy")
    config, tensors = read_json(folder / "config.json"), load_tensors(folder / "train.safetensors")
    tensors = {name: value.clone() for name, value in tensors.items()}
    for changes, message in (
        ({"format_version": 9}, "of format 9, this code reads 3"),
        ({"format_version": 2}, "of format 2, this code reads 3; .* run the stage reference again"),
        ({"format_version": None}, "of format None"),
        ({"crop": "none"}, "crop: .*run the stage reference again"),
        ({"features": [{"name": "other"}]}, "no such name 'other'"),
        ({"features": []}, "features.*run the stage reference again"),
        ({"splits": {"../train": config["splits"]["train"]}}, "splits.*run the stage reference again"),
    ):
        write_json(folder / "config.json", config | changes)
        with pytest.raises(ArtefactError, match=message):
            Reference.load(folder)
    write_json(folder / "config.json", config)
    bad = tensors["random-vgg16/pooled_mean"].clone()
    bad[2] = float("nan")
    for changed, message in (
        (
            tensors | {"random-vgg16/features": tensors["random-vgg16/features"][:3]},
            "is not what .* says; fetch the folder again",
        ),
        (tensors | {"rows": tensors["rows"][:-1]}, "is not what .* says; fetch the folder again"),
        (tensors | {"labels": tensors["labels"][1:]}, "is not what .* says; fetch the folder again"),
        ({"other": tensors["rows"]}, "random-vgg16 in .*train.*: holds {}, not Gaussian statistics"),
        (
            tensors | {"random-vgg16/pooled_mean": bad},
            "1 of .* rows of mean in .* hold NaN or infinity, the first is number 2",
        ),
    ):
        save_tensors(folder / "train.safetensors", changed)
        write_json(folder / "config.json", config)
        with pytest.raises(
            ArtefactError, match=r"not the files that were written there: train\.safetensors has sha256"
        ):
            Reference.load(folder).of("train")
        files = config["files"] | {"train.safetensors": digest(folder / "train.safetensors")}
        write_json(folder / "config.json", config | {"files": files})
        with pytest.raises(ValueError, match=message):
            Reference.load(folder).of("train")
    (folder / "validation.safetensors").replace(folder / "train.safetensors")
    write_json(folder / "config.json", config)
    for split in ("train", "validation"):
        with pytest.raises(ArtefactError, match=rf"{split}\.safetensors (has sha256|is missing)"):
            Reference.load(folder).of(split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": {"samples": 49}}}, "48 labelled images where reference.splits asks for 49"),
        ({"splits": {"train": {"kept": 38}}}, "37 labelled images where reference.splits asks for 38; lower"),
        ({"splits": {"validation": {"samples": 33}}}, "32 images where reference.splits asks for 33"),
    ],
)
def test_more_images_than_there_are(shards, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(shards, tmp_path, **changes)


def test_a_split_that_is_not_there(shards, tmp_path):
    config = params_of() | {"splits": {"test": SPLITS["validation"]}}
    config = stage.ReferenceStatistics.parse(config, where="test")
    with pytest.raises(ArtefactError, match="no split 'test'; it has train, validation"):
        stage.run(config, shards=shards, reference=tmp_path / "reference", host=work_in(tmp_path))
    with pytest.raises(ConfigError, match="splits"):
        stage.ReferenceStatistics.parse(params_of() | {"splits": {"../x": SPLITS["train"]}}, where="test")
    with pytest.raises(ConfigError, match="splits"):
        stage.ReferenceStatistics.parse(params_of() | {"splits": {}}, where="test")


def test_networks_have_names_of_their_own():
    """Two that metrics could not tell apart are refused."""
    twice = [VGG, {"name": "random_vgg16", "seed": 1}]
    with pytest.raises(ConfigError, match="two networks are called random-vgg16 in metrics; leave one out"):
        stage.ReferenceStatistics.parse(params_of(features=twice), where="test")
    with pytest.raises(ConfigError, match="features"):
        stage.ReferenceStatistics.parse(params_of(features=[]), where="test")
    sides = [EFFICIENTNET, EFFICIENTNET | {"side": 96}]
    assert len(stage.ReferenceStatistics.parse(params_of(features=sides), where="test").features) == 2
