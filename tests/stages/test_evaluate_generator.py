"""The stage on real samples: ranks and batches do not matter, figures are those of the pixels, mistakes are told.

Most tests see with the random VGG16, whose distances are quick; those of many networks with EfficientNet-Lite0 besides.
"""

import csv
import hashlib
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generating import cache
from launching import on_two_ranks
from PIL import Image
from tiny import merged, tiny_params, write_shards

import stages.evaluate_generator as stage
import stages.reference
from stages.figures.guidance import Guided, draw_guidance
from stages.generate import Generate
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import ArtefactError, digest, load_tensors, save_tensors, write_json
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.data.latents import STATISTICS_FILE, LatentDataset
from vtp.evaluation.adm import write_batch
from vtp.evaluation.class_probe import ClassProbe
from vtp.evaluation.features import build_features
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall
from vtp.evaluation.reference import Reference
from vtp.evaluation.samples import FORMAT_VERSION, Samples, SamplesArtefact
from vtp.evaluation.settings import NOISE
from vtp.flow import SamplerConfig
from vtp.layers.images import normalise, to_uint8
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

COUNT = 31  # samples; not divisible by ranks or batches
INPUTS = ("tokenizer", "samples", "latents", "reference")
NAMES = ("gfid", "sfid", "kid", "precision", "recall", "class_accuracy", "fdr1")
HELD = 32  # images of the validation split
VGG, EFFICIENTNET = {"name": "random_vgg16", "seed": 1}, {"name": "efficientnet_lite0", "side": 64}
SAMPLERS = {name: SamplerConfig.parse(v, where="test") for name, v in tiny_params()["generate"]["settings"].items()}
ENDS = {"unguided": "unguided_balanced", "guided": "cfg2_balanced", NOISE: "noise_balanced"}  # of names, by setting
CLASSES = 6
SHARD = 13  # samples of a file


def named(name, count=COUNT, features="random-vgg16"):
    """A figure's name but for how samples were drawn; the reference has more images, so as many are compared."""
    if name.startswith("fdr"):
        return f"{name}_{count}_vs{HELD}"
    return f"{name}_{features}_{count}" + (f"_vs{count}" if name in ("precision", "recall") else "")


class QuietHost(LocalHost):
    """Without bars."""

    counted = 0

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        self.counted += count


def work_in(folder):
    host = QuietHost(folder / "scratch" / "folder", folder, Runtime(device="cpu", weights=str(folder)))
    host.folder.mkdir(parents=True, exist_ok=True)
    return host


pytestmark = pytest.mark.usefixtures("one_thread")


def write_reference(root, folder, **changes):
    params = merged(tiny_params()["reference"], {"splits": {"train": {"samples": 40, "kept": 35}}})
    config = stages.reference.ReferenceStatistics.parse(params | {"features": [VGG]} | changes, where="test")
    folder.mkdir(exist_ok=True)
    stages.reference.run(config, shards=root / "shards", reference=folder / "reference", host=work_in(folder))


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
        (tokenizer.decode(tokenizer.encode(images, grad=True), grad=True) - images).square().mean().backward()
        optimizer.step()
    tokenizer.save_pretrained(root / "tokenizer")
    with torch.no_grad():
        latents = tokenizer.encode(images)
    drawn = {
        name: latents + 0.3 * number * latents.std() * torch.randn_like(latents) for number, name in enumerate(ENDS)
    }
    cache(root, root)
    write_samples(root / "samples", drawn, tokenizer.encoder_digest(), data.manifest.classes)
    return root


def write_samples(folder, drawn, encoder, classes):
    """Latents by setting, as `generate` writes them."""
    samplers = {name: SAMPLERS[name] for name in drawn if name != NOISE}
    artefact = SamplesArtefact(
        format_version=FORMAT_VERSION,
        encoder=encoder,
        classes=classes,
        prompts=None,
        text_encoder=None,
        samples=len(next(iter(drawn.values()))),
        shard_size=SHARD,
        labels="balanced",
        settings=samplers,
    )
    folder.mkdir()
    for shard in artefact.shards:
        rows = slice(shard.rows.start, shard.rows.stop)
        latents = drawn[shard.split] if shard.split in drawn else torch.randn_like(drawn["guided"])
        labels = torch.arange(len(latents)) % len(classes)
        save_tensors(shard.path(folder), {"latents": latents[rows].clone(), "labels": labels[rows].clone()})
    artefact.write(folder)


