"""Flow matching on cached latents with class conditions (paper 4.1, LightningDiT)."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field
from torch import nn

from vtp.config import Config
from vtp.data.batches import LatentBatch
from vtp.draws import torch_draws
from vtp.flow import TimeSamplingConfig, draw_times, flow_matching_loss
from vtp.layers.average import frozen_copy, update_average, warm_momentum
from vtp.layers.flops import TRAINING, forward_flops
from vtp.models.lightningdit import LightningDiT
from vtp.step import Logs, Moment, ParameterGroup, StepCost, Term


class GenerationObjectiveConfig(Config):
    """The loss of the generator."""

    times: TimeSamplingConfig
    cosine_weight: float = Field(ge=0, description="of the cosine between velocities, beside the squared error")
    label_dropout: float = Field(ge=0, lt=1, description="share of samples that train the null class")
    ema: float = Field(ge=0, lt=1, description="momentum of the averaged weights, which are the result")


class GenerationObjective(nn.Module):
    """One phase."""

    def __init__(self, model: LightningDiT, config: GenerationObjectiveConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.model = model
        self.average = frozen_copy(model)

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        return {"model": [ParameterGroup(list(self.model.parameters()))]}

    def watched(self) -> Sequence[nn.Parameter]:
        return ()

    def terms(self, phase: str, micros: Sequence[LatentBatch], moment: Moment) -> Iterator[Term]:
        draws = torch_draws(self.seed, "flow", moment.step)
        ((latents, labels),) = micros
        count, device = latents.shape[0], latents.device
        t = draw_times(self.config.times, count, draws).to(device)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        dropped = (torch.rand(count, generator=draws) < self.config.label_dropout).to(device)
        labels = torch.where(dropped, self.model.null_label, labels)
        loss = flow_matching_loss(self.model, latents, labels, t=t, noise=noise)
        mse, cosine = loss.mse.mean(), loss.cosine.mean()
        parts = {"mse": mse.detach(), "cosine": cosine.detach()}
        yield Term("flow", mse + self.config.cosine_weight * cosine, parts, (loss.mse,))

    def step_cost(self, batch: LatentBatch) -> StepCost:
        """Training FLOPs of one step."""
        count, _, height, width = batch.latents.shape
        flops = TRAINING * forward_flops(self.model, batch.latents, torch.zeros(count), batch.labels)
        return StepCost(flops, {"flow": count}, count * (height // self._patch) * (width // self._patch))

    def after_step(self, moment: Moment) -> Logs:
        """Move the averaged weights."""
        update_average(self.average, self.model, warm_momentum(self.config.ema, moment.step))
        return {}

    @property
    def _patch(self) -> int:
        return self.model.config.patch_size
