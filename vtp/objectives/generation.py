"""Flow matching on latents under classes or captions (paper 4.1, 5; LightningDiT)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp.config import Config, Distinct
from vtp.data.batches import LatentBatch
from vtp.distributed import ranks, whole
from vtp.flow import TimestepSamplingConfig, flow_matching_loss, timesteps_of
from vtp.layers.average import EMA_WARMUP, frozen_copy, update_average, warm_momentum
from vtp.layers.flops import TRAINING, forward_flops, without_contents
from vtp.models.lightningdit import LightningDiT
from vtp.step import Logs, ParameterGroup, StepContext, StepCost, Term, hidden_matrices


class GenerationObjectiveConfig(Config):
    """The loss of the generator."""

    timesteps: TimestepSamplingConfig
    uniform_from: float = Field(ge=0, le=1, description="share of the run after which timesteps are uniform; 1: never")
    cosine_weight: float = Field(ge=0, description="weight of the cosine between velocities, beside the squared error")
    condition_dropout: float = Field(ge=0, lt=1, description="share of samples that are told nothing, for guidance")
    ema: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Distinct] = Field(
        min_length=1, description="momenta of averaged weights; the first is the result, the others lie beside it"
    )
    ema_warmup: bool = Field(description=EMA_WARMUP)


class GenerationObjective(nn.Module):
    """One phase. A term is this rank's part of the loss of the global batch."""

    def __init__(self, model: LightningDiT, config: GenerationObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.averages = [frozen_copy(model) for _ in config.ema]
        self._averages = nn.ModuleList(self.averages)  # part of the state

    def averaged(self, number: int) -> dict[str, Tensor]:
        """State dict of averaged weights, whole; every rank must ask."""
        return {name: whole(value) for name, value in self.averages[number].state_dict().items()}

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        return {"model": [ParameterGroup(list(self.model.parameters()), hidden=hidden_matrices(self.model.blocks))]}

    def shared_parameters(self) -> Sequence[nn.Parameter]:
        return ()

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one."""
        for model in (self.model, *self.averages):
            yield from model.compiled_units

    def recompute(self) -> None:
        """Keep no activations inside of blocks; the backward pass computes them again."""
        self.model.recompute = True

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """What FSDP gathers together, parts first."""
        for model in (self.model, *self.averages):
            yield [*model.blocks, model]

    def terms(self, phase: str, micro_batches: Sequence[LatentBatch], context: StepContext) -> Iterator[Term]:
        parts = len(micro_batches) * ranks().size
        for number, batch in enumerate(micro_batches, start=1):
            t = self._timesteps(batch, context)
            dropped = batch.uniform[:, 1] < self.config.condition_dropout
            condition = self.model.without(batch.condition, dropped)
            loss = flow_matching_loss(self.model, batch.latents, condition, t=t, noise=batch.noise)
            mse, cosine = loss.mse.mean() / parts, loss.cosine.mean() / parts
            logs = {"mse": mse.detach(), "cosine": cosine.detach()}
            logs |= {"replaced_samples": batch.replaced.sum()} if len(batch.replaced) else {}
            yield Term(
                "flow", mse + self.config.cosine_weight * cosine, logs, (loss.mse,), number == len(micro_batches)
            )

    def step_cost(self, shapes: Mapping[tuple[int, int, int], float], *, batch_size: int) -> StepCost:
        """Expected training FLOPs of a step of `batch_size` latents; each shape (d, h, w) has a share of the steps."""
        shadow, flops, tokens = without_contents(self.model), 0.0, 0.0
        told = self.model.shape_of_condition(1)
        for shape, share in shapes.items():
            flops += share * TRAINING * forward_flops(shadow, torch.zeros(1, *shape), torch.zeros(1), told)
            tokens += share * (shape[1] * shape[2] // self.model.config.patch_size**2)
        return StepCost(flops * batch_size, {"flow": batch_size}, round(batch_size * tokens))

    def after_step(self, context: StepContext) -> Logs:
        """Move the averaged weights."""
        for average, momentum in zip(self.averages, self.config.ema, strict=True):
            update_average(
                average, self.model, warm_momentum(momentum, context.step) if self.config.ema_warmup else momentum
            )
        return {}

    def _timesteps(self, batch: LatentBatch, context: StepContext) -> Tensor:
        """t [B]. The author of LightningDiT makes them uniform late in long runs (its issue 23)."""
        late = context.progress >= self.config.uniform_from
        elements = batch.latents[0].numel()
        sampling = None if late else self.config.timesteps
        return timesteps_of(sampling, batch.normal, batch.uniform[:, 0], elements=elements)
