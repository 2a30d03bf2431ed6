"""Typed access to `params.yaml`.

A stage's parameters are one frozen pydantic model: unknown keys are errors, wrong types are errors, and
nothing that changes a result has a default, so `params.yaml` is complete and DVC sees every change. YAML is
read by ruamel.yaml as YAML 1.2, the dialect of DVC (`1e-4` is a number there, and a string in YAML 1.1).
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML, YAMLError

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A parameter is missing, unknown, of the wrong type or impossible; the message says where."""


class Config(BaseModel):
    """Base of every parameter record: frozen, closed, strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Any, *, where: str) -> Self:  # noqa: ANN401 - whatever YAML holds
        """Validate `values`; `where` names their place in messages. Raises ConfigError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file. Raises ConfigError when there is none."""
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such parameter file") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(values).__name__}")
    return values


def split_address(address: str) -> tuple[Path, str]:
    """`params.yaml:pretrain` -> (Path("params.yaml"), "pretrain")."""
    path, _, section = address.rpartition(":")
    if not path or not section:
        raise ConfigError(f"{address!r}: expected FILE:SECTION, such as params.yaml:pretrain")
    return Path(path), section


def load(address: str, config: type[C]) -> C:
    """The section at `FILE:SECTION` as a `config`. Raises ConfigError."""
    path, section = split_address(address)
    values = read_yaml(path)
    if section not in values:
        raise ConfigError(f"{path}: no section {section!r}; it has {', '.join(map(str, values))}")
    return config.parse(values[section], where=f"{path}:{section}")


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join([where, *_keys(problem["loc"])])
        given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        elif problem["type"] == "union_tag_invalid":
            about = problem.get("ctx", {})
            known = [name.strip(" '") for name in about["expected_tags"].split(",")]
            near = get_close_matches(about["tag"], known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            message, given = f"no such name {about['tag']!r}; {hint}known are {', '.join(known)}", ""
        elif problem["type"] == "value_error":
            message = message.removeprefix("Value error, ")
        lines.append(f"{place}: {message}{given}")
    return "\n".join(lines)


def _keys(location: Sequence[str | int]) -> list[str]:
    return [str(part) for part in location]
