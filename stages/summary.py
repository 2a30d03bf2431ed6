"""Compare runs along their training: one table and one figure from the metrics of many points.

The input holds `<run>/<training FLOPs>/*.json`, the metrics of the evaluation stages.
"""

import math
from pathlib import Path
from typing import Any

from pydantic import Field

from stages._runner import Input, Output, Work, main
from stages.report import flatten
from vtp.artefact import ArtefactError, read_json
from vtp.config import Config

Curve = dict[float, dict[str, float]]  # training FLOPs to metrics


class Summary(Config):
    """The section `summary`."""

    title: str = Field(min_length=1)
    metrics: list[str] = Field(min_length=1, description="names joined by dots, as in the tables of the report")


def run(config: Summary, *, points: Input, summary: Output, work: Work) -> None:
    runs = {folder.name: _curve(folder, config.metrics) for folder in sorted(points.iterdir()) if folder.is_dir()}
    summary.mkdir()
    (summary / "table.md").write_text(_table(runs, config.metrics), encoding="utf-8")
    _figure(runs, config, summary / "curves.png")


def _curve(folder: Path, metrics: list[str]) -> Curve:
    curve: Curve = {}
    for point in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: float(path.name)):
        measured: dict[str, float] = {}
        for path in sorted(point.glob("*.json")):
            measured |= flatten(read_json(path))
        missing = [name for name in metrics if name not in measured and not _of_absent_objective(name)]
        if missing:
            raise ArtefactError(f"{point}: no metric {missing[0]!r}; it has {', '.join(measured)}")
        curve[float(point.name)] = {name: measured.get(name, math.nan) for name in metrics}
    return curve


def _of_absent_objective(name: str) -> bool:
    """A tokenizer without text tower has no zero-shot figures."""
    return "zero_shot" in name


def _table(runs: dict[str, Curve], metrics: list[str]) -> str:
    head = ["run", "training FLOPs", *metrics]
    rows = [
        [run, f"{flops:.3g}", *("-" if math.isnan(values[name]) else f"{values[name]:.4g}" for name in metrics)]
        for run, curve in runs.items()
        for flops, values in curve.items()
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figure(runs: dict[str, Curve], config: Summary, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(config.metrics))
    rows = -(-len(config.metrics) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    panels: list[Any] = list(axes.flat)
    for axis, name in zip(panels, config.metrics, strict=False):
        for run, curve in runs.items():
            axis.plot(list(curve), [values[name] for values in curve.values()], marker="o", label=run)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("training FLOPs", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    for axis in panels[len(config.metrics) :]:
        axis.axis("off")
    figure.suptitle(config.title)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main(run)
