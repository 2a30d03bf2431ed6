"""Fréchet distance."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

from vtp.artefact import ArtefactError
from vtp.evaluation.frechet import BLOCK, GaussianStatistics, Moments, frechet_distance


def samples(seed, count, dim, scale=1.0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def with_moments(mean, std):
    """Samples whose sample mean and diagonal covariance are exactly those given."""
    dim = len(mean)
    cube = torch.cat([torch.eye(dim), -torch.eye(dim)]).double() * ((2 * dim - 1) / 2) ** 0.5
    return cube * torch.tensor(std) + torch.tensor(mean)


def test_statistics_stream():
    x = samples(0, 103, 7, shift=1000.0)
    statistics = GaussianStatistics(7)
    for part in x.split([1, 50, 0, 52]):
        statistics.update(part)
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert statistics.count == 103
    np.testing.assert_allclose(statistics.mean, x.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-10, atol=1e-12)


def test_any_batches_give_the_same_bits():
    x = samples(0, 2500, 7)
    whole = GaussianStatistics.of(x)
    for size in (1, 300, 1024, 2499):
        statistics = GaussianStatistics(7)
        for part in x.split(size):
            statistics.update(part)
        assert torch.equal(statistics.mean, whole.mean)
        assert torch.equal(statistics.covariance, whole.covariance)


def test_memory_does_not_grow():
    """A block and the sums, whatever came."""
    statistics, sizes = GaussianStatistics(3), set()
    for seed in range(50):
        statistics.update(samples(seed, 100, 3))
        sizes.add(sum(value.nbytes for value in vars(statistics).values() if torch.is_tensor(value)))
    assert statistics.count == 5000
    assert sizes == {8 * 3 * (BLOCK + 3 + 1)}


def test_closed_form_of_diagonal_covariances():
    """sum (mu_a - mu_b)^2 + sum (sigma_a - sigma_b)^2, also where a sigma is zero."""
    mean_a, mean_b, std_a, std_b = [0.0, 1.0, 2.0], [0.5, -1.0, 2.0], [1.0, 2.0, 0.5], [3.0, 0.0, 0.5]
    a, b = GaussianStatistics.of(with_moments(mean_a, std_a)), GaussianStatistics.of(with_moments(mean_b, std_b))
    expected = sum((m - n) ** 2 + (s - t) ** 2 for m, n, s, t in zip(mean_a, mean_b, std_a, std_b, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("count", [500, 20])
def test_equals_torch_fidelity(count):
    """20 samples in 64 dimensions: singular covariances, where the reference itself is less exact."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mix = torch.linspace(1, 0.01, 64) * (torch.eye(64) + 0.1)
    a, b = samples(0, count, 64) @ mix, samples(1, count, 64, 1.2, 0.3) @ mix
    reference = [fid_features_to_statistics(x.double()) for x in (a, b)]
    expected = fid_statistics_to_metric(*reference, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))
    assert ours == pytest.approx(expected, rel=1e-10 if count > 64 else 1e-5)


def test_singular_covariances_keep_their_precision():
    """The same rank-3 sets, in 3 and, rotated, in 40 dimensions, are equally far apart."""
    a, b = samples(0, 30, 3).double(), samples(1, 30, 3, 2.0, 1.0).double()
    rotation = torch.linalg.qr(samples(2, 40, 40).double()).Q[:3]
    expected = frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b))
    embedded = frechet_distance(GaussianStatistics.of(a @ rotation), GaussianStatistics.of(b @ rotation))
    assert embedded == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 10, 17])
def test_features_that_are_mostly_zero(seed):
    """Five samples that vary in 88 of 1280 dimensions, as plain pictures do: LAPACK finds no vectors of the last two."""
    draws = torch.Generator().manual_seed(seed)
    varied = torch.randperm(1280, generator=draws)[:88]
    few, others = (
        torch.rand(5, 88, generator=draws) * 10 ** (-3 * torch.rand(5, 1, generator=draws)),
        samples(1, 50, 1280),
    )
    there = frechet_distance(GaussianStatistics.of(few), GaussianStatistics.of(others[:, varied]))
    elsewhere = GaussianStatistics.of(others.index_fill(1, varied, 0))
    expected = there + float(elsewhere.mean.square().sum() + elsewhere.covariance.trace())
    whole = GaussianStatistics.of(torch.zeros(5, 1280).index_copy(1, varied, few))
    assert frechet_distance(whole, GaussianStatistics.of(others)) == pytest.approx(expected, rel=1e-12)


