"""The projection head of self-distillation: features to prototype logits (DINO; DINOv2's short recipe)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config


class DinoHeadConfig(Config):
    """A head for class tokens, masked patches or both."""

    hidden_dim: int = Field(ge=1, description="width of the hidden layers of the projection")
    bottleneck_dim: int = Field(ge=1, description="width of the vectors that are compared with prototypes")
    prototypes: int = Field(ge=2, description="number of prototypes K")
    weight_norm: bool = Field(description="true: prototypes are unit vectors with a learned scale; false: plain (v3)")
    prototype_init: Literal["trunc_normal", "linear"] = Field(
        description="first prototypes: normal with deviation 0.02, or uniform as those of nn.Linear (DINOv2), longer and so "
        "slower to turn"
    )


class DinoHead(nn.Module):
    """Three-layer GELU MLP, unit norm, and one logit per prototype: [..., in_dim] -> [..., K].

    With weight normalisation a logit is at most its prototype's scale, which starts at 1.
    """

    scales: nn.Parameter | None

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
        self.register_parameter("scales", nn.Parameter(torch.ones(config.prototypes)) if config.weight_norm else None)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
        if config.prototype_init == "linear":
            bound = config.bottleneck_dim**-0.5
            nn.init.uniform_(self.directions, -bound, bound)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Unit-norm embeddings [..., bottleneck_dim]."""
        return F.normalize(self.mlp(x), dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits [..., K] of embeddings: the wide product, cheap to repeat and large to keep."""
        if self.scales is None:
            return F.linear(embeddings, self.directions)
        return F.linear(embeddings, F.normalize(self.directions, dim=-1)) * self.scales
