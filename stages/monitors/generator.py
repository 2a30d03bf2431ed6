"""Validation loss, samples and a Fréchet distance during the generator's training, and its milestones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from stages.monitors.snapshots import SnapshotStore
from vtp.artefact import load_tensors, save_tensors
from vtp.config import Config, Distinct, number_name
from vtp.data.conditions import SampleConditions
from vtp.data.latents import HeldLatents, LatentDataset
from vtp.distributed import gather_rows, own_rows, ranks
from vtp.evaluation.convergence import EPOCHS, epochs_to_reach
from vtp.evaluation.features import FeatureExtractor, count_name
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.flow import SamplerConfig, draw_noise, flow_matching_loss, sample
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.objectives.generation import GenerationObjective
from vtp.step import Logs, StepContext
from vtp.training.conditioning import Drawn


class OnlineFidConfig(Config):
    """A Fréchet distance at every evaluation: samples of the averaged weights against the reference."""

    samples: int = Field(ge=2, description="samples that are drawn at every evaluation")
    reach: Annotated[list[Annotated[float, Field(gt=0)]], Distinct] = Field(
        description="distances; the epochs until the first evaluation at or below each are told, and those of a straight "
        "line from the evaluation before"
    )


class GeneratorMonitorConfig(Config):
    """Evaluations during the generator's training, of the averaged weights that will be kept."""

    evaluations: int = Field(ge=1, description="evaluations, evenly spaced over the run; the last is at its end")
    validation: int = Field(
        ge=0, description="held-out latents whose loss is taken, each with its own fixed t and noise"
    )
    pictures: int = Field(ge=1, description="samples of fixed seeds that are drawn and decoded")
    sampler: SamplerConfig = Field(description="how the pictures and the samples of the Fréchet distance are drawn")
    batch_size: int = Field(ge=1, description="samples of a forward pass")
    fid: OnlineFidConfig | None = Field(
        description="a Fréchet distance along the run; needs --reference, and wants a tuned --decoder; null for none"
    )
    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Distinct] = Field(
        description="shares of the run at which the averaged weights are kept, to guide or to compare"
    )

    @field_validator("sampler")
    @classmethod
    def _sampler_fits(cls, sampler: SamplerConfig) -> SamplerConfig:
        if sampler.guide == "generator":
            raise ValueError(
                "guide: generator asks for a weaker one, and beside one in training is none; choose null_class"
            )
        if sampler.adaptive:
            raise ValueError("solver: dopri5 takes other steps on every rank; choose euler or heun")
        return sampler


class FidReference(NamedTuple):
    """What the online distance compares with, and in which features."""

    extractor: FeatureExtractor
    statistics: GaussianStatistics


