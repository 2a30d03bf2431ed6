"""The samples of shards by the sizes that their pictures are for."""

from pathlib import Path

import numpy as np
import torch

from vtp.artefact import load_tensors, save_tensors
from vtp.data.dataset import ShardDataset
from vtp.data.size_order import SampleBuckets
from vtp.data.sizes import SizesConfig
from vtp.distributed import gather_objects, ranks, total

NO_BUCKET = -1  # of a sample that takes no part


class ImageBuckets:
    """Those of the samples of shards. `labelled`: samples without a class take no part."""

    def __init__(self, images: ShardDataset, sizes: SizesConfig, *, labelled: bool) -> None:
        self._images, self._sizes, self._labelled = images, sizes, labelled

    def of_shard(self, shard: int) -> np.ndarray:
        """The bucket of every sample of a shard, [n]; a negative number where it takes no part."""
        sides = self._images.sides(shard)
        buckets = self._sizes.bucket_of(sides.widths, sides.heights)
        return np.where(sides.labelled, buckets, NO_BUCKET) if self._labelled else buckets

    def samples(self, kept: Path) -> SampleBuckets:
        """With their counts, for which all ranks together read all tables once; a file `kept` of before spares that."""
        shape = len(self._images.shards), len(self._sizes.ratios), len(self._sizes.short_edges)
        if gather_objects(kept.exists())[0]:
            counts = load_tensors(kept)["counts"]
        else:
            counts = torch.zeros(shape[0], shape[1] * shape[2], dtype=torch.int64)
            for shard in range(ranks().rank, shape[0], ranks().size):
                buckets = self.of_shard(shard)
                counts[shard] = torch.from_numpy(np.bincount(buckets[buckets >= 0], minlength=counts.shape[1]))
            total(counts)
            if ranks().first:
                save_tensors(kept, {"counts": counts})
        return SampleBuckets(counts.numpy().reshape(shape), self.of_shard, self._images.sizes, list(self._sizes.ratios))
