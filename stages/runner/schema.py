"""The JSON schema of parameter files, for editors: completion, descriptions, and a first check of values.

It is derived from the records, and fits overlays: every key may be left out. What a whole file needs is for `check` to say.
"""

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from vtp.config import Config
from vtp.params import BASE, PICTURES, POINTS, RUNS, SEEDS

FILES = {
    "description": "files that this one changes, relative to it, in their order",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
OF_RUNS = {
    "description": "runs that a study compares: each a few changes of the sections that it has",
    "type": "object",
    "additionalProperties": {"$ref": "#/$defs/Sections"},
}
OF_SEEDS = {
    "description": "seeds of every run, each added to the seeds of its training and sampling stages",
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
}
OF_POINTS = {
    "description": "milestones of every run at which they are compared; `end` is where a run ends",
    "type": "array",
    "items": {"type": "string"},
}
OF_PICTURES = {
    "description": "folder of own pictures, seen from this file, or from the root",
    "type": "string",
}
NONE = {"type": "null", "description": "null: this section is none"}
EMPTY = {"description": "a section that this one changes; null: begin empty", "type": ["string", "null"]}


def schema_of(stages: Mapping[str, type[Config]]) -> dict[str, Any]:
    """The schema of files with the sections of these stages, and others of the same kinds under names of their own."""
    references, schema = models_json_schema(
        [(config, "validation") for config in stages.values()], ref_template="#/$defs/{model}"
    )
    definitions = {name: _overlay(definition) for name, definition in schema["$defs"].items()}
    sections = {name: {"anyOf": [references[config, "validation"], NONE]} for name, config in stages.items()}
    definitions["Sections"] = {"type": "object", "properties": sections, "additionalProperties": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Parameters",
        "type": "object",
        "properties": {
            BASE: FILES,
            RUNS: OF_RUNS,
            SEEDS: OF_SEEDS,
            POINTS: OF_POINTS,
            PICTURES: OF_PICTURES,
            **sections,
        },
        "additionalProperties": {"anyOf": [*(references[config, "validation"] for config in stages.values()), NONE]},
        "$defs": definitions,
    }


def _overlay(node: Any, *, named: bool = False) -> Any:  # noqa: ANN401 - JSON
    """A definition with every key optional, and without the titles that pydantic makes of names.

    `named`: the keys of the node are names of fields.
    """
    if isinstance(node, list):
        return [_overlay(item) for item in node]
    if not isinstance(node, dict):
        return node
    if named:
        return {name: _overlay(item) for name, item in node.items()}
    kept = {
        # Without `required` several members of a union may fit what an overlay says of one.
        {"oneOf": "anyOf"}.get(key, key): _overlay(item, named=key == "properties")
        for key, item in node.items()
        if key not in ("required", "discriminator", "title")
    }
    if "patternProperties" in kept:  # a mapping by names of its own, none of which is `base`
        kept["patternProperties"] = {
            f"^(?!base$){pattern.removeprefix('^')}": item for pattern, item in kept["patternProperties"].items()
        }
    if "properties" in kept or "patternProperties" in kept or isinstance(kept.get("additionalProperties"), dict):
        kept["properties"] = {"base": EMPTY, **kept.get("properties", {})}
    return kept
