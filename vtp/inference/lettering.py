"""Texts as pixels, in any script that an installed font has.

Fonts are those of packages: DejaVu of matplotlib, Noto of manimgx-fonts and manimgx-fonts-cjk, in this order. A word has
the first font that covers it, and resvg shapes what has one font, and writes it from right to left where it must be. What no
font covers is escaped like what nobody sees, so that no text becomes a row of boxes.
"""

import io
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from html import escape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unicodedata import bidirectional, category

from vtp.texts import shown

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDERS = {  # of fonts, by package
    "matplotlib": ("mpl-data/fonts/ttf", "DejaVuSans.ttf"),
    "manimgx_fonts": ("", "NotoSans*.ttf"),
    "manimgx_fonts_cjk": ("", "*.ttc"),
}
EMOJI = ("manimgx_fonts", "", "NotoEmoji*.ttf")  # after all others: it has digits too
JOINERS = "\u200c\u200d"  # they shape words of Persian and of Indian languages
JOINED = re.compile(f"([{JOINERS}])")
WORD = re.compile(r"\s+|\S+\s*")
UNSEEN = frozenset(JOINERS) | frozenset(
    map(chr, range(0xFE00, 0xFE10))
)  # with the selectors of a form: they need no glyph
ASCENT, DESCENT, SPACE = 1.2, 0.5, 0.32  # of a line, in sizes of its letters


class Font(NamedTuple):
    """A font file, and what it is called."""

    path: Path
    family: str
    characters: frozenset[int]  # code points that it covers


class TextPart(NamedTuple):
    """What is drawn in one font."""

    font: Font
    text: str


def drawable(text: str) -> str:
    """A text as it is drawn: on one line, with escapes for what acts, for what nobody sees and for what no font covers."""
    return "".join(part.text for part in _parts(text))


@lru_cache(256)
def draw_text(text: str, size: int, fill: str) -> "Image":
    """One line of a text, RGBA: letters of `size` pixels on a transparent ground, as wide as they are.

    The height is that of a line of this size, whatever the text, so that lines stand evenly. A text begins on the left.
    """
    from PIL import Image

    placed: list[tuple[Image.Image, int]] = []
    width = 0
    for from_right, group in groupby(_parts(text), key=_is_from_right):
        beside = list(group)
        for part in beside[::-1] if from_right else beside:
            drawn, spaces = _draw(part, size, fill), len(part.text) - len(part.text.rstrip())
            space = round(spaces * SPACE * size)
            placed.append((drawn, width + space * from_right))
            width += drawn.width + space
    line = Image.new("RGBA", (max(1, width), _height(size)))
    for drawn, left in placed:
        line.paste(drawn, (left, 0))
    return line


def font_files() -> Iterator[Path]:
    """Those that are installed, in the order in which they are asked."""
    places = [(package, *place) for package, place in FOLDERS.items()]
    for package, folder, pattern in (*places, EMOJI):
        if (spec := find_spec(package)) is not None and spec.origin is not None:
            yield from sorted((Path(spec.origin).parent / folder).glob(pattern))


def _draw(part: "TextPart", size: int, fill: str) -> "Image":
    """A part of a line without the spaces behind it; resvg finds no other font for it."""
    import resvg_py
    from PIL import Image

    width = size * (2 * len(part.text) + 16)  # more than any letters take
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_height(size)}">'
        f'<text x="0" y="{round(size * ASCENT)}" font-family="{escape(part.font.family)}" font-size="{size}" fill="{fill}" '
        f'xml:space="preserve">{escape(part.text.rstrip())}</text></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, font_files=[str(part.font.path)])
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ink = drawn.getchannel("A").getbbox()
    return drawn.crop((0, 0, ink[2] if ink else 0, drawn.height))


def _height(size: int) -> int:
    """Of a line."""
    return round(size * (ASCENT + DESCENT))


def _is_from_right(part: "TextPart") -> bool:
    """Whether the first letter that has a direction is written to the left."""
    directions = (bidirectional(letter) for letter in part.text)
    return next((each in ("R", "AL") for each in directions if each in ("L", "R", "AL")), False)


def _parts(text: str) -> Iterator[TextPart]:
    """A text in parts of one font each, in the order of the text; escapes are in the first font."""
    first = _font(next(font_files()))
    line = "".join(part if part in JOINERS else shown(part) for part in JOINED.split(text) if part)
    if line.isascii():
        yield TextPart(first, line)
        return
    pieces: list[TextPart] = []
    for word in WORD.findall(line):
        whole = _font_of(word)
        for cluster in (word,) if whole else _clusters(word):
            font = whole or _font_of(cluster)
            pieces.append(TextPart(font or first, cluster if font else cluster.encode("unicode_escape").decode()))
    for font, group in groupby(pieces, key=lambda piece: piece.font.path):
        yield TextPart(_font(font), "".join(piece.text for piece in group))


def _clusters(text: str) -> Iterator[str]:
    """Letters with their marks, and what is joined to them."""
    cluster = ""
    for letter in text:
        joined = letter in UNSEEN or category(letter).startswith("M") or cluster.endswith("\u200d")
        if cluster and not joined:
            yield cluster
            cluster = ""
        cluster += letter
    if cluster:
        yield cluster


def _font_of(word: str) -> Font | None:
    """The first that covers all of it."""
    needed = {ord(letter) for letter in word if letter not in UNSEEN and not letter.isspace()}
    return next((font for font in map(_font, font_files()) if needed <= font.characters), None)


@cache
def _font(path: Path) -> Font:
    """Read what a font covers."""
    from fontTools.ttLib import TTFont

    with TTFont(path, fontNumber=0, lazy=True) as font:
        names = font["name"]
        family = names.getDebugName(16) or names.getDebugName(1)
        return Font(path, str(family), frozenset(font.getBestCmap() or ()))
