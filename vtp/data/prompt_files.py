"""Files of prompts: one a line, or those of GenEval and DPG-Bench, whose own scorers judge the samples (`export`).

GenEval (Ghosh et al. 2023) is a file of JSON objects, one a line: the prompt, its `tag`, and what a detector must find.
DPG-Bench (Hu et al. 2024) is a CSV file with a line for every question about a prompt, or a folder with a text file for
every prompt, whose name is its `item_id`.
"""

import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vtp.artefact import ArtefactError, require_no_pipe, siblings
from vtp.config import Config, ConfigError
from vtp.texts import shown

PromptForm = Literal["lines", "geneval", "dpg"]
ITEM, TEXT = "item_id", "text"  # columns of DPG-Bench
REMEDY = "correct it, or fetch the file again"


class Prompt(Config):
    """What a picture is asked to show."""

    text: str = Field(min_length=1)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  # names files of its samples
    metadata: dict[str, Any]  # what its benchmark says of it, as JSON


def read_prompts(path: Path, form: PromptForm) -> list[Prompt]:
    """The prompts of a file, or of a folder of DPG-Bench, in its order, without the white space around them.

    Their names are the numbers of lines (lines, from 1; geneval, from 0, as its folders of samples are called) or DPG's
    `item_id`. Their metadata are GenEval's objects as they stand, DPG's lines as `questions`. Raises ArtefactError that
    names file and line.
    """
    readers = {"lines": _plain, "geneval": _geneval, "dpg": _dpg_folder if path.is_dir() else _dpg_table}
    prompts = list(readers[form](path))
    if not prompts:
        raise ArtefactError(f"{path}: no prompts; {REMEDY}")
    return prompts


def _plain(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        yield _prompt(line, str(number), {}, f"{path}, line {number}")


def _geneval(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{place}: not valid JSON ({error}); {REMEDY}") from None
        if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("tag", "prompt")):
            raise ArtefactError(f"{place}: expected an object with the texts `tag` and `prompt`; {REMEDY}")
        yield _prompt(values["prompt"], f"{number - 1:05d}", values, place)


def _dpg_folder(folder: Path) -> Iterator[Prompt]:
    for path in sorted(folder.glob("*.txt")):
        yield _prompt(_read(path), path.stem, {}, str(path))


def _dpg_table(path: Path) -> Iterator[Prompt]:
    items: dict[str, Prompt] = {}
    for number, row in _rows(path):
        name, text = row.pop(ITEM), row.pop(TEXT)
        place = f"{path}, line {number}"
        prompt = items.setdefault(name, _prompt(text, name, {"questions": []}, place))
        if prompt.text != text.strip():
            raise ArtefactError(f"{place}: another text than before for the same {ITEM} {shown(name)!r}; {REMEDY}")
        prompt.metadata["questions"].append(row)
    yield from items.values()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV file by column, each with the number of its last line."""
    reader = csv.DictReader(StringIO(_read(path), newline=""), strict=True)
    try:
        if missing := sorted({ITEM, TEXT} - set(reader.fieldnames or ())):
            raise ArtefactError(f"{path}, line 1: no column {' and no '.join(missing)}; is this DPG-Bench's CSV file?")
        for row in reader:
            if None in row or None in row.values():
                raise ArtefactError(f"{path}, line {reader.line_num}: not as many cells as the first line; {REMEDY}")
            yield reader.line_num, row
    except csv.Error as error:
        raise ArtefactError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}); {REMEDY}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; a line ends with \\n or \\r\\n, for other separators occur in texts."""
    yield from enumerate(_read(path).removesuffix("\n").split("\n"), 1)


def _read(path: Path) -> str:
    require_no_pipe(path)
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError(f"{path}: no such file; {siblings(path)}") from None
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}); make or fetch it again") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ArtefactError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _prompt(text: str, name: str, metadata: dict[str, Any], place: str) -> Prompt:
    """Raises ArtefactError for an empty text, and for a name that would be no file of its own."""
    try:
        return Prompt.parse(
            {"text": text.strip(), "name": name, "metadata": metadata}, where=lambda keys: f"{place}, {keys[-1]}"
        )
    except ConfigError as error:
        raise ArtefactError(f"{error}; {REMEDY}") from None
