"""One page that tells how the run went: a table of metrics, curves, reconstructions, samples.

`report.html` needs no other file and no network.
"""

import base64
import csv
import html
from pathlib import Path
from typing import Any

from pydantic import Field

from stages._pictures import curves
from stages._runner import Input, Output, Work, main
from vtp.artefact import read_json
from vtp.config import Config

STYLE = """
body { font: 15px sans-serif; max-width: 70em; margin: 2em auto }
td, th { padding: .2em 1em; text-align: left }
img { max-width: 100% }
"""


class Report(Config):
    """The section `report`."""

    title: str = Field(min_length=1)


def run(  # noqa: PLR0913 - one flag per file that the page shows
    config: Report,
    *,
    pretrain: Input,
    pretrain_curves: Input,
    looks: Input,
    tune_decoder: Input,
    decoder_curves: Input,
    train_generator: Input,
    generator_curves: Input,
    reconstruction: Input,
    reconstructions: Input,
    understanding: Input,
    generation: Input,
    samples: Input,
    report: Output,
    work: Work,
) -> None:
    tables = {"pretrain": pretrain_curves, "decoder": decoder_curves, "generator": generator_curves}
    report.mkdir()
    curves({name: _columns(path) for name, path in tables.items()}, report / "curves.png")
    metrics: dict[str, Any] = {}
    for path in (pretrain, tune_decoder, train_generator, understanding, reconstruction, generation):
        metrics |= read_json(path)
    flat = flatten(metrics)
    (report / "metrics.md").write_text(_markdown(flat), encoding="utf-8")
    shown = [reconstructions, looks, *sorted(samples.glob("*.png")), report / "curves.png"]
    (report / "report.html").write_text(_page(config.title, flat, shown), encoding="utf-8")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one table, names joined by dots."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _columns(path: Path) -> dict[str, list[float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]} if rows else {}


def _number(value: float) -> str:
    return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(flat: dict[str, float]) -> str:
    rows = [f"| {name} | {_number(value)} |" for name, value in flat.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows]) + "\n"


def _page(title: str, flat: dict[str, float], pictures: list[Path]) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{_number(value)}" for name, value in flat.items())
    images = "".join(
        f'<h2>{path.stem}</h2><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    heading = html.escape(title)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style>'
        f"<h1>{heading}</h1><table><tr><th>metric<th>value{rows}</table>{images}\n"
    )


if __name__ == "__main__":
    main(run)
