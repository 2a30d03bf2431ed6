"""Tiny tokenizers that were not trained here, as their authors publish them."""

import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import ROOT

from vtp.artefact import digest, load_tensors, save_tensors

GOLDEN = ROOT / "tests" / "golden"
BACKBONE = "test_vit.r160_in1k"  # the smallest of timm: 64 wide, 6 blocks, patches of 16
DECODER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_layer": "mlp", "norm_layer": "layernorm"}
DECODER |= {"use_qk_norm": False, "init_values": None}


def official_vtp(folder: Path, name: str = "vtp-tiny") -> None:
    """A golden checkpoint with random words up to the size of open_clip's vocabulary, so that it reads real prompts."""
    import json

    shutil.copytree(GOLDEN / name, folder)
    (folder / "io.safetensors").unlink()
    values = json.loads((folder / "config.json").read_text())
    tensors = load_tensors(folder / "model.safetensors")
    known = tensors.get("token_embedding.weight")
    if known is not None:
        words = 0.02 * torch.randn(49408, known.shape[1], generator=torch.Generator().manual_seed(0))
        words[: len(known)] = known
        tensors["token_embedding.weight"] = words
    (folder / "config.json").write_text(json.dumps(values | {"text_vocab_size": 49408}))
    save_tensors(folder / "model.safetensors", tensors)


def autoencoder(**changes: Any) -> Any:
    """A diffusers.AutoencoderKL with random weights, 4 channels, factor 4."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**settings | changes).eval()


def backbone_weights(folder: Path, name: str = BACKBONE) -> dict[str, str]:
    """A file as timm publishes it, at the size that the model was trained on, with random weights; its name and digest."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    path = folder / f"{name}.safetensors"
    save_tensors(path, model.state_dict())
    return {"weights": path.name, "sha256": digest(path)}


def backbone_source(weights: dict[str, str], **changes: Any) -> dict[str, Any]:
    """The parameter `import_tokenizer.source` of a backbone."""
    sizes = {"input_size": 32, "image_size": 16}
    return {"name": "backbone", "model": BACKBONE, **sizes, "decoder": DECODER, "seed": 0, **weights, **changes}


def golden_perceptual(folder: Path) -> Any:
    """LPIPS with the weights of `golden/rae-decoder-losses`, which go by the names of its tensors, from a file."""
    from lpips import LPIPS

    from vtp.losses.perceptual import LpipsConfig, build_perceptual

    golden = load_tensors(GOLDEN / "rae-decoder-losses" / "io.safetensors")
    weights = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).state_dict()
    for name, value in weights.items():
        if name.startswith("scaling_layer"):  # constants
            continue
        named = re.sub(r"^lins\.(\d)", r"lin\1", name)  # lins.K is linK
        drawn = np.random.RandomState(zlib.crc32(named.encode())).standard_normal(tuple(value.shape))
        if named.startswith("lin"):
            drawn = 0.1 * np.abs(drawn)
        else:
            drawn *= math.sqrt(2 / math.prod(value.shape[1:])) if name.endswith("weight") else 0.1
        value.copy_(torch.from_numpy(drawn))
    for name, first in golden.items():
        if name.startswith("check."):
            torch.testing.assert_close(weights[name.removeprefix("check.")].flatten()[:8], first)
    torch.save(weights, folder / "lpips.pth")
    config = LpipsConfig(name="lpips", weights="lpips.pth", sha256=digest(folder / "lpips.pth"))
    return build_perceptual(config, weights=folder)
