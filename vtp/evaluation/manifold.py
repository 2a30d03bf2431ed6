"""Improved precision and recall (Kynkäänniemi et al. 2019).

A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour.
Precision is the share of generated points on the real manifold, recall the share of real points on the generated one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vtp.evaluation.checks import require_features


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3, block: int = 4096) -> PrecisionRecall:
    """Of features [N, D] and [M, D], with `block` x `block` distances in memory at a time, none computed twice.

    Raises ValueError when a set has no more points than `neighbours`, and for features that cannot be compared.
    """
    if neighbours >= min(len(real), len(fake)):
        raise ValueError(
            f"{neighbours} neighbours need more points than {len(real)} real and {len(fake)} generated; "
            "lower `neighbours` or take more samples"
        )
    require_features(real, fake)
    # Distances come from inner products, which round less around a common centre.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    reach_of_real, reach_of_fake = _radii(real, neighbours, block), _radii(fake, neighbours, block)
    on_real, on_fake = (torch.zeros(len(points), dtype=torch.bool, device=points.device) for points in (fake, real))
    for of_fake in _blocks(fake, block):
        for of_real in _blocks(real, block):
            distances = torch.cdist(fake[of_fake], real[of_real])
            on_real[of_fake] |= (distances <= reach_of_real[of_real]).any(1)
            on_fake[of_real] |= (distances <= reach_of_fake[of_fake, None]).any(0)
    return PrecisionRecall(precision=_share(on_real), recall=_share(on_fake))


def _radii(points: Tensor, neighbours: int, block: int) -> Tensor:
    """Distance [N] of every point to its k-th neighbour; the nearest point is the point itself."""
    nearest = points.new_full((len(points), neighbours + 1), torch.inf)  # [N, k + 1]
    blocks = _blocks(points, block)
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            distances = torch.cdist(points[rows], points[columns])
            _keep_nearest(nearest, rows, distances)
            if columns != rows:
                _keep_nearest(nearest, columns, distances.T.contiguous())
    return nearest.amax(1)


def _keep_nearest(nearest: Tensor, rows: slice, distances: Tensor) -> None:
    """Let new distances [n, m] of the points `rows` compete with their nearest ones so far."""
    count = nearest.shape[1]
    best = distances.topk(min(count, distances.shape[1]), dim=1, largest=False, sorted=False).values
    nearest[rows] = torch.cat([nearest[rows], best], dim=1).topk(count, dim=1, largest=False, sorted=False).values


def _blocks(points: Tensor, size: int) -> list[slice]:
    return [slice(start, min(start + size, len(points))) for start in range(0, len(points), size)]


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
