"""Compose captioned pictures: single ones for class conditions, and scenes whose captions say what is where.

Sample i of a split is a function of the parameters and (seed, split, i), so any number of samples is one parameter and
validation holds compositions that training never sees.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from vtp.config import Config
from vtp.curation.ingest.openmoji import Picture, catalogue, render
from vtp.data.shards import NO_LABEL
from vtp.draws import numpy_draws

if TYPE_CHECKING:
    from PIL.Image import Image

SampleKind = Literal["single", "scene"]
OVERSAMPLING = 2  # pictures are drawn once at this multiple of the image size, then turned and shrunk

BACKGROUNDS = {
    "white": (255, 255, 255),
    "light grey": (214, 217, 222),
    "sky blue": (165, 212, 245),
    "mint green": (178, 232, 200),
    "pale yellow": (252, 240, 170),
    "peach": (252, 211, 180),
    "pink": (248, 190, 208),
    "lavender": (212, 196, 240),
}
SINGLE_CAPTIONS = (
    "a {name} on a {background} background",
    "a picture of a {name} in front of {background}",
    "{name}, {background} background",
    "an emoji of a {name}",
)
# Names of places and their centres, in shares of the side.
LAYOUTS = (
    (("on the left", (0.26, 0.5)), ("on the right", (0.74, 0.5))),
    (("at the top", (0.5, 0.26)), ("at the bottom", (0.5, 0.74))),
    (("at the top left", (0.27, 0.27)), ("at the top right", (0.73, 0.27)), ("at the bottom", (0.5, 0.74))),
)


class EmbeddedConfig(Config):
    """The embedded data set: OpenMoji pictures on plain backgrounds."""

    name: Literal["openmoji"]
    seed: int = Field(description="seed of the compositions")
    image_size: int = Field(ge=8, description="side in pixels")
    classes: int = Field(ge=3, description="number of pictures; each is a class, its emoji category a second label")
    labels: Literal["drawing", "category"] = Field(
        description="what generators are given as label, and samples are judged by: the class, or its category, which "
        "says less than captions do; probes and prompts ask for the class either way"
    )
    train_samples: int = Field(ge=1, description="number of training compositions")
    validation_samples: int = Field(ge=1, description="held-out compositions of the same classes")
    scene_fraction: float = Field(ge=0, le=1, description="share of the samples that are scenes of several pictures")
    scale_min: float = Field(gt=0, le=1, description="size of a single picture, in shares of the side")
    scale_max: float = Field(gt=0, le=1, description="largest size of a single picture, in shares of the side")
    rotation: float = Field(ge=0, le=180, description="largest turn of a picture in degrees")

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is above scale_max {self.scale_max}")
        return self


class Place(NamedTuple):
    """One picture in an image: centre and longest side in pixels, turn in degrees."""

    label: int
    centre: tuple[float, float]
    size: float
    turn: float


class Sample(NamedTuple):
    """What is drawn, and what is said about it."""

    kind: SampleKind
    label: int  # NO_LABEL for scenes
    background: str
    places: tuple[Place, ...]
    caption: str


class Composer:
    """Plans and draws samples."""

    def __init__(self, config: EmbeddedConfig) -> None:
        self.config = config
        self.pictures = catalogue(config.classes)
        self._drawings: dict[int, Image] = {}

    def plan(self, split: str, index: int) -> Sample:
        """Sample `index` of a split; the labels of successive singles run through the classes."""
        config = self.config
        draws = numpy_draws(config.seed, f"compose/{split}", index)
        background = list(BACKGROUNDS)[draws.integers(len(BACKGROUNDS))]
        if is_scene(index, config.scene_fraction):
            return self._scene(draws, background)
        label = self.label(index)
        side = config.image_size
        size = side * draws.uniform(config.scale_min, config.scale_max)
        centre = (draws.uniform(size / 2, side - size / 2), draws.uniform(size / 2, side - size / 2))
        caption = SINGLE_CAPTIONS[draws.integers(len(SINGLE_CAPTIONS))]
        caption = with_article(caption.format(name=self.pictures[label].name, background=background))
        place = Place(label, centre, size, self._turn(draws))
        return Sample("single", label, background, (place,), caption)

    def label(self, index: int) -> int:
        """The class of sample `index` of any split: singles run through the classes, scenes have none."""
        fraction = self.config.scene_fraction
        if is_scene(index, fraction):
            return NO_LABEL
        return (index - int(index * fraction)) % self.config.classes

    def draw(self, sample: Sample) -> "Image":
        """The picture, RGB."""
        from PIL import Image

        side = self.config.image_size
        canvas = Image.new("RGB", (side, side), BACKGROUNDS[sample.background])
        for place in sample.places:
            drawing = self._drawing(place.label).rotate(place.turn, Image.Resampling.BICUBIC)
            size = max(1, round(place.size))
            drawing = drawing.resize((size, size), Image.Resampling.LANCZOS)
            corner = (round(place.centre[0] - size / 2), round(place.centre[1] - size / 2))
            canvas.paste(drawing, corner, drawing)
        return canvas

    def _scene(self, draws: np.random.Generator, background: str) -> Sample:
        layout = LAYOUTS[draws.integers(len(LAYOUTS))]
        labels = draws.permutation(self.config.classes)[: len(layout)].tolist()
        side = self.config.image_size
        places = tuple(
            Place(label, (x * side, y * side), side * draws.uniform(0.42, 0.5), self._turn(draws))
            for label, (_, (x, y)) in zip(labels, layout, strict=True)
        )
        parts = [f"a {self.pictures[label].name} {where}" for label, (where, _) in zip(labels, layout, strict=True)]
        caption = f"{', '.join(parts[:-1])} and {parts[-1]}, on a {background} background"
        return Sample("scene", NO_LABEL, background, places, with_article(caption))

    def _turn(self, draws: np.random.Generator) -> float:
        return draws.uniform(-self.config.rotation, self.config.rotation)

    def _drawing(self, label: int) -> "Image":
        if label not in self._drawings:
            self._drawings[label] = render(self.pictures[label], OVERSAMPLING * self.config.image_size)
        return self._drawings[label]


def is_scene(index: int, fraction: float) -> bool:
    """Whether sample `index` is a scene: `fraction` of any long run of indices, spread evenly."""
    return int((index + 1) * fraction) > int(index * fraction)


def with_article(text: str) -> str:
    """`an` before vowels."""
    words = text.split(" ")
    following = [*words[1:], ""]
    return " ".join(
        "an" if word == "a" and after[:1] in tuple("aeiou") else word
        for word, after in zip(words, following, strict=True)
    )


def categories(pictures: list[Picture]) -> list[str]:
    """The categories of the pictures, sorted."""
    return sorted({picture.category for picture in pictures})
