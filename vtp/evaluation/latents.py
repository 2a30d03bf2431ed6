"""What a tokenizer's latents are like, and what its decoder makes of noise on them.

A generator learns these latents channel by channel and token by token, so their scale, their correlation and the
decoder's tolerance decide how hard that is. A token is the d channels at one position. Everything streams in float64
with memory that does not grow with the images, and none of it depends on batches or ranks.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from vtp.distributed import total
from vtp.draws import torch_draws
from vtp.evaluation.frechet import GaussianStatistics
from vtp.finite import require_finite


class PowerSpectrum(NamedTuple):
    """Mean power of the channels, each divided by its variance, over rings of spatial frequency; white noise has 1."""

    frequency: Tensor  # [R] cycles per token, ascending
    power: Tensor  # [R]


class LatentDiagnostics(NamedTuple):
    """Figures and curves of all tokens."""

    mean: Tensor  # [d] per channel
    std: Tensor  # [d]
    spectrum: Tensor  # [d] eigenvalues of the tokens' covariance, descending
    mean_cosine: float  # of pairs of different tokens, all of them (Ethayarajh 2019: anisotropy)
    power: PowerSpectrum

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the covariance's singular values (Roy & Vetterli 2007), its eigenvalues: 1 to d."""
        return float(torch.special.entr(self.spectrum / self.spectrum.sum()).sum().exp())

    @property
    def largest_to_mean(self) -> float:
        """Largest eigenvalue of the covariance over the mean eigenvalue: 1 when isotropic, d on a line."""
        return float(self.spectrum[0] / self.spectrum.mean())

    def figures(self) -> dict[str, float]:
        """The numbers of the comparison table, by name."""
        return {
            "channel_mean_largest": float(self.mean.abs().max()),
            "channel_std_smallest": float(self.std.min()),
            "channel_std_median": float(self.std.median()),
            "channel_std_largest": float(self.std.max()),
            "anisotropy_mean_cosine": self.mean_cosine,
            "anisotropy_largest_to_mean_eigenvalue": self.largest_to_mean,
            "effective_rank": self.effective_rank,
        }


class LatentAccumulator:
    """Streams latents of one shape (d, h, w)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.tokens = GaussianStatistics(shape[0])
        # Sum of unit tokens, then how many there were: |sum|^2 holds the cosines of all pairs.
        self._directions = torch.zeros(shape[0] + 1, dtype=torch.float64)
        self._power = torch.zeros(shape, dtype=torch.float64)  # sum over images of |Fourier coefficient|^2

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Add latents [B, d, h, w]. Raises ValueError for another shape or values that are not finite."""
        if latents.shape[1:] != self.shape:
            raise ValueError(f"latents are {list(latents.shape[1:])}, the tokenizer says {list(self.shape)}")
        values = latents.cpu().double()
        require_finite(values, "images have latents that", "is the tokenizer sound?")
        tokens = values.movedim(1, -1).reshape(-1, self.shape[0])  # [B h w, d]
        self.tokens.update(tokens)
        lengths = tokens.norm(dim=1, keepdim=True)
        units = tokens / lengths.where(lengths > 0, 1)
        self._directions += torch.cat([units.sum(0), (lengths > 0).sum()[None]])
        self._power += torch.fft.fft2(values, norm="ortho").abs().square().sum(0)

    def over_ranks(self) -> Self:
        """The latents of all ranks together, on every rank; each of them must ask."""
        everything = type(self)(self.shape)
        everything.tokens = self.tokens.over_ranks()
        everything._directions = total(self._directions.clone())
        everything._power = total(self._power.clone())
        return everything

    def diagnostics(self) -> LatentDiagnostics:
        """All figures. Raises ValueError for fewer than two tokens, and for tokens that are all the same."""
        covariance = self.tokens.covariance
        spectrum = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
        if spectrum[0] == 0:
            raise ValueError("all latents are the same; is this tokenizer trained?")
        *_, count = self._directions.tolist()
        pairs = max(count * (count - 1), 1)
        cosine = (float(self._directions[:-1].square().sum()) - count) / pairs
        return LatentDiagnostics(
            self.tokens.mean, covariance.diagonal().sqrt(), spectrum, cosine, self._rings(covariance.diagonal())
        )

    def _rings(self, variance: Tensor) -> PowerSpectrum:
        _, height, width = self.shape
        images = self.tokens.count / (height * width)
        power = self._power / images
        power[:, 0, 0] -= height * width * self.tokens.mean.square()  # the channel's mean is no power
        alive = variance > 0
        power = (power[alive] / variance[alive, None, None]).mean(0)  # [h, w]
        rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
        radius = (rows.square() + columns.square()).sqrt().double()
        ring = (radius * max(height, width)).round().long().flatten()
        sizes = ring.bincount()
        filled = sizes > 0
        means = [torch.bincount(ring, weights=values.flatten())[filled] / sizes[filled] for values in (radius, power)]
        return PowerSpectrum(*means)


class LatentNoise:
    """Gaussian noise on latents, in units of each channel's standard deviation.

    That of an image is a function of the seed and its index, and the same at every level.
    """

    def __init__(self, seed: int, std: Tensor) -> None:
        self._seed = seed
        self._std = std[:, None, None]  # [d, 1, 1]

    def of(self, indices: list[int], latents: Tensor) -> Tensor:
        """Noise of level 1 for latents [B, d, h, w]."""
        draws = [torch.randn(latents.shape[1:], generator=torch_draws(self._seed, "latent noise", i)) for i in indices]
        return torch.stack(draws).to(latents) * self._std.to(latents)
