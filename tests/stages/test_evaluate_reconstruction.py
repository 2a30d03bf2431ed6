"""The stage on real shards: ranks and batches do not matter, figures belong to their images, mistakes are told."""

import copy
import json
import math
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launching import on_two_ranks
from PIL import Image
from tiny import merged, tiny_params, write_shards
from torch import nn

import stages.evaluate_reconstruction as stage
import stages.reference
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.evaluation.reconstruction import psnr
from vtp.layers.images import IMAGENET_STD, normalise, to_uint8
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer, save_decoder
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

COUNT = 31  # not divisible by ranks or batches
OUTPUTS = {
    "metrics": "metrics.json",
    "images": "images.parquet",
    "pictures": "pictures",
    "diagnostics": "diagnostics",
    "speed": "speed.json",
}
LPIPS, RFID = "lpips_efficientnet-lite0-64", f"rfid_efficientnet-lite0-64_{COUNT}"


class QuietHost(LocalHost):
    """Without bars."""

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        pass


def work_in(folder):
    host = QuietHost(folder / "scratch" / "folder", folder, Runtime(device="cpu"))
    host.folder.mkdir(parents=True, exist_ok=True)
    return host


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, the reference of 31 of their images, a tokenizer that is no more than its start, another decoder."""
    root = tmp_path_factory.mktemp("reconstruction")
    write_shards(root / "shards")
    splits = {"validation": {"samples": COUNT, "labelled": False, "kept": 0}}
    params = tiny_params()["reference"] | {"splits": splits}
    config = stages.reference.run.__annotations__["config"].parse(params, where="test")
    stages.reference.run(config, shards=root / "shards", reference=root / "reference", host=work_in(root))
    torch.manual_seed(0)
    architecture = tiny_params()["pretrain"]["tokenizer"] | {"text": None}
    tokenizer = VisualTokenizer(TokenizerConfig.parse(architecture, where="test"))
    tokenizer.save_pretrained(root / "tokenizer")
    for parameter in tokenizer.pixel_decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_decoder(tokenizer, root / "decoder")
    return root


def params_of(**changes):
    small = tiny_params()["evaluate_reconstruction"]
    noise = {"seed": 0, "levels": [0.0, 0.5, 2.0], "samples": 17}
    return merged(
        small, {"batch_size": 8, "pictures": 4, "noise": noise, "speed": {"warmup": 0, "batches": 1}} | changes
    )


def evaluate(made, folder, *, tuned=True, **changes):
    """Run the stage here; its outputs by flag."""
    folder.mkdir(exist_ok=True)
    outputs = {flag: folder / name for flag, name in OUTPUTS.items()}
    inputs = {"shards": made / "shards", "tokenizer": made / "tokenizer", "reference": made / "reference"}
    inputs |= {"decoder": made / "decoder"} if tuned else {}
    config = stage.EvaluateReconstruction.parse(params_of(**changes), where="test")
    stage.run(config, **inputs, **outputs, host=work_in(folder))
    return outputs


@pytest.fixture(scope="module")
def outputs(made):
    return evaluate(made, made / "here")


def flat(values):
    for value in values.values():
        yield from flat(value) if isinstance(value, dict) else [value]


def same(ours, theirs, rel=1e-4):
    """Equal within what the rounding of another batch can do to the bytes of a reconstruction."""
    first, second = (json.loads(outputs["metrics"].read_text()) for outputs in (ours, theirs))
    assert list(flat(first)) == pytest.approx(list(flat(second)), rel=rel, abs=1e-6)
    first, second = (pq.read_table(outputs["images"]) for outputs in (ours, theirs))
    assert first["key"] == second["key"]
    for name in first.column_names[2:]:
        np.testing.assert_allclose(first[name], second[name], rtol=rel, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size(made, outputs, tmp_path, batch_size):
    same(evaluate(made, tmp_path / "other", batch_size=batch_size), outputs)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_two_ranks_are_one_process(made, outputs, tmp_path, batch_size):
    """Two real ones, by the command line. 31 images in batches of 64: one of them has nothing to do."""
    paths = {flag: made / flag for flag in ("shards", "tokenizer", "decoder", "reference")} | OUTPUTS
    on_two_ranks(tmp_path, "evaluate_reconstruction", params_of(batch_size=batch_size), paths)
    together = {flag: tmp_path / name for flag, name in OUTPUTS.items()}
    same(together, outputs)
    alone = evaluate(made, tmp_path / "alone", batch_size=batch_size)
    # Whole batches are shared, so every image is computed with the same others: equal bytes at equal threads.
    assert together["images"].read_bytes() == alone["images"].read_bytes()
    same(together, alone, rel=1e-9)


def test_equal_runs_write_equal_bytes(made, outputs, tmp_path):
    again = evaluate(made, tmp_path / "again")
    files = [
        "metrics.json",
        "images.parquet",
        *(f"pictures/{name}.png" for name in ("first", "worst", "median", "best")),
    ]
    files += [
        f"diagnostics/{name}" for name in ("channels.csv", "spectrum.csv", "power.csv", "noise.csv", "latents.png")
    ]
    for name in files:
        assert (outputs["metrics"].parent / name).read_bytes() == (again["metrics"].parent / name).read_bytes(), name
    assert {str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*.*")} >= set(files)


def test_figures_belong_to_their_images(made, outputs):
    """Every row is that of its key; metrics are the means over rows."""
    table = pq.read_table(outputs["images"]).to_pydict()
    data = ShardDataset(made / "shards", "validation")
    assert table["key"] == [data.key(row) for row in range(COUNT)]
    assert set(table["shard"]) == {"validation-00000.tar"}
    originals = data.images(range(COUNT), 16)
    for name, decoder in (("pretrained", None), ("tuned", made / "decoder")):
        tokenizer = load_tokenizer(made / "tokenizer", decoder)
        with torch.no_grad():
            written = to_uint8(tokenizer.decode(tokenizer.encode(normalise(originals))))
        expected = psnr(originals / 255, written / 255).double().numpy()
        np.testing.assert_allclose(table[f"{name}_psnr"], expected, rtol=1e-4)
        means = json.loads(outputs["metrics"].read_text())["reconstruction"]["validation_centre16"][name]
        assert set(means) == {"psnr", "ssim", LPIPS, RFID}
        for metric in ("psnr", "ssim", LPIPS):
            assert means[metric] == pytest.approx(np.mean(table[f"{name}_{metric}"]), rel=1e-12)


def test_pictures_show_worst_median_and_best(made, outputs, monkeypatch):
    """By the perceptual distance of the tuned decoder."""
    import stages.figures.reconstructions as comparison

    shown = {}
    monkeypatch.setattr(
        comparison, "grid", lambda rows, names, path, title, notes: shown.update({path.stem: (rows, names, notes)})
    )
    evaluate(made, made / "drawn")
    table = pq.read_table(outputs["images"])
    order = np.argsort(table[f"tuned_{LPIPS}"].to_numpy())
    expected = {"first": range(4), "worst": order[:-5:-1], "median": order[13:17], "best": order[:4]}
    originals = ShardDataset(made / "shards", "validation").images(range(COUNT), 16)
    for name, rows in expected.items():
        pictures, names, notes = shown[name]
        assert names == ["original", "pretrained", "tuned"]
        assert torch.equal(pictures[0], originals[list(rows)])
        assert notes[0] == [table["key"][int(row)].as_py() for row in rows]
        for row, note in zip(rows, notes[2], strict=True):
            values = [table[f"tuned_{metric}"][int(row)].as_py() for metric in ("psnr", "ssim", LPIPS)]
            assert note == "{:.2f} dB\n{:.3f}  {:.4f}".format(*values)
    worst = Image.open(outputs["pictures"] / "worst.png")
    assert worst.width > 4 * 96
    assert worst.height > 3 * 96


def test_no_noise_costs_nothing(made, outputs):
    table = pq.read_table(outputs["images"])
    noise = json.loads(outputs["metrics"].read_text())["latents"]["validation_centre16"]["noise"]
    for name, curve in noise.items():
        assert list(curve) == ["psnr_0", "psnr_0.5", "psnr_2"]
        assert curve["psnr_0"] == pytest.approx(table[f"{name}_psnr"].to_numpy()[:17].mean(), rel=1e-4)
        assert len(set(curve.values())) == 3
    rows = (outputs["diagnostics"] / "noise.csv").read_text().splitlines()
    assert rows[0] == "level,pretrained,tuned"
    assert float(rows[3].split(",")[1]) == pytest.approx(noise["pretrained"]["psnr_2"], rel=1e-6)


class Unchanged(nn.Identity):
    upscale = 1


class Pixels(Tokenizer):
    """Its latents are the pixels, pulled towards grey: a tokenizer with neither text nor features."""

    has_features = False
    image_size = 16
    latent_shape = (3, 16, 16)

    def __init__(self, factor=1.0):
        super().__init__()
        self.pixel_decoder = Unchanged()
        self.factor = factor

    def _encode(self, images):
        return images * self.factor

    def encoder_state(self):
        return {}, {}


@pytest.fixture
def pixels(monkeypatch):
    def install(factor):
        monkeypatch.setattr(stage, "load_tokenizer", lambda folder, decoder=None: Pixels(factor))

    return install


def test_noise_of_a_tokenizer_that_is_the_identity(made, pixels, tmp_path, monkeypatch):
    """Its PSNR is that of the noise: -10 log10 of the mean over channels of (level * deviation)^2."""
    pixels(1.0)
    grey = lambda self, indices, size: _grey(indices)  # noqa: E731 - in the middle, so that nothing is clamped
    monkeypatch.setattr(ShardDataset, "images", grey)
    noise = {"seed": 0, "levels": [0.0, 0.5, 1.0], "samples": COUNT}
    outputs = evaluate(made, tmp_path / "out", tuned=False, noise=noise)
    found = json.loads(outputs["metrics"].read_text())
    quality = found["reconstruction"]["validation_centre16"]["pretrained"]
    assert (quality["psnr"], quality["ssim"], quality[LPIPS]) == (100, pytest.approx(1), 0)
    curve = found["latents"]["validation_centre16"]["noise"]["pretrained"]
    channels = (outputs["diagnostics"] / "channels.csv").read_text().splitlines()[1:]
    std = np.array([float(line.split(",")[2]) for line in channels]) * IMAGENET_STD  # of pixels in [0, 1]
    assert std == pytest.approx([0.02, 0.04, 0.08], rel=0.05)
    assert curve["psnr_0"] == 100
    for level in (0.5, 1.0):
        error = np.mean((level * std) ** 2) + 1 / 12 / 255**2  # of rounding
        assert curve[f"psnr_{level:g}"] == pytest.approx(-10 * math.log10(error), abs=0.05)


def _grey(indices):
    """Images whose pixels have the deviations 0.02, 0.04, 0.08 around the middle."""
    draws = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(int(index))) for index in indices]
    values = 0.5 + torch.stack(draws) * torch.tensor([0.02, 0.04, 0.08])[:, None, None]
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def test_rfid_is_that_of_the_same_images(made, pixels, tmp_path):
    """Perfect reconstructions have none; others have some."""
    rfid = []
    for factor in (1.0, 0.5):
        pixels(factor)
        outputs = evaluate(made, tmp_path / f"{factor}", tuned=False)
        rfid.append(
            json.loads(outputs["metrics"].read_text())["reconstruction"]["validation_centre16"]["pretrained"][RFID]
        )
    assert rfid[0] == pytest.approx(0, abs=1e-6)
    assert rfid[1] > 1


def test_speed_stands_apart(outputs):
    speed = json.loads(outputs["speed"].read_text())["speed"]
    assert speed["encode_images_per_second"] > 0
    assert speed["decode_flops_per_image"] > 0
    assert speed["batch_size"] == 8
    assert "speed" not in json.loads(outputs["metrics"].read_text())


def test_mistakes_are_told(made, pixels, tmp_path):
    with pytest.raises(ArtefactError, match="train"):  # the reference has validation alone
        evaluate(made, tmp_path / "a", split="train")
    with pytest.raises(ArtefactError, match="no split 'test'"):
        evaluate(made, tmp_path / "b", split="test")
    with pytest.raises(ConfigError, match="levels"):
        params = copy.deepcopy(params_of())
        params["noise"]["levels"] = [-0.1]
        stage.EvaluateReconstruction.parse(params, where="test")
    pixels(math.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        evaluate(made, tmp_path / "c", tuned=False)


def test_a_shard_that_was_changed_is_named(made, tmp_path):
    import shutil

    for name in ("shards", "tokenizer", "reference"):
        shutil.copytree(made / name, tmp_path / name)
    row = pq.read_table(tmp_path / "shards" / "validation-00000.parquet").slice(3, 1).to_pylist()[0]
    with (tmp_path / "shards" / "validation-00000.tar").open("r+b") as tar:
        tar.seek(row["offset"])
        tar.write(b"\0" * row["size"])
    with pytest.raises(ArtefactError, match=r"validation-00000\.tar has sha256"):
        evaluate(tmp_path, tmp_path / "out", tuned=False)
