"""Pictures with fixed names and equal bytes for equal content: grids of images, and curves."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

SCALE = 96  # least side of an image in a grid, in pixels
UNINFORMED = "_uninformed"  # ends the name of a column with what a model that knows nothing would score


def grid(rows: Sequence[Tensor], names: Sequence[str], path: Path, *, title: str) -> None:
    """Rows of uint8 images [n, 3, H, W], each under its name, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0].shape[-1]
    factor = max(1, -(-SCALE // side))
    tile, gap, margin, line = side * factor, 4, 12, 22
    font = ImageFont.load_default(14)
    columns = max(len(row) for row in rows)
    left = margin + max(int(font.getlength(name)) for name in names) + 10
    width = left + columns * (tile + gap) + margin
    height = margin + line + len(rows) * (tile + gap) + margin
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, fill="black", font=font)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = margin + line + number * (tile + gap)
        draw.text((margin, top + tile // 2 - 8), name, fill="black", font=font)
        for column, pixels in enumerate(row.permute(0, 2, 3, 1).cpu().numpy()):
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((tile, tile), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * (tile + gap), top))
    canvas.save(path, format="PNG")


def curves(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel per scalar of the training curves, as one PNG; `tables` maps a run to its columns.

    A column `<name>_uninformed` is a dashed line in the panel of `<name>`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hidden = ("step", "_lr", UNINFORMED)
    panels = [(run, name) for run, table in tables.items() for name in table if not name.endswith(hidden)]
    columns = 4
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis, (run, name) in zip(axes.flat, panels, strict=False):
        table = tables[run]
        points = [point for point in zip(table["step"], table[name], strict=True) if math.isfinite(point[1])]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)  # a look leaves gaps between its points
        if (reference := table.get(name + UNINFORMED)) is not None:
            axis.axhline(reference[-1], linestyle="--", linewidth=0.8, color="grey")
        axis.set_title(f"{run}: {name}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)
