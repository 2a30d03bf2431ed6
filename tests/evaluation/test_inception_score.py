"""Inception score."""

import math

import pytest
import torch

from vtp.evaluation.inception_score import inception_score


@pytest.mark.parametrize("seed", [None, 2020])
def test_equals_torch_fidelity(seed):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(103, 17, generator=torch.Generator().manual_seed(0)) * 3
    expected = isc_features_to_metric(logits, splits=4, shuffle=seed is not None, rng_seed=seed)
    score = inception_score(logits, splits=4, seed=seed)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_extremes():
    """Sure and balanced: the number of classes. Unsure, or always the same: 1. No class is too unlikely."""
    sure = torch.eye(10).repeat(5, 1) * 5000
    assert inception_score(sure, splits=1) == pytest.approx((10, 0))
    assert inception_score(torch.zeros(50, 10), splits=5) == pytest.approx((1, 0))
    assert inception_score(sure[:1].expand(50, 10), splits=5) == pytest.approx((1, 0))


def test_order_matters_only_without_shuffling():
    """Sorted by class, every consecutive split holds one class only."""
    logits = (torch.eye(4).repeat_interleave(100, 0)) * 100
    assert inception_score(logits, splits=4).mean == pytest.approx(1)
    assert inception_score(logits, splits=4, seed=0).mean > 3.5


def test_two_classes_closed_form():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    q = [0.6, 0.4]
    expected = math.exp(sum(p[i, j] * math.log(p[i, j] / q[j]) for i in range(2) for j in range(2)) / 2)
    assert inception_score(p.log(), splits=1).mean == pytest.approx(expected, rel=1e-14)


def test_more_splits_than_samples():
    with pytest.raises(ValueError, match="10 splits need at least as many samples, given 3"):
        inception_score(torch.zeros(3, 5), splits=10)


def test_bad_logits():
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        inception_score(torch.tensor([[0.0, torch.inf], [1.0, 2.0]]), splits=1)
