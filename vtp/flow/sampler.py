"""Integrate the learned velocity from noise (t = 0) to data (t = 1), with or without guidance."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from vtp.config import Config, number_name
from vtp.flow.path import Velocity
from vtp.layers.captions import Captions, Condition


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # YAML has lists only


Solver = Literal["euler", "heun", "dopri5", "dopri5_bounded"]
Channels = Literal["all"] | Annotated[int, Field(ge=1)]
Interval = Annotated[tuple[float, float], BeforeValidator(_pair)]
Derivative = Callable[[float, Tensor], Tensor]  # (t, x) -> dx/dt


class SamplerConfig(Config):
    """How a sample is drawn."""

    solver: Solver = Field(
        description="method of integration; dopri5 steps beyond t = 1 and interpolates, as published samples were drawn, "
        "dopri5_bounded ends there"
    )
    steps: int = Field(ge=1, description="number of steps; dopri5 chooses its own")
    timestep_shift: float = Field(
        ge=0, le=1000, description="t' = s t / (1 + (s - 1) t); below 1 dwells on noise; 0 or 1: none"
    )
    guidance_scale: float = Field(ge=0, le=1000, description="1 is no guidance")
    guidance_interval: Interval = Field(description="timesteps between which guidance acts; 0 is noise")
    guidance_channels: Channels = Field(description="`all`, or the first so many channels; 3 for published numbers")
    guide: Literal["null_class", "generator"] = Field(
        description="what guidance leads away from: the null class, or a weaker generator (autoguidance)"
    )

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        start, end = self.guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"guidance_interval must be 0 <= start < end <= 1, got [{start}, {end}]")
        return self

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps while it draws."""
        return self.solver.startswith("dopri5")

    @property
    def guides(self) -> bool:
        """Whether there is guidance; without, neither interval nor channels nor guide matter."""
        return self.guidance_scale != 1

    @property
    def guidance(self) -> str:
        """For names of metrics: `unguided`, or how and how much, such as `cfg2p5`, `cfg10-3ch`, `auto1p4`."""
        if not self.guides:
            return "unguided"
        kind = "cfg" if self.guide == "null_class" else "auto"
        channels = "" if self.guidance_channels == "all" else f"-{self.guidance_channels}ch"
        return f"{kind}{number_name(self.guidance_scale)}{channels}".replace(".", "p")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `sample`, but for its `guide_model`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "guide"}


def time_grid(steps: int, shift: float) -> Tensor:
    """`steps` + 1 times from 0 to 1 in float64, warped by t' = s t / (1 + (s - 1) t) unless s is 0.

    The timestep shift of Esser et al. 2024, written for t = 0 noise: s < 1 spends more steps on noise.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t) if shift else t


def sample(  # noqa: PLR0913 - the sampler's own degrees of freedom
    model: Velocity,
    noise: Tensor,
    condition: Condition,
    *,
    solver: Solver,
    steps: int,
    timestep_shift: float,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: Channels | None = "all",
    guide_model: Velocity | None = None,
    null_condition: Condition | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Samples [B, C, H, W] from `noise` of that shape, in its precision.

    Guidance replaces v by v_0 + w (v - v_0) while t lies in the interval, ends included (Ho and Salimans 2022;
    Kynkäänniemi et al. 2024). v_0 is the velocity under `null_condition` (by default that of the model's `without`), or
    that of a weaker `guide_model` under the same condition (autoguidance, Karras et al. 2024). Outside the interval v_0 is
    not computed. `atol` and `rtol` are dopri5's, bounded or not; the other solvers call `progress` with the timestep that
    every step reaches.
    Raises ValueError when guidance lacks a null condition or asks for more channels than there are.
    """
    if guide_model is None and null_condition is None and guidance_scale != 1:
        null_condition = _null_of(condition, model)
    channels = guidance_channels if isinstance(guidance_channels, int) else noise.shape[1]
    if channels > noise.shape[1]:
        raise ValueError(f"guidance_channels is {channels}, the latents have {noise.shape[1]}")
    start, end = guidance_interval

    def velocity(t: float, x: Tensor) -> Tensor:
        timesteps = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
        if guidance_scale == 1 or not start <= t <= end:
            return model(x, timesteps, condition).to(x)
        # Extrapolated in the precision of x: the difference of two bfloat16 velocities loses what guidance multiplies.
        if guide_model is not None:
            strong, weak = model(x, timesteps, condition).to(x), guide_model(x, timesteps, condition).to(x)
        else:
            assert null_condition is not None
            both = model(torch.cat([x, x]), timesteps.repeat(2), _joined(condition, null_condition))
            strong, weak = both.to(x).chunk(2)
        guided = weak + guidance_scale * (strong - weak)
        return torch.cat([guided[:, :channels], strong[:, channels:]], dim=1)

    if solver in ("dopri5", "dopri5_bounded"):
        return _dopri5(velocity, noise, atol=atol, rtol=rtol, bounded=solver == "dopri5_bounded")
    x = noise
    for t, following in pairwise(time_grid(steps, timestep_shift).tolist()):
        x = _step(velocity, x, t, following, second_order=solver == "heun")
        if progress is not None:
            progress(following)
    return x


def _step(velocity: Derivative, x: Tensor, t: float, following: float, *, second_order: bool) -> Tensor:
    """Euler x + h v(t, x), or Heun's trapezoid x + h (v(t, x) + v(t + h, x + h v(t, x))) / 2."""
    step = following - t
    v = velocity(t, x)
    if second_order:
        v = (v + velocity(following, x + step * v)) / 2
    return x + step * v


def _dopri5(velocity: Derivative, x: Tensor, *, atol: float, rtol: float, bounded: bool) -> Tensor:
    """Dormand and Prince 1980 by torchdiffeq, which chooses its own steps from 0 to 1.

    Its last step goes beyond 1, where no velocity was learnt, and 1 is interpolated, unless `bounded`.
    """
    from torchdiffeq import odeint

    ends = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
    options = {"step_t": ends[1:]} if bounded else {}
    path: Any = odeint(
        lambda t, y: velocity(float(t), y), x, ends, method="dopri5", atol=atol, rtol=rtol, options=options
    )
    return path[-1]


def _joined(first: Condition, second: Condition) -> Condition:
    """Along the batch."""
    if isinstance(first, Captions) and isinstance(second, Captions):
        return Captions(*map(torch.cat, zip(first, second, strict=True)))
    return torch.cat([first, second])  # pyright: ignore[reportArgumentType, reportCallIssue] - both labels


def _null_of(condition: Condition, model: Velocity) -> Condition:
    without = getattr(model, "without", None)
    if without is None:
        raise ValueError(f"{type(model).__name__} has no `without`: give null_condition, or a guide_model")
    return without(condition)
