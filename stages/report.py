"""One page on how the run went: per part of the recipe its figures and pictures, and the training curves.

`report.html` needs no other file and no network; `metrics.md` holds all figures under their full names, `overview.png` is
originals, reconstructions and samples. The headline is what DVC shows of an experiment: the columns of the paper's tables.
"""

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from stages.figures.drawing import curves, stack
from stages.figures.paper_table import HEAD, TABLE_2, RunFigures, headline_figures, own_row
from stages.figures.tables import flatten, markdown, number
from stages.runner.run import Input, Output, main
from vtp.artefact import read_json, write_json
from vtp.config import Config
from vtp.host import Host
from vtp.texts import in_html

MEASURED = ("pretrain", "understanding", "tune_decoder", "reconstruction", "speed", "train_generator", "generation")
RECONSTRUCTIONS = ("first", "worst", "median", "best")
TABLE_TITLE = "Beside the paper's table 2 (ImageNet 256 x 256, Inception, 50k)"
OVERVIEW = 434  # pixels of each part of the overview: all reconstructions, and samples of four classes
STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 1em }
th, td { padding: .15em 1em .15em 0; text-align: left; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right }
figure { margin: 1em 0 }
figcaption { color: #555 }
img { max-width: 100% }
"""


class Report(Config):
    """The section `report`."""

    title: str = Field(min_length=1, description="heading of the page")


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    metrics: dict[str, Any]  # nested; numbers, and texts that say what they were measured with
    pictures: Sequence[Path]
    rows: Sequence[Sequence[str | float | None]] = ()  # of a table, the head first


def run(
    config: Report,
    *,
    metrics: Annotated[Input, "folder of the JSON files of the stages before"],
    plots: Annotated[Input, "folder of their curves and pictures"],
    report: Annotated[Output, "folder for the page, its pictures and tables"],
    headline: Annotated[Output, "JSON file for the figures that `dvc metrics` compares"],
    host: Host,
) -> None:
    measured = {name: read_json(metrics / f"{name}.json") for name in MEASURED}
    latents = {"latents": measured["reconstruction"].pop("latents")}
    report.mkdir()
    tables = {"pretrain": "pretrain", "decoder": "tune_decoder", "generator": "train_generator"}
    curves({name: _columns(plots / f"{file}.csv") for name, file in tables.items()}, report / "curves.png")
    decoders = next(iter(measured["reconstruction"]["reconstruction"].values()))  # the last is that of the samples
    figures = RunFigures(
        reconstruction=list(decoders.values())[-1],
        understanding=measured["understanding"]["understanding"],
        generator=measured["train_generator"]["train_generator"],
        generation=measured["generation"]["generation"],
    )
    shown = [plots / "reconstructions" / f"{name}.png" for name in RECONSTRUCTIONS]
    sections = [
        Section("Pre-training", measured["pretrain"], [plots / "pretrain.png"]),
        Section("Understanding", measured["understanding"], []),
        Section("Decoder tuning", measured["tune_decoder"], [plots / "tune_decoder.png"]),
        Section("Reconstruction", measured["reconstruction"], shown),
        Section("Latents", latents, [plots / "latents" / "latents.png"]),
        Section("Speed", measured["speed"], []),
        Section("Training of the generator", measured["train_generator"], [plots / "train_generator.png"]),
        Section("Generation", measured["generation"], sorted((plots / "samples").glob("*.png"))),
        Section(TABLE_TITLE, {}, [], [HEAD, own_row(figures), *TABLE_2]),
        Section("Curves", {}, [report / "curves.png"]),
    ]
    everything = {name: values for section in sections for name, values in section.metrics.items()}
    rows = [[name, number(value)] for name, value in flatten(everything).items()]
    (report / "metrics.md").write_text(markdown(["metric", "value"], rows), encoding="utf-8")
    (report / "report.html").write_text(_page(config.title, sections), encoding="utf-8")
    sampled = next(filter(None, reversed(figures.best)), None)  # guided, where a setting is
    drawn = [] if sampled is None else [plots / "samples" / f"{sampled.setting}.png"]
    stack([plots / "reconstructions" / "first.png", *drawn], report / "overview.png", tallest=OVERVIEW)
    flops = {"pretrain_flops": measured["pretrain"]["pretrain"]["flops"]}
    write_json(headline, flops | headline_figures(figures))


def _columns(path: Path) -> dict[str, list[float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]} if rows else {}


def _page(title: str, sections: Sequence[Section]) -> str:
    heading = in_html(title)
    body = "".join(
        f"<h2>{in_html(section.heading)}</h2>"
        + "".join(_tables(values, name) for name, values in section.metrics.items())
        + _rows(section.rows)
        + "".join(map(_figure, section.pictures))
        for section in sections
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style><h1>{heading}</h1>{body}\n'
    )


def _tables(values: dict[str, Any], name: str) -> str:
    """Figures under `name`; records with the same kind of figures stand beside each other, in columns."""
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    plain = {key: value for key, value in values.items() if key not in nested}
    shown = _table(name, {"": plain}) if plain else ""
    beside = {key: value for key, value in nested.items() if not any(isinstance(v, dict) for v in value.values())}
    if beside:
        shown += _table(name, beside)
    return shown + "".join(_tables(value, f"{name}.{key}") for key, value in nested.items() if key not in beside)


def _table(name: str, columns: dict[str, dict[str, Any]]) -> str:
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    head = "".join(f"<th>{in_html(column)}" for column in (name, *columns))
    body = "".join(
        f"<tr><td>{in_html(row)}" + "".join(f"<td>{_cell(column, row)}" for column in columns.values()) for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _rows(rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table as it is given, its head first."""
    if not rows:
        return ""
    head, *body = [[in_html(number(value)) for value in row] for row in rows]
    lines = "".join("<tr><td>" + "<td>".join(row) for row in body)
    return f"<table><tr><th>{'<th>'.join(head)}{lines}</table>"


def _cell(column: dict[str, Any], row: str) -> str:
    return in_html(number(column[row])) if row in column else ""


def _figure(path: Path) -> str:
    name = in_html(path.stem)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


if __name__ == "__main__":
    main(run)
