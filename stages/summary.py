"""Compare runs: one table and one figure from the metrics of their points, beside published figures where there are any.

The input holds `<run>/<point>/*.json`, what was measured of the tokenizer at a milestone, named by training FLOPs or `end`,
and `<run>/*.json`, what was measured of the whole run, which counts at its end. A run without points was not trained here.
"""

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, model_validator

from stages.figures.convergence import convergence_of, draw_convergence
from stages.figures.drawing import axes
from stages.figures.side_by_side import draw_side_by_side
from stages.figures.tables import flatten, markdown, number
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError, read_json, write_json
from vtp.config import Config
from vtp.host import Host
from vtp.inference.lettering import drawable
from vtp.params import END

EPOCHS_TO_REACH = "train_generator.epochs_to_reach."


class Summary(Config):
    """The section `summary`."""

    title: str = Field(min_length=1, description="heading of the figure")
    metrics: list[str] = Field(min_length=1, description="names joined by dots, as in the tables of the report")
    published: dict[str, dict[str, float]] = Field(
        description="figures that others report, by run and name, for its last point"
    )

    @model_validator(mode="after")
    def _published_are_shown(self) -> Self:
        for run, figures in self.published.items():
            if missing := [name for name in figures if name not in self.metrics]:
                raise ValueError(f"published.{run} has {missing[0]!r}, which is not among metrics")
        return self


class Point(NamedTuple):
    """What was measured of one tokenizer."""

    flops: float | None  # of its training; None when it is not ours to count
    values: dict[str, float]  # by metric, NaN for what it cannot have


def run(
    config: Summary,
    *,
    points: Annotated[Input, "folder of RUN/POINT/*.json and RUN/*.json, the metrics to compare"],
    plots: Annotated[
        OptionalInput, "folder of the runs' pictures, of which reconstructions are set side by side"
    ] = None,
    summary: Annotated[Output, "folder for the table and the curves"],
    headline: Annotated[Output, "JSON file for the last point of every run"],
    host: Host,
) -> None:
    runs = {folder.name: _curve(folder, config.metrics) for folder in sorted(points.iterdir()) if folder.is_dir()}
    _require_each(config.metrics, runs, points)
    if unknown := sorted(config.published.keys() - runs.keys()):
        raise ArtefactError(f"summary.published names {unknown[0]!r}; {points} holds the runs {', '.join(runs)}")
    summary.mkdir()
    table = _table(runs, config.metrics)
    if config.published:
        table += "\n" + _comparison(runs, config.published)
    (summary / "table.md").write_text(table, encoding="utf-8")
    _figure(runs, config, summary / "curves.png")
    if plots is not None:
        draw_side_by_side(plots, summary / "side_by_side.png")
    if watched := convergence_of(points):
        draw_convergence(watched, summary / "convergence.png")
    write_json(headline, {run: _known(curve[-1].values) for run, curve in runs.items()})


def _curve(folder: Path, metrics: list[str]) -> list[Point]:
    """The points of a run in the order of their training."""
    of_run = _measured(folder)
    folders = [path for path in folder.iterdir() if path.is_dir()]
    points = {path.name: _measured(path) for path in folders} if folders else {END: {}}
    if END in points:
        points[END] = of_run | points[END]
    curve = [
        Point(_flops(name, of_run), {metric: values.get(metric, math.nan) for metric in metrics})
        for name, values in points.items()
    ]
    return sorted(curve, key=lambda point: math.inf if point.flops is None else point.flops)


def _flops(point: str, of_run: dict[str, float]) -> float | None:
    return of_run.get("pretrain.flops") if point == END else float(point)


def _measured(folder: Path) -> dict[str, float]:
    """All metrics in a folder, by their names joined by dots."""
    return {name: value for path in sorted(folder.glob("*.json")) for name, value in flatten(read_json(path)).items()}


def _known(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _require_each(metrics: list[str], runs: dict[str, list[Point]], folder: Path) -> None:
    """A run may lack a metric, as one without text tower lacks zero-shot figures; one that all lack is misspelt.

    But for epochs to reach a distance: it may be that none came to it, and `check` knows which distances are asked for.
    """
    values = [point.values for curve in runs.values() for point in curve]
    for name in metrics:
        if all(math.isnan(of[name]) for of in values) and not name.startswith(EPOCHS_TO_REACH):
            known = {key for path in folder.rglob("*.json") for key in flatten(read_json(path))}
            raise ArtefactError(f"{folder}: no run has the metric {name!r}; they have {', '.join(sorted(known))}")


def _table(runs: dict[str, list[Point]], metrics: list[str]) -> str:
    rows = [
        [
            run,
            "-" if point.flops is None else f"{point.flops:.3g}",
            *(number(point.values[name]) for name in metrics),
        ]
        for run, curve in runs.items()
        for point in curve
    ]
    return markdown(["run", "training FLOPs", *metrics], rows)


def _comparison(runs: dict[str, list[Point]], published: dict[str, dict[str, float]]) -> str:
    """Each published figure beside that of the run's last point."""
    rows = []
    for run, figures in published.items():
        for name, theirs in figures.items():
            ours = runs[run][-1].values[name]
            difference = "-" if math.isnan(ours) else f"{ours - theirs:+.4g}"
            rows.append([run, name, number(ours), f"{theirs:.4g}", difference])
    return markdown(["run", "metric", "measured", "published", "difference"], rows)


def _figure(runs: dict[str, list[Point]], config: Summary, path: Path) -> None:
    single = all(len(curve) == 1 for curve in runs.values())  # bars say more than a dot of each
    counted = not single and any(point.flops is not None for curve in runs.values() for point in curve)
    with axes(len(config.metrics), path, columns=3, size=(4.6, 3.2), dpi=90) as every:
        for axis, name in zip(every, config.metrics, strict=True):
            for position, (run, curve) in enumerate(runs.items()):
                if single:
                    axis.bar(position, curve[0].values[name], width=0.6, color=f"C{position}", label=run)
                else:
                    _draw(axis, f"C{position}", run, curve, name)
                if (theirs := config.published.get(run, {}).get(name)) is not None:
                    axis.axhline(theirs, color=f"C{position}", linestyle=":")
            if single:
                axis.set_xticks(range(len(runs)), list(runs))
                axis.set_xlim(-0.5, len(runs) - 0.5)
            axis.set_title(drawable(name), fontsize=9)
            axis.set_xlabel("training FLOPs" if counted else "", fontsize=8)
            axis.tick_params(labelsize=8, labelbottom=counted or single, bottom=counted)
        every[0].legend(fontsize=8)
        every[0].figure.suptitle(drawable(f"{config.title} (dotted: published)" if config.published else config.title))


def _draw(axis: Any, colour: str, run: str, curve: list[Point], name: str) -> None:  # noqa: ANN401 - matplotlib's
    """A curve over training FLOPs, or a level when there are none."""
    if curve and curve[0].flops is None:
        axis.axhline(curve[0].values[name], color=colour, label=run)
    else:
        values = [point.values[name] for point in curve]
        axis.plot([point.flops for point in curve], values, color=colour, marker="o", label=run)


if __name__ == "__main__":
    main(run)
