"""The discriminator of a plan: its shapes, without contents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.models.base import Tokenizer
from vtp.models.discriminator import (
    Discriminator,
    FeatureDiscriminator,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    TimmFeaturesConfig,
)
from vtp.models.discriminator_features import TokenizerFeatures, spread
from vtp.models.frozen_backbone import bare_backbone
from vtp.objectives.adversary import AdversaryConfig


def discriminator_of(config: AdversaryConfig | None, tokenizer: Tokenizer) -> Discriminator | None:
    """The discriminator without contents; that of --discriminator-features is taken to be as large as `tokenizer`."""
    if config is None:
        return None
    record = config.discriminator
    with torch.device("meta"):
        if isinstance(record, PatchDiscriminatorConfig):
            return PatchDiscriminator(record)
        network = record.network
        if isinstance(network, TimmFeaturesConfig):
            features = _TimmShapes(network)
        else:
            features = TokenizerFeatures(tokenizer, blocks=network.blocks, size=network.image_size)
        return FeatureDiscriminator(record, features, dim=features.dim, heads=network.blocks)


class _TimmShapes(nn.Module):
    """`TimmFeatures` without its weights."""

    def __init__(self, config: TimmFeaturesConfig) -> None:
        super().__init__()
        self._size = config.image_size
        self.backbone = bare_backbone(config.model, config.image_size).requires_grad_(False)
        self.dim: int = self.backbone.embed_dim
        self._chosen = spread(config.blocks, len(self.backbone.blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.interpolate(images, (self._size, self._size))
        of_blocks = self.backbone.forward_intermediates(
            x, indices=self._chosen, output_fmt="NLC", intermediates_only=True
        )
        return [tokens.transpose(1, 2) for tokens in of_blocks]
