"""The space in which a generator works: latents of one encoder, normalised per channel, and the classes of its labels."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vtp.artefact import ArtefactError, load_tensors, save_tensors


class LatentStatistics(NamedTuple):
    """Mean and standard deviation per channel over a whole cache, [1, d, 1, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, path: Path) -> "LatentStatistics":
        """Raises ArtefactError when the file is missing, damaged or another."""
        tensors = load_tensors(path)
        if tensors.keys() != {"mean", "std"}:
            raise ArtefactError(f"{path}: holds {', '.join(sorted(tensors))}, expected mean and std; make it again")
        mean, std = tensors["mean"], tensors["std"]
        if mean.ndim != 4 or mean.shape != std.shape or mean.shape != (1, mean.shape[1], 1, 1):
            raise ArtefactError(
                f"{path}: mean {list(mean.shape)} and std {list(std.shape)}, expected [1, channels, 1, 1]; make it again"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ArtefactError(f"{path}: mean or std of some channels is no number, or std not above 0; make it again")
        return cls(**tensors)

    def save(self, path: Path) -> None:
        """One safetensors file."""
        save_tensors(path, self._asdict())

    def normalise(self, latents: Tensor) -> Tensor:
        """To zero mean and unit variance per channel."""
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Back to the tokenizer's own scale."""
        return latents * self.std.to(latents) + self.mean.to(latents)


class LatentSpace(NamedTuple):
    """What latents mean, whoever holds them."""

    encoder: str  # digest of the encoder whose latents these are
    classes: list[str]  # names, in the order of the labels
    statistics: LatentStatistics
    untrained: list[int]  # labels of classes without a training picture: a generator knows nothing of them
    pixels_per_latent: int | None  # along a side; None: nobody says

    @property
    def labels(self) -> list[int]:
        """Those of the classes that had training pictures."""
        return sorted(set(range(len(self.classes))) - set(self.untrained))
