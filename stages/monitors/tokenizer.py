"""Reconstructions of fixed images, a k-NN probe and milestones during pre-training."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.monitors.snapshots import SnapshotStore
from vtp.artefact import write_json
from vtp.config import Config, ConfigError, Distinct
from vtp.data.dataset import ShardDataset
from vtp.distributed import ranks
from vtp.evaluation.neighbours import knn_accuracy
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.layers.images import normalise, to_uint8
from vtp.models.vit import VisionTransformer
from vtp.objectives.pretrain import PretrainObjective
from vtp.objectives.pretrain_state import export_tokenizer
from vtp.params import END, milestone_flops, milestone_name
from vtp.step import Logs, StepContext

BATCH = 256


class KnnProbeConfig(Config):
    """k-nearest neighbours on class tokens, of student and teacher."""

    train_samples: int = Field(ge=1, description="labelled training images that are searched")
    test_samples: int = Field(ge=1, description="labelled validation images that are classified")
    neighbours: int = Field(ge=1, description="k of the nearest-neighbour classifier")

    @model_validator(mode="after")
    def _neighbours_are_there(self) -> Self:
        if self.neighbours > self.train_samples:
            raise ValueError(f"neighbours {self.neighbours} are more than train_samples {self.train_samples}")
        return self


class TokenizerMonitorConfig(Config):
    """Evaluations during pre-training."""

    evaluations: int = Field(ge=1, description="evaluations, evenly spaced over the run; the last is at its end")
    pictures: int = Field(ge=1, description="validation images that are reconstructed at every evaluation")
    probe: KnnProbeConfig | None = Field(description="k-NN accuracy at every evaluation; null for none")
    milestones: Annotated[list[Annotated[float, Field(gt=0)] | Literal["end"]], Distinct] = Field(
        description="training FLOPs, or below 1 shares of the run, at which the tokenizer is exported; `end`: when it ends"
    )


class TokenizerMonitor:
    """Pictures and probe at even intervals."""

    def __init__(
        self,
        objective: PretrainObjective,
        train: ShardDataset,
        validation: ShardDataset,
        config: TokenizerMonitorConfig,
        *,
        host: Host,
    ) -> None:
        self._objective = objective
        self._config = config
        self._snapshots = SnapshotStore(host.folder / "snapshots", config.evaluations)
        self._device = host.device
        side = objective.tokenizer.image_size
        self._images = validation.images(range(min(config.pictures, len(validation))), side)
        self._probe = None
        if config.probe is not None:
            self._probe = (
                _LabelledImages(train, config.probe.train_samples, side),
                _LabelledImages(validation, config.probe.test_samples, side),
            )

    def due(self, context: StepContext) -> bool:
        return self._snapshots.due(context)

    @torch.no_grad()
    def evaluate(self, context: StepContext) -> Logs:
        tokenizer = self._objective.tokenizer
        pixels = to_uint8(tokenizer.decode(tokenizer.encode(normalise(self._images.to(self._device)))))
        if ranks().first:
            self._snapshots.save(context, pixels.cpu())
        return self._knn() if self._probe is not None else {}

    def draw(self, path: Path, *, steps: int) -> None:
        """Originals over the reconstructions of every evaluation, as one PNG."""
        rows = {"original": self._images, **self._snapshots.rows(steps)}
        grid(list(rows.values()), list(rows), path, title="reconstructions along the run")

    def _knn(self) -> dict[str, float]:
        assert self._probe is not None
        assert self._config.probe is not None
        train, test = self._probe
        trunks = {"student": self._objective.vit.trunk}
        if self._objective.ssl is not None:
            trunks["teacher"] = self._objective.ssl.teacher.trunk
        return {
            f"knn_{name}": knn_accuracy(
                train.features(trunk, self._device),
                train.labels,
                test.features(trunk, self._device),
                test.labels,
                k=self._config.probe.neighbours,
            )
            for name, trunk in trunks.items()
        }


class _LabelledImages:
    """The first images that have a class."""

    def __init__(self, shards: ShardDataset, most: int, side: int) -> None:
        if shards.manifest.unprobed is not None:
            raise ConfigError(
                f"{shards.folder}: {shards.manifest.unprobed}; set pretrain.monitor.probe to null, or give the source labels"
            )
        singles = shards.singles(most)
        self._shards = shards
        self._rows = singles.rows
        self._side = side
        self.labels = torch.from_numpy(singles.labels)

    def features(self, trunk: VisionTransformer, device: str) -> Tensor:
        parts = []
        for rows in np.split(self._rows, range(BATCH, len(self._rows), BATCH)):
            parts.append(trunk(normalise(self._shards.images(rows, self._side).to(device))).cls.float().cpu())
        return torch.cat(parts)


class TokenizerMilestones:
    """Tokenizers at chosen training FLOPs or shares of a run of `flops`: the paper's scaling figures evaluate along it."""

    def __init__(
        self,
        objective: PretrainObjective,
        milestones: Sequence[float | str],
        *,
        step_flops: float,
        flops: float,
        weights: str,
        host: Host,
    ) -> None:
        self._objective = objective
        self._milestones = {
            milestone_name(milestone): milestone_flops(milestone, flops)
            for milestone in milestones
            if not isinstance(milestone, str)
        }
        self._at_end = END in milestones
        self._step_flops = step_flops
        self._folder = host.folder / "milestones"
        self._weights = weights

    def due(self, context: StepContext) -> bool:
        return bool(self._reached(context))

    def evaluate(self, context: StepContext) -> Logs:
        for name in self._reached(context):
            folder = self._folder / name
            export_tokenizer(self._objective, folder, weights=self._weights)
            if ranks().first:
                write_json(folder / "milestone.json", {"step": context.step + 1, "flops": self._after(context)})
        return {}

    def publish(self, folder: Path) -> None:
        """Copy all to an output; an empty folder says that none was chosen or reached."""
        folder.mkdir()
        if self._folder.is_dir():
            shutil.copytree(self._folder, folder, dirs_exist_ok=True)
        write_json(folder / "index.json", {"milestones": sorted(path.name for path in folder.iterdir())})

    def _after(self, context: StepContext) -> float:
        return (context.step + 1) * self._step_flops

    def _reached(self, context: StepContext) -> list[str]:
        """Names of the milestones that this step comes to."""
        after = self._after(context)
        names = [name for name, flops in self._milestones.items() if after - self._step_flops < flops <= after]
        return names + ([END] if self._at_end and context.step + 1 == context.steps else [])
