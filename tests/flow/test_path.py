"""The path and the flow-matching loss."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp import LightningDiT
from vtp.flow import draw_timesteps, flow_matching_loss
from vtp.flow.path import Auto, LogitNormal, Uniform, interpolate, timesteps_of

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit-tiny"


def test_loss_matches_official():
    model, io = LightningDiT.from_pretrained(GOLDEN), load_file(GOLDEN / "io.safetensors")
    x1, x0, t = io["loss.x1"], io["loss.x0"], io["loss.t"]
    with torch.no_grad():
        loss = flow_matching_loss(model, x1, io["y"], t=t, noise=x0)
    torch.testing.assert_close(interpolate(x1, x0, t), io["loss.xt"], atol=1e-4, rtol=0)
    torch.testing.assert_close(x1 - x0, io["loss.ut"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.mse, io["loss.mse"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.cosine, io["loss.cos"], atol=1e-4, rtol=0)


def test_perfect_velocity_has_no_loss():
    x1, x0 = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    loss = flow_matching_loss(lambda x, t, c: x1 - x0, x1, torch.zeros(3), t=torch.rand(3), noise=x0)
    assert loss.mse.abs().max() == 0
    assert loss.cosine.abs().max() < 1e-6


def test_a_fresh_model_gets_a_gradient_of_ordinary_size():
    """It predicts exactly zero, where a cosine has no direction."""
    model = LightningDiT(LightningDiT.from_pretrained(GOLDEN).config)
    x1, x0, labels = torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), torch.zeros(4, dtype=torch.int64)
    loss = flow_matching_loss(model, x1, labels, t=torch.rand(4), noise=x0)
    assert torch.equal(loss.cosine, torch.ones(4))
    loss.cosine.mean().backward()
    assert 1e-2 < model.final_layer.linear.weight.grad.norm() < 1e2


@pytest.mark.parametrize(
    ("mu", "sigma", "quantiles"),
    [(0.0, 1.0, (0.16, 0.5, 0.84)), (-0.75, 1.0, (0.08, 0.32, 0.71)), (-0.5, 1.25, (0.07, 0.38, 0.83))],
)
def test_times_have_the_published_quantiles(mu, sigma, quantiles):
    t = draw_timesteps(LogitNormal(name="logit_normal", mu=mu, sigma=sigma), 200_000, torch.Generator().manual_seed(0))
    measured = torch.quantile(t, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert measured == pytest.approx(quantiles, abs=0.006)


@pytest.mark.parametrize(("channels", "shift"), [(16, 1.0), (32, 1.41), (64, 2.0), (256, 4.0), (768, 6.93)])
def test_automatic_times_shift_the_odds_of_noise_as_published(channels, shift):
    """RAE's rule for 16 x 16 latents: (1 - t) / t grows by sqrt(numbers / 4096)."""
    normal, uniform = torch.randn(1000, dtype=torch.float64), torch.rand(1000)
    t = timesteps_of(Auto(name="auto", sigma=1.0), normal, uniform, elements=channels * 256)
    plain = timesteps_of(LogitNormal(name="logit_normal", mu=0.0, sigma=1.0), normal, uniform, elements=1)
    torch.testing.assert_close((1 - t) / t, (1 - plain) / plain * shift, rtol=4e-3, atol=0)
    assert torch.equal(timesteps_of(None, normal, uniform, elements=1), uniform)


def test_uniform_times_have_uniform_quantiles():
    t = draw_timesteps(Uniform(name="uniform"), 200_000, torch.Generator().manual_seed(0))
    ranks = torch.tensor([0.05, 0.5, 0.95])
    torch.testing.assert_close(torch.quantile(t, ranks), ranks, atol=0.006, rtol=0)
    assert 0 <= t.min() <= t.max() < 1


def test_path_runs_from_noise_to_data_at_the_velocity():
    x1, x0 = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    assert torch.equal(interpolate(x1, x0, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x1, x0, torch.ones(3)), x1)
    t = torch.rand(3, dtype=torch.float64) / 2
    torch.testing.assert_close((interpolate(x1, x0, t + 0.5) - interpolate(x1, x0, t)) / 0.5, x1 - x0)


def test_loss_is_in_full_precision():
    """Latents kept in bfloat16 lose nothing more on the path, and the loss is per sample in fp32."""
    latents, noise, t = torch.randn(3, 4, 2, 2).bfloat16(), torch.randn(3, 4, 2, 2).bfloat16(), torch.full((3,), 0.3)
    expected = latents.float() - noise.float()
    loss = flow_matching_loss(lambda x, t, c: expected, latents, torch.zeros(3), t=t, noise=noise)
    assert loss.mse.dtype == loss.cosine.dtype == torch.float32
    assert loss.mse.shape == loss.cosine.shape == (3,)
    assert loss.mse.max() == 0


def test_draws_come_from_the_generator():
    def loss(seed):
        torch.manual_seed(seed + 100)  # the global state must not matter
        generator = torch.Generator().manual_seed(seed)
        return flow_matching_loss(
            lambda x, t, c: x * t.view(-1, 1, 1, 1), torch.ones(2, 3, 2, 2), torch.zeros(2), generator=generator
        ).mse

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    with pytest.raises(ValueError, match="generator"):
        flow_matching_loss(lambda x, t, c: x, torch.ones(1, 1, 1, 1), torch.zeros(1))
