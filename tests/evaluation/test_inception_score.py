"""Inception score."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

from vtp.evaluation.inception_score import inception_score

GOLDEN = ROOT / "tests/golden/adm-metrics"


@pytest.mark.parametrize("seed", [None, 2020])
def test_equals_torch_fidelity(seed):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(104, 17, generator=torch.Generator().manual_seed(0)) * 3
    expected = isc_features_to_metric(logits, splits=4, shuffle=seed is not None, rng_seed=seed)
    score = inception_score(logits, split_size=26, seed=seed)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_extremes():
    """Sure and balanced: the number of classes. Unsure, or always the same: 1. No class is too unlikely."""
    sure = torch.eye(10).repeat(5, 1) * 5000
    assert inception_score(sure, split_size=50) == pytest.approx((10, 0))
    assert inception_score(torch.zeros(50, 10), split_size=10) == pytest.approx((1, 0))
    assert inception_score(sure[:1].expand(50, 10), split_size=10) == pytest.approx((1, 0))


def test_order_matters_only_without_shuffling():
    """Sorted by class, every consecutive split holds one class only."""
    logits = (torch.eye(4).repeat_interleave(100, 0)) * 100
    assert inception_score(logits, split_size=100).mean == pytest.approx(1)
    assert inception_score(logits, split_size=100, seed=0).mean > 3.5


def test_two_classes_closed_form():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    q = [0.6, 0.4]
    expected = math.exp(sum(p[i, j] * math.log(p[i, j] / q[j]) for i in range(2) for j in range(2)) / 2)
    assert inception_score(p.log(), split_size=2).mean == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "split_size"), [("default", 5000), ("split_5000", 5000), ("split_2000", 2000), ("split_6000", 6000)]
)
def test_equals_the_evaluator_of_adm(name, split_size):
    """Its default of 5000 leaves a last split of 1000 samples, which counts like the first."""
    golden = load_file(GOLDEN / "io.safetensors")
    score = inception_score(golden["inception_score.predictions"].double().log(), split_size=split_size)
    assert score.mean == pytest.approx(float(golden[f"inception_score.{name}"]), rel=1e-5)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples to score"):
        inception_score(torch.zeros(0, 5), split_size=10)


def test_bad_logits():
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        inception_score(torch.tensor([[0.0, torch.inf], [1.0, 2.0]]), split_size=1)
