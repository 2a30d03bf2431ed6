"""What is where in a picture of the embedded data: one function for each kind of scene, from draws alone."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from vtp.curation.ingest.scenes import (
    DECIDED,
    INKS,
    LAYOUTS,
    NUMBERS,
    PHRASES,
    PLACES,
    RELATIONS,
    Scene,
    SceneKind,
    Thing,
    Word,
    leanings,
)
from vtp.curation.ingest.words import LEAST_SIZE, SPAN, Lettering, Vocabulary, largest_size, width

Canvas = tuple[int, int]  # width and height in pixels
Centre = tuple[float, float]
TRIES = 256  # arrangements that are drawn at a time
# Sizes of pictures, in shares of the short edge.
AT_PLACES, COUNTED, RELATED, BESIDE_WORD = (0.42, 0.5), (0.3, 0.36), (0.36, 0.46), (0.44, 0.5)
# Heights of a picture and of the word beside it, by their relation, and of a word alone, in shares of the height.
HEIGHTS = {"above": (0.3, 0.79), "below": (0.7, 0.21)}
HEIGHT_ALONE = 0.5
MARGIN = 0.15  # of a relation: how far it is from being undecided
LEAST_OF_LARGEST = 0.85  # a word is written in a size between this share of the largest and the largest


class Place(NamedTuple):
    """One picture in an image: centre and longest side in pixels, turn in degrees."""

    label: int
    centre: Centre
    size: float
    turn: float


class Arrangement(NamedTuple):
    """What is drawn on a canvas."""

    canvas: Canvas
    scene: Scene
    places: tuple[Place, ...]
    variant: int = 0  # of the captions, where a scene has several
    lettering: Lettering | None = None

    def moved(self, right: float, down: float) -> Self:
        """With everything so many pixels further; what leaves the canvas is cut."""
        places = tuple(place._replace(centre=_moved(place.centre, right, down)) for place in self.places)
        lettering = self.lettering
        if lettering is not None:
            lettering = lettering._replace(centre=_moved(lettering.centre, right, down))
        return self._replace(places=places, lettering=lettering)


class Arranger:
    """Arranges pictures of so many classes, turned by up to `rotation` degrees."""

    def __init__(self, classes: int, rotation: float, vocabulary: Vocabulary | None) -> None:
        self._classes, self._rotation, self._vocabulary = classes, rotation, vocabulary

    def single(
        self, draws: np.random.Generator, canvas: Canvas, background: str, label: int, scale: tuple[float, float]
    ) -> Arrangement:
        """A picture anywhere, of a size between two shares of the short edge."""
        size = min(canvas) * draws.uniform(*scale)
        centre = (draws.uniform(size / 2, canvas[0] - size / 2), draws.uniform(size / 2, canvas[1] - size / 2))
        variant = int(draws.integers(len(PHRASES["single"]["full"])))
        place = Place(label, centre, size, self._turn(draws))
        return Arrangement(canvas, Scene((Thing(label),), background=background), (place,), variant)

    def scene(self, kind: SceneKind, draws: np.random.Generator, canvas: Canvas, background: str) -> Arrangement:
        """A scene of a kind."""
        arrange = {
            "places": self._at_places,
            "counts": self._counted,
            "relations": self._related,
            "words": self._written,
        }[kind]
        return arrange(draws, canvas, background)

    def _at_places(self, draws: np.random.Generator, canvas: Canvas, background: str) -> Arrangement:
        """Different pictures at the named places of a layout."""
        variant = int(draws.integers(len(LAYOUTS)))
        layout = LAYOUTS[variant]
        labels = draws.permutation(self._classes)[: len(layout)].tolist()
        places = tuple(
            Place(label, (x * canvas[0], y * canvas[1]), min(canvas) * draws.uniform(*AT_PLACES), self._turn(draws))
            for label, (x, y) in zip(labels, (PLACES[place] for place in layout), strict=True)
        )
        things = tuple(Thing(label, place=place) for label, place in zip(labels, layout, strict=True))
        return Arrangement(canvas, Scene(things, background=background), places, variant)

    def _counted(self, draws: np.random.Generator, canvas: Canvas, background: str) -> Arrangement:
        """One to four equal pictures at random, without overlap."""
        label, count = int(draws.integers(self._classes)), int(draws.integers(len(NUMBERS))) + 1
        size = min(canvas) * draws.uniform(*COUNTED)
        places = tuple(Place(label, at, size, self._turn(draws)) for at in scattered(draws, canvas, size, count))
        return Arrangement(canvas, Scene((Thing(label, count),), background=background), places)

    def _related(self, draws: np.random.Generator, canvas: Canvas, background: str) -> Arrangement:
        """Two different pictures at random, without overlap, in one relation and no other."""
        relation = list(RELATIONS)[draws.integers(len(RELATIONS))]
        labels = draws.permutation(self._classes)[:2].tolist()
        sizes = (min(canvas) * draws.uniform(*RELATED, 2)).tolist()
        centres = related(draws, canvas, sizes, relation)
        places = tuple(
            Place(label, centre, size, self._turn(draws))
            for label, centre, size in zip(labels, centres, sizes, strict=True)
        )
        return Arrangement(canvas, Scene(tuple(map(Thing, labels)), relation, background), places)

    def _written(self, draws: np.random.Generator, canvas: Canvas, background: str) -> Arrangement:
        """A word, alone or above or below a picture."""
        assert self._vocabulary is not None, "scenes of words come with words"
        word, ink = self._vocabulary.draw(draws), list(INKS)[draws.integers(len(INKS))]
        font = max(LEAST_SIZE, largest_size(word, canvas) * draws.uniform(LEAST_OF_LARGEST, 1))
        most = SPAN * canvas[0] - font * width(word)
        x = canvas[0] / 2 + most * draws.uniform(-0.5, 0.5)
        if draws.uniform() >= self._vocabulary.config.beside:
            lettering = Lettering(word, ink, (x, HEIGHT_ALONE * canvas[1]), font)
            return Arrangement(canvas, Scene((), None, background, Word(word, ink)), (), 0, lettering)
        label, relation = int(draws.integers(self._classes)), list(HEIGHTS)[draws.integers(len(HEIGHTS))]
        above, beside = (share * canvas[1] for share in HEIGHTS[relation])
        size = min(canvas) * draws.uniform(*BESIDE_WORD)
        place = Place(label, (draws.uniform(size / 2, canvas[0] - size / 2), above), size, self._turn(draws))
        scene = Scene((Thing(label),), relation, background, Word(word, ink))
        return Arrangement(canvas, scene, (place,), 1, Lettering(word, ink, (x, beside), font))

    def _turn(self, draws: np.random.Generator) -> float:
        return draws.uniform(-self._rotation, self._rotation)


def _moved(centre: Centre, right: float, down: float) -> Centre:
    return centre[0] + right, centre[1] + down


def scattered(draws: np.random.Generator, canvas: Canvas, size: float, count: int) -> list[Centre]:
    """Random centres of squares of one size inside of a canvas, without overlap."""
    while True:
        centres = _draw_centres(draws, canvas, [size] * count)
        apart = (_gaps(centres) >= size) | np.eye(count, dtype=bool)
        if (chosen := np.flatnonzero(apart.all((1, 2)))).size:
            return list(map(tuple, centres[chosen[0]].tolist()))


def related(draws: np.random.Generator, canvas: Canvas, sizes: Sequence[float], relation: str) -> list[Centre]:
    """Random centres of two squares inside of a canvas, without overlap, between which this relation alone holds clearly."""
    asked = np.array([each == relation for each in RELATIONS])
    while True:
        centres = _draw_centres(draws, canvas, sizes)
        leaning = leanings(centres[:, 0] - centres[:, 1], sum(sizes))
        clear = np.where(asked, leaning > DECIDED + MARGIN, leaning < DECIDED - MARGIN).all(1)
        apart = _gaps(centres)[:, 0, 1] >= sum(sizes) / 2
        if (chosen := np.flatnonzero(clear & apart)).size:
            return list(map(tuple, centres[chosen[0]].tolist()))


def _draw_centres(draws: np.random.Generator, canvas: Canvas, sizes: Sequence[float]) -> np.ndarray:
    """Centres [TRIES, N, 2] of N squares inside of a canvas."""
    half = np.array(sizes)[:, None] / 2
    return draws.uniform(half, np.array(canvas) - half, (TRIES, len(sizes), 2))


def _gaps(centres: np.ndarray) -> np.ndarray:
    """Distances [TRIES, N, N] of centres along the axis on which they are further apart: squares part on one."""
    return np.abs(centres[:, :, None] - centres[:, None]).max(-1)
