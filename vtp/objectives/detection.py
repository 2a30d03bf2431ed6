"""What a detector of scenes learns: centres, classes and sizes of the pictures in scenes that are composed on the way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtp.config import Config
from vtp.curation.ingest.arrange import Arrangement, Canvas
from vtp.curation.ingest.compose import Composer, EmbeddedConfig
from vtp.data.batches import RankSlice
from vtp.draws import numpy_draws
from vtp.layers.colour import gaussian_blur
from vtp.layers.flops import TRAINING, forward_flops
from vtp.models.scene_detector import SceneDetector, scaled
from vtp.step import Logs, ParameterGroup, StepContext, StepCost, Term

SPLIT = "detector"  # compositions of its own: it sees none by which a generator is trained or judged
SPREAD, LEAST_SPREAD = (
    0.1,
    0.6,
)  # deviation of the target around a centre: a share of the picture's size, in cells at least
NEAR = 0.3  # a class is learnt in cells whose target is above it
FOCUS, LENIENCE = 2, 4  # CornerNet's focal loss (Law and Deng 2018): alpha and beta
SHARP = 1e-3  # deviation in pixels of a blur that is none
LEAST_WEIGHT = 1e-6  # of all cells of a picture, so that one without centres has a mean of 0


class ImperfectionConfig(Config):
    """What is done to composed pictures, so that samples of generators are read too. Half have no blur, half no noise."""

    shift: float = Field(ge=0, le=0.5, description="largest shift of what is drawn, in shares of the short edge")
    blur: float = Field(ge=0, le=0.1, description="largest deviation of a Gaussian blur, in shares of the short edge")
    noise: float = Field(ge=0, le=128, description="largest deviation of Gaussian noise, in levels of 8 bits")


class SceneBatch(NamedTuple):
    """A micro-batch of a rank."""

    images: Tensor  # [B, 3, H, W] uint8
    near: Tensor  # [B, h, w] in [0, 1], 1 in the cells of centres
    labels: Tensor  # [B, h, w] int64, of the nearest picture
    sizes: Tensor  # [B, h, w], of the nearest picture in shares of the short edge


class SceneBatches(Dataset[SceneBatch]):
    """Composed scenes without end: one item per micro-batch of this rank. All pictures of a step have one shape."""

    def __init__(
        self,
        source: EmbeddedConfig,
        imperfections: ImperfectionConfig,
        *,
        stride: int,
        seed: int,
        batch_size: int,
        rank_slice: RankSlice,
    ) -> None:
        self._composer = Composer(source)
        self._imperfections, self._stride, self._seed = imperfections, stride, seed
        self._batch_size, self._rank_slice = batch_size, rank_slice

    def __getitem__(self, index: int) -> SceneBatch:
        step, rows = self._rank_slice.of(self._batch_size, index)
        canvas = self._composer.canvas(SPLIT, step)
        drawn = [self._draw(step * self._batch_size + row, canvas) for row in rows]
        images, blur, noise, *targets = (torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True))
        reach = math.ceil(2 * self._imperfections.blur * min(canvas))
        images = gaussian_blur(images.permute(0, 3, 1, 2).float(), blur, reach).add_(noise)
        return SceneBatch(images.round_().clamp_(0, 255).to(torch.uint8), *targets)

    def _draw(self, number: int, canvas: Canvas) -> tuple[np.ndarray, ...]:
        """A picture [H, W, 3], the deviation of its blur [], noise [3, H, W], and targets; all belong to its number."""
        sample, most, edge = self._composer.plan(SPLIT, number, canvas), self._imperfections, min(canvas)
        draws = numpy_draws(self._seed, "imperfections", number)
        x, y, blur, noise = draws.uniform(-1, 1, 4).tolist()
        sample = sample._replace(arrangement=sample.arrangement.moved(x * most.shift * edge, y * most.shift * edge))
        blur, noise = np.array(max(SHARP, blur * most.blur * edge), np.float32), max(0, noise) * most.noise
        added = noise * draws.standard_normal((3, canvas[1], canvas[0]), np.float32)
        return np.array(self._composer.draw(sample)), blur, added, *targets_of(sample.arrangement, self._stride)


class DetectionObjective(nn.Module):
    """One phase. A term is this rank's part of the mean over the pictures of the global batch."""

    def __init__(self, model: SceneDetector, *, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self._batch_size = batch_size

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        return {"model": [ParameterGroup(list(self.model.parameters()))]}

    def shared_parameters(self) -> Sequence[nn.Parameter]:
        return ()

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one."""
        yield self.model

    def recompute(self) -> None:
        """Nothing: activations are small."""

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """Nothing: it stays whole on every rank."""
        yield from ()

    def terms(self, phase: str, micro_batches: Sequence[SceneBatch], context: StepContext) -> Iterator[Term]:
        for batch in micro_batches:
            maps = self.model(scaled(batch.images))
            losses = {
                "centre_loss": centre_loss(maps.centres.float(), batch.near),
                "class_loss": class_loss(maps.classes.float(), batch.labels, batch.near),
                "size_loss": size_loss(maps.sizes.float(), batch.sizes, batch.near),
            }
            parts = {name: values.sum() / self._batch_size for name, values in losses.items()}
            loss, logs = torch.stack(list(parts.values())).sum(), {n: part.detach() for n, part in parts.items()}
            yield Term("detection", loss, logs, tuple(losses.values()))

    def step_cost(self, canvas: Canvas) -> StepCost:
        """Training FLOPs of a step of pictures of this size (width, height)."""
        width, height = canvas
        flops = TRAINING * forward_flops(self.model, torch.zeros(1, 3, height, width))
        cells = (width // self.model.config.stride) * (height // self.model.config.stride)
        return StepCost(flops * self._batch_size, {"detection": self._batch_size}, self._batch_size * cells)

    def after_step(self, context: StepContext) -> Logs:
        return {}


def targets_of(arrangement: Arrangement, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`near`, `labels` and `sizes` [h, w] of `SceneBatch`, in cells of `stride` pixels."""
    width, height = (side // stride for side in arrangement.canvas)
    near, sizes = (np.zeros((height, width), np.float32) for _ in range(2))
    labels = np.zeros((height, width), np.int64)
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    for place in arrangement.places:
        column, row = (centre / stride for centre in place.centre)
        spread = max(SPREAD * place.size / stride, LEAST_SPREAD)
        around = np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * spread**2))
        around[min(max(int(row), 0), height - 1), min(max(int(column), 0), width - 1)] = 1
        nearer = around > near
        near[nearer], labels[nearer] = around[nearer], place.label
        sizes[nearer] = place.size / min(arrangement.canvas)
    return near, labels, sizes


def centre_loss(logits: Tensor, near: Tensor) -> Tensor:
    """CornerNet's focal loss of centres [B], over their number; cells [B, h, w] near a centre count less."""
    probability = logits.sigmoid()
    found = (near == 1).float()
    hits = found * (1 - probability) ** FOCUS * F.logsigmoid(logits)
    misses = (1 - near) ** LENIENCE * probability**FOCUS * F.logsigmoid(-logits)
    return -(hits + misses).sum((1, 2)) / found.sum((1, 2)).clamp_min(1)


def class_loss(logits: Tensor, labels: Tensor, near: Tensor) -> Tensor:
    """Cross-entropy [B] of classes [B, C, h, w], mean over cells near a centre; 0 for a picture without one."""
    return _mean(F.cross_entropy(logits, labels, reduction="none"), near * (near > NEAR))


def size_loss(predicted: Tensor, sizes: Tensor, near: Tensor) -> Tensor:
    """Absolute errors of sizes [B, h, w], mean [B] over the cells of centres; 0 for a picture without one."""
    return _mean((predicted - sizes).abs(), (near == 1).float())


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp_min(LEAST_WEIGHT)
