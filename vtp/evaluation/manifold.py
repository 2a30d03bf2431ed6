"""Improved precision and recall (Kynkäänniemi et al. 2019).

A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour.
Precision is the share of generated points on the real manifold, recall the share of real points on the generated one.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3, block: int = 4096) -> PrecisionRecall:
    """Of features [N, D] and [M, D], with `block` x `block` distances in memory at a time.

    Raises ValueError when a set has no more points than `neighbours`.
    """
    if neighbours >= min(len(real), len(fake)):
        raise ValueError(
            f"{neighbours} neighbours need more points than {len(real)} real and {len(fake)} generated; "
            "lower `neighbours` or take more samples"
        )
    # Distances come from inner products, which round less around a common centre.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(
        precision=_share_inside(fake, real, _radii(real, neighbours, block), block),
        recall=_share_inside(real, fake, _radii(fake, neighbours, block), block),
    )


def _radii(points: Tensor, neighbours: int, block: int) -> Tensor:
    """Distance [N] of every point to its k-th neighbour; the nearest point is the point itself."""
    radii = []
    for rows in points.split(block):
        nearest = points.new_empty(len(rows), 0)
        for columns in points.split(block):
            candidates = torch.cat([nearest, torch.cdist(rows, columns)], dim=1)
            nearest = candidates.topk(min(neighbours + 1, candidates.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Share of `points` [N, D] that lie in at least one ball."""
    inside = 0
    for rows in points.split(block):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, reach in zip(centres.split(block), radii.split(block), strict=True):
            hit |= (torch.cdist(rows, columns) <= reach).any(1)
        inside += int(hit.sum())
    return inside / len(points)
