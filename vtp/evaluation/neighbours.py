"""Weighted nearest neighbours: what features know of labels, without anything to train (Wu et al. 2018, DINO)."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, BLOCK = 4096, 1 << 14  # similarities in memory at a time


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float = 0.07,
    device: str = "cpu",
) -> float:
    """Share of test samples for whose label the k most similar training samples vote.

    A vote weighs exp(cosine / temperature). Features [N, D] may be of half precision and lie on the CPU: blocks of them
    are compared on the device in float32. Raises ValueError when there are fewer training samples than k.
    """
    if k > len(train_features):
        raise ValueError(f"k is {k}, the training set has {len(train_features)} samples; lower k or take more samples")
    classes = int(train_labels.max()) + 1
    hits = 0
    for queries, truth in zip(test_features.split(QUERIES), test_labels.split(QUERIES), strict=True):
        similarity, labels = _nearest(queries.to(device), train_features, train_labels, k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), classes).scatter_add_(1, labels, weights)
        hits += int((votes.argmax(1).cpu() == truth).sum())
    return hits / len(test_features)


def _nearest(queries: Tensor, features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines [n, k] of the nearest, in falling order, and their labels."""
    unit = F.normalize(queries.float(), dim=1)
    best = unit.new_empty(len(unit), 0)
    of_best = labels.new_empty(len(unit), 0).to(unit.device)
    for block, of_block in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        cosines = unit @ F.normalize(block.to(unit.device).float(), dim=1).T
        nearest, places = cosines.topk(min(k, len(block)), dim=1)
        candidates = torch.cat([best, nearest], 1)
        best, kept = candidates.topk(min(k, candidates.shape[1]), dim=1)
        of_best = torch.cat([of_best, of_block.to(unit.device)[places]], 1).gather(1, kept)
    return best, of_best
