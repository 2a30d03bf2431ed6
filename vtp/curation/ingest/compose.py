"""Compose captioned pictures: single ones for class conditions, and scenes whose captions say what is where.

Sample i of a split is a function of the parameters and (seed, split, i), so any number of samples is one parameter and
validation holds compositions that training never sees. Splits of other names have compositions of their own.
"""

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from vtp.config import Config, Distinct
from vtp.curation.ingest.arrange import Arrangement, Arranger, Canvas
from vtp.curation.ingest.held_out import HeldOutCombinations, HeldOutConfig
from vtp.curation.ingest.openmoji import Picture, all_names, catalogue, render
from vtp.curation.ingest.scenes import BACKGROUNDS, INKS, CaptionGrammar, CaptionStyle, SceneKind
from vtp.curation.ingest.words import LEAST_SIZE, Vocabulary, WordsConfig, write
from vtp.data.shards import NO_LABEL
from vtp.draws import address, numpy_draws

if TYPE_CHECKING:
    from PIL.Image import Image

SampleKind = Literal["single", "scene"]
OVERSAMPLING = 2  # pictures are drawn once at this multiple of the image size, then turned and shrunk


class EmbeddedConfig(Config):
    """The embedded data set: OpenMoji pictures on plain backgrounds."""

    name: Literal["openmoji"]
    seed: int = Field(description="seed of the compositions")
    image_size: int = Field(ge=8, description="short edge in pixels")
    aspect_ratios: Annotated[list[Annotated[float, Field(ge=0.25, le=4)]], Distinct] = Field(
        min_length=1, description="widths over heights, of which one is drawn for each picture"
    )
    classes: int = Field(ge=3, description="number of pictures; each is a class, its emoji category a second label")
    labels: Literal["drawing", "category"] = Field(
        description="what generators are given as label, and samples are judged by: the class, or its category, which "
        "says less than captions do; probes and prompts ask for the class either way"
    )
    captions: Annotated[list[CaptionStyle], Distinct] = Field(
        min_length=1,
        description="captions of every composition, each of which makes it a sample: full ones say all, short ones "
        "leave out the colours",
    )
    train_samples: int = Field(ge=1, description="number of training compositions")
    validation_samples: int = Field(ge=1, description="held-out compositions of the same classes")
    held_out: HeldOutConfig | None = Field(
        description="combinations that training never shows, and validation alone; null: both splits show all"
    )
    scene_fraction: float = Field(ge=0, le=1, description="share of the compositions that are scenes")
    scenes: Annotated[list[SceneKind], Distinct] = Field(
        min_length=1,
        description="kinds of scenes, which come in turn: pictures at named places, one to four equal ones (counts), two "
        "in a relation, written words",
    )
    words: WordsConfig | None = Field(description="words that scenes of words show; null: there are no such scenes")
    scale_min: float = Field(gt=0, le=1, description="size of a single picture, in shares of the short edge")
    scale_max: float = Field(gt=0, le=1, description="largest size of a single picture, in shares of the short edge")
    rotation: float = Field(ge=0, le=180, description="largest turn of a picture in degrees")

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is above scale_max {self.scale_max}")
        return self

    @model_validator(mode="after")
    def _words_are_read(self) -> Self:
        if (self.words is None) == ("words" in self.scenes):
            said = "scenes have words, and words is null" if self.words is None else "words are given, scenes have none"
            raise ValueError(f"{said}; set both or none")
        if self.words is not None and self.image_size < self.words.least_side:
            raise ValueError(
                f"words.letters {self.words.letters}: so many letters of {LEAST_SIZE} pixels need an image_size of "
                f"{self.words.least_side}, given {self.image_size}; raise it, or take shorter words"
            )
        return self

    @property
    def samples(self) -> dict[str, int]:
        """Samples by split: every composition once for each of its captions."""
        compositions = {"train": self.train_samples, "validation": self.validation_samples}
        return {split: count * len(self.captions) for split, count in compositions.items()}


