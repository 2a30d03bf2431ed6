"""One pass over images that are scored: features, files, measures of prompts and pictures, from the same pixels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config, Distinct
from vtp.distributed import gather_rows, own_rows, ranks
from vtp.evaluation.export import SampleWriter
from vtp.evaluation.feature_set import FeatureSets
from vtp.evaluation.features import FeatureExtractor, extract
from vtp.evaluation.image_sets import ImageSet
from vtp.evaluation.prompt_measures import PromptMeasure


class ViewingConfig(Config):
    """How images are looked at."""

    counts: Annotated[list[Annotated[int, Field(ge=2)]], Distinct] = Field(
        min_length=1, description="how many of the samples are compared, the first so many; published: 10000, 50000"
    )
    batch_size: int = Field(ge=1, description="images of a forward pass")
    pictures_per_class: int = Field(ge=1, description="samples that are shown of every class")
    pictured_classes: int = Field(ge=1, description="classes, or prompts, that are shown, the first so many")


class Viewing:
    """A pass over a set of images; ranks share whole batches, so that rounding does not depend on their number."""

    def __init__(self, images: ImageSet, config: ViewingConfig, *, side: int) -> None:
        self._images, self._config = images, config
        labels = images.labels
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.long)
        self._labels = labels  # [N]
        self.pictured = labels.unique()[: config.pictured_classes].tolist()  # labels; not all need be drawn
        self._wanted = [(labels == label).nonzero()[: config.pictures_per_class, 0] for label in self.pictured]
        self._pictured = torch.cat(self._wanted)  # indices
        self._seen = [(torch.empty(0, dtype=torch.long), torch.empty(0, 3, side, side, dtype=torch.uint8))]

    def features(
        self,
        extractors: Mapping[str, FeatureExtractor],
        writer: SampleWriter | None,
        measures: Sequence[PromptMeasure],
        report: Callable[[int], object],
    ) -> list[FeatureSets]:
        """Of the first samples, one set per count, on every rank.

        Pixels go to `writer`, to `measures` with what they were asked, and to the pictures on their way.
        """
        sets, reported, size = [FeatureSets.of(extractors) for _ in self._config.counts], 0, self._config.batch_size
        numbers, prompts = own_rows(-(-len(self._labels) // size)), self._images.prompts or [] if measures else []
        for number, images in zip(numbers, self._images.batches(size, numbers), strict=True):
            first = number * size
            extracted = extract(extractors, images)
            for features, count in zip(sets, self._config.counts, strict=True):
                if first < count:
                    part = {name: of.first(count - first) for name, of in extracted.items()}
                    features.add(part, keep=count - first)
            if writer is not None:
                writer.add(first, images)
            for measure in measures:
                measure.add(images, prompts[first : first + len(images)])
            indices = torch.arange(first, first + len(images))
            here = torch.isin(indices, self._pictured)
            self._seen.append((indices[here], images.cpu()[here]))
            report(len(images) * ranks().size)
            reported += len(images) * ranks().size
        report(len(self._labels) - reported)
        if writer is not None:
            writer.finish(self._labels)
        return [features.over_ranks() for features in sets]

    def shown(self) -> list[Tensor]:
        """The pictured samples [n, 3, S, S] uint8 of every pictured class."""
        indices, images = (gather_rows(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        return [images[torch.isin(indices, wanted)] for wanted in self._wanted]
