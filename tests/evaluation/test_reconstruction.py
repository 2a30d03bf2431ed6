"""PSNR, SSIM and their means."""

import math

import numpy as np
import pytest
import torch

from vtp.evaluation.reconstruction import ReconstructionMeans, psnr, ssim


def pair(seed=0, count=3, height=17, width=14):
    draws = torch.Generator().manual_seed(seed)
    a = torch.rand(count, 3, height, width, generator=draws)
    noise = torch.randn(a.shape, generator=draws) * torch.tensor([0.02, 0.1, 0.5])[:count, None, None, None]
    return a, (a + noise).clamp(0, 1)


def ssim_by_windows(a, b):
    """Weighted moments of every window, one by one, in float64."""
    axis = np.arange(11) - 5
    weights = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                u, v = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mu, mv = (weights * u).sum(), (weights * v).sum()
                su, sv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
                suv = (weights * (u - mu) * (v - mv)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mu * mv + c1) * (2 * suv + c2) / ((mu**2 + mv**2 + c1) * (su + sv + c2)))
    return np.mean(values)


def test_ssim_equals_brute_force():
    a, b = pair()
    expected = [ssim_by_windows(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, atol=2e-6)
    assert expected[0] > 0.95
    assert expected[2] < 0.7


def test_ssim_of_flat_images():
    """No variance: the luminance term is left, where single precision must not invent variance."""
    a, b = torch.full((1, 3, 32, 32), 0.9), torch.full((1, 3, 32, 32), 0.6)
    expected = (2 * 0.9 * 0.6 + 1e-4) / (0.9**2 + 0.6**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-3)
    assert ssim(a, b).item() == pytest.approx(expected, rel=2e-4)


def test_ssim_is_symmetric_and_one_for_equals():
    a, b = pair()
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    torch.testing.assert_close(ssim(a, a), torch.ones(3))


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_psnr_closed_form():
    a = torch.zeros(3, 3, 8, 8)
    b = torch.tensor([0.1, 0.01, 1.0])[:, None, None, None].expand_as(a)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, 0.0]))
    half = torch.cat([torch.zeros(1, 3, 8, 4), torch.full((1, 3, 8, 4), 0.5)], dim=3)
    assert psnr(a[:1], half).item() == pytest.approx(-10 * math.log10(0.125), rel=1e-6)
    assert psnr(a, a).tolist() == [100] * 3


def test_means_count_images_not_batches():
    a, b = pair()

    def distance(x, y):
        assert min(x.min(), y.min()) < -0.5
        return (x - y).abs().mean((1, 2, 3))

    means = ReconstructionMeans(distance)
    means.update(a[:2], b[:2])
    means.update(a[2:], b[2:])
    assert means.means() == pytest.approx(
        {
            "psnr": psnr(a, b).mean().item(),
            "ssim": ssim(a, b).mean().item(),
            "perceptual": distance(a * 2 - 1, b * 2 - 1).mean().item(),
        }
    )
    with pytest.raises(ValueError, match="no image was added"):
        ReconstructionMeans(distance).means()
