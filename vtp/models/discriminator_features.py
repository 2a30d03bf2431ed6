"""Discriminators by their parameters, and the frozen networks behind the one on `features`.

Such a network gives maps of patch tokens of images in [-1, 1], one per chosen block.
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vtp.artefact import verified_weights
from vtp.device import constant
from vtp.host import Host
from vtp.layers.images import normalise
from vtp.models.base import Tokenizer
from vtp.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    FeatureDiscriminator,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    TimmFeaturesConfig,
)
from vtp.models.frozen_backbone import bare_backbone, load_backbone
from vtp.models.loading import load_tokenizer


def build_discriminator(
    config: DiscriminatorConfig, host: Host, *, tokenizer: Tokenizer, folder: Path | None
) -> Discriminator:
    """A discriminator with fresh weights, its frozen features on the host's device.

    Those of a tokenizer come from `folder`, or from `tokenizer` when there is none.
    """
    if isinstance(config, PatchDiscriminatorConfig):
        return PatchDiscriminator(config)
    network = config.network
    if isinstance(network, TimmFeaturesConfig):
        path = verified_weights(
            host.weights / network.weights,
            network.sha256,
            f"timm's weights of {network.model}",
            instead="choose `discriminator: {name: patch, ...}` in params.yaml",
        )
        features = TimmFeatures(network, path).to(host.device)
    else:
        source = tokenizer if folder is None else load_tokenizer(folder).to(host.device).requires_grad_(False)
        features = TokenizerFeatures(source, blocks=network.blocks, size=network.image_size)
    return FeatureDiscriminator(config, features, dim=features.dim, heads=network.blocks)


class TokenizerFeatures(nn.Module):
    """The encoder of a tokenizer, at `size` pixels or at those of the images.

    Raises ValueError when it has no features, or fewer blocks than asked for.
    """

    def __init__(self, tokenizer: Tokenizer, *, blocks: int, size: int | None) -> None:
        super().__init__()
        if not tokenizer.has_features:
            raise ValueError(
                f"{type(tokenizer).__name__} has no features for a discriminator; give another tokenizer by "
                "--discriminator-features, or choose the discriminator `patch`"
            )
        self._tokenizer = [tokenizer]  # in a list: no part of the state
        self._size = size
        self.chosen = spread(blocks, tokenizer.num_blocks)

    @property
    def dim(self) -> int:
        """Channels of every map."""
        return self._tokenizer[0].feature_dim

    def forward(self, images: Tensor) -> list[Tensor]:
        tokenizer = self._tokenizer[0]
        x = _resized(images, self._size)
        of_blocks = tokenizer.intermediate_features(normalise((x + 1) / 2), tokenizer.num_blocks - self.chosen[0])
        return [of_blocks[index - self.chosen[0]].patches.transpose(1, 2) for index in self.chosen]


class TimmFeatures(nn.Module):
    """A vision transformer of timm with its own normalisation.

    Raises ArtefactError for unknown models and weights that do not fit, ValueError for more blocks than it has.
    """

    def __init__(self, config: TimmFeaturesConfig, path: Path) -> None:
        super().__init__()
        self._config = config
        self.backbone: Any = bare_backbone(config.model, config.image_size)
        load_backbone(self.backbone, config.model, path)
        self.eval().requires_grad_(False)
        self.dim: int = self.backbone.embed_dim
        self.chosen = spread(config.blocks, len(self.backbone.blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = (_resized(images, self._config.image_size, antialias=self._config.antialias) + 1) / 2
        trained_on = self.backbone.pretrained_cfg
        mean, std = (constant(trained_on[name], x).view(3, 1, 1) for name in ("mean", "std"))
        of_blocks = self.backbone.forward_intermediates(
            (x - mean) / std, indices=self.chosen, output_fmt="NLC", intermediates_only=True
        )
        if self._config.layer_norm:
            of_blocks = [F.layer_norm(tokens, tokens.shape[-1:]) for tokens in of_blocks]
        return [tokens.transpose(1, 2) for tokens in of_blocks]


def spread(count: int, depth: int) -> list[int]:
    """`count` blocks of `depth`, evenly spaced, the last among them: 2, 5, 8, 11 of 12."""
    if not 1 <= count <= depth:
        raise ValueError(
            f"the discriminator's features have {depth} blocks, discriminator.network.blocks asks for {count}"
        )
    return [round((index + 1) * depth / count) - 1 for index in range(count)]


def _resized(images: Tensor, size: int | None, *, antialias: bool = True) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=antialias)
