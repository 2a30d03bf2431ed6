"""A page of HTML that needs no other file: sections of tables and pictures, with a list of contents."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.figures.tables import number
from vtp.layers.decode import read_rgb
from vtp.texts import in_html

STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 1em }
th, td { padding: .15em 1em .15em 0; text-align: left; border-bottom: 1px solid #ddd }
td + td, th + th { text-align: right }
table.words td, table.words th { text-align: left; vertical-align: top }
.figures { display: flex; flex-wrap: wrap; gap: 1em; margin: 1em 0 }
.figures div { border: 1px solid #ddd; padding: .5em 1em; min-width: 20em }
.figures b { display: block; font-size: 1.6em }
.figures small { color: #555 }
figure { margin: 1em 0 }
figcaption { color: #555 }
img { max-width: 100% }
"""
Cells = Sequence[str | float | None]


class HeadlineFigure(NamedTuple):
    """A number of the headline."""

    label: str
    name: str  # full, which says what was measured; empty: not measured
    value: float | None
    beside: str = ""  # what to compare it with


class CaptionedPicture(NamedTuple):
    """A PNG and what it shows."""

    path: Path
    caption: str


class Table(NamedTuple):
    """Rows as they are given."""

    head: Cells
    rows: Sequence[Cells]
    words: bool = False  # texts, not numbers


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    metrics: dict[str, Any] = {}  # noqa: RUF012 - never changed. Nested; numbers, and texts that say what measured them
    pictures: Sequence[CaptionedPicture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def page(title: str, opening: Sequence[Section], figures: Sequence[HeadlineFigure], sections: Sequence[Section]) -> str:
    """First what `opening` says, with the headline figures behind its first section, then contents, then the sections."""
    first, *others = opening
    parts = [_section(first), _headline(figures), _contents([*others, *sections])]
    body = "".join([*parts, *map(_section, [*others, *sections])])
    heading = in_html(title)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{heading}</title><style>{STYLE}</style><h1>{heading}</h1>{body}\n'
    )


def _section(section: Section) -> str:
    return (
        f'<h2 id="{_anchor(section.heading)}">{in_html(section.heading)}</h2>'
        + "".join(f"<p>{in_html(note)}</p>" for note in section.notes)
        + "".join(metrics_tables(values, name) for name, values in section.metrics.items())
        + "".join(map(_rows, section.tables))
        + "".join(map(_picture, section.pictures))
    )


def _headline(figures: Sequence[HeadlineFigure]) -> str:
    shown = "".join(
        f"<div>{in_html(figure.label)}<b>{in_html(number(figure.value))}</b>"
        f"<small>{in_html(figure.name or 'not measured')}"
        + (f"<br>{in_html(figure.beside)}" if figure.beside else "")
        + "</small></div>"
        for figure in figures
    )
    return f'<div class="figures">{shown}</div>'


def _contents(sections: Sequence[Section]) -> str:
    lines = "".join(f'<li><a href="#{_anchor(each.heading)}">{in_html(each.heading)}</a>' for each in sections)
    return f"<h2>Contents</h2><ul>{lines}</ul>"


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def metrics_tables(values: dict[str, Any], name: str) -> str:
    """Figures under `name`; records with the same kind of figures stand beside each other, in columns."""
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    plain = {key: value for key, value in values.items() if key not in nested}
    shown = _table(name, {"": plain}) if plain else ""
    beside = {key: value for key, value in nested.items() if not any(isinstance(v, dict) for v in value.values())}
    if beside:
        shown += _table(name, beside)
    return shown + "".join(metrics_tables(value, f"{name}.{key}") for key, value in nested.items() if key not in beside)


def _table(name: str, columns: dict[str, dict[str, Any]]) -> str:
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    head = "".join(f"<th>{in_html(column)}" for column in (name, *columns))
    body = "".join(
        f"<tr><td>{in_html(row)}" + "".join(f"<td>{_cell(column, row)}" for column in columns.values()) for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _rows(table: Table) -> str:
    head, *body = [[in_html(number(value)) for value in row] for row in (table.head, *table.rows)]
    lines = "".join("<tr><td>" + "<td>".join(row) for row in body)
    kind = ' class="words"' if table.words else ""
    return f"<table{kind}><tr><th>{'<th>'.join(head)}{lines}</table>"


def _cell(column: dict[str, Any], row: str) -> str:
    return in_html(number(column[row])) if row in column else ""


def _picture(picture: CaptionedPicture) -> str:
    caption = in_html(picture.caption)
    read_rgb(picture.path)  # raises: a page does not show a broken one as if there were none
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
