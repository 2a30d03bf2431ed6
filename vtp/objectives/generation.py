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
from vtp.objectives.pretrain import Term


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

    def phases(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"model": [self.model]}

    def losses(self, phase: str, batch: LatentBatch, step: int, progress: float) -> Iterator[Term]:
        assert phase == "model"
        draws = torch_draws(self.seed, "flow", step)
        latents, labels = batch
        count, device = latents.shape[0], latents.device
        t = draw_times(self.config.times, count, draws).to(device)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        dropped = (torch.rand(count, generator=draws) < self.config.label_dropout).to(device)
        labels = torch.where(dropped, self.model.null_label, labels)
        loss = flow_matching_loss(self.model, latents, labels, t=t, noise=noise)
        mse, cosine = loss.mse.mean(), loss.cosine.mean()
        yield mse + self.config.cosine_weight * cosine, {"mse": mse.detach(), "cosine": cosine.detach()}

    def step_flops(self, batch: LatentBatch) -> float:
        """Training FLOPs of one step."""
        return TRAINING * forward_flops(self.model, batch.latents, torch.zeros(len(batch.labels)), batch.labels)

    def after_step(self, step: int) -> None:
        """Move the averaged weights."""
        update_average(self.average, self.model, warm_momentum(self.config.ema, step))
