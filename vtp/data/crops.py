"""Centre crops of the pictures of a split, decoded by worker processes ahead of their use."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vtp.data.dataset import ShardDataset
from vtp.data.loader import load_batches
from vtp.host import Host


class Crops(NamedTuple):
    """A batch."""

    pixels: Tensor  # [B, 3, S, S] uint8


class CroppedImages(Dataset[Crops]):
    """Batches of the pictures `rows`, squares of `size` pixels as ADM cuts them."""

    def __init__(self, images: ShardDataset, batches: Sequence[np.ndarray], size: int) -> None:
        self.images = images
        self.batches = batches
        self.size = size

    def __getitem__(self, index: int) -> Crops:
        return Crops(self.images.images(self.batches[index], self.size))


def cropped(
    images: ShardDataset, batches: Sequence[np.ndarray], size: int, host: Host
) -> Generator[Tensor, None, None]:
    """The batches in turn [B, 3, S, S] uint8, on the device; close what is not read to its end."""
    for batch in load_batches(CroppedImages(images, batches, size), range(len(batches)), host):
        yield batch.pixels
