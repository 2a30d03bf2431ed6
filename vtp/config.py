"""Typed parameter records.

A stage's parameters are one frozen pydantic model: unknown keys are errors, wrong types are errors, and nothing that
changes a result has a default, so parameters are complete and DVC sees every change. YAML is read by ruamel.yaml as
YAML 1.2, the dialect of DVC (`1e-4` is a number there, and a string in YAML 1.1).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import DuplicateKeyError

from vtp.artefact import is_endless
from vtp.texts import shown

Keys = tuple[str | int, ...]
LONGEST = 80  # characters of a value that a message shows
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # positive normal numbers of float32
UNUSABLE = re.compile("[\0\ud800-\udfff]")
MOST_NODES, DEEPEST = 1_000_000, 64  # of a parameter file
MOST_DIGITS = 17  # tell all floats of double precision apart


class ConfigError(ValueError):
    """A parameter is missing, unknown, of the wrong type or impossible; the message says where."""


def number_name(value: float, *, digits: int = 6, style: str = "g") -> str:
    """A number as a part of a name, of a metric, a file or a key: 0.99, 2, 1e-05; of `style` e 5.800e+12.

    It has `digits` digits (of `style` e: behind the point), and more where it takes more to read the same number back: two
    numbers never have one name. Raises ValueError for NaN.
    """
    for precision in range(digits, MOST_DIGITS + 1):
        if float(text := f"{value:.{precision}{style}}") == value:
            return text
    raise ValueError(f"{value} is no number, and has no name")


def _distinct(values: list[Any]) -> list[Any]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{value!r} comes twice, and would be one under one name; leave one out")
    return values


Distinct = AfterValidator(_distinct)  # of a list whose values name something


class Config(BaseModel):
    """Base of every parameter record: frozen, closed, strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _fit_tensors(cls, value: Any) -> Any:  # noqa: ANN401 - of any field
        """Numbers become tensors: integers of 64 bits, numbers of float32."""
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{number} needs more than 64 bits")
            if isinstance(number, float) and number and not SMALLEST <= abs(number) <= LARGEST:
                raise ValueError(f"{number:g} is {'0' if abs(number) < SMALLEST else 'infinite'} in float32")
        return value

    @classmethod
    def parse(cls, values: Any, *, where: str | Callable[[Keys], str]) -> Self:  # noqa: ANN401 - whatever YAML holds
        """Validate `values`. `where` names their place in messages, or gives the place of a key. Raises ConfigError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            place = where if callable(where) else lambda keys: ".".join((where, *(shown(str(key)) for key in keys)))
            raise ConfigError(_explain(error, cls, values, place)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file. Raises ConfigError when there is none, or one that no person writes."""
    if is_endless(path):
        raise ConfigError(f"{path}: cannot be read: a pipe, a socket or a device, not a file")
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such parameter file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error.problem}{error.problem_mark}; remove one of the two") from None
    except (YAMLError, ValueError, RecursionError) as error:  # of UTF-8, of numbers
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(values).__name__}")
    _require_texts([values], path)
    _require_bounded(values, path)
    return values


def _require_bounded(values: Any, path: Path) -> None:  # noqa: ANN401 - whatever YAML holds
    """Raises ConfigError when mappings and lists are too deep or too many, as aliases of aliases make them."""
    level, nodes = [values], 0
    for _ in range(DEEPEST):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        nodes += len(level)
        _require_texts(level, path)
        if not level or nodes > MOST_NODES:
            break
    if level:
        raise ConfigError(
            f"{path}: more than {MOST_NODES:,} values or {DEEPEST} levels, counting what aliases stand for; write less"
        )


def _require_texts(nodes: list[Any], path: Path) -> None:
    """Raises ConfigError for a value or key with NUL or half of a character, which no name of a file and no table holds."""
    keys = (key for node in nodes if isinstance(node, dict) for key in node)
    for text in (*nodes, *keys):
        if isinstance(text, str) and UNUSABLE.search(text):
            raise ConfigError(f"{path}: {_short(text)} holds NUL or a lone surrogate; write it without")


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """`; did you mean X?` for the nearest known name, or nothing."""
    near = get_close_matches(str(name), [str(each) for each in known], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(error: ValidationError, model: type[Config], values: Any, place: Callable[[Keys], str]) -> str:  # noqa: ANN401
    found: dict[
        tuple[str, str], list[str]
    ] = {}  # by place and value: where there is a choice, each says why it is not it
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        # What is wrong between keys is said with their values; the whole section would hide it.
        whole = problem["type"] == "missing" or isinstance(problem["input"], dict)
        given = "" if whole else f" (given: {_short(problem['input'])})"
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            hint = did_you_mean(location[-1], _fields_beside(model, location))
            message = f"unknown key{hint or '; remove it or correct its spelling'}"
        elif problem["type"] == "union_tag_invalid":
            about = problem.get("ctx", {})
            known = [name.strip(" '") for name in about["expected_tags"].split(",")]
            hint = did_you_mean(about["tag"], known)
            message, given = f"no such name {about['tag']!r}; known are {', '.join(known)}{hint}", ""
        elif problem["type"] == "value_error":
            message = message.removeprefix("Value error, ")
        found.setdefault((place(_keys(location, values)), given), []).append(message)
    return "\n".join(f"{where}: {', or: '.join(messages)}{given}" for (where, given), messages in found.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _keys(location: Sequence[str | int], values: Any) -> Keys:  # noqa: ANN401 - whatever YAML holds
    """The keys that lead to a place, without what pydantic calls the members of unions on the way."""
    keys: list[str | int] = []
    here: Any = values
    member = False
    for part in location:
        if isinstance(here, Mapping):
            # A member of a union is called by its name, which may be that of a field too, which then comes after it.
            if member := not member and part == here.get("name"):
                continue
        elif not isinstance(here, list) or not isinstance(part, int):
            continue
        keys.append(part)
        # A pair may lack the item that a message is about.
        inside: Mapping[Any, Any] = here if isinstance(here, Mapping) else dict(enumerate(here))
        here = inside.get(part)
    return tuple(keys)


def _fields_beside(model: type[Config], location: Sequence[str | int]) -> set[str]:
    """Names of the fields of the record in which the last part of a location stands."""
    models = [model]
    for part in location[:-1]:
        fields = [m.model_fields[str(part)] for m in models if part in m.model_fields]
        inner = [each for field in fields for each in _models_in(field.annotation)]
        named = [m for m in models if "name" in m.model_fields and part in get_args(m.model_fields["name"].annotation)]
        models = inner or named or models  # neither: a place in a list, or a key of a mapping
    return {name for each in models for name in each.model_fields}


def _models_in(annotation: object) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
