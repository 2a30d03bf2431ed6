"""The projection head of self-distillation: features to prototype logits (DINO; DINOv2's short recipe)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config


class DinoHeadConfig(Config):
    """One head for class tokens and masked patches."""

    hidden_dim: int = Field(ge=1)
    bottleneck_dim: int = Field(ge=1)
    prototypes: int = Field(ge=2, description="K")


class DinoHead(nn.Module):
    """Three-layer GELU MLP, unit norm, and cosine logits scaled per prototype (weight normalisation).

    [..., in_dim] -> [..., K]; a logit is at most its prototype's scale, which starts at 1.
    """

    def __init__(self, in_dim: int, config: DinoHeadConfig) -> None:
        super().__init__()
        self.in_dim = in_dim
        hidden = config.hidden_dim
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.bottleneck_dim),
        )
        self.directions = nn.Parameter(torch.empty(config.prototypes, config.bottleneck_dim))
        self.scales = nn.Parameter(torch.ones(config.prototypes))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        embedding = F.normalize(self.mlp(x), dim=-1)
        return F.linear(embedding, F.normalize(self.directions, dim=-1)) * self.scales
