"""What SGD heads see, batch after batch: cached features, or images that are cropped and encoded anew in every epoch.

The order of an epoch and the crop of an image are functions of (seed, epoch, image), so they depend on no number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages._runner import Work
from vtp.config import Config
from vtp.data.dataset import ShardDataset, Singles
from vtp.data.views import Crop
from vtp.distributed import gather_rows, own_rows
from vtp.draws import numpy_draws
from vtp.evaluation.sgd_probe import SgdConfig, Sight, count_batches, epoch_batches


class SgdSolverConfig(SgdConfig):
    """For data sets that do not fit into memory in float64: a grid of learning rates."""

    name: Literal["sgd"]


class AugmentConfig(Config):
    """Random crops with mirror images, as the official probe trains."""

    scale_min: float = Field(gt=0, le=1, description="least area of a crop; torchvision's default is 0.08")


def cached_sights(
    features: Mapping[str, Tensor], labels: Tensor, held: Tensor, config: SgdConfig, *, seed: int
) -> Iterator[Iterator[Sight]]:
    """Epochs of batches from features [N, D] by name."""
    for epoch in range(config.epochs):
        batches = [torch.from_numpy(batch) for batch in epoch_batches(len(labels), config, seed=seed, epoch=epoch)]
        yield (Sight({name: x[rows] for name, x in features.items()}, labels[rows], held[rows]) for rows in batches)


def augmented_sights(  # noqa: PLR0913 - what, how, and where
    images: ShardDataset,
    singles: Singles,
    held: Tensor,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    solver: SgdConfig,
    augment: AugmentConfig,
    size: int,
    seed: int,
    work: Work,
) -> Iterator[Iterator[Sight]]:
    """The same from images; every rank encodes its share of each batch, and all see the whole."""
    total = solver.epochs * count_batches(len(singles.rows), solver)
    with work.progress(total=total, description="probes", unit="batch") as bar:
        for epoch in range(solver.epochs):
            batches = epoch_batches(len(singles.rows), solver, seed=seed, epoch=epoch)
            shares = [batch[own_rows(len(batch)).start : own_rows(len(batch)).stop] for batch in batches]
            crops = _Crops(images, singles.rows, shares, augment, size=size, seed=seed, epoch=epoch)
            loader = DataLoader(crops, batch_size=None, sampler=range(len(shares)), num_workers=work.workers)
            labels = torch.from_numpy(singles.labels)
            yield _sights(loader, batches, labels, held, encode, bar.update)


def _sights(
    loader: "DataLoader[Tensor]",
    batches: Sequence[np.ndarray],
    labels: Tensor,
    held: Tensor,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    progress: Callable[[int], object],
) -> Iterator[Sight]:
    for pictures, batch in zip(loader, batches, strict=True):
        features = {name: gather_rows(x) for name, x in encode(pictures).items()}
        rows = torch.from_numpy(batch)
        progress(1)
        yield Sight(features, labels[rows], held[rows])


class _Crops(Dataset[Tensor]):
    """Uint8 crops [B, 3, S, S] of the images of each batch."""

    def __init__(
        self,
        images: ShardDataset,
        rows: np.ndarray,
        batches: Sequence[np.ndarray],
        config: AugmentConfig,
        *,
        size: int,
        seed: int,
        epoch: int,
    ) -> None:
        self.images = images
        self.rows = rows
        self.batches = batches
        self.config = config
        self.size = size
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> Tensor:
        crops = [self._crop(int(sample)) for sample in self.batches[index]]
        return torch.cat(crops) if crops else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

    def _crop(self, sample: int) -> Tensor:
        draws = numpy_draws(self.seed, "probe_crop", self.epoch, sample).random(5)
        picture = np.asarray(self.images.image(int(self.rows[sample])))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        crop = Crop(self.size, (self.config.scale_min, 1.0), draws[:4]).of(pixels)
        return crop.flip(3) if draws[4] < 0.5 else crop
