"""What was measured of the runs of a study: by run, seed and point, where a point is a milestone of pre-training.

A milestone is called by its training FLOPs, or below 1 by its share of the run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stages.figures.legend import LegendEntry, legend_of
from stages.figures.tables import flatten
from vtp.artefact import ArtefactError, read_json
from vtp.evaluation.intervals import Interval, mean_interval
from vtp.params import END, milestone_flops
from vtp.texts import listed

FLOPS, SAMPLES = "flops", "samples"  # of pre-training up to a point
EPOCHS_TO_REACH = "train_generator.epochs_to_reach."
OF_TRAINING = {FLOPS: "training FLOPs", SAMPLES: "samples of pre-training"}


class StudyPoint(NamedTuple):
    """What was measured of one tokenizer."""

    training: dict[str, float]  # under FLOPS and SAMPLES; NaN where it is not ours to count
    figures: dict[str, float]  # by label, NaN for what it cannot have or what failed

    def value(self, quantity: str) -> float:
        """Of a label, or of the training so far."""
        return (self.training if quantity in OF_TRAINING else self.figures)[quantity]


class StudyPoints:
    """All points of all runs. `metrics`: names joined by dots, by label."""

    def __init__(
        self, points: Mapping[str, Mapping[int, Mapping[str, StudyPoint]]], metrics: Mapping[str, str]
    ) -> None:
        self._points = points
        self.metrics = metrics

    @property
    def runs(self) -> list[str]:
        """Their names, in order."""
        return list(self._points)

    def seeds(self, runs: Iterable[str]) -> list[int]:
        """Those of any of the runs."""
        return sorted({seed for run in runs for seed in self._points[run]})

    def points(self, run: str) -> list[str]:
        """In the order of training: of a run that failed in one seed all that the others reached."""

        def reached(name: str) -> float:
            known = self.values(run, name, FLOPS)
            return math.inf if name == END else known[0] if known else float(name)

        return sorted({name for points in self._points[run].values() for name in points}, key=reached)

    def last(self, run: str) -> str:
        """The last of its points."""
        return self.points(run)[-1]

    def value(self, run: str, seed: int, point: str, quantity: str) -> float:
        """NaN for what was not measured."""
        found = self._points[run].get(seed, {}).get(point)
        return math.nan if found is None else found.value(quantity)

    def values(self, run: str, point: str, quantity: str) -> list[float]:
        """Over the seeds, without those that lack it."""
        of_seeds = (self.value(run, seed, point, quantity) for seed in self._points[run])
        return [value for value in of_seeds if not math.isnan(value)]

    def mean(self, run: str, point: str, quantity: str) -> Interval:
        """Over the seeds."""
        return mean_interval(self.values(run, point, quantity))


def read_points(folder: Path, metrics: Mapping[str, str], *, first: Sequence[str]) -> StudyPoints:
    """`folder` holds RUN/SEED/POINT/*.json, and RUN/SEED/*.json of the whole run, which counts at its end. Runs come in the
    order of `first`, then by name.

    Raises ArtefactError for another layout, and for a metric that no run has: one may lack it, as one without text tower
    lacks zero-shot figures; one that all lack is misspelt. But for epochs to reach a distance: it may be that none came to
    it, and `check` knows which distances are asked for.
    """
    order = {run: place for place, run in reversed(list(enumerate(first)))}
    paths = sorted(folder.iterdir(), key=lambda path: (order.get(path.name, len(first)), path.name))
    runs = {path.name: path for path in paths if path.is_dir()}
    measured = {run: _seeds(path, metrics) for run, path in runs.items()}
    points = [point for seeds in measured.values() for of_seed in seeds.values() for point in of_seed.values()]
    if not points:
        raise ArtefactError(f"{folder}: no run; expected RUN/SEED/*.json in it")
    for label, name in metrics.items():
        if all(math.isnan(point.figures[label]) for point in points) and not name.startswith(EPOCHS_TO_REACH):
            known = {key for path in folder.rglob("*.json") for key in flatten(read_json(path))}
            raise ArtefactError(
                f"{folder}: no run has {name!r}, the metric of {label!r}; they have {', '.join(sorted(known))}"
            )
    return StudyPoints(measured, metrics)


def meaning(metrics: Mapping[str, str]) -> dict[str, LegendEntry | None]:
    """The legend's entry of every label; None for a metric that it lacks."""
    ends = {label: name.rpartition(".")[2] for label, name in metrics.items()}
    known = legend_of(ends.values())
    return {label: known[end] for label, end in ends.items()}


def is_logarithmic(quantity: str, metrics: Mapping[str, str]) -> bool:
    """Whether what counts of a quantity is its ratio: of counts and FLOPs."""
    entry = meaning(metrics).get(quantity)
    return quantity in OF_TRAINING or (entry is not None and entry.unit in ("FLOPs", "count"))


def quantity_name(quantity: str) -> str:
    """In words."""
    return OF_TRAINING.get(quantity, quantity)


def _seeds(folder: Path, metrics: Mapping[str, str]) -> dict[int, dict[str, StudyPoint]]:
    """The seeds of a run."""
    paths = [path for path in folder.iterdir() if path.is_dir()]
    if wrong := sorted(path.name for path in paths if not path.name.isdecimal()):
        raise ArtefactError(f"{folder}: expected a folder for every seed, such as 0; found {listed(wrong)}")
    return {int(path.name): _curve(path, metrics) for path in sorted(paths, key=lambda path: int(path.name))}


def _curve(folder: Path, metrics: Mapping[str, str]) -> dict[str, StudyPoint]:
    """The points of a run with one seed."""
    of_run = _figures(folder)
    folders = [path for path in folder.iterdir() if path.is_dir()]
    points = {path.name: _figures(path) for path in folders} if folders else {END: {}}
    if END in points:
        points[END] = of_run | points[END]
    whole = [of_run.get(f"pretrain.{name}", math.nan) for name in (FLOPS, SAMPLES)]
    return {
        point: StudyPoint(
            _training(folder, point, *whole), {label: figures.get(name, math.nan) for label, name in metrics.items()}
        )
        for point, figures in points.items()
    }


def _training(folder: Path, point: str, flops: float, samples: float) -> dict[str, float]:
    """What a run of so many FLOPs and samples took up to a point: every step takes as much."""
    if point == END:
        return {FLOPS: flops, SAMPLES: samples}
    try:
        reached = milestone_flops(float(point), flops)
    except ValueError:
        raise ArtefactError(
            f"{folder}: {point!r} is no point; expected training FLOPs as 5.800e+12, a share of the run as 0.25, or {END}"
        ) from None
    return {FLOPS: reached, SAMPLES: reached / flops * samples}


def _figures(folder: Path) -> dict[str, float]:
    """All numbers in a folder, by their names joined by dots."""
    flat = [flatten(read_json(path)) for path in sorted(folder.glob("*.json"))]
    return {name: float(value) for table in flat for name, value in table.items() if isinstance(value, int | float)}