def params_of(**changes):
    return merged(tiny_params()["evaluate_generator"], {"batch_size": 8, "counts": [COUNT]} | changes)


def classes_of(made):
    return Samples(made / "samples").config.classes


def evaluate(made, folder, *, inputs=None, least=4 * COUNT, **changes):
    """Run the stage here; its outputs by flag."""
    folder.mkdir(exist_ok=True)
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures", "export": "export"}
    outputs = {flag: folder / file for flag, file in files.items()}
    given = {flag: made / flag for flag in INPUTS} | (inputs or {})
    config = stage.EvaluateGenerator.parse(params_of(**changes), where="test")
    host = work_in(folder)
    stage.run(config, **given, **outputs, host=host)
    assert host.counted >= least
    return outputs


@pytest.fixture(scope="module")
def outputs(made):
    return evaluate(made, made / "here")


def decoded(made, name):
    model = load_tokenizer(made / "tokenizer")
    with torch.no_grad():
        return to_uint8(model.decode(Samples(made / "samples").of(name).latents(0, COUNT)))


def rows(path):
    """Figures of every setting, by names without what says how it was drawn, which they all have."""
    table = json.loads(path.read_text())["generation"]
    assert [name for name in table if name in ENDS] == list(ENDS)
    assert all(name.endswith(ENDS[setting]) for setting in ENDS for name in table[setting])
    return [
        {name.removesuffix(f"_{end}"): value for name, value in table[setting].items()} for setting, end in ENDS.items()
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size(made, outputs, tmp_path, batch_size):
    """But that a pixel may be rounded to the other side, and a sample fall on the other side of a ball."""
    other = evaluate(made, tmp_path, batch_size=batch_size)
    distances, shares = (
        [[row[named(name)] for row in rows(of) for name in names] for of in (other["metrics"], outputs["metrics"])]
        for names in ((*NAMES[:3], NAMES[-1]), NAMES[3:-1])
    )
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert shares[0] == pytest.approx(shares[1], abs=1.5 / COUNT)


def test_figures_are_those_of_the_pixels(made, outputs):
    """By hand, from the exported samples, all at once."""
    extractor = build_features(Reference.load(made / "reference").features[0], weights=made, device="cpu")
    reference = Reference.load(made / "reference")
    of_train, held = reference.of("train"), reference.of("validation").networks["random-vgg16"]
    real, labels = of_train.networks["random-vgg16"], torch.arange(COUNT) % CLASSES
    probe = ClassProbe.of(
        real.features, of_train.labels[:35], stage.EvaluateGenerator.parse(params_of(), where="t").class_probe
    )
    for name, row in zip(ENDS, rows(outputs["metrics"]), strict=True):
        with np.load(outputs["export"] / f"{name}.npz") as batch:
            found = extractor(torch.from_numpy(batch["arr_0"]).permute(0, 3, 1, 2))
        manifold = precision_recall(real.features[:COUNT], found.pooled)
        expected = {
            "gfid": frechet_distance(real.statistics, GaussianStatistics.of(found.pooled)),
            "sfid": frechet_distance(real.spatial, GaussianStatistics.of(found.spatial)),
            "kid": kernel_distance(found.pooled, real.features[:COUNT], subsets=3, subset_size=20, seed=2020).mean,
            "precision": manifold.precision,
            "recall": manifold.recall,
            "class_accuracy": probe.accuracy(found.pooled, labels),
        }
        expected["fdr1"] = expected["gfid"] / frechet_distance(held.statistics, real.statistics)
        assert row == pytest.approx({named(key): value for key, value in expected.items()}, rel=1e-3)
        assert 0 < manifold.precision < 1
        assert 0 < manifold.recall < 1


def test_without_what_is_not_asked_for(made, outputs, tmp_path):
    """No kernel, no probe, no ratio, no latents, no export."""
    changes = {"kernel": None, "class_probe": None, "ratio_to": None}
    config = stage.EvaluateGenerator.parse(params_of(**changes), where="test")
    given = {flag: made / flag for flag in INPUTS if flag != "latents"}
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures"}
    stage.run(config, **given, **{flag: tmp_path / file for flag, file in files.items()}, host=work_in(tmp_path))
    more = [named(name) for name in ("kid", "class_accuracy", "fdr1")]
    for ours, theirs in zip(rows(tmp_path / "metrics.json"), rows(outputs["metrics"]), strict=True):
        assert theirs == ours | {name: theirs[name] for name in more}
    assert list(json.loads((tmp_path / "metrics.json").read_text())["generation"]) == [*ENDS, "best"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "metrics.json", "pictures", "scratch"]


def test_several_numbers_of_samples(made, outputs, tmp_path):
    """Those of the first ones are the figures of a folder that holds no others."""
    both = evaluate(made, tmp_path / "both", counts=[22, COUNT], kernel={"subset_size": 15})
    few = evaluate(made, tmp_path / "few", counts=[22], kernel={"subset_size": 15}, least=3 * COUNT + 22)
    for together, alone, many in zip(*(rows(out["metrics"]) for out in (both, few, outputs)), strict=True):
        assert set(together) == {named(name, count) for name in NAMES for count in (22, COUNT)}
        assert alone.items() <= together.items()
        assert together[f"gfid_random-vgg16_{COUNT}"] == many[f"gfid_random-vgg16_{COUNT}"]
    latents = {name: Samples(made / "samples").of(name).latents(0, 22) for name in ENDS}
    write_samples(tmp_path / "samples", latents, load_tokenizer(made / "tokenizer").encoder_digest(), classes_of(made))
    inputs = {"samples": tmp_path / "samples"}
    fewer = evaluate(made, tmp_path / "fewer", counts=[22], kernel={"subset_size": 15}, inputs=inputs, least=88)
    for ours, theirs in zip(rows(few["metrics"]), rows(fewer["metrics"]), strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_a_row_per_setting_and_a_picture_of_guidance(made, outputs, tmp_path):
    """The table says how each was drawn; the picture comes where two scales can be compared."""
    with outputs["curves"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["setting"] for row in table] == ["unguided", "guided"]
    assert [float(row["guidance_scale"]) for row in table] == [1, 2]
    for row, figures in zip(table, rows(outputs["metrics"])[:2], strict=True):
        assert float(row[f"gfid_random-vgg16_{COUNT}"]) == figures[f"gfid_random-vgg16_{COUNT}"]
    assert not (outputs["pictures"] / "guidance.png").exists()  # one of them is not guided
    sampler = SAMPLERS["guided"].model_copy(update={"guidance_scale": 3.0})
    guided = [
        Guided(
            name, SAMPLERS["guided"].model_copy(update={"guidance_scale": scale}), {"gfid_x_5": scale, "kid_x_5": 0.0}
        )
        for name, scale in (("b", 2.0), ("a", 1.0), ("c", 4.0))
    ]
    draw_guidance(
        [*guided, Guided("d", sampler.model_copy(update={"timestep_shift": 1.0}), {"gfid_x_5": 2.0})],
        tmp_path / "guidance.png",
    )
    with Image.open(tmp_path / "guidance.png") as picture:
        assert picture.width > picture.height
    draw_guidance(guided[:2], tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()


def test_exported_samples_are_the_pixels(made, outputs, tmp_path):
    pngs = evaluate(made, tmp_path, export={"name": "png"})["export"]
    for name in ENDS:
        pixels = decoded(made, name).permute(0, 2, 3, 1).numpy().astype(int)
        with np.load(outputs["export"] / f"{name}.npz", allow_pickle=False) as batch:
            assert np.abs(batch["arr_0"] - pixels).max() <= 1
            assert (batch["arr_0"] == pixels).mean() > 0.99
            np.testing.assert_array_equal(batch["arr_1"], torch.arange(COUNT) % CLASSES)
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
    assert names == classes_of(made)[:5]
    for label, row in enumerate(shown):
        assert (row.int() - pixels[label::CLASSES][:4].int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "networks"), [(5, [EFFICIENTNET, VGG]), (64, [VGG])])
def test_two_ranks_are_one_process(made, tmp_path, batch_size, networks):
    """Two real ones, by the command line. 31 samples in batches of 64: the first has nothing to do, and writes."""
    write_reference(made, tmp_path, features=networks)
    reference = {"reference": tmp_path / "reference"}
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures", "export": "export"}
    paths = {flag: made / flag for flag in INPUTS} | reference | files
    on_two_ranks(tmp_path, "evaluate_generator", params_of(batch_size=batch_size), paths)
    alone = evaluate(made, tmp_path / "alone", batch_size=batch_size, inputs=reference)
    ours, theirs = (
        json.loads(path.read_text())["generation"] for path in (tmp_path / "metrics.json", alone["metrics"])
    )
    assert list(ours) == list(theirs) == ["real", *ENDS, "reconstructed", "best"]
    for name, row in ours.items():
        assert row == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)
    # Whole batches are shared, so every image is computed with the same others: equal bytes at equal threads.
    for name in ENDS:
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
    write_reference(made, folder, features=[features], splits=splits, batch_size=12)
    return folder


def write_adm(path, real, images):
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    for end, statistics in (("", real.statistics), ("_s", real.spatial)):
        arrays |= {f"mu{end}": statistics.mean.numpy(), f"sigma{end}": statistics.covariance.numpy()}
    np.savez(path, **arrays)


def test_against_an_adm_batch(made, inception, tmp_path):
    """One with the statistics and images of our reference gives the same figures under names of their own."""
    split = Reference.load(inception / "reference").of("train")
    real = split.networks["inception"]
    images = ShardDataset(made / "shards", "train").images(split.rows, 16)
    write_adm(tmp_path / "adm.npz", real, images)
    (tmp_path / "inception.pth").symlink_to(inception / "inception.pth")
    encoder = load_tokenizer(made / "tokenizer").encoder_digest()
    latents = {"guided": Samples(made / "samples").of("guided").latents(0, 16)}
    write_samples(tmp_path / "samples", latents, encoder, classes_of(made))
    kernel = {"subsets": 2, "subset_size": 10, "seed": 0}
    config = params_of(counts=[16], kernel=kernel, inception_split_size=8, class_probe=None, ratio_to=None)
    inputs = {"tokenizer": made / "tokenizer", "samples": tmp_path / "samples", "adm": tmp_path / "adm.npz"}
    stage.run(
        stage.EvaluateGenerator.parse(config, where="test"),
        **inputs,
        reference=inception / "reference",
        metrics=tmp_path / "metrics.json",
        curves=tmp_path / "curves.csv",
        pictures=tmp_path / "pictures",
        host=work_in(tmp_path),
    )
    row = json.loads((tmp_path / "metrics.json").read_text())["generation"]["guided"]
    score, *names = (f"{named(name, 16, 'inception')}_{ENDS['guided']}" for name in ("is", *NAMES[:5]))
    assert set(row) == {score, *(name + adm for name in names for adm in ("", "_adm"))}
    for name in names:
        assert row[f"{name}_adm"] == pytest.approx(row[name], rel=1e-4, abs=1e-6)
    extractor = build_features(Reference.load(inception / "reference").features[0], weights=inception, device="cpu")
    logits = extractor.logits(extractor(decoded(made, "guided")[:16]).pooled)
    assert row[score] == pytest.approx(inception_score(logits, split_size=8).mean, rel=1e-3)
    write_adm(tmp_path / "adm.npz", real, images[:, :, :8, :8])
    with pytest.raises(ConfigError, match=r"adm\.npz: images of 8 pixels, the samples have 16"):
        stage.run(
            stage.EvaluateGenerator.parse(config, where="test"),
            **inputs,
            reference=inception / "reference",
            metrics=tmp_path / "metrics.json",
            curves=tmp_path / "curves.csv",
            pictures=tmp_path / "pictures2",
            host=work_in(tmp_path),
        )


def test_adm_batches_are_for_inception(made, tmp_path):
    with pytest.raises(
        ConfigError, match="statistics are those of Inception, reference.features has random-vgg16; add inception"
    ):
        evaluate(made, tmp_path, inputs={"adm": tmp_path / "adm.npz"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no split 'test', it has train, validation"),
        (
            {"split": "validation", "ratio_to": None},
            r"keeps 0 of validation; raise reference\.splits\.validation\.kept",
        ),
        (
            {"counts": [40], "kernel": {"subset_size": 36}},
            r"compares 36 features .* keeps 35 of train; raise reference\.splits\.train",
        ),
        ({"counts": [40], "neighbours": 35}, "compares 36 features"),
        (
            {"kernel": {"subset_size": 32}},
            "counts 31 are fewer than the 32 samples that neighbours and kernel.subset_size need",
        ),
        ({"counts": [COUNT + 1]}, r"counts asks for 32 samples, there are 31; raise generate\.samples"),
        ({"ratio_to": "test"}, "no split 'test', it has train, validation"),
        ({"ratio_to": "train"}, "ratio_to: 'train' is what is compared with; name a split that is held out"),
    ],
)
def test_mistakes_are_told_before_anything_is_decoded(made, tmp_path, changes, message):
    with pytest.raises((ConfigError, ArtefactError), match=message):
        evaluate(made, tmp_path, **changes)
    assert not (tmp_path / "pictures").exists()


def test_samples_of_another_encoder(made, tmp_path):
    write_samples(tmp_path / "samples", {"guided": torch.randn(COUNT, 8, 2, 2)}, "another", classes_of(made))
    with pytest.raises(ArtefactError, match=r"samples in the latent space of another encoder than that of .*tokenizer"):
        evaluate(made, tmp_path / "out", inputs={"samples": tmp_path / "samples"})


def test_a_reference_of_another_size(made, tmp_path):
    write_reference(made, tmp_path, image_size=24)
    with pytest.raises(ArtefactError, match="statistics of 24 x 24 images, those to compare are 16 x 16"):
        evaluate(made, tmp_path, inputs={"reference": tmp_path / "reference"})


def generation(outputs):
    return json.loads(outputs["metrics"].read_text())["generation"]


def test_real_images_and_reconstructions_stand_beside_samples(made, outputs):
    """The ceiling of the probe, the distance of held-out images, and the floor: the same images through the decoder."""
    table = generation(outputs)
    reference = Reference.load(made / "reference")
    train, held = reference.of("train"), reference.of("validation").networks["random-vgg16"]
    unit = frechet_distance(held.statistics, train.networks["random-vgg16"].statistics)
    assert table["real"][f"fid_random-vgg16_{HELD}_real"] == unit
    assert 0 <= table["real"]["class_accuracy_random-vgg16_7_real"] <= 1  # a fifth of 35 is held out
    model, latents = load_tokenizer(made / "tokenizer"), LatentDataset(made / "latents")
    with torch.no_grad():
        pixels = to_uint8(model.decode(latents.rows(np.arange(COUNT))))
    pooled = build_features(reference.features[0], weights=made, device="cpu")(pixels).pooled
    floor = table["reconstructed"]
    expected = frechet_distance(train.networks["random-vgg16"].statistics, GaussianStatistics.of(pooled))
    assert floor[f"rfid_random-vgg16_{COUNT}_reconstructed"] == pytest.approx(expected, rel=1e-3)
    assert floor[f"fdr1_{COUNT}_vs{HELD}_reconstructed"] == pytest.approx(expected / unit, rel=1e-3)
    kinds = {name.split("_")[0] for name in floor}
    assert kinds == {"rfid", "kid", "precision", "recall", "class", "fdr1"}
    assert (outputs["pictures"] / "reconstructed.png").exists()
    assert not (outputs["export"] / "reconstructed.npz").exists()


def test_the_best_setting_stands_once_more(outputs):
    """That of the lowest gFID, not the baseline; its figures lose their guidance, which stands beside them."""
    table = generation(outputs)
    distances = {name: table[name][f"gfid_random-vgg16_{COUNT}_{ENDS[name]}"] for name in ("unguided", "guided")}
    best = min(distances, key=distances.__getitem__)
    row = dict(table["best"])
    assert (row.pop("guidance_scale"), row.pop("timestep_shift")) == (
        SAMPLERS[best].guidance_scale,
        SAMPLERS[best].timestep_shift,
    )
    assert row == {name.replace(ENDS[best], "balanced"): value for name, value in table[best].items()}


def test_the_best_setting_is_that_of_the_first_network_and_of_most_samples():
    """Where two networks, two numbers or the baseline would choose otherwise."""
    settings = {"low": SAMPLERS["unguided"], "high": SAMPLERS["guided"]}
    artefact = {"format_version": FORMAT_VERSION, "encoder": "e", "classes": ["a"], "samples": 9, "shard_size": 9}
    artefact |= {"prompts": None, "text_encoder": None}
    drawn = SimpleNamespace(config=SamplesArtefact(**artefact, labels="random", settings=settings))
    table = {
        "low": {"gfid_a_5_unguided_random": 1.0, "gfid_a_9_unguided_random": 3.0, "gfid_b_9_unguided_random": 1.0},
        "high": {"gfid_a_5_cfg2_random": 2.0, "gfid_a_9_cfg2_random": 2.0, "gfid_b_9_cfg2_random": 5.0},
        NOISE: {"gfid_a_9_noise_random": 0.1},
    }
    row = stage._best(drawn, table, "a", 9)["best"]
    assert row == {
        "gfid_a_5_random": 2.0,
        "gfid_a_9_random": 2.0,
        "gfid_b_9_random": 5.0,
        "guidance_scale": 2.0,
        "timestep_shift": SAMPLERS["guided"].timestep_shift,
    }


@pytest.mark.parametrize("name", ["noise", "reconstructed", "real", "best"])
def test_names_of_other_rows_are_taken(name):
    params = tiny_params()["generate"]
    with pytest.raises(ConfigError, match=f"settings: '{name}' is the name of other rows of figures; choose another"):
        Generate.parse(params | {"settings": {name: params["settings"]["unguided"]}}, where="test")


def write_first_latents(made, folder, count):
    """A cache of latents of so many images."""
    folder.mkdir()
    config = json.loads((made / "latents" / "config.json").read_text())
    name = config["splits"]["train"]["shards"][0]
    tensors = {key: value[:count].clone() for key, value in load_tensors(made / "latents" / name).items()}
    save_tensors(folder / name, tensors)
    (folder / STATISTICS_FILE).write_bytes((made / "latents" / STATISTICS_FILE).read_bytes())
    config["splits"] = {"train": {"samples": count, "shards": [name]}}
    config["files"] = {file: digest(folder / file) for file in (name, STATISTICS_FILE)}
    write_json(folder / "config.json", config)
    return folder


def test_fewer_latents_than_samples(made, tmp_path):
    """The floor is that of as many as there are, and its names say so; too few to compare are refused."""
    few = {"latents": write_first_latents(made, tmp_path / "some", 18)}
    floor = generation(evaluate(made, tmp_path / "out", inputs=few, kernel=None, least=3 * COUNT + 18))["reconstructed"]
    assert {
        name.split("_")[1 if name.startswith("fdr") else 3 if name.startswith("class") else 2] for name in floor
    } == {"18"}
    with pytest.raises(
        ConfigError, match="compares 20 features or more, and there are 18 latents of real images; leave"
    ):
        evaluate(made, tmp_path / "few", inputs=few)


def given(made, pictures, folder, **changes):
    """Score pictures made elsewhere; the outputs by flag."""
    folder.mkdir()
    outputs = {"metrics": folder / "metrics.json", "curves": folder / "curves.csv", "pictures": folder / "pictures"}
    config = stage.EvaluateGenerator.parse(params_of(**changes), where="test")
    stage.run(config, given=pictures, reference=made / "reference", **outputs, host=work_in(folder))
    return outputs


def test_pictures_made_elsewhere_score_as_samples_do(made, outputs, tmp_path):
    """The samples once more, as a batch of ADM and as a folder of pictures; only the first says what they should show."""
    pixels = decoded(made, "guided")
    labels = torch.arange(COUNT) % CLASSES
    write_batch(tmp_path / "batch.npz", pixels.split(10), labels, count=COUNT, image_size=16)
    for number, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        path = tmp_path / "folder" / str(number // 20) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    batch, folder = (
        generation(given(made, tmp_path / name, tmp_path / f"of_{name}")) for name in ("batch.npz", "folder")
    )
    assert set(batch) == set(folder) == {"real", "given"}
    shown = batch["given"].pop(f"class_accuracy_random-vgg16_{COUNT}_given")
    assert folder["given"] == pytest.approx(batch["given"], rel=1e-5)  # channels lie otherwise in memory
    expected = {name.replace(ENDS["guided"], "given"): value for name, value in generation(outputs)["guided"].items()}
    assert expected.pop(f"class_accuracy_random-vgg16_{COUNT}_given") == pytest.approx(shown, abs=1.5 / COUNT)
    assert batch["given"] == pytest.approx(expected, rel=5e-3, abs=1.5 / COUNT)
    with (tmp_path / "of_folder" / "curves.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["setting"] == "given"
    assert (tmp_path / "of_batch.npz" / "pictures" / "given.png").exists()


def test_pictures_that_cannot_be_scored_are_told(made, tmp_path):
    draw = torch.randint(256, (COUNT, 3, 24, 24), dtype=torch.uint8)
    write_batch(tmp_path / "large.npz", [draw], None, count=COUNT, image_size=24)
    write_batch(tmp_path / "few.npz", [draw[:, :, :16, :16][:5]], None, count=5, image_size=16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    for folder, sizes in (("mixed", ((16, 16), (24, 24))), ("oblong", ((16, 24),))):
        (tmp_path / folder).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (16, 16)).save(tmp_path / "single.png")
    for name, message in (
        ("large.npz", "statistics of 16 x 16 images, those to compare are 24 x 24"),
        ("few.npz", "counts asks for 31 samples, there are 5"),
        ("empty", "empty: no pictures; expected files that end in"),
        ("notes", "notes: no pictures; expected files that end in .*png"),
        ("oblong", r"0\.png: 16 x 24 pixels among squares of 24; distances compare images of one size"),
        ("damaged", r"a\.png: .*take it out, or make it again"),
        ("single.png", r"single\.png: not a whole npz file"),
        ("nothing", "nothing: no such file"),
    ):
        with pytest.raises(ArtefactError if name != "few.npz" else ConfigError, match=message):
            given(made, tmp_path / name, tmp_path / f"of_{name}")
    with pytest.raises(ArtefactError, match=r"1\.png: 24 x 24 pixels among squares of 16"):
        given(made, tmp_path / "mixed", tmp_path / "of_mixed", counts=[2], neighbours=1, kernel=None)


def test_what_is_scored_is_said(made, tmp_path):
    """Samples with their tokenizer, or pictures by themselves."""
    config = stage.EvaluateGenerator.parse(params_of(), where="test")
    outputs = {flag: tmp_path / flag for flag in ("metrics", "curves", "pictures")}
    common = {"reference": made / "reference", **outputs, "host": work_in(tmp_path)}
    with pytest.raises(ConfigError, match="--given is scored as it is: leave --tokenizer, .* out"):
        stage.run(config, given=tmp_path, tokenizer=made / "tokenizer", **common)
    for flags in ({}, {"tokenizer": made / "tokenizer"}, {"samples": made / "samples"}):
        with pytest.raises(ConfigError, match="give the command --tokenizer and --samples, or --given"):
            stage.run(config, **flags, **common)


def test_a_probe_needs_classes_of_real_images(made, tmp_path):
    """Those of other samples tell nothing, and images without a class neither."""
    splits = {
        "train": {"samples": 40, "labelled": False, "kept": 35},
        "validation": tiny_params()["reference"]["splits"]["validation"],
    }
    write_reference(made, tmp_path, splits=splits)
    with pytest.raises(
        ConfigError, match=r"the reference keeps none of train; set reference\.splits\.train\.labelled to true"
    ):
        evaluate(made, tmp_path / "out", inputs={"reference": tmp_path / "reference"})
    evaluate(made, tmp_path / "without", inputs={"reference": tmp_path / "reference"}, class_probe=None)
    latents = {name: Samples(made / "samples").of(name).latents(0, COUNT) for name in ENDS if name != NOISE}
    encoder = load_tokenizer(made / "tokenizer").encoder_digest()
    write_samples(tmp_path / "samples", latents, encoder, ["a", "b"])
    with pytest.raises(ConfigError, match="the classes of the samples are not those of the reference, 2 and 6; run"):
        evaluate(made, tmp_path / "other", inputs={"samples": tmp_path / "samples"})
