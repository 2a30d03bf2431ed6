"""The stage on real samples: ranks and batches do not matter, figures are those of the pixels, mistakes are told."""

import csv
import hashlib
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from launching import on_two_ranks
from PIL import Image
from tiny import merged, tiny_params, write_shards

import stages.evaluate_generator as stage
import stages.reference
from stages.figures.guidance import Guided, draw_guidance
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import ArtefactError, save_tensors
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import build_features
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall
from vtp.evaluation.reference import Reference
from vtp.evaluation.samples import FORMAT_VERSION, NOISE, Samples, SamplesArtefact
from vtp.flow import SamplerConfig
from vtp.layers.images import normalise, to_uint8
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

COUNT = 31  # samples; not divisible by ranks or batches
CLASSES = ["cat", "dog", "owl", "bat", "pig", "ant"]
INPUTS = ("tokenizer", "samples", "reference")
NAMES = ("gfid", "sfid", "kid", "precision", "recall")
SAMPLERS = {name: SamplerConfig.parse(v, where="test") for name, v in tiny_params()["generate"]["settings"].items()}
ENDS = {"unguided": "unguided_balanced", "guided": "cfg2_balanced", NOISE: "noise_balanced"}  # of names, by setting
SHARD = 13  # samples of a file


def named(name, count=COUNT, features="efficientnet-lite0-64"):
    """A figure's name but for how samples were drawn; the reference has more images, so as many are compared."""
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
    config = stages.reference.ReferenceStatistics.parse(params | changes, where="test")
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
    write_samples(root / "samples", drawn, tokenizer.encoder_digest())
    return root


def write_samples(folder, drawn, encoder):
    """Latents by setting, as `generate` writes them."""
    samplers = {name: SAMPLERS[name] for name in drawn if name != NOISE}
    artefact = SamplesArtefact(
        format_version=FORMAT_VERSION,
        encoder=encoder,
        classes=CLASSES,
        samples=len(next(iter(drawn.values()))),
        shard_size=SHARD,
        labels="balanced",
        settings=samplers,
    )
    folder.mkdir()
    for shard in artefact.shards:
        rows = slice(shard.rows.start, shard.rows.stop)
        latents = drawn[shard.split] if shard.split in drawn else torch.randn_like(drawn["guided"])
        labels = torch.arange(len(latents)) % len(CLASSES)
        save_tensors(shard.path(folder), {"latents": latents[rows].clone(), "labels": labels[rows].clone()})
    artefact.write(folder)


def params_of(**changes):
    return merged(tiny_params()["evaluate_generator"], {"batch_size": 8, "counts": [COUNT]} | changes)


def evaluate(made, folder, *, inputs=None, least=3 * COUNT, **changes):
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
    assert list(table) == list(ENDS)
    assert all(name.endswith(ENDS[setting]) for setting, row in table.items() for name in row)
    return [
        {name.removesuffix(f"_{ENDS[setting]}"): value for name, value in row.items()} for setting, row in table.items()
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size(made, outputs, tmp_path, batch_size):
    """But that a pixel may be rounded to the other side, and a sample fall on the other side of a ball."""
    other = evaluate(made, tmp_path, batch_size=batch_size)
    distances, shares = (
        [[row[named(name)] for row in rows(of) for name in names] for of in (other["metrics"], outputs["metrics"])]
        for names in (NAMES[:3], NAMES[3:])
    )
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert shares[0] == pytest.approx(shares[1], abs=1.5 / COUNT)


def test_figures_are_those_of_the_pixels(made, outputs):
    """By hand, from the exported samples, all at once."""
    extractor = build_features(Reference.load(made / "reference").features, weights=made, device="cpu")
    real = Reference.load(made / "reference").of("train")
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
        }
        assert row == pytest.approx({named(key): value for key, value in expected.items()}, rel=1e-3)
        assert 0 < manifold.precision < 1
        assert 0 < manifold.recall < 1


def test_without_what_is_not_asked_for(made, outputs, tmp_path):
    """No kernel, no export."""
    config = stage.EvaluateGenerator.parse(params_of(kernel=None), where="test")
    given = {flag: made / flag for flag in INPUTS}
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures"}
    stage.run(config, **given, **{flag: tmp_path / file for flag, file in files.items()}, host=work_in(tmp_path))
    kernel = f"kid_efficientnet-lite0-64_{COUNT}"
    for ours, theirs in zip(rows(tmp_path / "metrics.json"), rows(outputs["metrics"]), strict=True):
        assert theirs == ours | {kernel: theirs[kernel]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "metrics.json", "pictures", "scratch"]


