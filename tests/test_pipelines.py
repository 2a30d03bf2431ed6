"""Wiring: dvc.yaml, params.yaml, the stages and the schema agree."""

import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages._runner import path_flags
from stages.check import problems, schema, uses
from vtp.config import load

ROOT = Path(__file__).parents[1]
DVC_FILES = [ROOT / "dvc.yaml", *sorted((ROOT / "pipelines").glob("*/dvc.yaml"))]


def stages():
    for file in DVC_FILES:
        for name, stage in YAML(typ="safe", pure=True).load(file)["stages"].items():
            yield pytest.param(file, stage, id=f"{file.parent.name}:{name}")


def paths(entries):
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]


@pytest.mark.parametrize(("file", "stage"), list(stages()))
def test_stage_is_wired(file, stage):
    python, dash, module, address, *flags = shlex.split(stage["cmd"])
    assert (python, dash) == ("python", "-m")
    deps = paths(stage.get("deps"))
    outs = paths(stage.get("outs")) + paths(stage.get("metrics")) + paths(stage.get("plots"))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert all(flag.startswith("--") for flag in given)
    assert stage["desc"]
    assert not any(isinstance(entry, dict) and "persist" in str(entry) for entry in stage["outs"])
    if module == "stages.check":
        assert set(given.values()) == set(outs)
        return
    run = import_module(module).run
    inputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "input")}
    outputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "output")} | {"--provenance"}
    optional = {f"--{name.replace('_', '-')}" for name in path_flags(run, "optional")}
    assert inputs | outputs >= set(given) >= (inputs | outputs) - optional
    inputs &= set(given)
    assert {given[flag] for flag in inputs} <= set(deps)
    assert {given[flag] for flag in outputs} == set(outs)
    # All else that a stage depends on is what `check` writes: the constant and its own code digest.
    checks = {"work/check/valid", f"work/check/code/{module.removeprefix('stages.')}.txt"}
    assert set(deps) - {given[flag] for flag in inputs} == checks
    _, section = address.split(":")
    assert stage["params"] == [section]
    first = next(iter(run.__annotations__.values()))
    load(f"{file.parent}/{address}", first)


@pytest.mark.parametrize("file", DVC_FILES, ids=lambda f: f.parent.name)
def test_parameters_are_valid(file):
    assert problems(file.parent / "params.yaml", uses(file)) == []


def test_schema_is_current():
    """Else: python -m stages.check params.yaml --schema > params.schema.json"""
    assert json.loads((ROOT / "params.schema.json").read_text()) == schema(uses(ROOT / "dvc.yaml"))


def test_every_section_has_a_comment_or_a_description():
    """What a number does stands beside it or in the schema."""
    text = (ROOT / "params.yaml").read_text()
    assert text.count("#") > 40
