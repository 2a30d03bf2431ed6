"""Kernel distance."""

import pytest
import torch

from vtp.evaluation.kernel_distance import kernel_distance


def samples(seed, count, dim=8, scale=1.0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_fidelity(dtype):
    """The same subsets by the same seed; in float32 the reference itself rounds."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    fake, real = samples(0, 200, 32, 0.8).to(dtype), samples(1, 300, 32, shift=0.1).to(dtype)
    options = {"kid_subsets": 7, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
    expected = kid_features_to_metric(fake, real, **options)
    found = kernel_distance(fake, real, subsets=7, subset_size=50, seed=2020)
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=rel)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=rel)
    assert kernel_distance(fake, real, subsets=7, subset_size=50, seed=0) != found


def test_closed_form_of_constants():
    """Every kernel value of constants is known: (x y / 1 + 1)^3."""
    found = kernel_distance(torch.full((9, 1), 1.0), torch.full((9, 1), 2.0), subsets=2, subset_size=5, seed=0)
    assert found == pytest.approx((2**3 + 5**3 - 2 * 3**3, 0))


def test_is_unbiased():
    """Of two sets of one distribution: 0 on average, so also negative."""
    found = [kernel_distance(samples(s, 40), samples(99 - s, 40), subsets=1, subset_size=40, seed=0) for s in range(40)]
    means = torch.tensor([each.mean for each in found])
    assert means.min() < 0 < means.max()
    assert abs(means.mean()) < 3 * means.std() / 40**0.5


@pytest.mark.parametrize("size", [1, 11, 100])
def test_subsets_that_cannot_be_drawn(size):
    with pytest.raises(ValueError, match=f"subsets of {size} need 2 samples or more, and no more than 20 generated"):
        kernel_distance(samples(0, 20), samples(1, 10), subsets=1, subset_size=size, seed=0)


def test_bad_features():
    bad = samples(0, 20)
    bad[3, 1] = torch.nan
    for fake, real, message in (
        (bad, samples(1, 20), "1 of 20 generated features hold NaN"),
        (samples(1, 20), bad, "1 of 20 real features hold NaN"),
        (samples(0, 20, 4), samples(1, 20), "features of 8 and of 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(fake, real, subsets=1, subset_size=5, seed=0)
