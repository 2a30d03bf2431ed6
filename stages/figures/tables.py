"""Metrics as tables: nested JSON flattened, numbers written alike everywhere, Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vtp.texts import in_markdown


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one table, names joined by dots; texts are left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif not isinstance(value, str):
            flat[f"{prefix}{name}"] = value
    return flat


def number(value: float | str | None) -> str:
    """Four digits; `-` for what there is not."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:.4g}"
    return str(value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are plain text."""
    lines = ([in_markdown(cell) for cell in line] for line in (head, ["---"] * len(head), *rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
