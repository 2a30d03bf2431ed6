"""The straight path between noise and data, and the loss on its velocity (LightningDiT; paper 4.1).

t = 0 is noise, t = 1 is data;  x_t = t x_1 + (1 - t) x_0;  v = x_1 - x_0
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.layers.captions import Condition

# A prediction below this length has no direction yet. With the usual 1e-8 the cosine's gradient is 1e8 at the zero that
# adaLN-zero begins with; unless it is clipped, Adam's second moment of the last layer needs hundreds of steps to forget.
SHORTEST = 0.1
AUTO_ELEMENTS = 4096  # numbers of a latent at which `Auto` has mu 0
Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # (x, t, condition) -> v


class LogitNormal(Config):
    """t = sigmoid(mu + sigma n). Smaller mu trains more on noise; VTP-L uses -0.75, 1.0; VTP-S and B -0.5, 1.25."""

    name: Literal["logit_normal"]
    mu: float = Field(description="mean of the logit of t; below 0 dwells on noise")
    sigma: float = Field(gt=0, description="standard deviation of the logit of t")


class Auto(Config):
    """Logit-normal with the mu of the latents' dimension: larger latents hide less under the same noise.

    mu = -ln sqrt(channels * height * width / 4096): the odds of noise rise as the time shift of Zheng et al. 2025 (RAE)
    has it. For 64 x 16 x 16 that is -0.69, beside the -0.75 of VTP-L.
    """

    name: Literal["auto"]
    sigma: float = Field(
        gt=0, description="standard deviation of the logit of t, whose mean follows from the size of the latents"
    )

    def resolved(self, elements: int) -> LogitNormal:
        """For latents of so many numbers."""
        return LogitNormal(name="logit_normal", mu=-0.5 * math.log(elements / AUTO_ELEMENTS), sigma=self.sigma)


class Uniform(Config):
    """t uniform in [0, 1)."""

    name: Literal["uniform"]


TimestepSamplingConfig = Annotated[LogitNormal | Auto | Uniform, Field(discriminator="name")]


class FlowLoss(NamedTuple):
    """Per sample, float32."""

    mse: Tensor  # [B], mean over channels and positions of the squared error
    cosine: Tensor  # [B], mean over positions of 1 - cosine along channels


def draw_timesteps(config: LogitNormal | Uniform, count: int, generator: torch.Generator) -> Tensor:
    """Training timesteps [count] in [0, 1], float32, on the generator's device.

    sigmoid(mu + sigma n), n standard normal (Esser et al. 2024, logit-normal sampling), or uniform.
    """
    device = generator.device
    if isinstance(config, Uniform):
        return torch.rand(count, generator=generator, device=device)
    return logit_normal(config, torch.randn(count, generator=generator, device=device))


def timesteps_of(
    config: LogitNormal | Auto | Uniform | None, normal: Tensor, uniform: Tensor, *, elements: int
) -> Tensor:
    """Timesteps [B] of given draws, standard normal and uniform, for latents of so many numbers; None: uniform."""
    if config is None or isinstance(config, Uniform):
        return uniform
    known = config.resolved(elements) if isinstance(config, Auto) else config
    return logit_normal(known, normal)


def logit_normal(config: LogitNormal, normal: Tensor) -> Tensor:
    """sigmoid(mu + sigma n) of standard normal draws n."""
    return torch.sigmoid(config.mu + config.sigma * normal)


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t x_1 + (1 - t) x_0 for data x_1, noise x_0 and t [B].

    The straight path of flow matching (Lipman et al. 2023; Ma et al. 2024, SiT, linear interpolant).
    """
    t = t.view(-1, *[1] * (latents.ndim - 1))
    return t * latents + (1 - t) * noise


def flow_matching_loss(
    model: Velocity,
    latents: Tensor,
    condition: Condition,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    timesteps: LogitNormal | Uniform | None = None,
    generator: torch.Generator | None = None,
) -> FlowLoss:
    """Error of the predicted velocity at x_t for latents x_1 [B, C, H, W], noise x_0 and timesteps t [B].

    mean (v_hat - v)^2 and mean (1 - cos(v_hat, v)) with v = x_1 - x_0 (Yao et al. 2025, LightningDiT).
    What is not given is drawn from `generator`: t after `timesteps` (None: uniform), noise from a standard normal. Raises
    ValueError when something would have to be drawn without a generator.
    """
    if (t is None or noise is None) and generator is None:
        raise ValueError("give t and noise, or a generator to draw them from")
    latents = latents.float()
    if t is None:
        assert generator is not None
        t = draw_timesteps(timesteps or Uniform(name="uniform"), latents.shape[0], generator).to(latents)
    if noise is None:
        assert generator is not None
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
    predicted = model(interpolate(latents, noise, t), t, condition).float()
    velocity = latents - noise
    mse = (predicted - velocity).square().flatten(1).mean(1)
    cosine = 1 - F.cosine_similarity(predicted, velocity, dim=1, eps=SHORTEST)
    return FlowLoss(mse, cosine.flatten(1).mean(1))
