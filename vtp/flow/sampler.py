"""Integrate the learned velocity from noise (t = 0) to data (t = 1), with or without guidance."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from vtp.config import Config
from vtp.flow.path import Velocity

Solver = Literal["euler", "heun", "dopri5"]
Channels = Literal["all"] | Annotated[int, Field(ge=1)]


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # YAML has lists only


class SamplerConfig(Config):
    """How a sample is drawn."""

    solver: Solver
    steps: int = Field(ge=1, description="real steps; dopri5 chooses its own")
    timestep_shift: float = Field(ge=0, description="t' = s t / (1 + (s - 1) t); below 1 dwells on noise; 0 or 1: none")
    guidance_scale: float = Field(ge=0, description="1 is no guidance")
    guidance_interval: Annotated[tuple[float, float], BeforeValidator(_pair)] = Field(
        description="times between which guidance acts; 0 is noise"
    )
    guidance_channels: Channels = Field(description="`all`, or the first so many channels; 3 for published numbers")

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        start, end = self.guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"guidance_interval must be 0 <= start < end <= 1, got [{start}, {end}]")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `sample`."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def time_grid(steps: int, shift: float) -> Tensor:
    """`steps` + 1 times from 0 to 1 in float64, warped by t' = s t / (1 + (s - 1) t) unless s is 0."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t) if shift else t


def sample(  # noqa: PLR0913 - the sampler's own degrees of freedom
    model: Velocity,
    noise: Tensor,
    condition: Tensor,
    *,
    solver: Solver,
    steps: int,
    timestep_shift: float,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: Channels = "all",
    guide_model: Velocity | None = None,
    null_condition: Tensor | None = None,
) -> Tensor:
    """Samples [B, C, H, W] from `noise` of that shape.

    Guidance replaces v by v_0 + w (v - v_0) while t lies in the interval, where v_0 is the velocity under
    `null_condition` (by default the model's null label), or that of a weaker `guide_model` under the same condition
    (autoguidance, Karras et al. 2024). Outside the interval v_0 is not computed.
    """
    if guide_model is None and null_condition is None and guidance_scale != 1:
        null_condition = torch.full_like(condition, model.null_label)  # pyright: ignore[reportFunctionMemberAccess]
    channels = noise.shape[1] if guidance_channels == "all" else guidance_channels
    start, end = guidance_interval

    def velocity(t: float, x: Tensor) -> Tensor:
        times = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
        if guidance_scale == 1 or not start <= t <= end:
            return model(x, times, condition)
        if guide_model is not None:
            strong, weak = model(x, times, condition), guide_model(x, times, condition)
        else:
            assert null_condition is not None
            both = model(torch.cat([x, x]), times.repeat(2), torch.cat([condition, null_condition]))
            strong, weak = both.chunk(2)
        guided = weak + guidance_scale * (strong - weak)
        return torch.cat([guided[:, :channels], strong[:, channels:]], dim=1)

    grid = time_grid(steps, timestep_shift)
    if solver == "dopri5":
        return _dopri5(velocity, noise, grid)
    return _fixed_steps(velocity, noise, grid.tolist(), second_order=solver == "heun")


def _fixed_steps(
    velocity: Callable[[float, Tensor], Tensor], x: Tensor, grid: list[float], *, second_order: bool
) -> Tensor:
    """Euler, or Heun's trapezoid."""
    for t, following in pairwise(grid):
        step = following - t
        v = velocity(t, x)
        if second_order:
            v = (v + velocity(following, x + step * v)) / 2
        x = x + step * v
    return x


def _dopri5(velocity: Callable[[float, Tensor], Tensor], x: Tensor, grid: Tensor) -> Tensor:
    """torchdiffeq's adaptive solver at the tolerances of the reference."""
    from torchdiffeq import odeint

    path: Any = odeint(lambda t, y: velocity(float(t), y), x, grid.to(x), method="dopri5", atol=1e-6, rtol=1e-3)
    return path[-1]
