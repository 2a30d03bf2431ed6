"""The samplers against official samples and known solutions."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from vtp import LightningDiT
from vtp.flow import SamplerConfig, sample
from vtp.flow.sampler import Solver, time_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit-tiny"
OFFICIAL: dict[str, dict[str, Any]] = {
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

    def without(self, condition):
        return torch.full_like(condition, self.null_label)

    def __init__(self, strong=1.0, weak=0.0):
        self.strong, self.weak, self.batches = strong, weak, []

    def __call__(self, x, t, condition):
        self.batches.append(len(x))
        rate = torch.where(condition == self.null_label, self.weak, self.strong).to(x)
        return rate.view(-1, 1, 1, 1) * x


def draw(model, *, steps=8, solver: Solver = "euler", **options):
    noise = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    return sample(
        model, noise, torch.zeros(2, dtype=torch.int64), solver=solver, steps=steps, timestep_shift=0, **options
    )


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """x' = x has x(1) = e; halving the step divides the error by 2^order."""
    errors = [abs(float(draw(Recorder(), steps=n, solver=solver)[0, 0, 0, 0]) - math.e) for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_constant_velocity_is_integrated_exactly():
    """x(1) = x(0) + v for any grid, since the steps sum to one."""
    noise, v = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    cases: list[tuple[Solver, float]] = [("euler", 0.0), ("euler", 0.075), ("heun", 0.3)]
    cases += [("dopri5", 0.0), ("dopri5_bounded", 0.0)]
    for solver, shift in cases:
        out = sample(lambda x, t, c: v, noise, torch.zeros(2), solver=solver, steps=7, timestep_shift=shift)
        torch.testing.assert_close(out, noise + v, atol=1e-12, rtol=0)


def test_dopri5_keeps_its_tolerance():
    """Tighter tolerances give a smaller error and cost more evaluations."""
    loose, tight = Recorder(), Recorder()
    loose_error = abs(float(draw(loose, solver="dopri5").mean()) - math.e)
    tight_error = abs(float(draw(tight, solver="dopri5", atol=1e-12, rtol=1e-10).mean()) - math.e)
    assert tight_error < 1e-8 < loose_error < 1e-2
    assert len(tight.batches) > len(loose.batches)


def test_bounded_dopri5_stays_within_what_was_learnt():
    """The published solver asks for velocities behind t = 1 and interpolates; both reach the same point."""
    times = {"dopri5": [], "dopri5_bounded": []}

    def model(x, t, condition, *, seen):
        seen.append(float(t[0]))
        return 4 * x * (t[0] - 0.5)

    noise = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for solver, seen in times.items():
        drawn = sample(partial(model, seen=seen), noise, torch.zeros(2), solver=solver, steps=1, timestep_shift=0.0)
        torch.testing.assert_close(drawn, noise, atol=2e-3, rtol=0)  # the integral of the factor from 0 to 1 is 0
    assert max(times["dopri5"]) > 1
    assert max(times["dopri5_bounded"]) == pytest.approx(1, abs=1e-9)


def test_steps_count_evaluations():
    cases: list[tuple[Solver, int]] = [("euler", 8), ("heun", 16)]
    for solver, evaluations in cases:
        model = Recorder()
        draw(model, solver=solver)
        assert model.batches == [2] * evaluations


def test_null_branch_is_computed_inside_the_interval_only():
    model = Recorder()
    draw(model, guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    assert model.batches == [2] * 4 + [4] * 4
    draw(model := Recorder(), guidance_scale=2.0, guidance_interval=(0.25, 0.5))
    assert model.batches == [2] * 2 + [4] * 3 + [2] * 3  # both ends belong to the interval


def test_scale_one_is_no_guidance():
    """One plain evaluation a step, no need of a null condition, and the limit of guidance as the scale nears one."""
    evaluations = []

    def model(x, t, condition):
        evaluations.append(len(x))
        return -x

    draw(model, guidance_scale=1.0)
    assert evaluations == [2] * 8
    nearly = draw(Recorder(weak=0.5), guidance_scale=1 + 1e-9)
    torch.testing.assert_close(nearly, draw(Recorder(weak=0.5), guidance_scale=1.0), atol=1e-7, rtol=0)


def test_guidance_extrapolates():
    """v = b x + w (a - b) x is the velocity of rate b + w (a - b)."""
    guided = draw(Recorder(strong=1.0, weak=0.5), guidance_scale=3.0)
    torch.testing.assert_close(guided, draw(Recorder(strong=2.0)))


def test_guidance_on_three_channels():
    guided = draw(Recorder(strong=1.0, weak=0.5), guidance_scale=3.0, guidance_channels=3)
    torch.testing.assert_close(guided[:, :3], draw(Recorder(strong=2.0))[:, :3])
    torch.testing.assert_close(guided[:, 3:], draw(Recorder(strong=1.0))[:, 3:])

    for channels in (None, "all", 4):
        every = draw(Recorder(strong=1.0, weak=0.5), guidance_scale=3.0, guidance_channels=channels)
        torch.testing.assert_close(every, draw(Recorder(strong=2.0)))
    with pytest.raises(ValueError, match="guidance_channels is 5"):
        draw(Recorder(), guidance_scale=3.0, guidance_channels=5)


def test_null_condition_is_an_argument():
    """Conditions need not be labels: any tensor with a null of its shape."""
    noise, features = torch.ones(2, 4, 1, 1, dtype=torch.float64), torch.ones(2, 1, 1, 1, dtype=torch.float64)

    def model(x, t, condition):
        return condition * x

    options: dict[str, Any] = {"solver": "euler", "steps": 8, "timestep_shift": 0.0}
    guided = sample(model, noise, features, null_condition=features / 2, guidance_scale=3.0, **options)
    torch.testing.assert_close(guided, sample(model, noise, features * 2, **options))
    with pytest.raises(ValueError, match="null_condition"):
        sample(model, noise, features, guidance_scale=3.0, **options)


def test_low_precision_models_keep_the_state_in_full():
    """A bfloat16 velocity, as under autocast, is widened before guidance and integration."""

    def model(x, t, condition):
        return x.bfloat16()

    for solver in ("euler", "heun", "dopri5"):
        out = draw(model, solver=solver, guide_model=model, guidance_scale=2.0)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, draw(Recorder(), solver=solver), rtol=0.02, atol=0)


def test_progress_is_the_time_reached():
    reached = []
    draw(Recorder(), steps=4, progress=reached.append)
    assert reached == [0.25, 0.5, 0.75, 1.0]


def test_autoguidance_keeps_the_condition():
    model, guide = Recorder(strong=1.0), Recorder(strong=0.5)
    torch.testing.assert_close(draw(model, guidance_scale=3.0, guide_model=guide), draw(Recorder(strong=2.0)))
    assert model.batches == guide.batches == [2] * 8


def test_samples_do_not_depend_on_their_neighbours():
    model, io = LightningDiT.from_pretrained(GOLDEN), load_file(GOLDEN / "io.safetensors")
    options: dict[str, Any] = {"solver": "euler", "steps": 4, "timestep_shift": 0.3, "guidance_scale": 2.0}
    with torch.no_grad():
        both = sample(model, io["ode.noise"], io["ode.y"], **options)
        swapped = sample(model, io["ode.noise"].flip(0), io["ode.y"].flip(0), **options).flip(0)
    torch.testing.assert_close(both, swapped, atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.1


VALUES = {
    "solver": "euler",
    "steps": 5,
    "timestep_shift": 0.0,
    "guidance_scale": 1.0,
    "guidance_interval": [0.0, 1.0],  # YAML has lists only
    "guidance_channels": "all",
    "guide": "null_class",
}


def test_config_is_the_arguments_of_sample():
    config = SamplerConfig.model_validate(VALUES)
    assert config.guidance_interval == (0.0, 1.0)
    assert SamplerConfig.model_validate(VALUES | {"guidance_channels": 3}).guidance_channels == 3
    noise = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    drawn = sample(Recorder(), noise, torch.zeros(2, dtype=torch.int64), **config.arguments())
    assert torch.equal(drawn, draw(Recorder(), steps=5))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "unguided"),
        ({"guidance_scale": 1.5}, "cfg1p5"),
        ({"guidance_scale": 10.0, "guidance_channels": 3}, "cfg10-3ch"),
        ({"guidance_scale": 1.42, "guide": "generator"}, "auto1p42"),
        ({"guidance_scale": 1.5000001}, "cfg1p5000001"),
    ],
)
def test_guidance_has_a_name(changes, name):
    """Without the points and underscores that part the names of metrics."""
    assert SamplerConfig.model_validate(VALUES | changes).guidance == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_interval", [0.5, 0.5]),
        ("guidance_interval", [-0.1, 0.5]),
        ("guidance_interval", [0.5]),
        ("guidance_channels", 0),
        ("guidance_channels", "first"),
        ("solver", "rk4"),
        ("steps", 0),
        ("timestep_shift", -1.0),
    ],
)
def test_config_refuses(key, value):
    with pytest.raises(ValidationError, match=key):
        SamplerConfig.model_validate(VALUES | {key: value})
