"""The convolutional tokenizer through the stages: trained, exported on the way, begun from, tuned, cached, planned."""

from importlib import import_module

import pytest
import torch
from objectives.test_pretrain import CONVOLUTIONAL
from test_stages import QuietHost
from tiny import merged, tiny_params, write_params, write_shards

from stages.check import stage_config
from stages.plans.rules import disagreements
from stages.runner.environment import Runtime
from stages.runner.run import path_flags
from vtp import load_tokenizer
from vtp.artefact import read_json
from vtp.data.latents import LatentDataset

SECTIONS = ("prepare_data", "reference", "pretrain", "tune_decoder", "cache_latents", "train_generator", "generate")
OTHERS = ("evaluate_understanding", "evaluate_reconstruction", "evaluate_generator")


def params():
    changes = {"training": {"length": {"name": "samples", "samples": 16}}, "monitor": {"milestones": ["end"]}}
    tuning = {"training": {"length": {"name": "samples", "samples": 16}}}
    return merged(tiny_params(), {"pretrain": merged(CONVOLUTIONAL, changes, new=True), "tune_decoder": tuning})


def run(stage, root, **inputs):
    """Outputs lie in a folder of the stage's own."""
    function, folder = import_module(f"stages.{stage}").run, root / stage
    (folder / "scratch").mkdir(parents=True)
    outputs = {flag: folder / flag for flag in path_flags(function, "output")}
    host = QuietHost(folder / "scratch", root, Runtime())
    function(stage_config(stage).parse(params()[stage], where=stage), **inputs, **outputs, host=host)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("convolutional")
    write_shards(root / "shards")
    return root, run("pretrain", root, shards=[root / "shards"])


def test_the_tokenizer_serves_the_stages_behind(trained):
    root, pretrained = trained
    shards, folder = root / "shards", pretrained / "tokenizer"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.latent_shape == (3, 4, 4)
    assert (pretrained / "milestones" / "end" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    figures = read_json(pretrained / "metrics")["pretrain"]
    assert figures["parameters"] == sum(parameter.numel() for parameter in tokenizer.parameters())
    assert "kl" in (pretrained / "curves").read_text().splitlines()[0].split(",")
    tuned = run("tune_decoder", root, shards=shards, tokenizer=folder)
    assert load_tokenizer(folder, tuned / "decoder").encoder_digest() == tokenizer.encoder_digest()
    cached = run("cache_latents", root, shards=shards, tokenizer=folder)
    assert LatentDataset(cached / "latents").shape == (3, 4, 4)


@pytest.mark.parametrize("begin", ["state", "tokenizer"])
def test_another_run_begins_where_it_ended(trained, tmp_path, begin, monkeypatch):
    root, pretrained = trained
    kept = {}
    fit = import_module("stages.pretrain").fit

    def first_weights(objective, *arguments, **options):
        kept.update({name: tensor.clone() for name, tensor in objective.tokenizer.state_dict().items()})
        return fit(objective, *arguments, **options)

    monkeypatch.setattr("stages.pretrain.fit", first_weights)
    run("pretrain", tmp_path, shards=[root / "shards"], init_from=pretrained / begin)
    ended = load_tokenizer(pretrained / "tokenizer").state_dict()
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in ended.items())


def test_stages_that_run_it_have_plans_of_it(tmp_path):
    write_params(params(), tmp_path / "params.yaml")
    plans = {
        stage: import_module(f"stages.plans.{stage}").plan([f"{tmp_path}/params.yaml:{stage}"])
        for stage in ("pretrain", "tune_decoder", "cache_latents", "evaluate_understanding")
    }
    assert all(plan["run"].value > 0 for plan in plans.values())
    assert plans["cache_latents"]["of an image"].value == 3 * 4 * 4 * 4
    assert plans["pretrain"]["activations, reconstruction"].value > 0
    assert plans["pretrain"]["encoder and decoder"].value == 17_251


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"train_generator": {"model": {"patch_size": 3}}}, "patch_size: 3 does not divide 4, the side of the latents"),
        (
            {"generate": {"settings": {"guided": {"guidance_channels": 5}}}},
            "guidance_channels: 5, pretrain.tokenizer.latent_channels is 3",
        ),
        ({"evaluate_understanding": {"probes": {"size": 14}}}, "14 is no multiple of 4, the pixels per latent"),
        (
            {
                "tune_decoder": {
                    "adversary": {
                        "discriminator": {
                            "name": "features",
                            "network": {"name": "tokenizer", "image_size": None, "blocks": 2},
                            "kernel": 3,
                        }
                    }
                }
            },
            "pretrain.tokenizer is convolutional, which has no features beside its latents; choose timm",
        ),
    ],
)
def test_check_knows_what_does_not_go_with_it(changes, said):
    values = merged(params(), changes)
    configs = {name: stage_config(name).parse(values[name], where=name) for name in (*SECTIONS, *OTHERS)}
    problems = disagreements(configs, [])
    assert [problem for problem in problems if said is None or said in problem] == (problems if said else [])
    assert bool(problems) is (said is not None)
