"""How a list of rules is carried out: row rules together, each rule about all rows by itself, a line each in the funnel."""

from collections.abc import Sequence
from typing import NamedTuple

from vtp.curation.filter.read_source import Lines, Ruled
from vtp.curation.filter.rules import ImageRule, RowRule, SetRule, label


class Step(NamedTuple):
    """A rule about all rows, and the row rules between it and the next."""

    rule: SetRule
    line: str
    image_line: str  # of images that cannot be read; "" for rules that read none
    following: tuple[Ruled, ...]


class FilterSteps(NamedTuple):
    """Rules as they are carried out, with their lines in the funnel."""

    leading: tuple[Ruled, ...]
    lines: Lines
    steps: tuple[Step, ...]
    names: tuple[str, ...]  # of all lines, in order

    @classmethod
    def of(cls, rules: Sequence[RowRule | SetRule]) -> "FilterSteps":
        """Number the lines. Keys are made unique after the row rules that lead: only what they leave is sorted."""
        names: list[str] = []

        def line(name: str) -> str:
            names.append(f"{len(names) + 1:02}_{name}")
            return names[-1]

        texts, no_key = line("unreadable_text"), line("no_key")
        first = next((place for place, rule in enumerate(rules) if isinstance(rule, SetRule)), len(rules))
        leading = tuple(Ruled(line(label(rule)), rule) for rule in rules[:first] if isinstance(rule, RowRule))
        repeated = line("duplicate_key")
        steps: list[Step] = []
        for rule in rules[first:]:
            if isinstance(rule, SetRule):
                image_line = line("unreadable_image") if isinstance(rule, ImageRule) else ""
                steps.append(Step(rule, line(label(rule)), image_line, ()))
            else:
                following = (*steps[-1].following, Ruled(line(label(rule)), rule))
                steps[-1] = steps[-1]._replace(following=following)
        return cls(leading, Lines(texts, no_key, repeated), tuple(steps), tuple(names))
