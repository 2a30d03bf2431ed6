"""Pictures with fixed names and equal bytes for equal content: grids of images, and curves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

NOTE_LINE = 15  # pixels of a line of notes
SCALE = 96  # least side of an image in a grid, in pixels
UNINFORMED = "_uninformed"  # ends the name of a column with what a model that knows nothing would score


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
                text = "\n".join(_cut(part, tile, small) for part in notes[number][column].split("\n"))
                draw.multiline_text((at, top + tile), text, fill="dimgrey", font=small, spacing=2)
        top += tile + gap + below[number]
    canvas.save(path, format="PNG")


def _cut(text: str, width: int, font: "ImageFont | FreeTypeFont") -> str:
    """A text that fits; of one that is too long the end, which tells keys apart."""
    kept = text
    while kept and font.getlength(text if kept == text else f"..{kept}") > width:
        kept = kept[1:]
    return text if kept == text else f"..{kept}"


@contextmanager
def axes(count: int, path: Path, *, columns: int, size: tuple[float, float], dpi: int = 80) -> Iterator[list[Any]]:
    """`count` matplotlib axes of `size` in inches, `columns` beside each other, written as one PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    every = list(grid.flat)
    for axis in every[count:]:
        axis.axis("off")
    for axis in every[:count]:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    yield every[:count]
    figure.tight_layout()
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    pyplot.close(figure)


class Panel(NamedTuple):
    """Curves over one axis."""

    title: str
    axis: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    log: bool = False


def panels(drawn: Sequence[Panel], path: Path) -> None:
    """Panels beside each other, as one PNG."""
    with axes(len(drawn), path, columns=len(drawn), size=(4, 3)) as every:
        for axis, panel in zip(every, drawn, strict=True):
            for name, values in panel.curves.items():
                axis.plot(panel.x, values, marker="o", markersize=3, linewidth=1.2, label=name)
            axis.set_title(panel.title, fontsize=9)
            axis.set_xlabel(panel.axis, fontsize=8)
            if panel.log:
                axis.set_yscale("log")
            if len(panel.curves) > 1:
                axis.legend(fontsize=7)


def curves(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel per scalar of the training curves, as one PNG; `tables` maps a run to its columns.

    A column `<name>_uninformed` is a dashed line in the panel of `<name>`.
    """
    hidden = ("step", "_lr", UNINFORMED)
    scalars = [(run, name) for run, table in tables.items() for name in table if not name.endswith(hidden)]
    with axes(len(scalars), path, columns=4, size=(4, 2.6)) as every:
        for axis, (run, name) in zip(every, scalars, strict=True):
            table = tables[run]
            points = [point for point in zip(table["step"], table[name], strict=True) if math.isfinite(point[1])]
            axis.plot(*zip(*points, strict=True), linewidth=1.2)  # an evaluation leaves gaps between its points
            if (reference := table.get(name + UNINFORMED)) is not None:
                axis.axhline(reference[-1], linestyle="--", linewidth=0.8, color="grey")
            axis.set_title(f"{run}: {name}", fontsize=9)
