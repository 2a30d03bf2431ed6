"""Points of figures and rows of tables that others published: a CSV file with the source and error of each."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vtp.artefact import ArtefactError
from vtp.config import did_you_mean

CATEGORY = "category"  # unit of an x that is a name


class PublishedPoint(NamedTuple):
    """One number. The columns of the file, in its order."""

    figure: str  # or table
    series: str
    x: str  # a number, or a name where `x_unit` is CATEGORY
    x_unit: str
    metric: str  # called like the label of the same kind of metric here
    value: float  # shares, not percent
    error: float  # of reading a picture, or half of the last digit of a printed number
    source: str


class Published:
    """All of a file."""

    def __init__(self, points: Sequence[PublishedPoint], path: Path) -> None:
        self.points = points
        self._path = path

    @classmethod
    def read(cls, path: Path) -> "Published":
        """Raises ArtefactError that names the line for what is no number, has no source or is no table at all."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                head, *rows = list(csv.reader(file)) or [[]]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ArtefactError(f"{path}: no CSV file with published figures: {error}") from None
        if tuple(head) != PublishedPoint._fields:
            raise ArtefactError(f"{path}: its first line is {head}; expected {','.join(PublishedPoint._fields)}")
        return cls([_point(row, f"{path}:{line}") for line, row in enumerate(rows, 2)], path)

    def require(self, figure: str, metrics: Sequence[str]) -> None:
        """Raises ArtefactError for a figure that is not there, or has none of these metrics."""
        known = {point.metric for point in self.points if point.figure == figure}
        if not known:
            figures = {point.figure for point in self.points}
            raise ArtefactError(f"{self._path}: no figure {figure!r}{did_you_mean(figure, figures)}")
        if not known & set(metrics):
            raise ArtefactError(
                f"{self._path}: {figure} has {', '.join(sorted(known))}, and the panel shows {', '.join(metrics)}; name "
                "another figure, or null"
            )

    def of(self, figure: str | None, metric: str) -> list[PublishedPoint]:
        """The points of a figure, or of none."""
        return [point for point in self.points if point.figure == figure and point.metric == metric]


def _point(row: Sequence[str], place: str) -> PublishedPoint:
    if len(row) != len(PublishedPoint._fields) or not all(cell.strip() for cell in row):
        raise ArtefactError(f"{place}: expected {', '.join(PublishedPoint._fields)}, all of them; found {row}")
    figure, series, x, x_unit, metric, value, error, source = row
    if x_unit != CATEGORY:
        _number(x, place)
    return PublishedPoint(figure, series, x, x_unit, metric, _number(value, place), _number(error, place), source)


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArtefactError(f"{place}: {text!r} is no finite number")
    return value
