"""What is kept of the features of a set of images while they stream by: statistics of all, features of some.

Several networks may look at the same images: a `FeatureSets` has a set for each.
"""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from vtp.distributed import gather_rows
from vtp.evaluation.features import FeatureExtractor
from vtp.evaluation.frechet import GaussianStatistics
from vtp.evaluation.networks import Extracted

POOLED, SPATIAL, FEATURES = "pooled_", "spatial_", "features"


class FeatureSet:
    """Statistics of pooled and spatial features, and the pooled features of those images that were to be kept."""

    def __init__(self, dim: int, spatial_dim: int | None) -> None:
        self.statistics = GaussianStatistics(dim)
        self.spatial = None if spatial_dim is None else GaussianStatistics(spatial_dim)
        self._kept = [torch.empty(0, dim)]

    @classmethod
    def of(cls, extractor: FeatureExtractor) -> Self:
        """An empty set of what `extractor` gives."""
        return cls(extractor.dim, extractor.spatial_dim)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.statistics.count

    @property
    def features(self) -> Tensor:
        """Pooled features [kept, D] float32, on the CPU, in the order of the images."""
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def update(self, extracted: Extracted, *, keep: int) -> None:
        """Add a batch; the features of its first `keep` images stay."""
        self.statistics.update(extracted.pooled)
        if self.spatial is not None:
            assert extracted.spatial is not None
            self.spatial.update(extracted.spatial)
        if keep > 0:
            self._kept.append(extracted.pooled[:keep].float().cpu())

    def merge(self, other: "FeatureSet") -> None:
        """Add the images of another set behind these."""
        self.statistics.merge(other.statistics)
        if self.spatial is not None:
            assert other.spatial is not None
            self.spatial.merge(other.spatial)
        self._kept += other._kept

    def over_ranks(self) -> "FeatureSet":
        """The images of all ranks, in the order of ranks, on every rank; each of them must ask."""
        together = FeatureSet(len(self.statistics.mean), None)
        together.statistics = self.statistics.over_ranks()
        together.spatial = None if self.spatial is None else self.spatial.over_ranks()
        together._kept = [gather_rows(self.features)]
        return together

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` takes."""
        tensors = {FEATURES: self.features}
        for prefix, statistics in ((POOLED, self.statistics), (SPATIAL, self.spatial)):
            if statistics is not None:
                tensors |= {prefix + name: value for name, value in statistics.tensors().items()}
        return tensors

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, where: str) -> Self:
        """The set that `tensors` gave. Raises ArtefactError for other ones; `where` they were found."""
        parts = {
            prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (POOLED, SPATIAL)
        }
        feature_set = cls(0, None)
        feature_set.statistics = GaussianStatistics.of_tensors(parts[POOLED], where=where)
        if parts[SPATIAL]:
            feature_set.spatial = GaussianStatistics.of_tensors(parts[SPATIAL], where=where)
        feature_set._kept = [tensors.get(FEATURES, torch.empty(0, len(feature_set.statistics.mean)))]
        return feature_set


class FeatureSets(dict[str, FeatureSet]):
    """The features of the same images by the names of networks."""

    @classmethod
    def of(cls, extractors: Mapping[str, FeatureExtractor]) -> Self:
        """Empty sets of what `extractors` give."""
        return cls({name: FeatureSet.of(extractor) for name, extractor in extractors.items()})

    @property
    def count(self) -> int:
        """Number of images."""
        return next(iter(self.values())).count

    def add(self, extracted: Mapping[str, Extracted], *, keep: int) -> None:
        """Add a batch; the features of its first `keep` images stay."""
        for name, feature_set in self.items():
            feature_set.update(extracted[name], keep=keep)

    def merge(self, other: "FeatureSets") -> None:
        """Add the images of other sets behind these."""
        for name, feature_set in self.items():
            feature_set.merge(other[name])

    def over_ranks(self) -> "FeatureSets":
        """The images of all ranks, in the order of ranks, on every rank; each of them must ask."""
        return FeatureSets({name: feature_set.over_ranks() for name, feature_set in self.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` takes."""
        return {f"{name}/{key}": value for name, of in self.items() for key, value in of.tensors().items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], names: Iterable[str], *, where: str) -> Self:
        """The sets that `tensors` gave, of networks with these names. Raises ArtefactError for other ones."""
        sets = cls()
        for name in names:
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            sets[name] = FeatureSet.of_tensors(own, where=f"{name} in {where}")
        return sets
