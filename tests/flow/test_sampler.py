"""The samplers against official samples and known solutions."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from vtp import LightningDiT
from vtp.flow import SamplerConfig, sample
from vtp.flow.sampler import time_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit-tiny"
OFFICIAL = {
    "euler_10steps_shift0.0": {"solver": "euler", "steps": 10, "timestep_shift": 0.0},
    "euler_10steps_shift0.3": {"solver": "euler", "steps": 10, "timestep_shift": 0.3},
    "dopri5": {"solver": "dopri5", "steps": 10, "timestep_shift": 0.0},
    "guided_w2.5_start0.11": {
        "solver": "euler",
        "steps": 10,
        "timestep_shift": 0.3,
        "guidance_scale": 2.5,
        "guidance_interval": (0.11, 1.0),
    },
}


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_matches_official_samples(name):
    model, io = LightningDiT.from_pretrained(GOLDEN), load_file(GOLDEN / "io.safetensors")
    ours = sample(model, io["ode.noise"], io["ode.y"], **OFFICIAL[name])
    torch.testing.assert_close(ours, io[f"ode.{name}"], atol=1e-4, rtol=0)


def test_grid_matches_official():
    golden = load_file(GOLDEN / "io.safetensors")["timegrid.euler_10steps_shift0.3"]
    torch.testing.assert_close(time_grid(10, 0.3).float(), golden, atol=1e-6, rtol=0)
    assert torch.equal(time_grid(7, 0.0), time_grid(7, 1.0))


class Recorder:
    """Velocity a x (null label: b x), counting the batch sizes that it saw."""

    null_label = 9

    def __init__(self, strong=1.0, weak=0.0):
        self.strong, self.weak, self.batches = strong, weak, []

    def __call__(self, x, t, condition):
        self.batches.append(len(x))
        rate = torch.where(condition == self.null_label, self.weak, self.strong).to(x)
        return rate.view(-1, 1, 1, 1) * x


def draw(model, *, steps=8, solver="euler", **options):
    noise = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    return sample(
        model, noise, torch.zeros(2, dtype=torch.int64), solver=solver, steps=steps, timestep_shift=0, **options
    )


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """x' = x has x(1) = e; halving the step divides the error by 2^order."""
    errors = [abs(float(draw(Recorder(), steps=n, solver=solver)[0, 0, 0, 0]) - math.e) for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_dopri5_solves_it():
    assert float(draw(Recorder(), solver="dopri5").mean()) == pytest.approx(math.e, rel=1e-3)


def test_steps_count_evaluations():
    for solver, evaluations in (("euler", 8), ("heun", 16)):
        model = Recorder()
        draw(model, solver=solver)
        assert model.batches == [2] * evaluations


def test_null_branch_is_computed_inside_the_interval_only():
    model = Recorder()
    draw(model, guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    assert model.batches == [2] * 4 + [4] * 4
    unguided = Recorder()
    torch.testing.assert_close(draw(unguided, guidance_scale=1.0), draw(Recorder()))
    assert set(unguided.batches) == {2}


def test_guidance_extrapolates():
    """v = b x + w (a - b) x is the velocity of rate b + w (a - b)."""
    guided = draw(Recorder(strong=1.0, weak=0.5), guidance_scale=3.0)
    torch.testing.assert_close(guided, draw(Recorder(strong=2.0)))


def test_guidance_on_three_channels():
    guided = draw(Recorder(strong=1.0, weak=0.5), guidance_scale=3.0, guidance_channels=3)
    torch.testing.assert_close(guided[:, :3], draw(Recorder(strong=2.0))[:, :3])
    torch.testing.assert_close(guided[:, 3:], draw(Recorder(strong=1.0))[:, 3:])


def test_autoguidance_keeps_the_condition():
    model, guide = Recorder(strong=1.0), Recorder(strong=0.5)
    torch.testing.assert_close(draw(model, guidance_scale=3.0, guide_model=guide), draw(Recorder(strong=2.0)))
    assert model.batches == guide.batches == [2] * 8


def test_samples_do_not_depend_on_their_neighbours():
    model, io = LightningDiT.from_pretrained(GOLDEN), load_file(GOLDEN / "io.safetensors")
    options = {"solver": "euler", "steps": 4, "timestep_shift": 0.3, "guidance_scale": 2.0}
    with torch.no_grad():
        both = sample(model, io["ode.noise"], io["ode.y"], **options)
        swapped = sample(model, io["ode.noise"].flip(0), io["ode.y"].flip(0), **options).flip(0)
    torch.testing.assert_close(both, swapped, atol=1e-5, rtol=0)


def test_config_refuses_an_empty_interval():
    values = {"solver": "euler", "steps": 5, "timestep_shift": 0.0, "guidance_scale": 1.0, "guidance_channels": "all"}
    assert SamplerConfig.model_validate(values | {"guidance_interval": [0.0, 1.0]}).guidance_interval == (0.0, 1.0)
    with pytest.raises(ValidationError, match="start < end"):
        SamplerConfig.model_validate(values | {"guidance_interval": [0.5, 0.5]})
