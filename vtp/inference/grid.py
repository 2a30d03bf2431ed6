"""Grids of images, with equal bytes for equal content."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vtp.artefact import whole_file
from vtp.texts import shown

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

NOTE_LINE = 15  # pixels of a line of notes
SCALE = 96  # least side of an image in a grid, in pixels


def grid(
    rows: Sequence[Tensor],
    names: Sequence[str],
    path: Path,
    *,
    title: str,
    notes: Sequence[Sequence[str]] | None = None,
) -> None:
    """Rows of uint8 images [n, 3, H, W], each under its name, as one PNG; `notes` stand below the images, cut to fit."""
    from PIL import Image, ImageDraw, ImageFont

    names, title = [shown(name) for name in names], shown(title)
    side = rows[0].shape[-1]
    factor = max(1, -(-SCALE // side))
    tile, gap, margin, line = side * factor, 4, 12, 22
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    below = [
        0 if notes is None else NOTE_LINE * max(note.count("\n") + 1 for note in notes[n]) for n in range(len(rows))
    ]
    columns = max(len(row) for row in rows)
    left = margin + max(int(font.getlength(name)) for name in names) + 10
    width = max(left + columns * (tile + gap), margin + int(font.getlength(title))) + margin
    height = margin + line + sum(tile + gap + extra for extra in below) + margin
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, fill="black", font=font)
    top = margin + line
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        draw.text((margin, top + tile // 2 - 8), name, fill="black", font=font)
        for column, pixels in enumerate(row.permute(0, 2, 3, 1).cpu().numpy()):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((tile, tile), Image.Resampling.NEAREST)
            at = left + column * (tile + gap)
            canvas.paste(image, (at, top))
            if notes is not None:
                text = "\n".join(_cut(shown(part), tile, small) for part in notes[number][column].split("\n"))
                draw.multiline_text((at, top + tile), text, fill="dimgrey", font=small, spacing=2)
        top += tile + gap + below[number]
    with whole_file(path) as temporary:
        canvas.save(temporary, format="PNG")


def _cut(text: str, width: int, font: "ImageFont | FreeTypeFont") -> str:
    """A text that fits; of one that is too long the end, which tells keys apart."""
    kept = text
    while kept and font.getlength(text if kept == text else f"..{kept}") > width:
        kept = kept[1:]
    return text if kept == text else f"..{kept}"
