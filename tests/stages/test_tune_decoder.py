"""The stage on tiny shards: it stops and goes on exactly, leaves the encoder alone, and says what does not fit."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from generating import QuietHost, work_in
from objectives.test_pretrain import FEATURES_ALONE
from tiny import ROOT, merged, tiny_params, write_params, write_shards
from tuning import FEATURES, tokenizer_of

from stages.pretrain import Pretrain
from stages.pretrain import run as pretrain
from stages.runner.environment import Interrupted, Runtime
from stages.tune_decoder import TuneDecoder, channel_std, run
from vtp import VisualTokenizer, load_tokenizer
from vtp.artefact import ArtefactError, load_tensors
from vtp.data.dataset import ShardDataset
from vtp.draws import address
from vtp.layers.images import normalise

STEPS = 12
CASES = {
    "patch": {},
    "features": {
        "adversary": {"discriminator": FEATURES},
        "objective": {"noise": {"std": 0.8, "samples": 20}},
        "view": {"name": "random_crop", "scale_min": 0.5},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_shards(root / "shards")
    tokenizer_of().save_pretrained(root / "tokenizer")
    torch.manual_seed(1)
    other = tokenizer_of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    other.save_pretrained(root / "other")
    return root


def tune(inputs, root, changes, *, stop_after=None, features=None, name="out", tokenizer=None):
    """Run the stage in `root`, whose scratch stays; the folder of the outputs."""
    config = TuneDecoder.parse(merged(tiny_params()["tune_decoder"], changes), where="test")
    host = QuietHost(root / "scratch" / "folder", root, Runtime(device="cpu"))
    host.stop_after = stop_after
    host.folder.mkdir(parents=True, exist_ok=True)
    out = root / name
    out.mkdir()
    files = {"decoder": out / "decoder", "metrics": out / "metrics.json", "curves": out / "curves.csv"}
    tokenizer = tokenizer or inputs / "tokenizer"
    paths = {"shards": inputs / "shards", "tokenizer": tokenizer, "picture": out / "picture.png"}
    run(config, **paths, **files, discriminator_features=features, host=host)
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_identical(inputs, tmp_path, case):
    """Stopped before and after the discriminator has begun; decoder, curves and picture are those of one run."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    features = inputs / "other" if case == "features" else None
    through = tune(inputs, tmp_path / "one", CASES[case], features=features)
    for number, stop in enumerate((1, 5)):
        with pytest.raises(Interrupted):
            tune(inputs, tmp_path / "two", CASES[case], stop_after=stop, features=features, name=f"stopped-{number}")
    resumed = tune(inputs, tmp_path / "two", CASES[case], features=features)
    assert contents(resumed) == contents(through)


