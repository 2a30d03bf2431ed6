"""KoLeo: spread features by pushing each away from its nearest neighbour (Sablayrolles et al. 2019; DINOv2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp.distributed import gather, ranks

EPS = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """This rank's part of -mean log distance to the nearest neighbour on the unit sphere, in float32.

    `features` [B, D] are rows of this rank; neighbours come from all ranks. Raises ValueError for a global batch of
    one, which has no neighbour.
    """
    rank, size = ranks()
    count = len(features)
    if size * count < 2:
        raise ValueError("KoLeo needs at least two samples; raise batch.ssl, or set koleo to 0")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), eps=EPS, dim=-1)
        every = gather(x)
        with torch.no_grad():
            similarity = x @ every.T
            similarity.diagonal(rank * count).fill_(-2)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(x, every[nearest], eps=EPS)
        return -(distance + EPS).log().sum() / (size * count)
