"""Weighted nearest neighbours."""

import math

import pytest
import torch
import torch.nn.functional as F
from evaluation.test_linear_probe import blobs

from vtp.evaluation import neighbours
from vtp.evaluation.neighbours import knn_accuracy


def angles(*degrees):
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def test_knn_weighs_votes_by_similarity():
    """One close neighbour of class 0, two far ones of class 1: the temperature decides. Lengths do not weigh."""
    train, labels = angles(5, 40, 45) * torch.tensor([[1.0], [9.0], [9.0]]), torch.tensor([0, 1, 1])
    query, truth = angles(0), torch.tensor([0])
    assert knn_accuracy(train, labels, query, truth, k=3) == 1  # exp(-0.3 / 0.07) is small
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=10) == 0
    assert knn_accuracy(train, labels, query, truth, k=3, temperature=1e-4) == 1  # and does not overflow
    assert knn_accuracy(train, labels, query, truth, k=1, temperature=10) == 1


@pytest.mark.parametrize("size", [4, 16, 1000])
def test_knn_equals_brute_force(size, monkeypatch):
    """Also where a block has fewer samples than k."""
    for name in ("QUERIES", "BLOCK"):
        monkeypatch.setattr(neighbours, name, size)
    (train, labels), (test, truth) = blobs(0, 80), blobs(1, 50)
    hits = 0
    for query, label in zip(test, truth, strict=True):
        near = sorted(
            ((F.cosine_similarity(query, x, dim=0).item(), y.item()) for x, y in zip(train, labels, strict=True))
        )
        votes = [sum(math.exp(s / 0.07) for s, y in near[-7:] if y == c) for c in range(3)]
        hits += votes.index(max(votes)) == label.item()
    assert knn_accuracy(train, labels, test, truth, k=7) == hits / 50


def test_knn_needs_enough_neighbours():
    with pytest.raises(ValueError, match="k is 20, the training set has 5 samples"):
        knn_accuracy(*blobs(0, 5), *blobs(1, 5), k=20)


def test_knn_of_half_precision():
    """Comparisons are those of float32, and the labels stay with their samples."""
    (train, labels), (test, truth) = blobs(0, 200, spread=0.5), blobs(1, 100, spread=0.5)
    expected = knn_accuracy(train.half().float(), labels, test.half().float(), truth, k=5)
    assert knn_accuracy(train.half(), labels, test.half(), truth, k=5) == expected > 0.6
