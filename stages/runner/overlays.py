"""Presets: small files of parameters that are written into a parameter file, whose comments and other lines stay.

A preset holds the sections and keys that it sets. A mapping with a `name` is one choice among several and replaces the
one that was there; of others only the given keys change. All presets of a call are written together, or none is.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from vtp.artefact import whole_file
from vtp.config import ConfigError, read_yaml

Changes = dict[str, tuple[str, str]]  # by place: what stood there, and what stands there now


def apply_presets(params: Path, presets: Sequence[Path], *, check: Callable[[Path], list[str]]) -> list[str]:
    """Write `presets` into `params` in their order; a line for everything that changed.

    `check` tells what is wrong with a parameter file. Raises ConfigError, and leaves `params` as it was, for keys that it
    does not have and for a result that is not valid.
    """
    read_yaml(params)  # which says what is wrong with it
    text = params.read_text(encoding="utf-8")
    (yaml, values), changes = _writer_of(text), Changes()
    for preset in presets:
        read_yaml(preset)
        _merge(values, yaml.load(preset.read_text(encoding="utf-8")), place="", file=preset, changes=changes)
    with whole_file(params) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            yaml.dump(values, file)
        if found := check(temporary):
            names = ", ".join(map(str, presets))
            problems = "\n".join(found).replace(str(temporary), str(params))
            raise ConfigError(f"{params} is left as it was, for with {names} it would not be valid:\n{problems}")
    return [f"{place}: {old} -> {new}" for place, (old, new) in changes.items() if old != new]


def _merge(values: CommentedMap, preset: Mapping[str, Any], *, place: str, file: Path, changes: Changes) -> None:
    for key, new in preset.items():
        where = f"{place}.{key}" if place else str(key)
        if key not in values:
            near = get_close_matches(str(key), list(map(str, values)), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{file}: {where}: the parameter file has no such key{hint}")
        old = values[key]
        if isinstance(new, Mapping) and isinstance(old, CommentedMap) and old and "name" not in new:
            _merge(old, new, place=where, file=file, changes=changes)
            continue
        first, _ = changes.get(where, (_line(old), ""))
        changes[where] = (first, _line(new))
        if _line(old) != _line(new):
            values[key] = _bare(new)
            _, _, behind, *_ = values.ca.items.get(key, [None] * 3)
            if behind is not None:
                behind.column = 0  # the comment follows the value, wherever that ends now


def _bare(value: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
    """A copy without the preset's comments, numbers written as they are there."""
    if isinstance(value, CommentedMap):
        copy = CommentedMap((key, _bare(item)) for key, item in value.items())
    elif isinstance(value, CommentedSeq):
        copy = CommentedSeq(_bare(item) for item in value)
    else:
        return deepcopy(value)
    if value.fa.flow_style():
        copy.fa.set_flow_style()
    return copy


def _line(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """A value as one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_line(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_line, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _writer_of(text: str) -> tuple[YAML, CommentedMap]:
    """What writes a file as it stands, lists under their key or further to the right, and what the file holds."""
    yaml, values = YAML(), CommentedMap()
    for offset in (2, 0):
        yaml, again = YAML(), StringIO()
        yaml.width = 1 << 20  # lines are as long as they are
        yaml.preserve_quotes = True
        yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
        yaml.representer.add_representer(type(None), _null)
        values = yaml.load(text)
        yaml.dump(values, again)
        if again.getvalue() == text:
            break
    return yaml, values


def _null(representer: Any, _: None) -> Any:  # noqa: ANN401 - ruamel's own types
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
