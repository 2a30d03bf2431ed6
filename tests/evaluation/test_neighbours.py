"""Weighted nearest neighbours."""

import math

import pytest
import torch
from evaluation.test_linear_probe import blobs
from foreign import GOLDEN
from safetensors.torch import load_file

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
def test_knn_equals_dino_s(size, monkeypatch):
    """`golden/probe-and-clipscore`, whose top-5 is no figure of ours; also where a block has fewer samples than k."""
    for name in ("QUERIES", "BLOCK"):
        monkeypatch.setattr(neighbours, name, size)
    official = load_file(GOLDEN / "probe-and-clipscore" / "io.safetensors")
    data = [official[f"knn.{name}"] for name in ("train_features", "train_labels", "test_features", "test_labels")]
    for k in (1, 5, 10, 20, 100, 200):
        for temperature in (0.07, 1.0):
            ours = knn_accuracy(*data, k=k, temperature=temperature)
            assert 100 * ours == pytest.approx(float(official[f"knn.k{k}_T{temperature}"][0]), abs=1e-6)


def test_knn_needs_enough_neighbours():
    with pytest.raises(ValueError, match="k is 20, the training set has 5 samples"):
        knn_accuracy(*blobs(0, 5), *blobs(1, 5), k=20)


def test_knn_of_half_precision():
    """Comparisons are those of float32, and the labels stay with their samples."""
    (train, labels), (test, truth) = blobs(0, 200, spread=0.5), blobs(1, 100, spread=0.5)
    expected = knn_accuracy(train.half().float(), labels, test.half().float(), truth, k=5)
    assert knn_accuracy(train.half(), labels, test.half(), truth, k=5) == expected > 0.6
