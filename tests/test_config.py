"""Typed parameters."""

from typing import Literal

import pytest
from pydantic import Field

from vtp.config import Config, ConfigError, read_yaml
from vtp.params import load, split_address


class Rate(Config):
    lr: float
    steps: int


def test_yaml_is_the_dialect_of_dvc(tmp_path):
    """YAML 1.2: 1e-4 is a number and `no` is a string."""
    path = tmp_path / "params.yaml"
    path.write_text("a: {lr: 1e-4, steps: 3}\nb: no\n")
    assert read_yaml(path) == {"a": {"lr": 1e-4, "steps": 3}, "b": "no"}
    assert load(f"{path}:a", Rate) == Rate(lr=1e-4, steps=3)


def test_messages_name_place_and_value(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {lr: fast, stesp: 3}\n")
    with pytest.raises(ConfigError) as error:
        load(f"{path}:a", Rate)
    assert f"{path}:a.lr: Input should be a valid number (given: 'fast')" in str(error.value)
    assert f"{path}:a.steps: Field required" in str(error.value)
    assert f"{path}:a.stesp: unknown key" in str(error.value)
    with pytest.raises(ConfigError, match="no section 'b'; it has a"):
        load(f"{path}:b", Rate)
    with pytest.raises(ConfigError, match="no such parameter file"):
        load(f"{tmp_path}/other.yaml:a", Rate)
    with pytest.raises(ConfigError, match="expected FILE:SECTION"):
        split_address("params.yaml")


def test_broken_yaml(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: [1, 2\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected sections with keys, found list"):
        read_yaml(path)


def test_records_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Rate(lr=1.0, steps=1).steps = 2


class Circle(Config):
    name: Literal["circle"]


class Square(Config):
    name: Literal["square"]


class Drawing(Config):
    shape: Circle | Square = Field(discriminator="name")


def test_a_choice_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(ConfigError) as raised:
        Drawing.parse({"shape": {"name": "squares"}}, where="p.yaml:d")
    assert str(raised.value) == (
        "p.yaml:d.shape: no such name 'squares'; known are circle, square; did you mean 'square'?"
    )
