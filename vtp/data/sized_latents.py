"""Cached latents of pictures of several sizes: every picture at each short edge that it is large enough for.

There is a file, or several, for every size. Files of one ratio hold the same pictures in the same order, those first that
are large enough for the most edges; so each is the beginning of that of the next smaller edge, and a picture has one number
in all of them.
"""

from pathlib import Path

import numpy as np
import torch

from vtp.artefact import ArtefactError
from vtp.data.latents import REMEDY, LatentDataset, read_latents_config, sized_split
from vtp.data.size_order import SampleBuckets, SizedBatch
from vtp.layers.latent_space import LatentSpace


def space_of(folder: Path) -> LatentSpace:
    """What the latents of a folder mean, be they of one size or of several."""
    sized = read_latents_config(folder).sizes is not None
    return (SizedLatents(folder) if sized else LatentDataset(folder)).space


def squares_of(folder: Path) -> LatentDataset:
    """Training latents of squares: all, or of several sizes those of the smallest squares, which not all pictures are."""
    sizes = read_latents_config(folder).sizes
    return LatentDataset(folder, "train" if sizes is None else sized_split(sizes.square))


class SizedLatents:
    """The training latents of such a folder. Raises ArtefactError when it is another, or a file is not as it was written."""

    def __init__(self, folder: Path) -> None:
        config = read_latents_config(folder)
        if config.sizes is None:
            raise ArtefactError(
                f"{folder}: latents of squares alone; set cache_latents.sizes for those of several sizes"
            )
        self.folder, self.config, self.sizes = folder, config, config.sizes
        splits = [[sized_split(size) for size in of_ratio] for of_ratio in config.sizes.sizes]
        self._parts = [
            [LatentDataset(folder, split) if split in config.splits else None for split in of_ratio]
            for of_ratio in splits
        ]
        lengths = np.array([[len(part or ()) for part in parts] for parts in self._parts])  # [R, E]
        if (np.diff(lengths, axis=1) > 0).any() or not lengths.any():
            raise ArtefactError(f"{folder / 'config.json'}: sizes are not what its files are of; {REMEDY}")
        self._first = np.concatenate([[0], np.cumsum(lengths[:, 0])])  # of the numbers of each ratio
        # By the number of edges: those of one edge are in the file of the smallest alone.
        self._counts = lengths - np.pad(lengths[:, 1:], ((0, 0), (0, 1)))

    def __len__(self) -> int:
        """Pictures."""
        return int(self._first[-1])

    @property
    def buckets(self) -> SampleBuckets:
        """Of all pictures, as if they lay in one shard."""
        return SampleBuckets(self._counts[None], self._of_shard, [len(self)], list(self.sizes.ratios))

    def _of_shard(self, shard: int) -> np.ndarray:
        edges = len(self.sizes.short_edges)
        descending = self._counts[:, ::-1].flatten()
        places = np.arange(self._counts.size).reshape(-1, edges)[:, ::-1].flatten()
        return np.repeat(places, descending)

    @property
    def parts(self) -> dict[tuple[int, int], LatentDataset]:
        """By the places of ratio and edge."""
        return {
            (ratio, edge): part
            for ratio, parts in enumerate(self._parts)
            for edge, part in enumerate(parts)
            if part is not None
        }

    def of_size(self, ratio: int, edge: int) -> LatentDataset:
        """Those of one size, by the places of its ratio and of its edge. Raises KeyError where there are none."""
        part = self._parts[ratio][edge]
        if part is None:
            raise KeyError(f"no latents of {self.sizes.sizes[ratio][edge]}")
        return part

    def rows(self, batch: SizedBatch) -> np.ndarray:
        """Where the pictures of a batch are among those of its size."""
        return batch.numbers - self._first[batch.ratio]

    @property
    def space(self) -> LatentSpace:
        """What these latents mean, and which classes are none of theirs."""
        smallest = [parts[0] for parts in self._parts if parts[0] is not None]
        labels = torch.cat([part.labels for part in smallest]).unique().tolist()
        untrained = sorted(set(range(len(self.config.classes))) - set(labels))
        return smallest[0].space._replace(untrained=untrained)
