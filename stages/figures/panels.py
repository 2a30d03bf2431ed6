"""Panels of a study in the layout of the paper's figures: what was measured here, and below it what is published."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from stages.figures.drawing import axes
from stages.figures.legend import NEITHER, LegendEntry
from stages.figures.points import OF_TRAINING, StudyPoints, is_logarithmic, meaning, quantity_name
from stages.figures.published import CATEGORY, Published, PublishedPoint
from vtp.config import Config, Distinct
from vtp.evaluation.intervals import Interval
from vtp.inference.lettering import drawable

Shown = Annotated[list[str], Distinct, Field(min_length=1, description="labels among metrics: a panel of each")]
PublishedFigure = Annotated[
    str | None, Field(description="figure or table of the published points whose metrics of these labels stand below")
]
RATIOS = re.compile(r".*(FLOPs.*|samples|images|parameters)")  # units of an x of which ratios count
WIDEST = 24  # letters of the names of bars that stand beside each other


class CurvesConfig(Config):
    """Every run along its points."""

    name: Literal["curves"]
    x: str = Field(description="flops or samples, of pre-training so far, or a label among metrics")
    y: Shown
    published: PublishedFigure


class LastPointsConfig(Config):
    """The last points of runs that differ in scale, joined to series."""

    name: Literal["last_points"]
    x: str = Field(description="flops or samples of pre-training, or a label among metrics")
    y: Shown
    series: dict[str, Annotated[list[str], Distinct]] = Field(
        min_length=1, description="names of runs by the name of their series"
    )
    published: PublishedFigure


class BarsConfig(Config):
    """The last point of every run."""

    name: Literal["bars"]
    y: Shown
    published: PublishedFigure


PanelConfig = Annotated[CurvesConfig | LastPointsConfig | BarsConfig, Field(discriminator="name")]


class _Single(NamedTuple):
    """One panel, and the published points below it."""

    config: CurvesConfig | LastPointsConfig | BarsConfig
    y: str
    published: list[PublishedPoint]


class _DrawnPoint(NamedTuple):
    """A point that is drawn."""

    x: Interval
    y: Interval
    seeds: list[tuple[float, float]]


def labels(panel: PanelConfig) -> list[str]:
    """Labels that a panel names, its x among them."""
    x = [] if isinstance(panel, BarsConfig) or panel.x in OF_TRAINING else [panel.x]
    return [*x, *panel.y]


def named_runs(panel: PanelConfig) -> list[str]:
    """Runs that a panel names."""
    return [run for runs in panel.series.values() for run in runs] if isinstance(panel, LastPointsConfig) else []


def draw_panels(
    configs: Sequence[PanelConfig], measured: StudyPoints, published: Published, *, title: str, path: Path
) -> None:
    """As one PNG. Error bars are 95 % t intervals over seeds, small dots the seeds."""
    singles = [_Single(panel, y, published.of(panel.published, y)) for panel in configs for y in panel.y]
    columns = {4: 2}.get(len(singles), min(len(singles), 3))
    rows: list[tuple[bool, Sequence[_Single]]] = []
    for first in range(0, len(singles), columns):
        block = singles[first : first + columns]
        rows += [(False, block), *([(True, block)] if any(single.published for single in block) else [])]
    entries, colours = meaning(measured.metrics), _colours(singles, measured)
    with axes(columns * len(rows), path, columns=columns, size=(5, 3.4), dpi=90) as every:
        for row, (of_others, block) in enumerate(rows):
            here = every[row * columns : (row + 1) * columns]
            for axis, single in zip(here, block, strict=False):
                if not of_others:
                    _ours(axis, single, measured, colours, entries[single.y])
                elif single.published:
                    _theirs(axis, single, colours, entries[single.y])
            for axis in here:
                if not axis.has_data():
                    axis.axis("off")
            _legends(here)
        every[0].figure.suptitle(drawable(title))


def _colours(singles: Sequence[_Single], measured: StudyPoints) -> dict[str, Any]:
    """One for every name of a series, wherever it is drawn: what is published as AE looks like a run `ae`."""
    from matplotlib import colormaps

    names = [name for single in singles for name in _series(single, measured)]
    names += [point.series for single in singles for point in single.published]
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined] - of a list of colours
    order = [*palette[::2], *palette[1::2]]
    places = {name: place for place, name in enumerate(dict.fromkeys(name.lower() for name in names))}
    return {name: order[places[name.lower()] % len(order)] for name in names}


def _series(single: _Single, measured: StudyPoints) -> dict[str, list[tuple[str, str]]]:
    """Runs and points of every curve."""
    if isinstance(single.config, LastPointsConfig):
        return {
            name: [(run, measured.last(run)) for run in runs if run in measured.runs]
            for name, runs in single.config.series.items()
        }
    return {run: [(run, point) for point in measured.points(run)] for run in measured.runs}


def _ours(
    axis: Any,  # noqa: ANN401 - matplotlib's
    single: _Single,
    measured: StudyPoints,
    colours: Mapping[str, Any],
    entry: LegendEntry | None,
) -> None:
    better = "" if entry is None or entry.better == NEITHER else f" ({entry.better} is better)"
    axis.set_title(drawable(f"{single.y}{better}"), fontsize=9)
    axis.set_ylabel("" if entry is None else drawable(entry.unit), fontsize=7)
    if isinstance(single.config, BarsConfig):
        _bars(axis, single, measured, colours)
        return
    x = single.config.x
    for name, places in _series(single, measured).items():
        _curve(axis, name, colours[name], list(_places(places, x, single.y, measured)))
    unit = meaning(measured.metrics).get(x)
    axis.set_xlabel(drawable(quantity_name(x) + (f" ({unit.unit})" if unit is not None else "")), fontsize=8)
    if is_logarithmic(x, measured.metrics) and axis.has_data():
        axis.set_xscale("log")


def _places(places: Sequence[tuple[str, str]], x: str, y: str, measured: StudyPoints) -> Iterator[_DrawnPoint]:
    """Those that were measured."""
    for run, point in places:
        at, value = measured.mean(run, point, x), measured.mean(run, point, y)
        pairs = [
            (measured.value(run, seed, point, x), measured.value(run, seed, point, y)) for seed in measured.seeds([run])
        ]
        if at.number and value.number:
            yield _DrawnPoint(at, value, [pair for pair in pairs if not any(map(math.isnan, pair))])


def _curve(axis: Any, name: str, colour: Any, places: Sequence[_DrawnPoint]) -> None:  # noqa: ANN401 - matplotlib's
    if not places:
        return
    x, y = [place.x for place in places], [place.y for place in places]
    axis.errorbar(
        [each.estimate for each in x],
        [each.estimate for each in y],
        xerr=_error(x),
        yerr=_error(y),
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        label=drawable(name),
    )
    axis.scatter(*zip(*(seed for place in places for seed in place.seeds), strict=True), color=colour, s=8, alpha=0.4)


def _error(of: Sequence[Interval]) -> list[list[float]] | None:
    """How far intervals reach below and above; none of one seed, and none that is a single value."""
    ends = [[each.estimate - each.low for each in of], [each.high - each.estimate for each in of]]
    known = [[0.0 if math.isnan(value) else value for value in side] for side in ends]
    return known if any(map(any, known)) else None


def _bars(axis: Any, single: _Single, measured: StudyPoints, colours: Mapping[str, Any]) -> None:  # noqa: ANN401
    runs = measured.runs
    for position, run in enumerate(runs):
        point = measured.last(run)
        value = measured.mean(run, point, single.y)
        if value.number:
            axis.bar(
                position, value.estimate, width=0.6, color=colours[run], alpha=0.8, yerr=_error([value]), capsize=3
            )
            of_seeds = measured.values(run, point, single.y)
            axis.scatter([position] * len(of_seeds), of_seeds, color="black", s=8, zorder=3)
    _name_bars(axis, runs)


def _theirs(
    axis: Any,  # noqa: ANN401 - matplotlib's
    single: _Single,
    colours: Mapping[str, Any],
    entry: LegendEntry | None,
) -> None:
    unit = single.published[0].x_unit
    axis.set_title(drawable(f"published: {single.config.published}, {single.y}"), fontsize=9)
    axis.set_ylabel("" if entry is None else drawable(entry.unit), fontsize=7)
    series = {
        name: [point for point in single.published if point.series == name]
        for name in dict.fromkeys(point.series for point in single.published)
    }
    if unit == CATEGORY:
        _published_bars(axis, series, colours)
        return
    for name, points in series.items():
        ordered = sorted(points, key=lambda point: float(point.x))
        axis.errorbar(
            [float(point.x) for point in ordered],
            [point.value for point in ordered],
            yerr=[point.error for point in ordered],
            color=colours[name],
            marker="s",
            markersize=4,
            capsize=2,
            label=drawable(name),
        )
    axis.set_xlabel(drawable(unit), fontsize=8)
    if RATIOS.fullmatch(unit):
        axis.set_xscale("log")


def _published_bars(
    axis: Any,  # noqa: ANN401 - matplotlib's
    series: Mapping[str, Sequence[PublishedPoint]],
    colours: Mapping[str, Any],
) -> None:
    """Categories beside each other, in each a bar of every series."""
    names = list(dict.fromkeys(point.x for points in series.values() for point in points))
    width = 0.8 / len(series)
    for number, (name, points) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * width
        axis.bar(
            [names.index(point.x) + shift for point in points],
            [point.value for point in points],
            width=0.9 * width,
            yerr=[point.error for point in points],
            color=colours[name],
            alpha=0.8,
            label=drawable(name),
        )
    _name_bars(axis, names)


def _name_bars(axis: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - matplotlib's
    axis.set_xticks(range(len(names)), [drawable(name) for name in names], fontsize=7)
    axis.set_xlim(-0.6, len(names) - 0.4)
    if sum(map(len, names)) > WIDEST:
        axis.tick_params(axis="x", labelrotation=30)


def _legends(here: Sequence[Any]) -> None:
    """Beside the first of the panels in a row that name the same series, where it hides no point."""
    told: list[list[str]] = []
    for axis in here:
        names = axis.get_legend_handles_labels()[1]
        if names and names not in told:
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
            told.append(names)
