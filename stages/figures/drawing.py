"""Curves and composed pictures, with equal bytes for equal content."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vtp.inference.lettering import font_files
from vtp.layers.decode import read_rgb
from vtp.step import UNINFORMED


def stack(pictures: Sequence[tuple[Path, int | None]], path: Path) -> None:
    """Pictures below each other as one PNG of 256 colours, each cut to so many pixels in height; None: whole."""
    from PIL import Image

    whole = [(read_rgb(picture), tallest) for picture, tallest in pictures]
    parts = [part.crop((0, 0, part.width, min(part.height, tallest or part.height))) for part, tallest in whole]
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    canvas.quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


@contextmanager
def axes(count: int, path: Path, *, columns: int, size: tuple[float, float], dpi: int = 80) -> Iterator[list[Any]]:
    """`count` matplotlib axes of `size` in inches, `columns` beside each other, written as one PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # titles and names are texts: a dollar begins no formula
    matplotlib.rcParams["font.family"] = _families()[:1]
    from matplotlib import pyplot
    from matplotlib.text import Text

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    every = list(grid.flat)
    for axis in every[count:]:
        axis.axis("off")
    for axis in every[:count]:
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    yield every[:count]
    for axis in every[:count]:
        for scale, ends in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            if scale.get_scale() == "log":
                _name_powers(scale, *ends)
    # What the first font does not cover others may; to ask all of them takes long.
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(_families())
    figure.tight_layout()
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    pyplot.close(figure)


def _name_powers(scale: Any, low: float, high: float) -> None:  # noqa: ANN401 - matplotlib's
    """Few enough ticks that their names do not overlap, in plain digits: formulas are off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low)
    scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=8))
    scale.set_major_formatter(FuncFormatter(_power))
    scale.set_minor_formatter(NullFormatter())


def _power(value: float, _position: int) -> str:
    """0.02, 500, 2e13."""
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


@cache
def _families() -> list[str]:
    """The fonts of all drawn texts, made known to matplotlib."""
    from matplotlib import font_manager

    families = []
    for path in map(str, font_files()):
        families.append(font_manager.get_font(path).family_name)
        # Of variable fonts matplotlib draws what is in the file, and would warn that it is no regular weight.
        font_manager.fontManager.ttflist.append(font_manager.FontEntry(fname=path, name=families[-1], weight=400))
    return families


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
            # An evaluation leaves gaps between its points; a line of one point would be invisible.
            axis.plot(*zip(*points, strict=True), linewidth=1.2, marker="o" if len(points) == 1 else None)
            if not points:
                axis.text(0.5, 0.5, "no finite value", ha="center", va="center", transform=axis.transAxes)
            if (reference := table.get(name + UNINFORMED)) is not None:
                axis.axhline(reference[-1], linestyle="--", linewidth=0.8, color="grey")
            axis.set_title(f"{run}: {name}", fontsize=9)
