"""Written words: which there are, and how they become pixels.

The font is DejaVu Sans, which matplotlib ships. Letters are drawn at a multiple of their size and shrunk, because hinting
spoils those of some ten pixels.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from vtp.config import Config

if TYPE_CHECKING:
    from PIL import ImageFont
    from PIL.Image import Image

SHORTEST = 3  # letters
LEAST_SIZE = 8  # pixels of a font whose words are read
WIDEST = 0.7  # of the font's size, for the mean letter of a word; wider words are not taken
SPAN = 0.9  # of the picture's width, at most
BAND = 0.3  # of its short edge: the largest size of a font
OVERSAMPLING = 4
LETTERS = [letter for letter in ascii_lowercase if letter not in "lio"]  # of random words: each is read as itself


class WordsConfig(Config):
    """Which words are written."""

    letters: int = Field(ge=SHORTEST, le=8, description="letters of the longest words; the shortest have 3")
    random: float = Field(ge=0, le=1, description="share of words that are random letters, without l, i and o")
    beside: float = Field(ge=0, le=1, description="share of words that are written above or below a picture")

    @property
    def least_side(self) -> int:
        """Pixels of a short edge in which the widest words are read."""
        return math.ceil(max(LEAST_SIZE / BAND, self.letters * WIDEST * LEAST_SIZE / SPAN))


class Lettering(NamedTuple):
    """A word in a picture."""

    text: str
    ink: str  # of INKS
    centre: tuple[float, float]  # pixels
    size: float  # of the font, pixels


class Vocabulary:
    """Words to write: those that stand in `names`, and random letters."""

    def __init__(self, config: WordsConfig, names: Sequence[str]) -> None:
        self.config = config
        found = {word for name in names for word in re.split(r"[ -]", name) if re.fullmatch("[a-z]+", word)}
        self.dictionary = sorted(filter(self._fits, found))

    def draw(self, draws: np.random.Generator) -> str:
        """A word that is narrow enough."""
        if draws.uniform() >= self.config.random:
            return self.dictionary[draws.integers(len(self.dictionary))]
        while True:
            count = draws.integers(SHORTEST, self.config.letters + 1)
            word = "".join(LETTERS[number] for number in draws.integers(len(LETTERS), size=count))
            if self._fits(word):
                return word

    def _fits(self, word: str) -> bool:
        return SHORTEST <= len(word) <= self.config.letters and width(word) <= WIDEST * len(word)


def width(word: str) -> float:
    """Of a word of lower-case letters, over the size of its font."""
    return sum(_advances()[letter] for letter in word)


def largest_size(word: str, canvas: tuple[int, int]) -> float:
    """Pixels of the largest font in which a word is written on a canvas (width, height)."""
    return min(SPAN * canvas[0] / width(word), BAND * min(canvas))


def write(canvas: "Image", lettering: Lettering, colour: tuple[int, int, int]) -> None:
    """Write a word into an RGB picture."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (OVERSAMPLING * canvas.width, OVERSAMPLING * canvas.height))
    place = (OVERSAMPLING * lettering.centre[0], OVERSAMPLING * lettering.centre[1])
    font = _font(OVERSAMPLING * lettering.size)
    ImageDraw.Draw(mask).text(place, lettering.text, fill=255, font=font, anchor="mm")
    canvas.paste(colour, mask=mask.resize(canvas.size, Image.Resampling.LANCZOS))


def font_file() -> Path:
    """DejaVu Sans. Raises FileNotFoundError where matplotlib does not ship it."""
    spec = find_spec("matplotlib")
    package = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path("matplotlib")
    path = package / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such font; install matplotlib, which ships it")
    return path


@cache
def _advances() -> dict[str, float]:
    """Widths of letters over the font's size. Raises ValueError where the font lacks one, which would become a box."""
    from fontTools.ttLib import TTFont

    with TTFont(path := font_file(), lazy=True) as font:
        glyphs, widths, unit = font.getBestCmap() or {}, font["hmtx"], font["head"].unitsPerEm  # pyright: ignore[reportAttributeAccessIssue]
        if missing := [letter for letter in ascii_lowercase if ord(letter) not in glyphs]:
            raise ValueError(f"{path}: has no letter {', '.join(missing)}; install matplotlib again")
        return {letter: widths[glyphs[ord(letter)]][0] / unit for letter in ascii_lowercase}


def _font(size: float) -> "ImageFont.FreeTypeFont":
    from PIL import ImageFont

    # Raqm, which may or may not be installed, would place letters in its own way.
    return ImageFont.truetype(str(font_file()), size, layout_engine=ImageFont.Layout.BASIC)