def test_zero_to_itself():
    a = GaussianStatistics.of(samples(0, 10, 32, scale=100.0))
    assert 0 <= frechet_distance(a, a) < 1e-7
    constant = GaussianStatistics.of(torch.ones(4, 8))
    assert frechet_distance(constant, constant) == 0


def test_one_sample_has_no_covariance():
    a, b = GaussianStatistics.of(torch.ones(1, 4)), GaussianStatistics.of(torch.ones(3, 4))
    with pytest.raises(ValueError, match="at least 2 samples, these statistics hold 1"):
        frechet_distance(a, b)


def test_bad_features():
    statistics = GaussianStatistics(4)
    with pytest.raises(ValueError, match=r"1 of 3 features hold NaN or infinity, the first is number 1"):
        statistics.update(torch.tensor([[1.0] * 4, [1.0, 2.0, math.inf, math.nan], [0.0] * 4]))
    for wrong in (torch.ones(4), torch.ones(3, 5), torch.ones(2, 4, 1)):
        with pytest.raises(ValueError, match="statistics of 4 dimensions, given features"):
            statistics.update(wrong)
    assert statistics.count == 0
    with pytest.raises(ValueError, match="features of 4 and of 5 dimensions"):
        frechet_distance(GaussianStatistics.of(samples(0, 9, 4)), GaussianStatistics.of(samples(0, 9, 5)))


def test_features_are_left_alone():
    x = samples(0, 50, 4).double()
    before = x.clone()
    GaussianStatistics.of(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("parts", [[103], [1, 50, 52], [0, 103], [52, 51]])
def test_merged_statistics(parts):
    """Whoever saw which samples, and also from an empty start."""
    x = samples(0, 103, 7, shift=1000.0)
    merged = GaussianStatistics(7)
    for part in x.split(parts):
        merged.merge(GaussianStatistics.of(part))
    expected = GaussianStatistics.of(x)
    assert merged.count == 103
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, expected.covariance, rtol=1e-10, atol=1e-12)


def test_order_does_not_matter():
    x, y = samples(0, 300, 16), samples(1, 200, 16, 1.3, 0.1)
    distance = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    shuffled = GaussianStatistics.of(x[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    assert frechet_distance(GaussianStatistics.of(y), shuffled) == pytest.approx(distance, rel=1e-10)


def test_published_moments():
    """Of others, who say no count."""
    x, y = samples(0, 300, 16).double(), samples(1, 20, 16, 1.3, 0.1).double()
    published = Moments(x.mean(0).float(), torch.from_numpy(np.cov(x.numpy(), rowvar=False)).float())
    expected = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert frechet_distance(published, GaussianStatistics.of(y)) == pytest.approx(expected, rel=1e-5)


def test_saved_statistics_go_on():
    x = samples(0, 60, 5)
    first = GaussianStatistics.of(x[:30])
    second = GaussianStatistics.of_tensors({k: v.clone() for k, v in first.tensors().items()}, where="here")
    for statistics in (first, second):
        statistics.update(x[30:])
    assert second.count == 60
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.covariance, second.covariance)
    for other in ({"mean": x}, first.tensors() | {"scatter": x}, first.tensors() | {"more": x}, {}):
        with pytest.raises(ArtefactError, match="here: holds .*, not Gaussian statistics"):
            GaussianStatistics.of_tensors(other, where="here")


@pytest.mark.parametrize("name", ["fid", "sfid", "fid_few"])
def test_equals_the_evaluator_of_adm(name):
    """`golden/adm-metrics`; fid_few has fewer samples than dimensions."""
    golden = load_file(ROOT / "tests/golden/adm-metrics/io.safetensors")
    ours = frechet_distance(*(GaussianStatistics.of(golden[f"{name}.{part}"]) for part in "ab"))
    assert ours == pytest.approx(float(golden[f"{name}.distance"]), rel=1e-5)
    if name != "fid_few":
        statistics = GaussianStatistics.of(golden[f"{name}.a"])
        torch.testing.assert_close(statistics.mean, golden[f"{name}.mu_a"].double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.covariance, golden[f"{name}.sigma_a"], rtol=1e-6, atol=1e-7)
