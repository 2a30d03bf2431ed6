"""Models that score captions, at a size of seconds: one of open_clip in a file, and a tokenizer of ours."""

import json

import torch
from tiny import tiny_params

from vtp.artefact import digest, save_tensors
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer

ARCHITECTURE, FILE = "vtp-test-tiny", "tiny.safetensors"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_open_clip(folder):
    """A tiny model of open_clip with random weights, in a file of `folder`."""
    import open_clip

    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.manual_seed(0)
    save_tensors(folder / FILE, open_clip.create_model(ARCHITECTURE, load_weights=False).state_dict())


def open_clip_model(folder, /, **changes):
    """The parameters of that model."""
    values = {"architecture": ARCHITECTURE, "weights": FILE, "sha256": digest(folder / FILE)}
    return {"name": "open_clip"} | values | changes


def write_tokenizer(folder, **changes):
    """A tokenizer of the tiny recipe with random weights."""
    torch.manual_seed(1)
    values = tiny_params()["pretrain"]["tokenizer"] | changes
    VisualTokenizer(TokenizerConfig.parse(values, where="tokenizer")).save_pretrained(folder)
