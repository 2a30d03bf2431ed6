"""What stands behind the tokenizer, with tokenizers that were not trained here, at tiny size in this process."""

import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch
from foreign import GOLDEN, autoencoder, backbone_source, backbone_weights, official_vtp
from test_stages import QuietHost
from tiny import merged, tiny_params, write_shards

from stages.check import stage_config
from stages.runner.environment import Runtime
from stages.runner.run import path_flags
from vtp import VisualTokenizer, load_tokenizer
from vtp.artefact import ArtefactError
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.layers.images import normalise
from vtp.models.tokenizer import TokenizerConfig

SIZE = 64  # of the golden checkpoint's images
KINDS = ("vtp", "autoencoder_kl", "backbone")
STAGES = ("tune_decoder", "cache_latents", "evaluate_reconstruction", "evaluate_understanding")


def run_stage(name, root, folder, params, **paths):
    """Run a stage with those of `paths` that it reads; what it writes, by flag, under `folder`."""
    run = import_module(f"stages.{name}").run
    inputs = {flag: paths[flag] for flag in path_flags(run, "input") if flag in paths}
    inputs |= {flag: [inputs[flag]] for flag in path_flags(run, "several")}
    outputs = {flag: folder / f"{name}_{flag}" for flag in path_flags(run, "output")}
    host = QuietHost(folder / "scratch" / name / "folder", root, Runtime())
    host.folder.mkdir(parents=True)
    run(stage_config(name).parse(params, where=name), **inputs, **outputs, host=host)
    return outputs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Shards and their reference statistics, which all kinds share; the folder of weights."""
    root = tmp_path_factory.mktemp("import")
    write_shards(root / "shards")
    (root / "weights").mkdir()
    params = tiny_params()["reference"] | {"image_size": SIZE}
    return root, run_stage("reference", root, root / "common", params, shards=root / "shards")["reference"]


@pytest.fixture(scope="module", params=KINDS)
def judged(request, project):
    """A tokenizer of each kind through every stage behind it: its kind, all paths by flag, and the metrics."""
    root, reference = project
    kind, folder = request.param, root / request.param
    source, published = {"name": kind}, folder / "published"
    folder.mkdir()
    if kind == "vtp":
        official_vtp(published)
    elif kind == "autoencoder_kl":
        autoencoder().save_pretrained(published)
        source["image_size"] = SIZE
    else:
        source, published = backbone_source(backbone_weights(root / "weights"), image_size=SIZE), None
    paths = {"shards": root / "shards", "reference": reference}
    given = {} if published is None else {"source": published}
    paths |= run_stage("import_tokenizer", root, folder, {"source": source}, **given)
    probes = {"probes": {"resize": SIZE, "size": SIZE}}
    params, metrics = merged(tiny_params(), {"evaluate_understanding": probes}), {}
    for name in STAGES:
        written = run_stage(name, root, folder, params[name], **paths)
        if "metrics" in written:
            metrics |= json.loads(written["metrics"].read_text())
        paths |= {flag: written[flag] for flag in ("decoder", "latents") if flag in written}
    return kind, paths, metrics


def test_tuning_leaves_the_encoder_alone(judged):
    _, paths, _ = judged
    plain, tuned = load_tokenizer(paths["tokenizer"]), load_tokenizer(paths["tokenizer"], paths["decoder"])
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        latents = plain.encode(images)
        assert torch.equal(latents, tuned.encode(images))
        assert tuned.decode(latents).shape == images.shape
        assert not torch.equal(plain.decode(latents), tuned.decode(latents))
    assert plain.encoder_digest() == tuned.encoder_digest()


def test_latents_are_those_of_the_encoder(judged):
    _, paths, _ = judged
    tokenizer, latents = load_tokenizer(paths["tokenizer"]), LatentDataset(paths["latents"])
    images = ShardDataset(paths["shards"], "train")
    rows = [0, 19, 20, 47]
    with torch.no_grad():
        encoded = tokenizer.encode(normalise(images.images(images.singles().rows[rows], SIZE)))
    torch.testing.assert_close(latents.rows(np.array(rows)), encoded, atol=1e-4, rtol=1e-4)
    assert latents.encoder == tokenizer.encoder_digest()
    assert latents.shape == tokenizer.latent_shape


def test_every_figure_that_a_kind_can_have(judged):
    kind, paths, metrics = judged

    def leaves(values):
        for value in values.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    assert all(math.isfinite(value) for value in leaves(metrics) if not isinstance(value, str))
    (of_reconstruction,) = metrics["reconstruction"].values()
    assert set(of_reconstruction) == {"pretrained", "tuned"}
    seen = metrics["understanding"]
    assert any("linear_probe_bottleneck" in name for name in seen)
    assert any("linear_probe_last" in name for name in seen) == load_tokenizer(paths["tokenizer"]).has_features
    assert any("zero_shot" in name for name in seen) == (kind == "vtp")


@pytest.fixture(scope="module")
def halves(project):
    """Imported tokenizers of VTP that give no pictures back: without a decoder, or with one that makes them larger."""
    root, _ = project
    folder = root / "halves"
    official_vtp(folder / "encoder", "official-ffn/cliponly-patch8")
    torch.manual_seed(0)
    values = tiny_params()["pretrain"]["tokenizer"] | {"decoder_upscale": 16, "image_size": SIZE}
    VisualTokenizer(TokenizerConfig.parse(values, where="test")).save_pretrained(folder / "larger")
    source = {"source": {"name": "vtp"}}
    return {
        name: run_stage("import_tokenizer", root, folder / f"{name} imported", source, source=folder / name)[
            "tokenizer"
        ]
        for name in ("encoder", "larger")
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("encoder", "published without a pixel decoder"),
        ("larger", f"images of {SIZE} pixels come back with {2 * SIZE}"),
    ],
)
def test_stages_that_decode_refuse_what_gives_no_pictures_back(name, said, project, halves, tmp_path):
    root, reference = project
    params = tiny_params()
    assert (load_tokenizer(halves[name]).config.decoder is None) == (name == "encoder")
    for stage in ("tune_decoder", "evaluate_reconstruction", "evaluate_generator", "train_generator"):
        paths = {"shards": root / "shards", "reference": reference, "tokenizer": halves[name]}
        if stage == "train_generator":
            paths |= run_stage("cache_latents", root, tmp_path, params["cache_latents"], **paths)
        nowhere = {"samples": root / "nowhere"} if stage == "evaluate_generator" else {}
        with pytest.raises(ArtefactError, match=f"{halves[name]}: .*{said}"):
            run_stage(stage, root, tmp_path, params[stage], **paths, **nowhere)


def test_an_encoder_has_every_figure_of_its_features(project, halves, tmp_path):
    root, _ = project
    params = merged(tiny_params(), {"evaluate_understanding": {"probes": {"resize": 32, "size": 32}}})
    paths = {"shards": root / "shards", "tokenizer": halves["encoder"]}
    written = run_stage("evaluate_understanding", root, tmp_path, params["evaluate_understanding"], **paths)
    seen = json.loads(written["metrics"].read_text())["understanding"]
    assert {"linear_probe_last", "linear_probe_bottleneck", "zero_shot_top1_squash"} <= seen.keys()


def test_an_unpooled_text_tower_has_no_zero_shot(project, tmp_path):
    root, _ = project
    official_vtp(tmp_path / "published", "official-ffn/mlp-pooledbottleneck")
    params = merged(tiny_params(), {"evaluate_understanding": {"probes": {"resize": 32, "size": 32}}})
    paths = {"shards": root / "shards", "tokenizer": tmp_path / "published"}
    written = run_stage("evaluate_understanding", root, tmp_path, params["evaluate_understanding"], **paths)
    seen = json.loads(written["metrics"].read_text())["understanding"]
    assert "linear_probe_last" in seen
    assert not any("zero_shot" in name for name in seen)


def test_another_vocabulary_is_refused_before_anything_is_computed(project, tmp_path):
    root, _ = project
    paths = {"shards": root / "shards", "tokenizer": GOLDEN / "vtp-tiny"}
    with pytest.raises(ValueError, match=r"text\.vocab_size is 512; open_clip's tokenizer has 49408"):
        run_stage("evaluate_understanding", root, tmp_path, tiny_params()["evaluate_understanding"], **paths)
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_a_fresh_decoder_learns(judged):
    kind, _, metrics = judged
    if kind == "backbone":
        ((_, figures),) = metrics["reconstruction"].items()
        assert figures["tuned"]["psnr"] > figures["pretrained"]["psnr"]
