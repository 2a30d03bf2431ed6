"""The stage on real shards: ranks, batches and kills do not matter, figures are those of their variants and protocols."""

import csv
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, merged, tiny_params, write_shards
from torch import nn
from understanding import OUTPUTS, evaluate

import stages.evaluate_understanding as stage
from vtp.artefact import ArtefactError, load_tensors
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.evaluation import extraction
from vtp.evaluation.linear_probe import draw_holdout
from vtp.evaluation.sgd_probe import ProbeFeatures, SgdConfig, SgdProbe
from vtp.layers.images import normalise
from vtp.layers.preprocess import CentreView, Squash
from vtp.models.base import Tokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

GOLDEN = ROOT / "tests" / "golden" / "vtp-tiny"
TRAIN, CHUNK = 41, 8  # not divisible by ranks, batches or chunks
HOLDOUT = 0.4
AUGMENTED = {"probes": {"augment": {"scale_min": 0.3}}}
ZERO_SHOT = {f"zero_shot_top{k}_{protocol}" for k in (1, 5) for protocol in ("squash", "centre")}
SINGLE = {f"linear_probe_{name}" for name in ("bottleneck", "bottleneck_category", "last", "last_category")}
MULTI = {f"linear_probe_multi{which}" for which in ("", "_category", "_best_on_val", "_category_best_on_val")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, and a tokenizer that is no more than its start."""
    root = tmp_path_factory.mktemp("understanding")
    write_shards(root / "shards")
    torch.manual_seed(0)
    VisualTokenizer(TokenizerConfig.parse(tiny_params()["pretrain"]["tokenizer"], where="test")).save_pretrained(
        root / "tokenizer"
    )
    return root


def params_of(**changes):
    """Rates that make something of untrained features; many held-out images."""
    probes = {"holdout": HOLDOUT, "multi": {"learning_rates": [1.0, 30.0, 1000.0]}}
    small = merged(tiny_params()["evaluate_understanding"], {"batch_size": 4, "train_samples": TRAIN, "probes": probes})
    return merged(small, changes)


def here(made, folder, *, chunk=CHUNK, **changes):
    """Run the stage in this process; the folder of its outputs."""
    evaluate(folder, params_of(**changes), chunk=chunk, shards=made / "shards", tokenizer=made / "tokenizer")
    return folder


def start(made, folder, *, ranks=1, seconds=0.0, **changes):
    """Run it in a process of its own, or in several."""
    given = {"folder": folder, "shards": made / "shards", "tokenizer": made / "tokenizer"}
    given = {name: str(path) for name, path in given.items()} | {"chunk": CHUNK, "seconds": seconds}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = [str(ROOT / "tests/understanding.py"), json.dumps(given | {"params": params_of(**changes)})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launch, *script], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def whole(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def figures(folder):
    return json.loads((folder / OUTPUTS["metrics"]).read_text())["understanding"]


def table_of(folder, name):
    chunks = [load_tensors(path) for path in sorted((folder / "scratch/folder/features" / name).iterdir())]
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


@pytest.fixture(scope="module")
def plain(made):
    return here(made, made / "plain")


@pytest.fixture(scope="module")
def augmented(made):
    return here(made, made / "augmented", **AUGMENTED)


def test_names_say_variant_protocol_and_selection(plain, augmented):
    expected = ZERO_SHOT | SINGLE | MULTI | {"knn20_last", "knn20_bottleneck", "chance"}
    assert figures(plain).keys() == figures(augmented).keys() == expected
    assert figures(plain)["chance"] == pytest.approx(1 / 6)
    assert all(0 <= value <= 1 for value in figures(plain).values())
    facts = json.loads((plain / "scratch/facts.json").read_text())
    assert facts["train_samples"] == TRAIN
    assert facts["linear_probe_multi"].startswith("multi, last ")


@pytest.mark.parametrize("changes", [{}, AUGMENTED], ids=["plain", "augmented"])
@pytest.mark.slow
def test_two_ranks_are_one_process(made, plain, augmented, tmp_path, changes):
    """Two real ones. They share whole chunks, so that bytes are equal."""
    whole(start(made, tmp_path, ranks=2, **changes))
    alone = augmented if changes else plain
    for name in OUTPUTS.values():
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 8), (7, 5), (64, 2048)])
def test_any_batch_and_chunk(made, augmented, tmp_path, batch_size, chunk):
    """Features are equal within rounding, and with them what is made of them."""
    other = here(made, tmp_path, batch_size=batch_size, chunk=chunk, **AUGMENTED)
    for name in ("train", "validation"):
        for key, values in table_of(augmented, name).items():
            torch.testing.assert_close(table_of(other, name)[key], values, atol=1e-5, rtol=1e-5)
    for name, value in figures(augmented).items():
        assert figures(other)[name] == pytest.approx(value, abs=1.01 / 32), name  # one image that sits on the fence


@pytest.mark.parametrize("epoch", [0, 2], ids=["train images", "second epoch"])
def test_a_kill_costs_a_chunk(made, augmented, tmp_path, epoch):
    """SIGKILL while features are taken; what is there is not taken again, and the end is the same."""
    features = tmp_path / "scratch/folder/features"
    name = f"multi epoch {epoch}" if epoch else "train"
    process = start(made, tmp_path, seconds=0.1, **AUGMENTED)
    deadline = time.monotonic() + 120
    while not (features / name / "00001.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    there = {path: path.stat() for path in features.rglob("*.safetensors")}
    assert not (features / name / "00005.safetensors").exists()
    if epoch:
        assert not (features / "multi epoch 1").exists()  # used, and gone
        assert "weight_0" in load_tensors(tmp_path / "scratch/folder/multi.safetensors")
    taken = taken_by(lambda: here(made, tmp_path, **AUGMENTED))
    for path, before in there.items():
        if path.exists():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    epochs = 2 - max(0, epoch - 1)
    rows = sum(len(load_file(path)["latent"]) for path in there if path.exists() and path.parent.name != name)
    assert taken <= TRAIN * epochs + TRAIN + 32 - rows - 2 * CHUNK
    for output in OUTPUTS.values():
        assert (tmp_path / output).read_bytes() == (augmented / output).read_bytes(), output


def taken_by(run):
    """How many images are decoded meanwhile."""
    count, original = 0, ShardDataset.image

    def counting(self, index):
        nonlocal count
        count += 1
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardDataset, "image", counting)
        run()
    return count


def test_a_wish_to_stop_is_followed_between_chunks(made, augmented, tmp_path):
    from stages.runner.environment import STOP, Interrupted

    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / STOP).touch()
    with pytest.raises(Interrupted):
        here(made, tmp_path, **AUGMENTED)
    assert len(list((tmp_path / "scratch/folder/features/train").iterdir())) == 1
    (tmp_path / "scratch" / STOP).unlink()
    here(made, tmp_path, **AUGMENTED)
    assert figures(tmp_path) == figures(augmented)


@pytest.mark.parametrize("resize", [16, 21], ids=["the view of centre", "another"])
def test_every_image_has_its_own_features(made, tmp_path, monkeypatch, resize):
    """Of the rows, views and variants that the names promise; pictures are no squares here."""
    plain = ShardDataset.image
    monkeypatch.setattr(ShardDataset, "image", lambda self, index: plain(self, index).resize((40, 24)))
    here(made, tmp_path, probes={"resize": resize})
    model, data = VisualTokenizer.from_pretrained(made / "tokenizer"), ShardDataset(made / "shards", "validation")
    singles, table = data.singles(), table_of(tmp_path, "validation")
    for place in (0, 9, len(singles.rows) - 1):
        picture = data.image(int(singles.rows[place]))

        def pixels(view, picture=picture):
            return normalise(torch.from_numpy(np.array(view.of(picture, 0))).permute(2, 0, 1)[None])

        with torch.no_grad():
            images = pixels(CentreView(resize, 16))
            features, several = model.features(images), model.intermediate_features(images, 2)
            expected = {
                "tokens": torch.cat([several[0].cls, features.cls, features.patches.mean(1)], 1),
                "latent": model.encode(images).mean((2, 3)),
                "squash": model.encode_image(pixels(Squash(16))),
                "centre": model.encode_image(pixels(CentreView(16, 16))),
            }
        for key, values in expected.items():
            torch.testing.assert_close(table[key][place], values[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_multi_reads_the_official_intermediate_features():
    """Class tokens of the last two blocks, the last at the end, then the mean patch: from the official implementation."""
    golden = load_file(GOLDEN / "io.safetensors")
    golden = {key.removeprefix("64x64."): value for key, value in golden.items()}
    model = VisualTokenizer.from_pretrained(GOLDEN)
    pixels = extraction.Pixels(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.empty(0), torch.empty(0))
    taken = extraction.Extraction(model, blocks=2, batch_size=2, precision="float32", host=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "normalise", lambda pixels: golden["image"])
        found = taken._features(pixels, extraction.Views(CentreView(64, 64)))
    mean = golden["patch_tokens"].mean(1)
    expected = torch.cat([golden["intermediate_cls_-2"], golden["cls_token"], mean], 1)
    torch.testing.assert_close(found["tokens"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["tokens"][:, -128:], torch.cat([golden["cls_token"], mean], 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["latent"], golden["latents"].mean((2, 3)), atol=1e-4, rtol=0)


def test_curves_hold_every_candidate(plain):
    """The chosen ones are the best on held-out images among them, and the best on validation is not below."""
    with (plain / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    config = params_of()["probes"]
    probes = [row["probe"] for row in rows]
    assert probes.count("bottleneck") == probes.count("last_category") == len(config["single"]["l2"])
    for depth in (1, 2):  # 4 is more than there are
        assert probes.count(f"multi, last {depth}") == len(config["multi"]["learning_rates"])
    multi = [row for row in rows if row["probe"].startswith("multi, ")]
    best = max(multi, key=lambda row: float(row["holdout"]))
    assert float(best["validation"]) == pytest.approx(figures(plain)["linear_probe_multi"], abs=1e-5)
    assert figures(plain)["linear_probe_multi_best_on_val"] >= max(float(row["validation"]) for row in multi) - 1e-5


def test_multi_is_the_probe_of_its_tables(made, plain):
    """Trained on the kept features and labels, judged on the held-out and validation ones of the same images."""
    train, validation = (ShardDataset(made / "shards", split).singles(TRAIN) for split in ("train", "validation"))
    tables, config = [table_of(plain, name) for name in ("train", "validation")], params_of()["probes"]
    labels, truth = (torch.from_numpy(singles.labels) for singles in (train, validation))
    one, held = (
        ProbeFeatures("multi, last 2", "multi", "tokens", 3 * 16, torch.arange(6), None),
        draw_holdout(TRAIN, HOLDOUT, 0),
    )
    probe = SgdProbe([one], SgdConfig.parse(config["multi"], where="test"), seed=0, device="cpu")
    for _ in range(config["multi"]["epochs"]):
        probe.train(tables[0], labels, held)
        of_held = probe.judge({name: table[held] for name, table in tables[0].items()}, labels[held])
        probe.end_epoch(holdout=of_held, validation=probe.judge(tables[1], truth))
    rows = [row for row in csv.reader((plain / "curves.csv").open()) if row[0] == one.name]
    expected = [(one.name, *(f"{value:.6g}" for value in candidate[1:])) for candidate in probe.candidates("multi")]
    assert [tuple(row) for row in rows] == expected


def test_validation_labels_choose_nothing(made, plain, tmp_path, monkeypatch):
    """Other labels there: the same penalties and heads, also of the probes that SGD solves."""
    right, single = ShardDataset.singles, {"name": "sgd", "learning_rates": [0.1, 10.0], "epochs": 2, "batch_size": 16}

    def swapped(self, most=None):
        singles = right(self, most)
        labels = (singles.labels + 1) % 6 if "validation" in self.shards[0].name else singles.labels
        return singles._replace(labels=labels)

    for number, solver in enumerate((params_of()["probes"]["single"], single)):
        chosen, accuracies = [], []
        for name, singles in (("right", right), ("wrong", swapped)):
            monkeypatch.setattr(ShardDataset, "singles", singles)
            folder = here(made, tmp_path / f"{name}{number}", probes={"single": solver})
            facts = json.loads((folder / "scratch/facts.json").read_text())
            chosen.append({key: value for key, value in facts.items() if "best_on_val" not in key})
            accuracies.append(figures(folder))
        assert chosen[0] == chosen[1]
        assert accuracies[0] != accuracies[1]
        names = accuracies[0].keys()
        assert ("linear_probe_bottleneck_best_on_val" in names) == (solver["name"] == "sgd")


class Pixels(Tokenizer):
    """A tokenizer with neither text nor features; its latents are twice the image."""

    has_features = False
    image_size = 16
    latent_shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.pixel_decoder = nn.Identity()

    def _encode(self, images):
        return 2 * images

    def encoder_state(self):
        return {}, {}


def test_a_tokenizer_without_features_has_the_bottlenecks_figures(made, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "load_tokenizer", lambda folder: Pixels())
    other = {"name": "sgd", "learning_rates": [0.1], "epochs": 2, "batch_size": 16}
    for number, changes in enumerate(({}, AUGMENTED, {"probes": {"single": other}})):
        folder = here(made, tmp_path / str(number), **changes)
        names = {"linear_probe_bottleneck", "linear_probe_bottleneck_category", "knn20_bottleneck", "chance"}
        names |= {f"{name}_best_on_val" for name in names if number == 2 and "probe" in name}
        assert figures(folder).keys() == names
    images = ShardDataset(made / "shards", "train")
    expected = 2 * normalise(images.images(images.singles(TRAIN).rows, 16)).mean((2, 3))
    torch.testing.assert_close(table_of(tmp_path / "0", "train")["latent"], expected)


def test_a_tokenizer_without_text_has_no_zero_shot(made, tmp_path):
    torch.manual_seed(0)
    architecture = tiny_params()["pretrain"]["tokenizer"] | {"text": None}
    model = VisualTokenizer(TokenizerConfig.parse(architecture, where="test"))
    model.save_pretrained(tmp_path / "tokenizer")
    changes = {"prompts": {"name": "openai"}}  # not asked for, so not refused
    evaluate(tmp_path, params_of(**changes), chunk=CHUNK, shards=made / "shards", tokenizer=tmp_path / "tokenizer")
    assert figures(tmp_path).keys() == SINGLE | MULTI | {"knn20_last", "knn20_bottleneck", "chance"}


def test_reduced_precision(made, plain, tmp_path):
    """Features of half precision, near those of float32."""
    folder = here(made, tmp_path, precision="bfloat16")
    for key, values in table_of(folder, "validation").items():
        assert values.dtype == torch.float16
        torch.testing.assert_close(values.float(), table_of(plain, "validation")[key], atol=0.05, rtol=0.05)
    assert figures(folder).keys() == figures(plain).keys()


def test_held_out_images_are_a_share_of_train(made, plain):
    state = load_tensors(plain / "scratch/folder/multi.safetensors")
    held = int(draw_holdout(TRAIN, HOLDOUT, 0).sum())
    counts = state["holdout"] * held
    torch.testing.assert_close(counts, counts.round())
    assert state["validation"].shape == (2, 4, len(params_of()["probes"]["multi"]["learning_rates"]))


def test_mistakes_are_told(made, tmp_path, monkeypatch):
    taken = tmp_path / "refused/scratch/folder/features"
    with pytest.raises(ArtefactError, match=r"for ImageNet's 1,000 classes .* have 6"):
        here(made, tmp_path / "refused", prompts={"name": "openai"})
    assert not taken.exists()  # nothing was computed before
    with pytest.raises(ConfigError, match="resize 15 is below size 16"):
        here(made, tmp_path / "a", probes={"resize": 15})
    with pytest.raises(ValueError, match="neighbours 20 are more than train_samples 10"):
        here(made, tmp_path / "b", train_samples=10)
    broken = VisualTokenizer.from_pretrained(made / "tokenizer")
    nn.init.constant_(broken.trunk.cls_token, float("nan"))
    monkeypatch.setattr(stage, "load_tokenizer", lambda folder: broken)
    with pytest.raises(ValueError, match="features of the encoder as torch.float32 hold NaN or infinity"):
        here(made, tmp_path / "c")
