"""Texts of strangers where people and programs read them: names of files, captions, classes, URLs, what servers say.

A terminal obeys control characters, a spreadsheet computes what begins like a formula, Markdown and HTML are languages. Data
keep their texts as they are; whatever is printed, logged or put into a table or a page goes through here.
"""

import csv
import html
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TextIO
from unicodedata import category

UNUSUAL = re.compile(r"[^ -~]")  # all but the printable part of ASCII
# Control and format characters (those that turn the direction of writing among them), lone surrogates, ends of lines.
ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", re.ASCII | re.IGNORECASE)
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the wide ones too
MARKDOWN = re.compile(r"[\\`*|\[\]]")
INDENT = "  "
LISTED = 10  # things that a message names


def shown(text: str) -> str:
    """On one line, with escapes for what a terminal acts on and for what nobody sees.

    A byte of a file name that is no UTF-8, which Python holds as a surrogate, becomes `\\xNN`.
    """
    return UNUSUAL.sub(_escape, text)


def message(text: str, *, indent: str = INDENT) -> str:
    """Lines for a terminal or a log; all but the first are indented, so that none can pass for another message."""
    first, *more = text.rstrip("\n").split("\n")
    return "\n".join([shown(first), *((indent + shown(line)).rstrip() for line in more)])


def in_markdown(text: str) -> str:
    """A text of one line or a cell of a table in Markdown, which means nothing there."""
    return MARKDOWN.sub(r"\\\g<0>", shown(text)).replace("&", "&amp;").replace("<", "&lt;")


def in_html(text: str) -> str:
    """A text or a quoted attribute of a page."""
    return html.escape(shown(text))


def listed(texts: Sequence[str], separator: str = ", ", *, count: int | None = None) -> str:
    """The first `LISTED` of them, and how many are left out; `nothing` for none. `count`: how many there are, if more."""
    first = list(texts[:LISTED])
    left = (len(texts) if count is None else count) - len(first)
    return separator.join([*first, *([f"and {left} more"] if left > 0 else [])]) or "nothing"


def write_csv(file: TextIO, rows: Iterable[Iterable[object]]) -> None:
    """Rows of a CSV file that was opened with newline="".

    Numbers stay numbers, written out or not; a text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    csv.writer(file, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)


def text_problem(value: object) -> str | None:
    """Why a value cannot stand where a text must, such as `is not UTF-8`; None when it can."""
    if not isinstance(value, str):
        return "is no text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def escape_tracebacks() -> None:
    """Print the errors that nobody expected like all other messages."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(message("".join(traceback.format_exception(kind, error, trace))) + "\n")

    sys.excepthook = show


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if category(letter) not in ACTING:
        return letter
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def _cell(value: object) -> object:
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    text = shown(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
