"""Grids of images, with equal bytes for equal content."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtp.artefact import whole_file
from vtp.inference.lettering import draw_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LETTERS, SMALL = 13, 10  # pixels of the letters of names, and of notes
NOTE_LINE = 15  # pixels of a line of notes
SCALE = 96  # least side of an image in a grid, in pixels
GAP, MARGIN, LINE = 4, 12, 22  # pixels between images, around all, of the heading


def tile_of(side: int) -> int:
    """Pixels in a grid of the shorter side of images, of that many pixels: a multiple."""
    return side * max(1, -(-SCALE // side))


def height_of(rows: int, side: int) -> int:
    """Pixels from the top of a grid without notes to the end of its first `rows` rows of images of this side."""
    return MARGIN + LINE + rows * (tile_of(side) + GAP)


def grid(
    rows: "Sequence[Tensor | np.ndarray]",
    names: Sequence[str],
    path: Path,
    *,
    title: str,
    notes: Sequence[Sequence[str]] | None = None,
) -> None:
    """Rows of uint8 images [n, 3, H, W], each under its name, as one PNG; `notes` stand below the images, cut to fit."""
    from PIL import Image

    gap, margin, line = GAP, MARGIN, LINE
    shorter = min(rows[0].shape[-2:])
    tall, wide = (side * (tile_of(shorter) // shorter) for side in rows[0].shape[-2:])
    heading = draw_text(title, LETTERS, "black")
    lettered = [draw_text(name, LETTERS, "black") for name in names]
    below = [
        0 if notes is None else NOTE_LINE * max(note.count("\n") + 1 for note in notes[n]) for n in range(len(rows))
    ]
    columns = max(len(row) for row in rows)
    left = margin + max(name.width for name in lettered) + 10
    width = max(left + columns * (wide + gap), margin + heading.width) + margin
    height = margin + line + sum(tall + gap + extra for extra in below) + margin
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(heading, (margin, margin), heading)
    top = margin + line
    for number, (row, name) in enumerate(zip(rows, lettered, strict=True)):
        canvas.paste(name, (margin, top + (tall - name.height) // 2), name)
        for column, pixels in enumerate(_pixels(row)):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((wide, tall), Image.Resampling.NEAREST)
            at = left + column * (wide + gap)
            canvas.paste(image, (at, top))
            for place, text in enumerate(notes[number][column].split("\n") if notes is not None else ()):
                note = _cut(text, wide)
                canvas.paste(note, (at, top + tall + place * NOTE_LINE), note)
        top += tall + gap + below[number]
    with whole_file(path) as temporary:
        canvas.save(temporary, format="PNG")


def _cut(text: str, width: int) -> "Image":
    """A text that fits; of one that is too long the end, which tells keys apart."""
    cut = draw_text(text, SMALL, "dimgrey")
    short, long = 0, len(text)  # ends of the text that fit, that do not
    if cut.width <= width:
        return cut
    cut = draw_text("..", SMALL, "dimgrey")
    while long - short > 1:
        kept = (short + long) // 2
        tried = draw_text(f"..{text[-kept:]}", SMALL, "dimgrey")
        short, long, cut = (kept, long, tried) if tried.width <= width else (short, kept, cut)
    return cut


def _pixels(images: "Tensor | np.ndarray") -> np.ndarray:
    """[n, H, W, 3] of images [n, 3, H, W], wherever they are."""
    return np.moveaxis(images if isinstance(images, np.ndarray) else images.cpu().numpy(), 1, 3)
