"""The stage on real samples: ranks and batches do not matter, figures are those of the pixels, mistakes are told."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, merged, tiny_params, write_params, write_shards

import stages.evaluate_generator as stage
import stages.reference
from stages._runtime import Runtime, Work
from vtp.artefact import ArtefactError, load_tensors, save_tensors, write_json
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import build_features
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall
from vtp.evaluation.reference import Reference
from vtp.layers.images import normalise, to_uint8
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

COUNT = 31  # samples; not divisible by ranks or batches
CLASSES = ["cat", "dog", "owl", "bat", "pig", "ant"]
INPUTS = ("tokenizer", "samples", "reference")
NAMES = ("gfid", "sfid", "kid", "precision", "recall")


class QuietWork(Work):
    """Without bars."""

    counted = 0

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        self.counted += count


def work_in(folder):
    work = QuietWork(folder / "scratch" / "folder", folder, Runtime(device="cpu", weights=str(folder)))
    work.folder.mkdir(parents=True, exist_ok=True)
    return work


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_reference(root, folder, **changes):
    params = merged(tiny_params()["reference"], {"splits": {"train": {"samples": 40, "kept": 35}}})
    config = stages.reference.ReferenceStatistics.parse(params | changes, where="test")
    folder.mkdir(exist_ok=True)
    stages.reference.run(config, shards=root / "shards", reference=folder / "reference", work=work_in(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, their reference, a tokenizer that has seen a few of them often, samples around their latents."""
    root = tmp_path_factory.mktemp("generation")
    write_shards(root / "shards")
    write_reference(root, root)
    torch.manual_seed(0)
    architecture = tiny_params()["pretrain"]["tokenizer"] | {"text": None}
    tokenizer = VisualTokenizer(TokenizerConfig.parse(architecture, where="test"))
    data = ShardDataset(root / "shards", "train")
    images = normalise(data.images(data.singles(COUNT).rows, 16))
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=5e-3)
    for _ in range(150):  # until its pictures are near enough to real ones for precision and recall
        optimizer.zero_grad()
        (tokenizer.decode(tokenizer.encode(images)) - images).square().mean().backward()
        optimizer.step()
    tokenizer.save_pretrained(root / "tokenizer")
    with torch.no_grad():
        latents = tokenizer.encode(images)
    (root / "samples").mkdir()
    labels = torch.arange(COUNT) % len(CLASSES)
    for number, name in enumerate(stage.SETTINGS):
        tensors = {"latents": latents + 0.3 * number * latents.std() * torch.randn_like(latents), "labels": labels}
        save_tensors(root / "samples" / f"{name}.safetensors", tensors)
    write_json(root / "samples" / "config.json", {"format_version": 1, "classes": CLASSES, "samples": COUNT})
    return root


def params_of(**changes):
    return merged(tiny_params()["evaluate_generator"], {"batch_size": 8} | changes)


def evaluate(made, folder, *, inputs=None, **changes):
    """Run the stage here; its outputs by flag."""
    folder.mkdir(exist_ok=True)
    outputs = {"metrics": folder / "metrics.json", "pictures": folder / "pictures", "export": folder / "export"}
    given = {flag: made / flag for flag in INPUTS} | (inputs or {})
    config = stage.EvaluateGenerator.parse(params_of(**changes), where="test")
    work = work_in(folder)
    stage.run(config, **given, **outputs, work=work)
    assert work.counted >= 3 * COUNT
    return outputs


@pytest.fixture(scope="module")
def outputs(made):
    return evaluate(made, made / "here")


def decoded(made, name):
    model = load_tokenizer(made / "tokenizer")
    with torch.no_grad():
        return to_uint8(model.decode(load_tensors(made / "samples" / f"{name}.safetensors")["latents"]))


def rows(path):
    """Figures by name, of every setting."""
    table = json.loads(path.read_text())["generation"]
    assert list(table) == list(stage.SETTINGS)
    return list(table.values())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size(made, outputs, tmp_path, batch_size):
    """But that a pixel may be rounded to the other side, and a sample fall on the other side of a ball."""
    other = evaluate(made, tmp_path, batch_size=batch_size)
    distances, shares = (
        [
            [row[f"{name}_random-vgg16_{COUNT}"] for row in rows(of) for name in names]
            for of in (other["metrics"], outputs["metrics"])
        ]
        for names in (NAMES[:3], NAMES[3:])
    )
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert shares[0] == pytest.approx(shares[1], abs=1.5 / COUNT)


