"""PSNR, SSIM and the perceptual distance, against references written another way."""

import math

import numpy as np
import pytest
import torch

from vtp.artefact import digest
from vtp.evaluation.reconstruction import psnr, quality, ssim
from vtp.losses.perceptual import LpipsConfig, build_perceptual


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


def bytes_of(images):
    return (images * 255).round().to(torch.uint8)


def test_quality_is_that_of_bytes_per_image():
    """Against float64 numpy and the windows above; the perceptual network sees [-1, 1]."""
    a, b = (bytes_of(images) for images in pair())

    def distance(x, y):
        assert min(x.min(), y.min()) < -0.5
        assert max(x.max(), y.max()) <= 1
        return (x - y).abs().mean((1, 2, 3))

    found = quality(a, b, distance)
    x, y = a.double().numpy(), b.double().numpy()
    np.testing.assert_allclose(found.psnr, 20 * np.log10(255 / np.sqrt(((x - y) ** 2).mean((1, 2, 3)))), rtol=1e-6)
    np.testing.assert_allclose(
        found.ssim, [ssim_by_windows(u / 255, v / 255) for u, v in zip(a.double(), b.double(), strict=True)], atol=2e-6
    )
    np.testing.assert_allclose(found.perceptual, np.abs(x - y).mean((1, 2, 3)) * 2 / 255, rtol=1e-5)
    for index in range(3):  # an image's figures do not depend on its batch
        alone = quality(a[index : index + 1], b[index : index + 1], distance)
        assert all(torch.equal(one[0], together[index]) for one, together in zip(alone, found, strict=True))


def test_quality_by_lpips_equals_the_package(tmp_path):
    """On the same bytes, in the range that the package asks for; random weights."""
    from lpips import LPIPS

    torch.manual_seed(0)
    network = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    for parameter in network.lins.parameters():
        parameter.data.abs_()
    torch.save(network.state_dict(), tmp_path / "lpips.pt")
    config = LpipsConfig(name="lpips", weights="lpips.pt", sha256=digest(tmp_path / "lpips.pt"))
    a, b = (bytes_of(images) for images in pair(height=32, width=32))
    found = quality(a, b, build_perceptual(config, weights=tmp_path)).perceptual
    with torch.no_grad():
        expected = network(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found[0] < found[2]


def test_quality_refuses_what_it_would_have_to_guess():
    a = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"compared as uint8, given torch.uint8 and torch.float32"):
        quality(a, a.float(), lambda x, y: x)
    with pytest.raises(ValueError, match=r"originals are \[1, 3, 16, 16\], reconstructions \[1, 3, 16, 8\]"):
        quality(a, a[..., :8], lambda x, y: x)
