"""Captions from shards to pictures: features, training, prompts, by the stages themselves."""

import json

import numpy as np
import pytest
import torch
from generating import cache, draw, train, work_in, write_inputs
from safetensors.torch import load_file
from tiny import merged, tiny_params

import vtp
from stages.cache_captions import CacheCaptions
from stages.cache_captions import run as cache_captions
from stages.evaluate_generator import EvaluateGenerator
from stages.evaluate_generator import run as evaluate_generator
from stages.reference import ReferenceStatistics
from stages.reference import run as reference
from stages.runner.environment import Interrupted
from vtp.__main__ import main
from vtp.artefact import ArtefactError
from vtp.commands.info import info
from vtp.config import ConfigError
from vtp.data.captions import CachedCaptions
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.evaluation.samples import Samples
from vtp.models.text_encoder import TokenizerText, load_text_encoder

ENCODER = {"encoder": {"name": "tokenizer"}}
CAPTIONS = {"precision": "float32", "batch_size": 8, "shard_size": 20, **ENCODER}
TOLD = {"model": {"condition": {"name": "captions", "features": "cached", "reading": "cross_attention", **ENCODER}}}
PROMPTS = {"prompts": {"name": "held_out", "most": 5}}


def encode(inputs, root, *, stop_after=None, **changes):
    config = CacheCaptions.parse(merged(CAPTIONS, changes), where="test")
    paths = {"shards": inputs / "shards", "text_encoder": inputs / "tokenizer", "captions": root / "captions"}
    cache_captions(config, **paths, host=work_in(root, stop_after=stop_after))
    return root / "captions"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    cache(root, root, of="captions")
    encode(root, root)
    return root


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Beside its tokenizer, as a pipeline has it."""
    root = tmp_path_factory.mktemp("trained")
    (root / "tokenizer").symlink_to(inputs / "tokenizer")
    return train(inputs, root, TOLD, captions=inputs / "captions").rename(root / "out")


def test_every_picture_with_a_caption_is_learnt(inputs):
    images, latents = ShardDataset(inputs / "shards", "train"), LatentDataset(inputs / "latents")
    assert latents.captions == [images.caption(row) for row in range(len(images))]
    assert latents.classes == ["all"]


def test_cached_features_are_those_of_the_encoder(inputs):
    encoder = load_text_encoder(TokenizerText(name="tokenizer"), inputs / "tokenizer", weights=inputs)
    cached = CachedCaptions(inputs / "captions")
    texts = LatentDataset(inputs / "latents", "validation").captions
    features, mask = cached.rows(cached.numbers(texts))
    ours = encoder(encoder.tokenize(texts))
    assert torch.equal(mask, ours.mask)
    torch.testing.assert_close(features[mask], ours.features[mask].bfloat16().float())
    assert f"{len(cached):,}, in" in info(inputs / "captions")
    assert len(cached) == len(set(texts) | set(LatentDataset(inputs / "latents").captions))
    with pytest.raises(ArtefactError, match="no features of the caption 'a unicorn'"):
        cached.numbers(["a unicorn"])


def test_features_survive_a_stop(inputs, tmp_path):
    with pytest.raises(Interrupted):
        encode(inputs, tmp_path, stop_after=1)
    again = encode(inputs, tmp_path)
    for path in (inputs / "captions").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_exchanged_features_are_refused(inputs, tmp_path):
    folder = encode(inputs, tmp_path)
    first, second = sorted(folder.glob("captions-*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(ArtefactError, match="captions-00000"):
        CachedCaptions(folder)


def test_a_training_resumes_bit_by_bit(inputs, trained, tmp_path):
    with pytest.raises(Interrupted):
        train(inputs, tmp_path, TOLD, captions=inputs / "captions", stop_after=5)
    again = train(inputs, tmp_path, TOLD, captions=inputs / "captions")
    assert (again / "generator/model.safetensors").read_bytes() == (
        trained / "generator/model.safetensors"
    ).read_bytes()


def test_features_may_be_made_step_by_step(inputs, trained, tmp_path):
    """Within the bfloat16 of those that are cached."""
    encoded = {"model": {"condition": {"features": "encoded"}}}
    out = train(inputs, tmp_path, merged(TOLD, encoded), text_encoder=inputs / "tokenizer")
    ours, cached = (load_file(folder / "generator/model.safetensors") for folder in (out, trained))
    for name, values in ours.items():
        torch.testing.assert_close(values, cached[name], atol=3e-3, rtol=0, msg=name)


def test_tokens_may_stand_beside_those_of_the_picture(inputs, tmp_path):
    out = train(
        inputs, tmp_path, merged(TOLD, {"model": {"condition": {"reading": "joint"}}}), captions=inputs / "captions"
    )
    config = json.loads((out / "generator/config.json").read_text())
    assert config["text"]["reading"] == "joint"


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {}, "give --captions FOLDER"),
        ({}, {"captions": "captions", "text_encoder": "tokenizer"}, "--text-encoder .* is not `encoded`"),
        ({"model": {"condition": {"features": "encoded"}}}, {}, "give its folder by --text-encoder"),
        ({"model": {"condition": {"name": "classes"}}}, {"captions": "captions"}, "is not `cached`"),
    ],
)
def test_what_does_not_go_together_is_refused(inputs, tmp_path, changes, given, words):
    given = {name: inputs / folder for name, folder in given.items()}
    told = merged(TOLD, changes)
    if changes.get("model", {}).get("condition", {}).get("name") == "classes":
        told = changes
    with pytest.raises(ConfigError, match=words):
        train(inputs, tmp_path, told, **given)


def test_samples_are_those_of_their_prompts(inputs, trained, tmp_path):
    """One is a function of seed, number and prompt, and not of where its features come from, or of its neighbours."""
    given = {"latents": inputs / "latents", "captions": inputs / "captions"}
    cached = Samples(draw(trained / "generator", tmp_path / "a", given=given, **PROMPTS))
    texts = LatentDataset(inputs / "latents", "validation").captions
    assert cached.config.names == list(dict.fromkeys(texts))[:5]
    assert cached.config.text_encoder == json.loads((inputs / "captions/config.json").read_text())["text_encoder"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(cached.config.names))
    given = {"prompts": file, "text_encoder": inputs / "tokenizer"}
    of_file = {"prompts": {"name": "file", "form": "lines"}, "batch_size": 7}
    encoded = Samples(draw(trained / "generator", tmp_path / "b", given=given, **of_file))
    for setting in ("unguided", "guided"):
        ours, theirs = (samples.of(setting).latents(0, 24) for samples in (cached, encoded))
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
        assert torch.equal(cached.of(setting).labels, torch.arange(24) % 5)


def test_pictures_of_prompts(trained, tmp_path, monkeypatch):
    generator = vtp.load_generator(trained / "generator")
    many = [np.asarray(picture) for picture in generator.sample(["a red apple", "a dog, a cat"], count=2, seed=3)]
    alone = [np.asarray(picture) for picture in generator.sample("a dog, a cat", count=2, seed=3, batch_size=1)]
    assert np.array_equal(many[2], alone[0])
    assert np.array_equal(many[3], alone[1])
    assert not np.array_equal(many[0], many[2])
    for wrong in ("", " ", 3):
        with pytest.raises(ValueError, match="no prompt"):
            generator.sample(wrong)
    monkeypatch.chdir(tmp_path)
    main(["sample", str(trained / "generator"), "--prompt", "a dog", "--count", "2", "--out", "dog.png"])
    assert (tmp_path / "dog.png").exists()
    with pytest.raises(SystemExit):
        main(["sample", str(trained / "generator"), "--class", "dog"])


def test_another_encoder_is_refused(inputs, trained, tmp_path):
    other = tmp_path / "other"
    write_inputs(tmp_path)
    from vtp.models.tokenizer import VisualTokenizer

    model = VisualTokenizer.from_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        model.text.ln_final.bias.add_(1)
    model.save_pretrained(other)
    with pytest.raises(ArtefactError, match="reads the features of another text encoder"):
        vtp.load_generator(trained / "generator", text_encoder=other)
    given = {"latents": inputs / "latents", "text_encoder": other}
    with pytest.raises(ArtefactError, match="reads the features of another text encoder"):
        draw(trained / "generator", tmp_path, given=given, **PROMPTS)
    with pytest.raises(ConfigError, match="set generate.prompts"):
        draw(trained / "generator", tmp_path)


@pytest.fixture(scope="module")
def judged(inputs, trained, tmp_path_factory):
    """What `evaluate_generator` says of samples of held-out prompts."""
    root = tmp_path_factory.mktemp("judged")
    given = {"latents": inputs / "latents", "captions": inputs / "captions"}
    draw(trained / "generator", root, given=given, prompts={"name": "held_out", "most": None})
    return judge(inputs, root, root)


CLIP = {"clip_scores": [{"name": "tokenizer"}], "retrieval": {"among": 6, "seed": 0}, "ocr": None, "scenes": False}


def judge(inputs, samples, root, **changes):
    splits = {"validation": {"samples": None, "labelled": False, "kept": 20}, "train": None}
    values = tiny_params()
    config = ReferenceStatistics.parse(
        values["reference"] | {"splits": {"validation": splits["validation"]}}, where="test"
    )
    reference(config, shards=inputs / "shards", reference=root / "reference", host=work_in(root))
    values = values["evaluate_generator"] | {"split": "validation", "ratio_to": None, "class_probe": None}
    values |= {"counts": [20], "kernel": {"subsets": 3, "subset_size": 12, "seed": 0}, "prompts": CLIP} | changes
    outputs = {"metrics": "generation.json", "curves": "generation.csv", "pictures": "pictures"}
    folders = {"tokenizer": inputs / "tokenizer", "samples": samples / "samples", "latents": inputs / "latents"}
    folders |= {"shards": inputs / "shards", "clip": inputs / "tokenizer", "reference": root / "reference"}
    evaluate_generator(
        EvaluateGenerator.parse(values, where="test"),
        **folders,
        **{name: root / file for name, file in outputs.items()},
        host=work_in(root),
    )
    return json.loads((root / "generation.json").read_text())["generation"]


def test_samples_are_held_against_their_prompts(judged):
    """So are reconstructions and real pictures; the tower that conditioned is no judge, and its figures say so."""
    names = ["clip_score_tokenizer_own", "retrieval_r1_of6_tokenizer_own", "retrieval_r5_of6_tokenizer_own"]
    for row in ("unguided", "guided", "reconstructed", "real"):
        assert judged[row].keys() >= set(names), row
        assert 0 <= judged[row][names[1]] <= judged[row][names[2]] <= 1
    assert judged["real"][names[0]] != judged["unguided"][names[0]]
