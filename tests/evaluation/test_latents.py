"""Diagnostics of latents against closed forms."""

import math

import numpy as np
import pytest
import torch

from vtp.evaluation.latents import LatentAccumulator, LatentNoise


def of(latents, *, batch=7):
    statistics = LatentAccumulator(tuple(latents.shape[1:]))
    for part in latents.split(batch):
        statistics.update(part)
    return statistics.diagnostics()


def drawn(seed=0, shape=(40, 5, 4, 6)):
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[1], shape[1], generator=draws)
    return torch.einsum("ce,behw->bchw", mixing, torch.randn(shape, generator=draws)) + 3 * mixing[:, :1, None]


def tokens_as_latents(tokens):
    """[N, d] as N images of one token."""
    return tokens[:, :, None, None]


def test_moments_and_spectrum_are_numpys():
    latents = drawn()
    tokens = latents.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    found = of(latents)
    np.testing.assert_allclose(found.mean, tokens.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, tokens.std(0, ddof=1), rtol=1e-12)
    values = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2 / (len(tokens) - 1)
    np.testing.assert_allclose(found.spectrum, values, rtol=1e-10)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found.largest_to_mean == pytest.approx(values[0] / values.mean())


def test_mean_cosine_is_that_of_all_pairs():
    latents = drawn(shape=(6, 5, 2, 3))
    units = torch.nn.functional.normalize(latents.permute(0, 2, 3, 1).reshape(-1, 5).double(), dim=1)
    cosines = units @ units.T
    pairs = ~torch.eye(len(units), dtype=torch.bool)
    assert of(latents).mean_cosine == pytest.approx(cosines[pairs].mean().item(), rel=1e-12)
    with_nothing = torch.cat([latents, torch.zeros_like(latents)])  # a token of length 0 has no direction
    assert of(with_nothing).mean_cosine == pytest.approx(cosines[pairs].mean().item(), rel=1e-12)


def test_isotropic_latents_have_full_rank():
    """Every axis both ways: the covariance is a multiple of the identity, and pairs cancel."""
    found = of(tokens_as_latents(torch.cat([torch.eye(8), -torch.eye(8)])))
    assert found.effective_rank == pytest.approx(8, rel=1e-12)
    assert found.largest_to_mean == pytest.approx(1, rel=1e-12)
    assert found.mean_cosine == pytest.approx(-1 / 15)  # of 15 others, one is opposite and 14 are orthogonal


def test_a_known_covariance():
    """Deviations 3, 1, 0: eigenvalues 9 : 1 : 0."""
    corners = torch.tensor([[3.0, 1, 7], [3, -1, 7], [-3, 1, 7], [-3, -1, 7]])
    found = of(tokens_as_latents(corners))
    torch.testing.assert_close(found.spectrum, torch.tensor([9.0, 1, 0], dtype=torch.float64) * 4 / 3)
    assert found.effective_rank == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))
    assert found.largest_to_mean == pytest.approx(2.7)
    assert found.figures()["channel_mean_largest"] == 7
    assert found.figures()["channel_std_smallest"] == 0


def test_latents_on_a_line():
    steps = torch.linspace(1, 2, 9)[:, None]
    found = of(tokens_as_latents(steps * torch.tensor([[1.0, 2, 2]])))
    assert found.effective_rank == pytest.approx(1, abs=1e-6)
    assert found.largest_to_mean == pytest.approx(3)
    assert found.mean_cosine == pytest.approx(1)


def test_a_large_mean_costs_no_precision():
    latents = drawn()
    torch.testing.assert_close(of(latents.double() + 1e4).spectrum, of(latents).spectrum, rtol=1e-6, atol=0)


def test_any_batch_size():
    latents = drawn()
    whole, parts = of(latents, batch=40), of(latents, batch=3)
    for ours, theirs in zip((*whole[:3], *whole.power), (*parts[:3], *parts.power), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert whole.mean_cosine == pytest.approx(parts.mean_cosine, rel=1e-12)


def test_power_of_white_noise_and_of_a_wave():
    draws = torch.Generator().manual_seed(0)
    white = of(torch.randn(4000, 2, 8, 8, generator=draws) * torch.tensor([1.0, 30])[:, None, None] + 5).power
    torch.testing.assert_close(white.power, torch.ones_like(white.power), rtol=0, atol=0.05)
    assert white.frequency[0] == 0
    assert white.frequency[-1] == pytest.approx(2**0.5 / 2)  # both axes at Nyquist
    phase = 2 * math.pi * torch.arange(4) / 4
    waves = torch.cos(2 * math.pi * 2 * torch.arange(8)[None] / 8 + phase[:, None])  # two cycles over 8 tokens
    power = of(waves[:, None, None].expand(4, 1, 8, 8)).power
    loud = power.power > 1e-9
    assert loud.sum() == 1
    assert power.frequency[loud].item() == pytest.approx(0.25, abs=0.03)


def test_latents_that_cannot_be_judged():
    with pytest.raises(ValueError, match="2 of 2 images have latents that hold NaN or infinity"):
        of(torch.full((2, 3, 2, 2), math.nan))
    with pytest.raises(ValueError, match="all latents are the same"):
        of(torch.ones(4, 3, 2, 2))
    statistics = LatentAccumulator((3, 2, 2))
    with pytest.raises(ValueError, match=r"latents are \[3, 4, 4\], the tokenizer says \[3, 2, 2\]"):
        statistics.update(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 2"):
        statistics.diagnostics()


def test_noise_belongs_to_the_image_and_has_the_channels_deviation():
    std = torch.tensor([0.5, 4.0], dtype=torch.float64)
    noise, like = LatentNoise(0, std), torch.zeros(3, 2, 16, 16)
    drawn_together = noise.of([4, 9, 2], like)
    assert torch.equal(noise.of([9], like[:1]), drawn_together[1:2])
    assert not torch.equal(LatentNoise(1, std).of([9], like[:1]), drawn_together[1:2])
    many = noise.of(list(range(64)), torch.zeros(64, 2, 16, 16))
    torch.testing.assert_close(many.std((0, 2, 3)).double(), std, rtol=0.02, atol=0)