class Sample(NamedTuple):
    """What is drawn, and what is said about it."""

    kind: SampleKind
    label: int  # NO_LABEL for scenes
    arrangement: Arrangement
    captions: tuple[str, ...]  # of each style


class Composer:
    """Plans and draws samples."""

    def __init__(self, config: EmbeddedConfig) -> None:
        self.config = config
        self.pictures = catalogue(config.classes)
        self._drawings: dict[int, Image] = {}
        self._captions = CaptionGrammar([picture.name for picture in self.pictures])
        vocabulary = None if config.words is None else Vocabulary(config.words, all_names())
        self._arranger = Arranger(config.classes, config.rotation, vocabulary)
        self._held_out = None
        if config.held_out is not None:
            self._held_out = HeldOutCombinations(config.held_out, seed=config.seed, classes=config.classes)
            self._held_out.require_words([] if vocabulary is None else vocabulary.dictionary)

    def plan(self, split: str, index: int, canvas: Canvas | None = None) -> Sample:
        """Sample `index` of a split, or the same on another canvas; labels of successive singles run through the classes."""
        config = self.config
        canvas = canvas or self.canvas(split, index)
        draws = numpy_draws(config.seed, f"compose/{split}", index)
        while True:
            arrangement = self._arrange(draws, index, canvas)
            if self._held_out is None or self._held_out.admits(split, arrangement.scene):
                break
        kind = "scene" if is_scene(index, config.scene_fraction) else "single"
        captions = tuple(
            self._captions.write(arrangement.scene, style, arrangement.variant) for style in config.captions
        )
        return Sample(kind, self.label(index), arrangement, captions)

    def label(self, index: int) -> int:
        """The class of sample `index` of any split: singles run through the classes, scenes have none."""
        fraction = self.config.scene_fraction
        if is_scene(index, fraction):
            return NO_LABEL
        return (index - int(index * fraction)) % self.config.classes

    def canvas(self, split: str, index: int) -> Canvas:
        """Width and height of sample `index` of a split in pixels."""
        ratios, side = self.config.aspect_ratios, self.config.image_size
        ratio = ratios[address(self.config.seed, f"compose/{split}/ratio", index) % len(ratios)]
        return round(side * max(ratio, 1)), round(side / min(ratio, 1))

    def draw(self, sample: Sample) -> "Image":
        """The picture, RGB."""
        from PIL import Image

        arrangement = sample.arrangement
        canvas = Image.new("RGB", arrangement.canvas, BACKGROUNDS[str(arrangement.scene.background)])
        for place in arrangement.places:
            drawing = self._drawing(place.label).rotate(place.turn, Image.Resampling.BICUBIC)
            size = max(1, round(place.size))
            drawing = drawing.resize((size, size), Image.Resampling.LANCZOS)
            corner = (round(place.centre[0] - size / 2), round(place.centre[1] - size / 2))
            canvas.paste(drawing, corner, drawing)
        if (lettering := arrangement.lettering) is not None:
            write(canvas, lettering, INKS[lettering.ink])
        return canvas

    def _arrange(self, draws: np.random.Generator, index: int, canvas: Canvas) -> Arrangement:
        config = self.config
        background = list(BACKGROUNDS)[draws.integers(len(BACKGROUNDS))]
        if is_scene(index, config.scene_fraction):
            kind = config.scenes[int(index * config.scene_fraction) % len(config.scenes)]
            return self._arranger.scene(kind, draws, canvas, background)
        scale = (config.scale_min, config.scale_max)
        return self._arranger.single(draws, canvas, background, self.label(index), scale)

    def _drawing(self, label: int) -> "Image":
        if label not in self._drawings:
            self._drawings[label] = render(self.pictures[label], OVERSAMPLING * self.config.image_size)
        return self._drawings[label]


def is_scene(index: int, fraction: float) -> bool:
    """Whether sample `index` is a scene: `fraction` of any long run of indices, spread evenly."""
    return int((index + 1) * fraction) > int(index * fraction)


def categories(pictures: list[Picture]) -> list[str]:
    """The categories of the pictures, sorted."""
    return sorted({picture.category for picture in pictures})
