"""Cached latents: sharded safetensors with labels, and the statistics that normalise them.

Shards are memory-mapped once; a random minibatch touches only its own rows.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import ArtefactError, load_tensors, read_json, save_tensors, write_json

FORMAT_VERSION = 1


class LatentStatistics(NamedTuple):
    """Mean and standard deviation per channel over a whole cache, [1, d, 1, 1]."""

    mean: Tensor
    std: Tensor

    def normalise(self, latents: Tensor) -> Tensor:
        """To zero mean and unit variance per channel."""
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Back to the tokenizer's own scale."""
        return latents * self.std.to(latents) + self.mean.to(latents)


class LatentWriter:
    """Writes shards of latents as they are encoded; shards that are already whole are kept."""

    def __init__(self, folder: Path, *, shard_size: int) -> None:
        self.folder = folder
        self.shard_size = shard_size
        folder.mkdir(parents=True, exist_ok=True)

    def missing(self, total: int) -> Iterable[tuple[Path, range]]:
        """Path and rows of every shard that is not there yet."""
        for number, first in enumerate(range(0, total, self.shard_size)):
            path = self.folder / shard_name(number)
            if not path.exists():
                yield path, range(first, min(first + self.shard_size, total))

    @staticmethod
    def write(path: Path, latents: Tensor, labels: Tensor) -> None:
        """One whole shard: latents [n, d, h, w], labels [n]."""
        save_tensors(path, {"latents": latents, "labels": labels.to(torch.int64)})

    def finish(self, total: int, description: Mapping[str, Any]) -> None:
        """Statistics in float64 over all shards, and `config.json`."""
        count, first, second = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        names = [shard_name(number) for number in range(-(-total // self.shard_size))]
        for name in names:
            wide = load_tensors(self.folder / name)["latents"].double()
            values = wide.transpose(0, 1).flatten(1)  # [d, n * h * w]
            first = first + values.sum(1) if count else values.sum(1)
            second = second + values.square().sum(1) if count else values.square().sum(1)
            count += values.shape[1]
        mean = first / count
        std = (second / count - mean.square()).clamp_min(0).sqrt()
        if not bool((std > 0).all()):
            dead = int((std == 0).sum())
            raise ArtefactError(f"{dead} latent channels are constant over the data set: the encoder has collapsed")
        statistics = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}
        save_tensors(self.folder / "statistics.safetensors", statistics)
        config = {"format_version": FORMAT_VERSION, "samples": total, "shards": names, **description}
        write_json(self.folder / "config.json", config)


class LatentDataset:
    """A folder of cached latents. Raises ArtefactError when it is incomplete."""

    def __init__(self, folder: Path) -> None:
        self.config = read_json(folder / "config.json")
        if self.config.get("format_version") != FORMAT_VERSION:
            version = self.config.get("format_version")
            raise ArtefactError(f"{folder}: latents of format {version!r}, this code reads {FORMAT_VERSION}")
        shards = [load_tensors(folder / name) for name in self.config["shards"]]
        self._latents = [shard["latents"] for shard in shards]
        self._starts = np.cumsum([0, *(len(latents) for latents in self._latents)])
        self.labels = torch.cat([shard["labels"] for shard in shards])
        if len(self.labels) != self.config["samples"]:
            raise ArtefactError(
                f"{folder}: {len(self.labels)} latents, config.json says {self.config['samples']}; cache them again"
            )
        self.statistics = LatentStatistics(**load_tensors(folder / "statistics.safetensors"))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w)."""
        channels, height, width = self._latents[0].shape[1:]
        return channels, height, width

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.config["classes"]

    def rows(self, indices: np.ndarray) -> Tensor:
        """Latents [n, d, h, w] in float32, as the tokenizer gave them."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = indices - self._starts[shards]
        rows = [self._latents[shard][offset] for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True)]
        return torch.stack(rows).float()


def shard_name(number: int) -> str:
    """`latents-00000.safetensors`."""
    return f"latents-{number:05d}.safetensors"
