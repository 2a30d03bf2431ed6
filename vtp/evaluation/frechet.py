"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017): FID, when the features are Inception's.

Statistics stream in float64 and the distance needs symmetric eigenproblems only. The usual sqrtm of a product that is
not symmetric is slow, and returns complex or wrong values for some versions of scipy and BLAS.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from vtp.distributed import gather_rows


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
        """Add features [B, D]. Batches are centred before they are squared (Chan et al. 1983)."""
        if not len(features):
            return
        values = features.cpu().double()
        total = self.count + len(values)
        mean = values.mean(0)
        shift = mean - self.mean
        between = shift * (self.count * len(values) / total) ** 0.5
        rows = torch.cat([values - mean, between[None]])
        self._scatter += rows.T @ rows
        self.mean += shift * (len(values) / total)
        self.count = total

    def merge(self, other: "GaussianStatistics") -> None:
        """Add what another has seen (Chan et al. 1983)."""
        if not other.count:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self._scatter += other._scatter + shift[:, None] * shift * (self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    def over_ranks(self) -> "GaussianStatistics":
        """The features of all ranks together, on every rank; each of them must ask."""
        parts = [gather_rows(part[None]) for part in (torch.tensor(self.count), self.mean, self._scatter)]
        together = GaussianStatistics(len(self.mean))
        for count, mean, scatter in zip(*parts, strict=True):  # in the order of ranks
            part = GaussianStatistics(len(mean))
            part.count, part.mean, part._scatter = int(count), mean, scatter
            together.merge(part)
        return together

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` takes."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The statistics that `tensors` gave."""
        statistics = cls(len(tensors["mean"]))
        statistics.count = int(tensors["count"])
        statistics.mean, statistics._scatter = tensors["mean"], tensors["scatter"]
        return statistics


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)); covariances may be singular, as with fewer samples than dim.

    Raises ValueError for features of different dimensions or values that are not finite.

    With S = F F^T, the trace of the root is the sum of the singular values of F_a^T F_b.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    if not all(bool(s.mean.isfinite().all() and s.covariance.isfinite().all()) for s in (a, b)):
        raise ValueError("the statistics hold values that are not finite; one image with NaN features is enough")
    between = (a.mean - b.mean).square().sum()
    within = a.covariance.trace() + b.covariance.trace()
    overlap = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(float(between + within - 2 * overlap), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F F^T = `covariance`; eigenvalues that are rounding noise are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
