"""Features of real images, once: what rFID and gFID compare reconstructions and samples with (paper 4.1).

rFID's are the centre-cropped images of the split that is reconstructed, gFID's those that the generator learnt.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stages._runner import Input, Output, Work, main
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.distributed import gather_rows, own_rows, ranks
from vtp.evaluation.features import FeatureExtractor, FeaturesConfig, build_features
from vtp.evaluation.frechet import GaussianStatistics
from vtp.evaluation.reference import SplitConfig, SplitReference, rows_of, save_reference


class ReferenceStatistics(Config):
    """The section `reference`."""

    features: FeaturesConfig
    image_size: int = Field(ge=1, description="side of the crops, that of the tokenizer")
    batch_size: int = Field(ge=1)
    splits: dict[str, SplitConfig] = Field(min_length=1)


@torch.inference_mode()
def run(config: ReferenceStatistics, *, shards: Input, reference: Output, work: Work) -> None:
    extractor = build_features(config.features, weights=work.weights, device=work.device)
    images = {name: ShardDataset(shards, name, cache=work.cache) for name in config.splits}
    rows = {name: rows_of(images[name], split) for name, split in config.splits.items()}
    batches = {name: np.split(of, range(config.batch_size, len(of), config.batch_size)) for name, of in rows.items()}
    # Ranks share whole batches: what an image is computed with, and so its rounding, depends on no number of ranks.
    own = {name: [of[index] for index in own_rows(len(of))] for name, of in batches.items()}
    total = sum(len(batch) for of in own.values() for batch in of)
    splits = {}
    with work.progress(total=total, description="features", unit="image") as bar:
        for name, split in config.splits.items():
            statistics = _Statistics(extractor, kept=split.kept)
            first = 0 if not own[name] else int(np.searchsorted(rows[name], own[name][0][0]))
            for batch in own[name]:
                statistics.add(images[name].images(batch, config.image_size), first)
                first += len(batch)
                bar.update(len(batch))
            splits[name] = statistics.over_ranks(rows[name])
    if ranks().first:
        description = {"features": config.features.model_dump(mode="json"), "image_size": config.image_size}
        save_reference(reference, images, splits, description)
    work.record(**{f"images_{name}": len(of) for name, of in rows.items()})


class _Statistics:
    """Streams images of a split; the features of the first `kept` stay."""

    def __init__(self, extractor: FeatureExtractor, *, kept: int) -> None:
        self._extractor = extractor
        self._kept = kept
        self._pooled = GaussianStatistics(extractor.dim)
        self._spatial = None if extractor.spatial_dim is None else GaussianStatistics(extractor.spatial_dim)
        self._features = [torch.empty(0, extractor.dim)]

    def add(self, images: Tensor, first: int) -> None:
        """Images whose number in the split starts at `first`."""
        found = self._extractor(images)
        self._pooled.update(found.pooled)
        if self._spatial is not None:
            assert found.spatial is not None
            self._spatial.update(found.spatial)
        self._features.append(found.pooled[: max(0, self._kept - first)].float().cpu())

    def over_ranks(self, rows: np.ndarray) -> SplitReference:
        """All ranks together."""
        spatial = self._spatial.over_ranks() if self._spatial is not None else None
        return SplitReference(rows, self._pooled.over_ranks(), spatial, gather_rows(torch.cat(self._features)))


if __name__ == "__main__":
    main(run, distributed=True)
