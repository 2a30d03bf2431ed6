"""VGG16's convolutions with seeded random weights.

Random-weight embeddings compare images that are unlike ImageNet better than trained ones do (Naeem et al. 2020), and
they need no download. They serve as evaluation features and as a perceptual distance, always under their own name.
"""

import math

import torch
from torch import Tensor, nn

from vtp.draws import torch_draws

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class ConvStages(nn.Module):
    """Stages of 3x3 convolutions and ReLUs, with max-pooling between them."""

    def __init__(self, widths: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for number, stage in enumerate(widths):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Activations after every stage, for ImageNet-normalised images [B, 3, H, W]."""
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def random_vgg16(seed: int, *, num_stages: int = 5) -> ConvStages:
    """The first `num_stages` stages, frozen; He-normal weights drawn by address from `seed`, zero biases."""
    network = ConvStages(STAGES[:num_stages])
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for number, layer in enumerate(convolutions):
            std = math.sqrt(2 / layer.weight[0].numel())
            layer.weight.normal_(std=std, generator=torch_draws(seed, "random_vgg16", number))
            assert layer.bias is not None
            layer.bias.zero_()
    return network.eval().requires_grad_(False)