def test_several_numbers_of_samples(made, outputs, tmp_path):
    """Those of the first ones are the figures of a folder that holds no others."""
    both = evaluate(made, tmp_path / "both", counts=[22, COUNT], kernel={"subset_size": 15})
    few = evaluate(made, tmp_path / "few", counts=[22], kernel={"subset_size": 15})
    for together, alone, many in zip(*(rows(out["metrics"]) for out in (both, few, outputs)), strict=True):
        assert set(together) == {named(name, count) for name in NAMES for count in (22, COUNT)}
        assert alone.items() <= together.items()
        assert together[f"gfid_efficientnet-lite0-64_{COUNT}"] == many[f"gfid_efficientnet-lite0-64_{COUNT}"]
    latents = {name: Samples(made / "samples").of(name).latents(0, 22) for name in ENDS}
    write_samples(tmp_path / "samples", latents, load_tokenizer(made / "tokenizer").encoder_digest())
    inputs = {"samples": tmp_path / "samples"}
    fewer = evaluate(made, tmp_path / "fewer", counts=[22], kernel={"subset_size": 15}, inputs=inputs, least=66)
    for ours, theirs in zip(rows(few["metrics"]), rows(fewer["metrics"]), strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_a_row_per_setting_and_a_picture_of_guidance(made, outputs, tmp_path):
    """The table says how each was drawn; the picture comes where two scales can be compared."""
    with outputs["curves"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["setting"] for row in table] == ["unguided", "guided"]
    assert [float(row["guidance_scale"]) for row in table] == [1, 2]
    for row, figures in zip(table, rows(outputs["metrics"])[:2], strict=True):
        assert float(row[f"gfid_efficientnet-lite0-64_{COUNT}"]) == figures[f"gfid_efficientnet-lite0-64_{COUNT}"]
    assert not (outputs["pictures"] / "guidance.png").exists()  # they differ in their intervals too
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


def test_exported_samples_are_the_pixels(made, outputs, tmp_path):
    pngs = evaluate(made, tmp_path, export={"name": "png"})["export"]
    for name in ENDS:
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
@pytest.mark.slow
def test_two_ranks_are_one_process(made, tmp_path, batch_size):
    """Two real ones, by the command line. 31 samples in batches of 64: the first has nothing to do, and writes."""
    files = {"metrics": "metrics.json", "curves": "curves.csv", "pictures": "pictures", "export": "export"}
    paths = {flag: made / flag for flag in INPUTS} | files
    on_two_ranks(tmp_path, "evaluate_generator", params_of(batch_size=batch_size), paths)
    alone = evaluate(made, tmp_path / "alone", batch_size=batch_size)
    for ours, theirs in zip(rows(tmp_path / "metrics.json"), rows(alone["metrics"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
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
    write_reference(made, folder, features=features, splits=splits, batch_size=12)
    return folder


def write_adm(path, real, images):
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    for end, statistics in (("", real.statistics), ("_s", real.spatial)):
        arrays |= {f"mu{end}": statistics.mean.numpy(), f"sigma{end}": statistics.covariance.numpy()}
    np.savez(path, **arrays)


def test_against_an_adm_batch(made, inception, tmp_path):
    """One with the statistics and images of our reference gives the same figures under names of their own."""
    real = Reference.load(inception / "reference").of("train")
    images = ShardDataset(made / "shards", "train").images(real.rows, 16)
    write_adm(tmp_path / "adm.npz", real, images)
    (tmp_path / "inception.pth").symlink_to(inception / "inception.pth")
    encoder = load_tokenizer(made / "tokenizer").encoder_digest()
    write_samples(tmp_path / "samples", {"guided": Samples(made / "samples").of("guided").latents(0, 16)}, encoder)
    config = params_of(counts=[16], kernel={"subsets": 2, "subset_size": 10, "seed": 0}, inception_split_size=8)
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
    score, *names = (f"{named(name, 16, 'inception')}_{ENDS['guided']}" for name in ("is", *NAMES))
    assert set(row) == {score, *(name + adm for name in names for adm in ("", "_adm"))}
    for name in names:
        assert row[f"{name}_adm"] == pytest.approx(row[name], rel=1e-4, abs=1e-6)
    extractor = build_features(Reference.load(inception / "reference").features, weights=inception, device="cpu")
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
        ConfigError, match="statistics are those of Inception, reference.features.name is 'random_vgg16'"
    ):
        evaluate(made, tmp_path, inputs={"adm": tmp_path / "adm.npz"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no split 'test', it has train, validation"),
        ({"split": "validation"}, r"keeps 0 of validation; raise reference\.splits\.validation\.kept"),
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
    ],
)
def test_mistakes_are_told_before_anything_is_decoded(made, tmp_path, changes, message):
    with pytest.raises((ConfigError, ArtefactError), match=message):
        evaluate(made, tmp_path, **changes)
    assert not (tmp_path / "pictures").exists()


def test_samples_of_another_encoder(made, tmp_path):
    write_samples(tmp_path / "samples", {"guided": torch.randn(COUNT, 8, 2, 2)}, "another")
    with pytest.raises(ArtefactError, match=r"samples in the latent space of another encoder than that of .*tokenizer"):
        evaluate(made, tmp_path / "out", inputs={"samples": tmp_path / "samples"})


def test_a_reference_of_another_size(made, tmp_path):
    write_reference(made, tmp_path, image_size=24)
    with pytest.raises(ArtefactError, match="statistics of 24 x 24 images, the tokenizer makes 16 x 16"):
        evaluate(made, tmp_path, inputs={"reference": tmp_path / "reference"})
