"""Text encoders by name, against the libraries that they come from."""

import pytest
import torch
from tiny import tiny_params

from stages.pretrain import Pretrain
from vtp.artefact import ArtefactError, digest
from vtp.config import ConfigError
from vtp.models.text_encoder import OpenClipText, TokenizerText, load_text_encoder
from vtp.models.tokenizer import VisualTokenizer

CAPTIONS = ["a frog", "a red apple left of a dog, on a pink background", ""]
ARCHITECTURE = "tiny-text"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    model = VisualTokenizer(Pretrain.parse(tiny_params()["pretrain"], where="test").architecture)
    model.save_pretrained(tmp_path_factory.mktemp("tower") / "tokenizer")
    return tmp_path_factory.getbasetemp() / "tower0" / "tokenizer"


@pytest.fixture(scope="module")
def open_clip_weights(tmp_path_factory):
    """A model of open_clip with an architecture of a few thousand numbers and its checkpoint."""
    import json

    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE, load_weights=False)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder, model.eval()


def test_a_tower_gives_all_tokens_behind_its_last_norm(tokenizer):
    """The one at the end, projected, is what the tower calls the caption."""
    encoder = load_text_encoder(TokenizerText(name="tokenizer"), tokenizer, weights=tokenizer)
    features, mask = encoder(encoder.tokenize(CAPTIONS))
    model = VisualTokenizer.from_pretrained(tokenizer)
    ids = encoder.tokenize(CAPTIONS).ids
    ends = mask.sum(1) - 1
    assert ends.tolist() == ids.argmax(1).tolist()
    pooled = features[torch.arange(3), ends] @ model.text.text_projection
    torch.testing.assert_close(pooled, model.text(ids), atol=1e-6, rtol=1e-5)
    assert (encoder.length, encoder.width) == (mask.shape[1], features.shape[2])


def test_a_caption_has_its_own_tokens_whoever_stands_beside_it(tokenizer):
    encoder = load_text_encoder(TokenizerText(name="tokenizer"), tokenizer, weights=tokenizer)
    together, alone = encoder(encoder.tokenize(CAPTIONS)), encoder(encoder.tokenize(CAPTIONS[:1]))
    assert together.mask.sum(1).tolist()[::2] == [4, 2]  # start, two words, end; start and end
    torch.testing.assert_close(together.features[:1], alone.features)


def test_open_clip_tokens_lead_to_open_clip_embeddings(open_clip_weights):
    folder, model = open_clip_weights
    config = OpenClipText(
        name="open_clip", architecture=ARCHITECTURE, weights="tiny.pt", sha256=digest(folder / "tiny.pt")
    )
    encoder = load_text_encoder(config, None, weights=folder)
    tokens = encoder.tokenize(CAPTIONS)
    features, mask = encoder(tokens)
    pooled = features[torch.arange(3), mask.sum(1) - 1] @ model.text_projection
    torch.testing.assert_close(pooled, model.encode_text(tokens.ids), atol=1e-5, rtol=1e-5)
    assert len(encoder.digest) == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, "params.yaml expects"),
        ({"weights": "none.pt"}, "no such weights"),
        ({"architecture": "ViT-Z"}, "no architecture 'ViT-Z'"),
        ({"architecture": "ViT-B-16-SigLIP"}, "Hugging Face hub, which no digest pins"),
    ],
)
def test_weights_of_open_clip_are_pinned(open_clip_weights, changes, words):
    folder, _ = open_clip_weights
    given = {"architecture": ARCHITECTURE, "weights": "tiny.pt", "sha256": digest(folder / "tiny.pt")} | changes
    with pytest.raises((ArtefactError, ConfigError), match=words):
        load_text_encoder(OpenClipText(name="open_clip", **given), None, weights=folder)


def test_a_digest_is_that_of_the_tower_alone(tokenizer, tmp_path):
    model = VisualTokenizer.from_pretrained(tokenizer)
    digests = []
    for part in (None, "trunk", "text"):
        with torch.no_grad():
            if part is not None:
                next(getattr(model, part).parameters()).add_(1)
        model.save_pretrained(tmp_path / str(part))
        config = TokenizerText(name="tokenizer")
        digests.append(load_text_encoder(config, tmp_path / str(part), weights=tmp_path).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_tokenizer_without_text_is_refused(tmp_path):
    values = tiny_params()["pretrain"]
    values["objective"]["weights"]["clip"] = 0.0
    VisualTokenizer(Pretrain.parse(values, where="test").architecture).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ArtefactError, match="no text tower"):
        load_text_encoder(TokenizerText(name="tokenizer"), tmp_path / "tokenizer", weights=tmp_path)
    with pytest.raises(ConfigError, match="give its folder by --text-encoder"):
        load_text_encoder(TokenizerText(name="tokenizer"), None, weights=tmp_path)
