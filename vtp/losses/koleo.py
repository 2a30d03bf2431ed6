"""KoLeo: spread features by pushing each away from its nearest neighbour (Sablayrolles et al. 2019; DINOv2)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp.distributed import gather, ranks

EPS = 1e-8
NEAR = 0.1  # a cosine of 0.995: distinct pictures are farther apart from the first steps on, copies are not


class Koleo(NamedTuple):
    """This rank's parts of scalars of the global batch, float32."""

    loss: Tensor
    duplicates: Tensor  # share of the features whose nearest neighbour is nearer than NEAR


def koleo_loss(features: Tensor, *, group: int | None = None) -> Koleo:
    """The mean over features of -log d, d the distance to the nearest neighbour on the unit sphere, in float32.

    `features` [B, D] are rows of this rank; neighbours come from all ranks, or from the `group` consecutive rows of the
    global batch to which a row belongs (DINOv2's are those of a GPU; DINOv3 has such groups). Raises ValueError for a global
    batch of one, which has no neighbour, and for one that is no multiple of `group`.

    DINOv2 has the same but for two of the same picture, where -log d pushes by 1 / d, up to 1e8, in a direction that is
    rounding, and clipping then shrinks the rest of the step to nothing. Here the push is softened as in N-body codes:
    -log d is the potential of a point in the plane, and within NEAR it is that of a disc of this radius, a parabola with
    the same value and slope at its rim. So a feature is pushed by (x - y) / max(d, NEAR)^2, at most 1 / NEAR, and a copy
    not at all; features that collapse together still part, each distance growing by a like factor in a step.
    """
    rank, size = ranks()
    count = len(features)
    if size * count < 2:
        raise ValueError("KoLeo needs at least two samples; raise batch.ssl, or set koleo to 0")
    if group is not None and (size * count) % group:
        raise ValueError(f"the batch of {size * count} is no multiple of koleo_group {group}")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), eps=EPS, dim=-1)
        every = gather(x)
        with torch.no_grad():
            similarity = x @ every.T
            similarity.diagonal(rank * count).fill_(-2)
            if group is not None:
                groups = torch.arange(size * count, device=x.device) // group
                similarity.masked_fill_(groups[rank * count : (rank + 1) * count, None] != groups, -2)
            nearest = similarity.argmax(1)
        squared = (x - every[nearest]).square().sum(1)
        near = squared < NEAR**2
        parabola = (1 - squared / NEAR**2) / 2 - math.log(NEAR)
        each = torch.where(near, parabola, -squared.clamp_min(NEAR**2).log() / 2)
        return Koleo(each.sum() / (size * count), near.sum() / (size * count))
