"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017): FID, when the features are Inception's.

Statistics stream in float64 and the distance needs eigenvalues of a symmetric matrix only. The usual sqrtm of a product
that is not symmetric is slow, and returns complex or wrong values for some versions of scipy and BLAS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.distributed import total
from vtp.finite import require_finite

BLOCK = 1024  # features that are squared at once


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
    """Mean and covariance of streamed features, in float64 on the CPU, since not every device has float64.

    Features wait until there are `BLOCK` of them, so that sums are the same whatever batches they come in.
    """

    def __init__(self, dim: int) -> None:
        self._seen = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # [D, D], sum of (x - mean)(x - mean)^T
        self._block = torch.empty(0, dim, dtype=torch.float64)  # [BLOCK, D] when it is needed
        self._waiting = 0  # rows of it that are not in the sums yet

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The statistics of features [N, D]."""
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def count(self) -> int:
        """Number of features."""
        return self._seen + self._waiting

    @property
    def mean(self) -> Tensor:
        """[D]."""
        self._fold()
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, these statistics hold {self.count}")
        self._fold()
        return self._scatter / (self._seen - 1)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features [B, D].

        Raises ValueError for another dimension, NotFiniteError for values that would spoil all.
        """
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"statistics of {len(self._mean)} dimensions, given features {list(features.shape)}")
        require_finite(features, "features", "check the weights and the model that made the images")
        if not len(self._block):
            self._block = torch.empty(BLOCK, len(self._mean), dtype=torch.float64)
        while len(features):
            room = self._block[self._waiting :][: len(features)]
            room.copy_(features[: len(room)])
            features, self._waiting = features[len(room) :], self._waiting + len(room)
            if self._waiting == BLOCK:
                self._fold()

    def _fold(self) -> None:
        """Add what waits, centred before it is squared (Chan et al. 1983)."""
        if not self._waiting:
            return
        values, self._waiting = self._block[: self._waiting], 0
        mean = values.mean(0)
        values -= mean
        # numpy sees that both factors are one, and computes half of the product.
        self._add(len(values), mean, torch.from_numpy(values.numpy().T @ values.numpy()))

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        grown, shift = self._seen + count, mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(shift, shift, alpha=self._seen * count / grown)
        self._mean += shift * (count / grown)
        self._seen = grown

    def merge(self, other: "GaussianStatistics") -> None:
        """Add what another has seen."""
        if other.count:
            self._fold()
            other._fold()
            self._add(other._seen, other._mean, other._scatter)

    def over_ranks(self) -> "GaussianStatistics":
        """The features of all ranks together, on every rank; each of them must ask."""
        self._fold()
        together = GaussianStatistics(len(self._mean))
        together._seen = int(total(torch.tensor(self._seen)))
        together._mean = total(self._mean * self._seen) / max(together._seen, 1)
        shift = self._mean - together._mean
        together._scatter = total(self._scatter.addr(shift, shift, alpha=self._seen))
        return together

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` takes."""
        self._fold()
        return {"count": torch.tensor(self._seen), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, where: str) -> Self:
        """The statistics that `tensors` gave. Raises ArtefactError for other ones; `where` they were found."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        dim = shapes.get("mean", (0,))[0]
        if shapes != {"count": (), "mean": (dim,), "scatter": (dim, dim)}:
            raise ArtefactError(f"{where}: holds {shapes}, not Gaussian statistics; make it again")
        for name in ("mean", "scatter"):
            require_finite(tensors[name], f"rows of {name} in {where}", "make it again")
        statistics = cls(0)
        statistics._seen = int(tensors["count"])
        statistics._mean, statistics._scatter = tensors["mean"], tensors["scatter"]
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
    covariance = few.covariance.double()
    within, factor = covariance.trace(), _factor(covariance)
    covariance = many.covariance.double()
    within += covariance.trace()
    product = factor.T @ (covariance @ factor)  # symmetric but for rounding: half of it is read
    overlap = _positive(torch.linalg.eigvalsh(product)).sqrt().sum()
    between = (a.mean.double() - b.mean.double()).square().sum()
    return max(float(between + within - 2 * overlap), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F F^T = `covariance`: its Cholesky decomposition with pivots, up to what is rounding noise.

    Eigenvectors would take ten times as long, and LAPACK does not always find those of few samples in many dimensions,
    where nearly all eigenvalues are zero.
    """
    from scipy.linalg import lapack

    decompose = lapack.dpstrf  # pyright: ignore[reportAttributeAccessIssue] - compiled
    lower, pivots, rank, _ = decompose(covariance.numpy(), lower=1)
    factor = torch.zeros(len(covariance), rank, dtype=covariance.dtype)
    factor[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(lower).tril()[:, :rank]
    return factor


def _positive(eigenvalues: Tensor) -> Tensor:
    """Ascending eigenvalues of a positive matrix, 0 in place of those that are rounding noise."""
    if not len(eigenvalues):
        return eigenvalues
    noise = eigenvalues[-1].clamp(min=0) * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return eigenvalues.where(eigenvalues > noise, 0)