def test_figures_are_those_of_the_pixels(made, outputs):
    """By hand, from the exported samples, all at once."""
    extractor = build_features(Reference.load(made / "reference").features, weights=made, device="cpu")
    real = Reference.load(made / "reference").of("train")
    for name, row in zip(stage.SETTINGS, rows(outputs["metrics"]), strict=True):
        with np.load(outputs["export"] / f"{name}.npz") as batch:
            found = extractor(torch.from_numpy(batch["arr_0"]).permute(0, 3, 1, 2))
        manifold = precision_recall(real.features[:COUNT], found.pooled)
        expected = {
            "gfid": frechet_distance(real.statistics, GaussianStatistics.of(found.pooled)),
            "sfid": frechet_distance(real.spatial, GaussianStatistics.of(found.spatial)),
            "kid": kernel_distance(found.pooled, real.features[:COUNT], subsets=3, subset_size=20, seed=2020).mean,
            "precision": manifold.precision,
            "recall": manifold.recall,
        }
        assert row == pytest.approx({f"{key}_random-vgg16_{COUNT}": value for key, value in expected.items()}, rel=1e-3)
        assert 0 < manifold.precision < 1
        assert 0 < manifold.recall < 1


def test_without_what_is_not_asked_for(made, outputs, tmp_path):
    """No kernel, no export."""
    config = stage.EvaluateGenerator.parse(params_of(kernel=None), where="test")
    given = {flag: made / flag for flag in INPUTS}
    stage.run(
        config, **given, metrics=tmp_path / "metrics.json", pictures=tmp_path / "pictures", work=work_in(tmp_path)
    )
    ours, theirs = (json.loads(p.read_text())["generation"] for p in (tmp_path / "metrics.json", outputs["metrics"]))
    for name in stage.SETTINGS:
        assert theirs[name] == ours[name] | {f"kid_random-vgg16_{COUNT}": theirs[name][f"kid_random-vgg16_{COUNT}"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "pictures", "scratch"]


def test_exported_samples_are_the_pixels(made, outputs, tmp_path):
    pngs = evaluate(made, tmp_path, export={"name": "png"})["export"]
    for name in stage.SETTINGS:
        pixels = decoded(made, name).permute(0, 2, 3, 1).numpy().astype(int)
        with np.load(outputs["export"] / f"{name}.npz", allow_pickle=False) as batch:
            assert np.abs(batch["arr_0"] - pixels).max() <= 1
            assert (batch["arr_0"] == pixels).mean() > 0.99
            np.testing.assert_array_equal(batch["arr_1"], torch.arange(COUNT) % len(CLASSES))
            assert sorted(path.name for path in (pngs / name).iterdir()) == [f"{n:06d}.png" for n in range(COUNT)]
            for number in range(COUNT):
                with Image.open(pngs / name / f"{number:06d}.png") as picture:
                    assert np.array_equal(np.asarray(picture), batch["arr_0"][number])
    assert list((made / "here" / "scratch" / "folder").iterdir()) == []  # no pixels are left there


def test_pictured_samples_are_of_their_class(made, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(stage, "grid", lambda rows, names, path, title: drawn.update({path.stem: (rows, names)}))
    evaluate(made, tmp_path, pictures_per_class=4, pictured_classes=5)
    pixels = decoded(made, "guided")
    shown, names = drawn["guided"]
    assert names == CLASSES[:5]
    for label, row in enumerate(shown):
        assert (row.int() - pixels[label :: len(CLASSES)][:4].int()).abs().max() <= 1


@pytest.mark.parametrize("batch_size", [5, 64])
def test_two_ranks_are_one_process(made, tmp_path, batch_size):
    """Two real ones, by the command line. 31 samples in batches of 64: the first has nothing to do, and writes."""
    (tmp_path / ".dvc").mkdir()
    write_params({"evaluate_generator": params_of(batch_size=batch_size)}, tmp_path / "params.yaml")
    command = [sys.executable, "-m", "stages.evaluate_generator", "params.yaml:evaluate_generator"]
    for flag in INPUTS:
        command += [f"--{flag}", str(made / flag)]
    command += ["--metrics", "metrics.json", "--pictures", "pictures", "--export", "export"]
    own = {"VTP_RANKS": "2", "VTP_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_ROOT": ""}
    environment = {name: value for name, value in (os.environ | own).items() if value}
    command += ["--provenance", "provenance.json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(".scratch/evaluate_generator/*/job.json"))  # ranks were started
    alone = evaluate(made, tmp_path / "alone", batch_size=batch_size)
    for ours, theirs in zip(rows(tmp_path / "metrics.json"), rows(alone["metrics"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    # Whole batches are shared, so every image is computed with the same others: equal bytes at equal threads.
    for name in stage.SETTINGS:
        for file in (f"pictures/{name}.png", f"export/{name}.npz"):
            assert (tmp_path / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


@pytest.fixture(scope="module")
def inception(made, tmp_path_factory):
    """torch-fidelity's network with random weights, and the reference of it."""
    from torch_fidelity import feature_extractor_inceptionv3 as network

    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        fresh = network.FeatureExtractorInceptionV3("any", ["2048"])
    for parameter in fresh.parameters():
        if parameter.dim() == 4:  # the default initialisation lets the signal vanish
            parameter.data.mul_(6**0.5)
    path = folder / "inception.pth"
    torch.save(fresh.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    features = {"name": "inception", "weights": path.name, "sha256": sha256}
    splits = {"train": {"samples": 24, "labelled": True, "kept": 24}}
    write_reference(made, folder, features=features, splits=splits, batch_size=12)
    return folder


def write_adm(path, real, images):
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    for end, statistics in (("", real.statistics), ("_s", real.spatial)):
        arrays |= {f"mu{end}": statistics.mean.numpy(), f"sigma{end}": statistics.covariance.numpy()}
    np.savez(path, **arrays)


def test_against_an_adm_batch(made, inception, tmp_path, monkeypatch):
    """One with the statistics and images of our reference gives the same figures under names of their own."""
    real = Reference.load(inception / "reference").of("train")
    images = ShardDataset(made / "shards", "train").images(real.rows, 16)
    write_adm(tmp_path / "adm.npz", real, images)
    (tmp_path / "inception.pth").symlink_to(inception / "inception.pth")
    monkeypatch.setattr(stage, "SETTINGS", ("guided",))  # Inception is slow here
    (tmp_path / "samples").mkdir()
    tensors = {name: few[:16].clone() for name, few in load_tensors(made / "samples" / "guided.safetensors").items()}
    save_tensors(tmp_path / "samples" / "guided.safetensors", tensors)
    write_json(tmp_path / "samples" / "config.json", {"classes": CLASSES, "samples": 16})
    config = params_of(kernel={"subsets": 2, "subset_size": 10, "seed": 0}, inception_splits=2)
    inputs = {"tokenizer": made / "tokenizer", "samples": tmp_path / "samples", "adm": tmp_path / "adm.npz"}
    stage.run(
        stage.EvaluateGenerator.parse(config, where="test"),
        **inputs,
        reference=inception / "reference",
        metrics=tmp_path / "metrics.json",
        pictures=tmp_path / "pictures",
        work=work_in(tmp_path),
    )
    row = json.loads((tmp_path / "metrics.json").read_text())["generation"]["guided"]
    assert set(row) == {"is_inception_16", *(f"{n}_inception_16{end}" for n in NAMES for end in ("", "_adm"))}
    for name in NAMES:
        assert row[f"{name}_inception_16_adm"] == pytest.approx(row[f"{name}_inception_16"], rel=1e-4, abs=1e-6)
    extractor = build_features(Reference.load(inception / "reference").features, weights=inception, device="cpu")
    logits = extractor.logits(extractor(decoded(made, "guided")[:16]).pooled)
    assert row["is_inception_16"] == pytest.approx(inception_score(logits, splits=2).mean, rel=1e-3)
    write_adm(tmp_path / "adm.npz", real, images[:, :, :8, :8])
    with pytest.raises(ConfigError, match=r"adm\.npz: images of 8 pixels, the samples have 16"):
        stage.run(
            stage.EvaluateGenerator.parse(config, where="test"),
            **inputs,
            reference=inception / "reference",
            metrics=tmp_path / "metrics.json",
            pictures=tmp_path / "pictures2",
            work=work_in(tmp_path),
        )


def test_adm_batches_are_for_inception(made, tmp_path):
    with pytest.raises(
        ConfigError, match="statistics are those of Inception, reference.features.name is 'random_vgg16'"
    ):
        evaluate(made, tmp_path, inputs={"adm": tmp_path / "adm.npz"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no split 'test', it has train, validation"),
        ({"split": "validation"}, r"keeps 0 of validation; raise reference\.splits\.validation\.kept"),
        ({"kernel": {"subset_size": 36}}, r"compares 36 features .* keeps 35 of train; raise reference\.splits\.train"),
        ({"neighbours": 35}, "compares 36 features"),
        ({"kernel": {"subset_size": 32}}, r"31 samples are too few .* raise generate\.samples"),
    ],
)
def test_mistakes_are_told_before_anything_is_decoded(made, tmp_path, changes, message):
    with pytest.raises((ConfigError, ArtefactError), match=message):
        evaluate(made, tmp_path, **changes)
    assert not (tmp_path / "pictures").exists()


def test_a_reference_of_another_size(made, tmp_path):
    write_reference(made, tmp_path, image_size=24)
    with pytest.raises(ArtefactError, match="statistics of 24 x 24 images, the tokenizer makes 16 x 16"):
        evaluate(made, tmp_path, inputs={"reference": tmp_path / "reference"})