@pytest.mark.slow
def test_two_ranks_and_micro_batches(inputs, tmp_path):
    """The real stage, asked to shard: weights stay whole, which the log says, and the decoder is that of one process."""
    changes = CASES["features"] | {"batch_size": 8, "training": {"length": {"name": "samples", "samples": 8 * STEPS}}}
    alone = tune(inputs, tmp_path, changes, name="alone")
    (tmp_path / ".dvc").mkdir()
    write_params(merged(tiny_params(), {"tune_decoder": changes}), tmp_path / "params.yaml")
    flags = {"shards": inputs / "shards", "tokenizer": inputs / "tokenizer", "decoder": "decoder"}
    flags |= {"metrics": "metrics.json", "curves": "curves.csv", "picture": "picture.png", "provenance": "p.json"}
    arguments = [part for name, path in flags.items() for part in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "stages.tune_decoder", "params.yaml:tune_decoder", *arguments]
    settings = {"VTP_DEVICE": "cpu", "VTP_RANKS": "2", "VTP_PARALLEL": "fsdp", "VTP_MICRO_BATCH": "2"}
    environment = os.environ | settings | {"VTP_WORKERS": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (load_tensors(folder / "decoder" / "decoder.safetensors") for folder in (tmp_path, alone))
    first = dict(load_tokenizer(inputs / "tokenizer").pixel_decoder.named_parameters())
    moved = sum((theirs[name] - first[name]).square().sum().item() for name in first) ** 0.5
    apart = sum((theirs[name] - ours[name]).square().sum().item() for name in first) ** 0.5
    assert apart < 1e-2 * moved
    assert "these models stay whole on every rank" in next(tmp_path.glob(".scratch/**/run.log")).read_text()


def test_what_it_leaves(inputs, tmp_path):
    before = contents(inputs / "tokenizer")
    out = tune(inputs, tmp_path, CASES["features"])
    assert contents(inputs / "tokenizer") == before
    plain, tuned = load_tokenizer(inputs / "tokenizer"), load_tokenizer(inputs / "tokenizer", out / "decoder")
    facts = json.loads((tmp_path / "scratch" / "facts.json").read_text())
    assert facts["encoder"] == plain.encoder_digest() == tuned.encoder_digest()
    assert plain.encoder_state()[1].keys() == tuned.encoder_state()[1].keys()
    for name, tensor in plain.encoder_state()[1].items():
        assert torch.equal(tensor, tuned.encoder_state()[1][name]), name
    assert any(
        not torch.equal(one, other)
        for one, other in zip(plain.pixel_decoder.parameters(), tuned.pixel_decoder.parameters(), strict=True)
    )
    with (out / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == str(STEPS)
    for name in ("validation_psnr", "validation_lpips_random-vgg16"):
        assert float(rows[-1][name]) != float(rows[-1][f"{name}_uninformed"])
    norms = json.loads((out / "metrics.json").read_text())["tune_decoder"]["gradient_norm"]
    assert 0 < norms["median"] <= norms["p99"] <= norms["max"]
    assert len(facts["latent_std"].split()) == plain.latent_shape[0]


def test_a_frozen_encoder_gets_its_decoder_here(inputs, tmp_path):
    """Pre-trained by self-supervision alone, which leaves the decoder as it was drawn (RAE)."""
    alone = Pretrain.parse(
        merged(tiny_params()["pretrain"], FEATURES_ALONE | {"monitor": {"milestones": ["end"]}}), where="test"
    )
    host = QuietHost(tmp_path / "pretrain" / "folder", tmp_path, Runtime(device="cpu"))
    host.folder.mkdir(parents=True)
    names = ("tokenizer", "state", "milestones", "metrics", "curves", "picture")
    pretrain(alone, shards=[inputs / "shards"], **{name: tmp_path / name for name in names}, host=host)
    tokenizer = load_tokenizer(tmp_path / "milestones/end")
    torch.manual_seed(address(alone.seed, "weights"))
    first = VisualTokenizer(alone.architecture).state_dict()
    same = {name for name, value in tokenizer.state_dict().items() if torch.equal(value, first[name])}
    assert all(name in same for name in first if name.startswith("pixel_decoder."))
    assert "trunk.blocks.0.attn.qkv.weight" not in same
    with (tmp_path / "curves").open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["replaced_samples"]) == 0
    out = tune(inputs, tmp_path, {"optim": {"lr": 5e-3}}, tokenizer=tmp_path / "milestones/end")
    with (out / "curves.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["validation_psnr"]) > float(last["validation_psnr_uninformed"]) + 0.5


def test_noise_is_measured_on_the_latents(inputs, tmp_path):
    """Over positions and images, whatever the batch."""
    tokenizer, train = load_tokenizer(inputs / "tokenizer"), ShardDataset(inputs / "shards", "train")
    with torch.no_grad():
        latents = tokenizer.encode(normalise(train.images(range(20), tokenizer.image_size)))
    expected = latents.std((0, 2, 3), correction=0)
    for batch_size in (3, 20):
        found = channel_std(tokenizer, train, 20, batch_size, work_in(tmp_path))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_discriminator_that_reads_another_tokenizer(inputs, tmp_path):
    ours = tune(inputs, tmp_path / make(tmp_path, "ours"), CASES["features"])
    theirs = tune(inputs, tmp_path / make(tmp_path, "theirs"), CASES["features"], features=inputs / "other")
    assert contents(ours / "decoder") != contents(theirs / "decoder")


def make(folder, name):
    (folder / name).mkdir()
    return name


def test_discriminators_that_cannot_be_are_told_before_any_step(inputs, tmp_path):
    timm = {"name": "timm", "model": "vit_tiny_patch16_224", "weights": "none", "sha256": "0" * 64, "image_size": 32}
    timm |= {"antialias": True, "layer_norm": True}
    cases = {
        "no such weights": {"discriminator": FEATURES | {"network": timm | {"blocks": 2}}},
        "have 2 blocks": {"discriminator": FEATURES | {"network": FEATURES["network"] | {"blocks": 5}}},
        "fewer than discriminator.kernel 9": {"discriminator": FEATURES | {"kernel": 9}},
    }
    for number, (words, adversary) in enumerate(cases.items()):
        with pytest.raises((ArtefactError, ValueError), match=words):
            tune(inputs, tmp_path, {"adversary": adversary}, name=f"out-{number}")
    assert not list((tmp_path / "scratch" / "folder").glob("*step*"))
