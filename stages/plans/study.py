"""What a study takes that compares runs: the plans of its stages, over its runs, seeds and points."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from stages.plans.estimate import Estimate, Figure, rounded
from stages.runner.pipeline import Use
from vtp.artefact import write_json

UNPLANNED = ("prepare_data", "train_detector", "summary")  # they run on no device, or for a minute
FLOPS, HOURS = "run", "GPU hours"  # as the plans of stages call them


class Cost(NamedTuple):
    """What a stage, or several, take."""

    flops: float
    hours: float  # of GPUs

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override] - no tuple is meant
        return Cost(self.flops + other.flops, self.hours + other.hours)

    def times(self, count: int) -> "Cost":
        """Of so many."""
        return Cost(self.flops * count, self.hours * count)

    @property
    def figure(self) -> Figure:
        """FLOPs, beside the hours."""
        return Figure(self.flops, f"{self.flops:.3e} FLOPs, {rounded(self.hours)} GPU hours")


def plan_study(
    uses: list[Use],
    shared: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
    arguments: list[str],
    *,
    seeds: int,
    points: int,
) -> Estimate:
    """What all stages of all runs take; `arguments` are options that the plans of all stages have.

    Stages whose seeds differ cost the same, so one of them is planned.
    """
    estimate, whole = Estimate(), Cost(0, 0)
    planner = _Planner(arguments)
    for name, sections in runs.items():
        section = estimate.section(f"{name}, of one seed")
        of_run = Cost(0, 0)
        for use in (use for use in uses if use.of_runs):
            cost = planner.cost(use, {**shared, **sections}).times(points if use.at_points else 1)
            section[use.section] = cost.figure
            of_run += cost
        section["all"] = of_run.figure
        whole += of_run.times(seeds)
    any_run = {**shared, **next(iter(runs.values()))}
    for use in uses:
        if not use.of_runs and use.module not in UNPLANNED:
            whole += planner.cost(use, any_run)
    estimate.section(f"the study: {len(runs)} runs, {seeds} seeds, {points} points")["all"] = whole.figure
    return estimate


class _Planner:
    """The plans of stages, each asked once for the same parameters."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._known: dict[str, Cost] = {}

    def cost(self, use: Use, sections: Mapping[str, Any]) -> Cost:
        """Of one stage with these parameters."""
        key = f"{use.module} {use.section} {json.dumps(_decisive(use, sections))}"
        if key not in self._known:
            plan = import_module(f"stages.plans.{use.module}").plan
            with TemporaryDirectory() as folder:
                write_json(path := Path(folder) / "params.json", sections)
                found: Estimate = plan([f"{path}:{use.section}", *self._arguments])
            self._known[key] = Cost(found[FLOPS].value, found[HOURS].value)
        return self._known[key]


def _decisive(use: Use, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What the cost of a stage depends on: on no seed, and behind pre-training on the tokenizer and its objectives."""
    parts = {name: {key: value for key, value in of.items() if key != "seed"} for name, of in sections.items()}
    if use.module != "pretrain" and "pretrain" in parts:
        weights = parts["pretrain"]["objective"]["weights"]
        trained = [name for name, weight in weights.items() if weight]
        parts["pretrain"] = {"tokenizer": parts["pretrain"]["tokenizer"], "objectives": trained}
    return parts
