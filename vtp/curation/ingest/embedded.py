"""The embedded data set as a source of shards: pictures that are drawn as they are written."""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby

from vtp.curation.ingest.compose import Composer, EmbeddedConfig, categories
from vtp.curation.ingest.encode import ImageConfig, draw
from vtp.curation.ingest.openmoji import attribution
from vtp.curation.ingest.source import Description
from vtp.data.shards import NO_LABEL, SampleRecord

FULL = "full"  # the style that keys do not tell
TEMPLATES = ["an emoji of a {}", "a picture of a {}", "a {}"]


class ComposedPictures:
    """Samples of the embedded data set by number; nothing but parameters travels to other processes.

    A composition has as many samples as captions, one behind the other: it is in one split.
    """

    def __init__(self, config: EmbeddedConfig, image: ImageConfig) -> None:
        self._config, self._image = config, image

    def __reduce__(self) -> tuple[type, tuple[EmbeddedConfig, ImageConfig]]:
        return ComposedPictures, (self._config, self._image)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples per split."""
        return self._config.samples

    @property
    def description(self) -> Description:
        """Classes are pictures, categories their emoji categories."""
        pictures = self._composer.pictures
        return Description(
            source="openmoji",
            classes=[picture.name for picture in pictures],
            class_ids=[picture.code for picture in pictures],
            templates=TEMPLATES,
            categories=categories(pictures),
            category_of_class=self._category_of_class,
            attribution=attribution(),
            learnt="classes" if self._config.labels == "drawing" else "categories",
        )

    def records(self, split: str, rows: range) -> Iterator[SampleRecord]:
        """Drawn one by one, a composition once for all of its captions that are asked for."""
        styles = self._config.captions
        for index, numbers in groupby(rows, key=lambda row: row // len(styles)):
            sample = self._composer.plan(split, index)
            stored = draw(self._composer.draw(sample), self._image)
            category = NO_LABEL if sample.label == NO_LABEL else self._category_of_class[sample.label]
            for number in numbers:
                style, caption = styles[number % len(styles)], sample.captions[number % len(styles)]
                key = f"{split}-{index:09d}" + ("" if style == FULL else f"-{style}")
                yield SampleRecord(key, *stored, caption, sample.label, category, sample.kind)

    @cached_property
    def _composer(self) -> Composer:
        return Composer(self._config)

    @cached_property
    def _category_of_class(self) -> list[int]:
        pictures = self._composer.pictures
        names = categories(pictures)
        return [names.index(picture.category) for picture in pictures]
