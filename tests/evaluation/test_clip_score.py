"""CLIP scores of pools, by open_clip and by a tokenizer of ours, against both models asked directly."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import GOLDEN
from PIL import Image
from safetensors.torch import load_file
from scoring import ARCHITECTURE, open_clip_model, write_open_clip, write_tokenizer
from sifting import removed, section, selected, sift, write_pool

from vtp.artefact import ArtefactError, digest, save_tensors
from vtp.config import ConfigError
from vtp.evaluation.clip_score import ClipScorer, build_scorer
from vtp.layers.decode import decode_rgb
from vtp.models.tokenizer import VisualTokenizer

CAPTIONS = ["a red square", "a noisy picture of the sea", None, "a dog", "", "something else", "blue", "last"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pictures = []
    for index, caption in enumerate(CAPTIONS):
        draws = np.random.default_rng(index)
        image = Image.fromarray(draws.integers(0, 255, (5 + index, 9, 3), dtype=np.uint8)).resize((48, 40))
        file = io.BytesIO()
        image.save(file, "PNG")
        pictures.append((f"key-{index}", caption, file.getvalue() if index != 5 else b"no image"))
    return write_pool(tmp_path_factory.mktemp("data") / "pool", pictures)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_open_clip(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    write_tokenizer(folder)
    return folder


def direct(pool, model, preprocess, tokenize):
    """Scores by key, one image at a time."""
    import pyarrow.parquet as pq

    scores = {}
    for row in pq.read_table(pool / "part-00000.parquet").to_pylist():
        content = (pool / row["tar"]).read_bytes()[row["offset"] :][: row["size"]]
        if row["caption"] is not None and content != b"no image":
            image = F.normalize(model.encode_image(preprocess(decode_rgb(content))[None]), dim=-1)
            text = F.normalize(model.encode_text(tokenize([row["caption"]])), dim=-1)
            scores[row["key"]] = float((image * text).sum())
    return scores


def rule(model, keep, missing="drop"):
    return {"name": "clip_score", "model": model, "keep": keep, "batch_size": 3, "missing": missing}


def sifted(rule, pool, folder, monkeypatch, **inputs):
    config = section([rule], columns={"name": "pool"}, keep_columns=[])
    monkeypatch.setattr("vtp.curation.filter.engine.span_of", lambda rows: 3)
    return sift(config, pool, folder, **inputs)


@pytest.mark.parametrize("kind", ["open_clip", "tokenizer"])
@torch.no_grad()
def test_scores_are_those_of_the_model(pool, weights, tokenizer, tmp_path, monkeypatch, kind):
    import open_clip

    if kind == "open_clip":
        model, inputs = open_clip_model(weights), {}
        network, _, preprocess = open_clip.create_model_and_transforms(ARCHITECTURE, str(weights / "tiny.safetensors"))
        scores = direct(pool, network.eval(), preprocess, open_clip.get_tokenizer(ARCHITECTURE))
    else:
        model, inputs = {"name": "tokenizer"}, {"tokenizer": tokenizer}
        ours = VisualTokenizer.from_pretrained(tokenizer)
        scores = direct(pool, ours, lambda image: ours.preprocess(image)[0], ours.tokenize)
    monkeypatch.setattr("sifting.Runtime", lambda **values: _runtime(weights, **values))
    assert len(scores) == 6
    ranked = sorted(scores, key=lambda key: -scores[key])
    middle = (scores[ranked[2]] + scores[ranked[3]]) / 2
    for number, (keep, missing, expected) in enumerate(
        [
            ({"name": "min", "value": middle}, "drop", {*ranked[:3]}),
            ({"name": "min", "value": middle}, "keep", {*ranked[:3], "key-2"}),
            ({"name": "top_fraction", "fraction": 0.34}, "drop", {*ranked[:2]}),
            ({"name": "top_fraction", "fraction": 0.34}, "keep", {*ranked[:2], "key-2"}),
        ]
    ):
        folder = sifted(rule(model, keep, missing), pool, tmp_path / str(number), monkeypatch, **inputs)
        assert {row["key"] for row in selected(folder)} == expected
        assert removed(folder)["unreadable_image"] == 1
    pieces = (tmp_path / "0" / "scratch" / "folder" / "rule-00").glob("image-*.npy")
    found = np.concatenate([np.load(path) for path in pieces])
    codes = np.sort(found[found[:, 1] == 1, 0])
    values = np.where(codes >> np.uint64(63), codes ^ np.uint64(1 << 63), ~codes).view(np.float64)
    np.testing.assert_allclose(np.sort(values), sorted(scores.values()), atol=2e-6)


def _runtime(weights, **values):
    from stages.runner.environment import Runtime

    return Runtime(weights=str(weights), device="cpu", **values)


def test_scores_are_those_of_torchmetrics():
    """`golden/probe-and-clipscore`: a hundred times the cosine. Their mean, not below 0 there, is no figure of ours."""
    official = load_file(GOLDEN / "probe-and-clipscore" / "io.safetensors")
    model = torch.nn.Module()
    model.encode_image = lambda pixels: pixels
    model.encode_text = lambda tokens: official["clip_score.text"][tokens]
    scorer = ClipScorer(model, lambda images: images, None, None, device="cpu")
    images = official["clip_score.image"]
    batches = [slice(first, first + 8) for first in (0, 8, 16)]
    found = torch.cat([scorer.score(images[batch], torch.arange(24)[batch]) for batch in batches]).numpy()
    np.testing.assert_allclose(100 * found, official["clip_score.per_sample"].numpy(), rtol=0, atol=1e-4)
    assert 100 * found.mean() == pytest.approx(float(official["clip_score.score"]), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(pool, tokenizer):
    scorer = build_scorer(
        section([rule({"name": "tokenizer"}, {"name": "min", "value": 0.0})]).rules[0].model,
        weights=tokenizer,
        tokenizer=tokenizer,
        device="cpu",
    )
    images = torch.stack([scorer.prepare(Image.new("RGB", (30, 20), (40 * i, 9, 9))) for i in range(5)])
    tokens = scorer.tokenize(["a", "b", "c", "d", "e"])
    together = scorer.score(images, tokens)
    alone = [scorer.score(images[[i]], tokens[[i]])[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "other.pt"}, ArtefactError, "other.pt: no such weights"),
        ({"sha256": "0" * 64}, ArtefactError, "tiny.safetensors: sha256 is .*, params.yaml expects 000"),
        ({"architecture": "ViT-Q"}, ConfigError, "open_clip has no architecture 'ViT-Q'"),
        ({"architecture": "ViT-B-16-SigLIP"}, ConfigError, "tokenizer from the Hugging Face hub"),
    ],
)
def test_unusable_models_are_named_before_the_work(pool, weights, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setattr("sifting.Runtime", lambda **values: _runtime(weights, **values))
    values = rule(open_clip_model(weights, **changes), {"name": "min", "value": 0.0})
    with pytest.raises(error, match=message):
        sifted(values, pool, tmp_path, monkeypatch)
    assert not (tmp_path / "scratch" / "folder" / "read").exists()


def test_weights_that_do_not_fit(pool, weights, tmp_path, monkeypatch):
    save_tensors(weights / "odd.safetensors", {"a": torch.zeros(1), "positional_embedding": torch.zeros(16, 32)})
    monkeypatch.setattr("sifting.Runtime", lambda **values: _runtime(weights, **values))
    changes = {"weights": "odd.safetensors", "sha256": digest(weights / "odd.safetensors")}
    values = rule(open_clip_model(weights, **changes), {"name": "min", "value": 0.0})
    with pytest.raises(ArtefactError, match=r"odd\.safetensors does not fit vtp-test-tiny"):
        sifted(values, pool, tmp_path, monkeypatch)


def test_our_model_needs_its_folder_and_a_text_tower(pool, tmp_path, monkeypatch):
    values = rule({"name": "tokenizer"}, {"name": "min", "value": 0.0})
    with pytest.raises(ConfigError, match="give the command --tokenizer"):
        sifted(values, pool, tmp_path, monkeypatch)
    write_tokenizer(tmp_path / "mute", text=None)
    with pytest.raises(ConfigError, match="mute: this tokenizer has no text tower"):
        sifted(values, pool, tmp_path / "b", monkeypatch, tokenizer=tmp_path / "mute")
    unpooled = GOLDEN / "official-ffn/mlp-pooledbottleneck"
    with pytest.raises(ConfigError, match="mlp-pooledbottleneck: .* one that does not pool"):
        sifted(values, pool, tmp_path / "c", monkeypatch, tokenizer=unpooled)
