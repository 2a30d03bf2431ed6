"""Typed parameters."""

from typing import Annotated, Literal

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff\n", "not valid YAML"),
        ("a: b\n".encode("utf-16"), "not valid YAML"),
        (b"a: " + b"9" * 5000, "not valid YAML"),
        (b"a: 1\na: 2\n", "remove one of the two"),
        (b"a: &x {b: *x}\n", "more than 1,000,000 values or 64 levels"),
        (b"a: " + b"[" * 80 + b"]" * 80, "more than 1,000,000 values or 64 levels"),
        (
            b"a: ["
            + b"".join(b"&%c [%s], " % (97 + n, b"*%c, " % (96 + n) * 9 if n else b"x") for n in range(9))
            + b"]",
            "more than 1,000,000 values or 64 levels",
        ),
    ],
)
def test_files_that_no_person_writes(tmp_path, content, message):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_yaml(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "params.yaml"
    path.mkdir() if kind == "folder" else path.symlink_to("params.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path)


class BySamples(Config):
    name: Literal["samples"]
    samples: int


class ByFlops(Config):
    name: Literal["flops"]
    flops: float


class Training(Config):
    length: Annotated[BySamples | ByFlops, Field(discriminator="name")]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"name": "samples", "sampels": 9}, "t.length.sampels: unknown key; did you mean 'samples'? (given: 9)"),
        ({"name": "samples"}, "t.length.samples: Field required"),
        ({"name": "samples", "samples": "x"}, "t.length.samples: Input should be a valid integer (given: 'x')"),
        ({"name": "flops", "flops": 1.0, "samples": 3}, "t.length.samples: unknown key"),
        ({"name": "lops"}, "t.length: no such name 'lops'; known are samples, flops; did you mean 'flops'?"),
    ],
)
def test_a_choice_may_be_called_as_a_field_is(length, message):
    with pytest.raises(ConfigError) as raised:
        Training.parse({"length": length}, where="t")
    assert message in str(raised.value)


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
