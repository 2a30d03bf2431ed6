"""Training curves: one CSV row per interval, readable while the run goes on, exact after a resume."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vtp.artefact import whole_file
from vtp.step import Logs
from vtp.texts import write_csv


class Means:
    """Running means of named scalars in float64. They stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, logs: Logs) -> None:
        """Count one value of each scalar."""
        for name, value in logs.items():
            exact = torch.as_tensor(value).detach().double()  # stays on its device: no synchronisation here
            self._sums[name] = self._sums[name].to(exact.device) + exact if name in self._sums else exact
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, and start again."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Sum and count of every scalar, exact in JSON."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {name: [value, self._counts[name]] for name, value in sums.items() if math.isfinite(value)}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from what `state` gave."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, (value, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}


class Curves:
    """A CSV file with a `step` column; opened at step n, it drops the rows of later steps."""

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        self._columns: list[str] = []
        rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                # A kill in the middle of a line leaves a row without its last columns.
                rows = [row for row in reader if None not in row.values() and int(row["step"]) <= start]
                self._columns = list(reader.fieldnames or [])
        self._rewrite(rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; a column that appears for the first time rewrites the file."""
        row = {"step": str(step)} | {name: f"{value:.6g}" for name, value in values.items()}
        fresh = [name for name in row if name not in self._columns]
        if fresh:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._columns += fresh
            self._rewrite(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            write_csv(file, [[row.get(name, "") for name in self._columns]])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with whole_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            write_csv(file, [self._columns] if self._columns else [])
            write_csv(file, ([row.get(name) or "" for name in self._columns] for row in rows))


def gradient_figures(path: Path, phase: str) -> dict[str, dict[str, float]]:
    """Median, 99th percentile and maximum over the rows of finished curves: of a phase's gradient norm before clipping,
    as `gradient_norm`, and of each objective's on the trunk, as `trunk_gradient_<objective>` where there are several.

    A row of the norm holds the mean over `log_every` steps; gradients on the trunk are those of its last step.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figures = {}
    for column in rows[0] if rows else ():
        if column != f"{phase}_gradient_norm" and not column.startswith("trunk_gradient_"):
            continue
        values = torch.tensor([float(value) for row in rows if (value := row[column])], dtype=torch.float64)
        median, high = values.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        name = "gradient_norm" if column.startswith(phase) else column
        figures[name] = {"median": median, "p99": high, "max": float(values.max())}
    return figures
