"""Figures of generated images in the features of one network, beside those of real ones."""

from collections.abc import Mapping
from statistics import mean
from typing import Literal, NamedTuple, Self

from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.evaluation.class_probe import ClassProbe, ClassProbeConfig
from vtp.evaluation.feature_set import FeatureSet, FeatureSets
from vtp.evaluation.features import FeatureExtractor, count_name
from vtp.evaluation.frechet import Gaussian, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall

Distance = Literal["gfid", "rfid"]  # of samples, of reconstructions


class KernelConfig(Config):
    """Random subsets behind the kernel distance; 100 of 1000 for published numbers."""

    subsets: int = Field(ge=1, description="number of random subsets that are averaged; published: 100")
    subset_size: int = Field(ge=2, description="images of a subset; published: 1000")
    seed: int = Field(ge=0, lt=2**32, description="seed of the choice of subsets")


class ComparisonConfig(Config):
    """How two sets of features are compared."""

    neighbours: int = Field(ge=1, description="k of precision and recall")
    kernel: KernelConfig | None = Field(description="subsets of the kernel distance (KID); null leaves it out")
    inception_split_size: int = Field(
        ge=1, description="samples of a split of the inception score, where features have classes; published: 5000"
    )
    class_probe: ClassProbeConfig | None = Field(
        description="probe that tells whether samples show their class; null leaves it out"
    )

    @property
    def compared(self) -> int:
        """Features of real images, and of samples, that distances between points need at least."""
        return max(self.neighbours + 1, self.kernel.subset_size if self.kernel else 0)


class RealImages(NamedTuple):
    """What samples are compared with."""

    suffix: str  # of metric names
    statistics: Gaussian
    spatial: Gaussian | None
    features: Tensor  # [n, D]

    @classmethod
    def of(cls, features: FeatureSet) -> Self:
        """The images of a reference."""
        return cls("", features.statistics, features.spatial, features.features)


class Ratio(NamedTuple):
    """What Fréchet distances are held against: those of held-out real images, by network. Their ratio's mean is FDr."""

    held: int  # images that were held out
    units: Mapping[str, float]

    @classmethod
    def of(cls, held: FeatureSets, learnt: FeatureSets) -> Self:
        """Distances of the images of one split to those of another."""
        return cls(
            held.count, {name: frechet_distance(held[name].statistics, learnt[name].statistics) for name in held}
        )

    @property
    def real(self) -> dict[str, float]:
        """The distances by name."""
        return {f"fid_{name}_{count_name(self.held)}_real": value for name, value in self.units.items()}

    def figures(
        self, sets: FeatureSets, table: Mapping[str, float], distance: Distance, drawn: str
    ) -> dict[str, float]:
        """The mean over networks of distances in `table` over those of held-out images, which score 1, by name."""
        number = count_name(sets.count)
        ratios = [table[f"{distance}_{name}_{number}_{drawn}"] / unit for name, unit in self.units.items()]
        return {f"fdr{len(ratios)}_{number}_vs{count_name(self.held)}_{drawn}": mean(ratios)}


class Judge:
    """Scores sets of images in the features of one network; `reals` are what they are compared with."""

    def __init__(
        self, extractor: FeatureExtractor, reals: list[RealImages], probe: ClassProbe | None, config: ComparisonConfig
    ) -> None:
        self._extractor, self._reals, self._probe, self._config = extractor, reals, probe, config

    @property
    def ceiling(self) -> dict[str, float]:
        """Of the probe, by name: nothing without one."""
        if self._probe is None:
            return {}
        return {f"class_accuracy_{self._extractor.name}_{count_name(self._probe.held)}_real": self._probe.ceiling}

    def figures(
        self, generated: FeatureSet, labels: Tensor | None, *, distance: Distance, drawn: str
    ) -> dict[str, float]:
        """All figures of a set of images with `labels` [N], by name, which ends with how they were `drawn`."""
        table: dict[str, float] = {}
        samples = f"{self._extractor.name}_{count_name(generated.count)}"
        features = generated.features.to(self._extractor.device)
        if self._extractor.has_logits:
            logits = self._extractor.logits(generated.features)
            table[f"is_{samples}_{drawn}"] = inception_score(logits, split_size=self._config.inception_split_size).mean
        for real in self._reals:
            table |= self._compare(generated, features, real, distance, samples, drawn + real.suffix)
        if self._probe is not None and labels is not None:
            right = self._probe.accuracy(generated.features, labels[: generated.count])
            table[f"class_accuracy_{samples}_{drawn}"] = right
        return table

    def _compare(
        self, generated: FeatureSet, fake: Tensor, real: RealImages, distance: Distance, samples: str, drawn: str
    ) -> dict[str, float]:
        features = real.features[: generated.count].to(fake.device)
        table = {f"{distance}_{samples}_{drawn}": frechet_distance(generated.statistics, real.statistics)}
        if distance == "gfid" and generated.spatial is not None and real.spatial is not None:
            table[f"sfid_{samples}_{drawn}"] = frechet_distance(generated.spatial, real.spatial)
        if (kernel := self._config.kernel) is not None:
            subsets = {"subsets": kernel.subsets, "subset_size": kernel.subset_size, "seed": kernel.seed}
            table[f"kid_{samples}_{drawn}"] = kernel_distance(fake, features, **subsets).mean
        manifold = precision_recall(features, fake, neighbours=self._config.neighbours)
        against = f"{samples}_vs{count_name(len(features))}_{drawn}"
        return table | {f"precision_{against}": manifold.precision, f"recall_{against}": manifold.recall}
