"""KoLeo: spread features by pushing each away from its nearest neighbour (Sablayrolles et al. 2019; DINOv2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour on the unit sphere, for features [B, D], in float32.

    Raises ValueError for a batch of one, which has no neighbour.
    """
    if len(features) < 2:
        raise ValueError("KoLeo needs at least two samples; raise batch.ssl, or set koleo to 0")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), eps=EPS, dim=-1)
        with torch.no_grad():
            similarity = (x @ x.T).fill_diagonal_(-1)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(x, x[nearest], eps=EPS)
        return -(distance + EPS).log().mean()
