"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017): FID, when the features are Inception's.

Statistics stream in float64 and the distance needs symmetric eigenproblems only. The usual sqrtm of a product that is
not symmetric is slow, and returns complex or wrong values for some versions of scipy and BLAS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.distributed import total

TENSORS = ("count", "mean", "scatter")


class Gaussian(Protocol):
    """What a distance needs to know of a set of features."""

    @property
    def mean(self) -> Tensor: ...  # [D]

    @property
    def covariance(self) -> Tensor: ...  # [D, D]


@dataclass(frozen=True)
class Moments:
    """A Gaussian as others publish it."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]


class GaussianStatistics:
    """Mean and covariance of streamed features, in float64 on the CPU, since not every device has float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # [D, D], sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The statistics of features [N, D]."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, these statistics hold {self.count}")
        return self._scatter / (self.count - 1)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features [B, D]. Batches are centred before they are squared (Chan et al. 1983).

        Raises ValueError for another dimension, and for values that are not finite: they would spoil all.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"statistics of {len(self.mean)} dimensions, given features {list(features.shape)}")
        if not len(features):
            return
        values = features.cpu().double()
        if (bad := (~values.isfinite().all(1)).nonzero()[:, 0]).numel():
            raise ValueError(
                f"{len(bad)} of {len(values)} features hold NaN or infinity, first that of image {int(bad[0])} of the "
                "batch; check the weights and the model that made the images"
            )
        grown = self.count + len(values)
        mean = values.mean(0)
        shift = mean - self.mean
        centred = values - mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(shift, shift, alpha=self.count * len(values) / grown)
        self.mean += shift * (len(values) / grown)
        self.count = grown

    def merge(self, other: "GaussianStatistics") -> None:
        """Add what another has seen."""
        if not other.count:
            return
        grown = self.count + other.count
        shift = other.mean - self.mean
        self._scatter += other._scatter
        self._scatter.addr_(shift, shift, alpha=self.count * other.count / grown)
        self.mean += shift * (other.count / grown)
        self.count = grown

    def over_ranks(self) -> "GaussianStatistics":
        """The features of all ranks together, on every rank; each of them must ask."""
        together = GaussianStatistics(len(self.mean))
        together.count = int(total(torch.tensor(self.count)))
        together.mean = total(self.mean * self.count) / max(together.count, 1)
        shift = self.mean - together.mean
        together._scatter = total(self._scatter.addr(shift, shift, alpha=self.count))
        return together

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` takes."""
        return dict(zip(TENSORS, (torch.tensor(self.count), self.mean, self._scatter), strict=True))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, where: str) -> Self:
        """The statistics that `tensors` gave. Raises ArtefactError for other ones; `where` they were found."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        dim = shapes.get("mean", (0,))[0]
        if shapes != {"count": (), "mean": (dim,), "scatter": (dim, dim)}:
            raise ArtefactError(f"{where}: holds {shapes}, not Gaussian statistics; make it again")
        statistics = cls(0)
        statistics.count = int(tensors["count"])
        statistics.mean, statistics._scatter = tensors["mean"], tensors["scatter"]
        return statistics


@torch.no_grad()
def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)); covariances may be singular, as with fewer samples than dim.

    With S_a = F F^T the eigenvalues of S_a S_b are those of F^T S_b F, which is symmetric and as small as the rank of
    S_a. Raises ValueError for features of different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions do not compare")
    # The set with fewer samples has the lower rank: its factor leaves no zeros to be rounded.
    few, many = sorted((a, b), key=lambda each: each.count if isinstance(each, GaussianStatistics) else torch.inf)
    covariances = few.covariance.double(), many.covariance.double()
    factor = _factor(covariances[0])
    product = factor.T @ covariances[1] @ factor
    overlap = _positive(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    between = (a.mean.double() - b.mean.double()).square().sum()
    within = covariances[0].trace() + covariances[1].trace()
    return max(float(between + within - 2 * overlap), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F F^T = `covariance`."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = _positive(values)
    return vectors[:, kept > 0] * kept[kept > 0].sqrt()


def _positive(eigenvalues: Tensor) -> Tensor:
    """Ascending eigenvalues of a positive matrix, 0 in place of those that are rounding noise."""
    if not len(eigenvalues):
        return eigenvalues
    noise = eigenvalues[-1].clamp(min=0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return eigenvalues.where(eigenvalues > noise, 0)
