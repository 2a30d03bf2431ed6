"""What each rule removed: counts that add up over chunks, and the first examples in the order of the output."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from vtp.artefact import read_json, write_json
from vtp.curation.rows import CAPTION, KEY, ORDER, URL
from vtp.texts import in_markdown, shown

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 3  # per rule
LONGEST = 100  # characters of a text that is shown


class RemovedRow(NamedTuple):
    """A row that a rule removed. Examples sort by `order`."""

    order: int
    key: str
    url: str
    caption: str


class Tally:
    """Counts and examples of a piece of the work, by line of the funnel."""

    def __init__(self) -> None:
        self.removed: dict[str, int] = {}
        self.examples: dict[str, list[RemovedRow]] = {}
        self.left = 0

    def add(self, line: str, table: "pa.Table", indices: np.ndarray) -> None:
        """Rows of `table` were removed; it may have as many more columns as it likes, and lack any but `order`."""
        self.removed[line] = self.removed.get(line, 0) + len(indices)
        if len(indices) == 0:
            return
        orders = table[ORDER].to_numpy()[indices]
        # More than are shown, because rows with one key have one order, and which of them is first is told by the rest.
        first = indices[np.argsort(orders, kind="stable")[: 8 * EXAMPLES]]
        names = [name for name in (ORDER, KEY, URL, CAPTION) if name in table.column_names]
        rows = table.select(names).take(first).to_pylist()
        texts = [[_shown(row.get(name)) for name in (KEY, URL, CAPTION)] for row in rows]
        self.merge(line, [RemovedRow(row[ORDER], *text) for row, text in zip(rows, texts, strict=True)])

    def merge(self, line: str, examples: Iterable[RemovedRow]) -> None:
        """More examples; the first stay."""
        self.examples[line] = sorted([*self.examples.get(line, []), *examples])[:EXAMPLES]

    def save(self, path: Path) -> None:
        """As JSON."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        values, tally = read_json(path), cls()
        tally.removed, tally.left = values["removed"], values["left"]
        tally.examples = {line: [RemovedRow(*row) for row in rows] for line, rows in values["examples"].items()}
        return tally


class Line(NamedTuple):
    """What one rule removed."""

    name: str
    removed: int
    examples: Sequence[RemovedRow]


class Funnel(NamedTuple):
    """From all rows to those that are left."""

    rows_in: int
    lines: list[Line]
    rows_out: int

    @classmethod
    def of(cls, rows_in: int, names: Iterable[str], tallies: Iterable[Tally]) -> Self:
        """The sum of all tallies, a line for each name."""
        total = Tally()
        for tally in tallies:
            for name, count in tally.removed.items():
                total.removed[name] = total.removed.get(name, 0) + count
                total.merge(name, tally.examples.get(name, []))
        lines = [Line(name, total.removed.get(name, 0), total.examples.get(name, [])) for name in names]
        return cls(rows_in, lines, rows_in - sum(line.removed for line in lines))

    def removed(self, names: Iterable[str]) -> int:
        """Rows that these lines removed."""
        chosen = set(names)
        return sum(line.removed for line in self.lines if line.name in chosen)

    def metrics(self) -> dict[str, Any]:
        """As a metrics file holds it."""
        removed = {line.name: line.removed for line in self.lines}
        return {"filter": {"rows_in": self.rows_in, "removed": removed, "rows_out": self.rows_out}}

    def table(self) -> str:
        """Aligned, a line per rule: removed, share of the rows that it saw, left."""
        width = max(len("rows out"), *(len(line.name) for line in self.lines))
        text = [f"{'':{width}}  {'removed':>15}  {'share':>8}  {'left':>15}"]
        text.append(f"{'rows in':{width}}  {'':15}  {'':8}  {self.rows_in:15,}")
        left = self.rows_in
        for line in self.lines:
            share = line.removed / left if left else 0.0
            left -= line.removed
            text.append(f"{line.name:{width}}  {line.removed:15,}  {share:8.2%}  {left:15,}")
        return "\n".join([*text, f"{'rows out':{width}}  {'':15}  {'':8}  {self.rows_out:15,}"])

    def markdown(self) -> str:
        """The table, and below it what each rule removed first."""
        text = ["# Funnel", "", "```", self.table(), "```"]
        for line in self.lines:
            if line.examples:
                text += ["", f"## {in_markdown(line.name)}", ""]
                text += [f"- `{row.key}` `{row.url or '-'}` `{row.caption or '-'}`" for row in line.examples]
        return "\n".join(text) + "\n"


def _shown(text: str | None) -> str:
    """A foreign text on one line, short, without what a terminal or code in Markdown would act on."""
    text = text or ""
    return shown(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...").replace("`", "'")