class GeneratorMonitor:
    """Evaluations at even intervals; every rank does its share.

    `conditions` are those of the validation latents; samples are told what `drawn` says of their numbers.
    """

    def __init__(  # noqa: PLR0913 - what is evaluated, and by what
        self,
        objective: GenerationObjective,
        validation: LatentDataset | HeldLatents,
        tokenizer: Tokenizer,
        config: GeneratorMonitorConfig,
        *,
        conditions: SampleConditions,
        drawn: Drawn,
        seed: int,
        precision: str,
        reference: FidReference | None,
        host: Host,
    ) -> None:
        self._model = objective.averages[0]
        self._validation = validation
        self._tokenizer = tokenizer
        self._config = config
        self._conditions = conditions
        self._drawn = drawn
        self._seed = seed
        self._snapshots = SnapshotStore(host.folder / "snapshots", config.evaluations)
        self._device = host.device
        self._precision = precision
        self._reference = reference

    def due(self, context: StepContext) -> bool:
        return self._snapshots.due(context)

    @torch.no_grad()
    def evaluate(self, context: StepContext) -> Logs:
        logs: dict[str, Tensor | float] = {}
        if self._config.validation:
            logs["validation_mse"] = self._validation_loss()
        pictures = gather_rows(torch.cat([part.cpu() for part in self._sample(self._config.pictures)]))
        distances = self._distance()
        if ranks().first:
            self._snapshots.save(context, pictures, **distances)
        return logs | distances

    def _distance(self) -> dict[str, float]:
        """The Fréchet distance by its name, where there is one."""
        if self._config.fid is None or self._reference is None:
            return {}
        extractor, real = self._reference
        count = self._config.fid.samples
        drawn = GaussianStatistics(extractor.dim)
        for pixels in self._sample(count):
            drawn.update(extractor(pixels).pooled)
        return {self._distance_name(extractor): frechet_distance(real, drawn.over_ranks())}

    def _distance_name(self, extractor: FeatureExtractor) -> str:
        assert self._config.fid is not None
        return f"gfid_{extractor.name}_{count_name(self._config.fid.samples)}_{self._config.sampler.guidance}_balanced"

    def convergence(self, *, steps: int, epochs: float) -> dict[str, dict[str, Any]]:
        """Of a whole run: the distance at every evaluation, by epochs, and the epochs to reach those of `fid.reach`.

        Named as metrics are: `<distance>.epochs_2`, `epochs_to_reach.<X>.evaluated` and `.interpolated`; nothing for an
        X that was not reached.
        """
        if self._config.fid is None or self._reference is None:
            return {}
        name = self._distance_name(self._reference.extractor)
        points = {epochs * step / steps: value for step, value in self._snapshots.figures(name, steps).items()}
        reached = {number_name(each): epochs_to_reach(each, points) for each in self._config.fid.reach}
        told = {x: {key: v for key, v in of._asdict().items() if v is not None} for x, of in reached.items() if of}
        return {
            name: {f"{EPOCHS}{number_name(round(done, 4))}": value for done, value in points.items()},
            "epochs_to_reach": told,
        }

    def draw(self, path: Path, *, steps: int) -> None:
        """The same noise at every evaluation, as one PNG."""
        rows = self._snapshots.rows(steps)
        grid(list(rows.values()), list(rows), path, title="samples of the same noise along the run")

    def _validation_loss(self) -> float:
        """Mean squared error of the velocity, at timesteps that are evenly spaced over the samples."""
        count = min(self._config.validation, len(self._validation))
        losses = []
        for indices, kept in _even(count, self._config.batch_size):
            rows = np.asarray(indices)
            latents = self._validation.statistics.normalise(self._validation.rows(rows)).to(self._device)
            noise = self._noise("validation", indices)
            t = torch.from_numpy((rows + 0.5) / count).float().to(self._device)
            condition = self._conditions.of(rows, self._device)
            with self._reduced():
                loss = flow_matching_loss(self._model, latents, condition, t=t, noise=noise)
            losses.append(loss.mse[:kept].cpu())
        return float(gather_rows(torch.cat(losses)).double().mean())

    def _sample(self, count: int) -> Iterator[Tensor]:
        """This rank's share of `count` samples as uint8 pictures, in batches."""
        for indices, kept in _even(count, self._config.batch_size):
            noise = self._noise("samples", indices)
            with self._reduced():
                drawn = sample(self._model, noise, self._drawn(indices), **self._config.sampler.arguments())
            yield to_uint8(self._tokenizer.decode(self._validation.statistics.denormalise(drawn)))[:kept]

    def _reduced(self) -> torch.autocast:
        """The precision of the training."""
        return torch.autocast(self._device, torch.bfloat16, enabled=self._precision == "bfloat16")

    def _noise(self, purpose: str, indices: Sequence[int]) -> Tensor:
        # `looks/` is the address of these draws; by another name they would be other draws.
        noise = draw_noise(self._seed, indices, self._validation.shape, purpose=f"looks/{purpose}")
        return noise.to(self._device)


def _even(count: int, size: int) -> Iterator[tuple[list[int], int]]:
    """This rank's share of `count` samples in batches, and how many of each count.

    All ranks get as many batches, of one size: sharded weights are gathered by all of them together.
    """
    own, most = list(own_rows(count)), -(-count // ranks().size)
    size = min(size, most)
    for first in range(0, most, size):
        rows = own[first : first + size]
        yield rows + [0] * (size - len(rows)), len(rows)


class GeneratorMilestones:
    """The averaged weights at chosen shares of a run."""

    def __init__(self, objective: GenerationObjective, shares: Sequence[float], *, folder: Path) -> None:
        self._objective = objective
        self._shares = sorted(shares)
        self._folder = folder

    def due(self, context: StepContext) -> bool:
        return bool(self._reached(context))

    def evaluate(self, context: StepContext) -> Logs:
        state = self._objective.averaged(0)
        if ranks().first:
            for share in self._reached(context):
                save_tensors(self._path(share), state)
        return {}

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by the names of their folders."""
        return {_name(share): load_tensors(self._path(share)) for share in self._shares}

    def _path(self, share: float) -> Path:
        return self._folder / f"{_name(share)}.safetensors"

    def _reached(self, context: StepContext) -> list[float]:
        return [
            share for share in self._shares if context.step < max(1, round(share * context.steps)) <= context.step + 1
        ]


def _name(share: float) -> str:
    return f"at-{number_name(share)}"
