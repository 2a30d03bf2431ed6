"""Typed parameters, and the names that numbers have."""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vtp.config import Config, ConfigError, Distinct, number_name, read_yaml
from vtp.params import load, milestone_name, split_address


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


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.name), os.mkfifo])
def test_what_is_no_file(tmp_path, make):
    path = tmp_path / "params.yaml"
    make(path)
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


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *[
            (0.0, "0"),
            (2.0, "2"),
            (0.99, "0.99"),
            (0.9999, "0.9999"),
            (1e-5, "1e-05"),
            (1e6, "1e+06"),
            (123456.0, "123456"),
        ],
        *[
            (0.9999999, "0.9999999"),
            (1.0000001, "1.0000001"),
            (1234567.0, "1234567"),
            (0.1 + 0.2, "0.30000000000000004"),
        ],
        *[(math.nextafter(1, 2), "1.0000000000000002"), (5e-324, "4.94066e-324")],
    ],
)
def test_a_number_has_a_name_of_its_own(value, name):
    """Six digits where they are enough, else as many as it takes."""
    assert number_name(value) == name
    assert float(name) == value


def test_neighbours_never_share_a_name():
    for value in (0.1, 0.9999, 1.0, 1.5, 1000.0, 5.8e12, 9.75e19, 1e-300):
        around = [math.nextafter(value, 0), value, math.nextafter(value, math.inf)]
        assert len({number_name(each) for each in around}) == len({milestone_name(each) for each in around}) == 3
    with pytest.raises(ValueError, match="has no name"):
        number_name(math.nan)


def test_milestones_have_four_digits_or_more():
    assert milestone_name(0.25) == "0.25"  # a share of the run
    names = [milestone_name(each) for each in (5.8e12, 1.16e13, 5.8001e12, 5800123456789.0, 9.75e19, "end")]
    assert names == ["5.800e+12", "1.160e+13", "5.8001e+12", "5.800123456789e+12", "9.750e+19", "end"]


class Named(Config):
    counts: Annotated[list[int], Distinct]
    milestones: list[Annotated[float, Field(gt=0)] | Literal["end"]]


def test_what_would_be_one_under_one_name_is_refused():
    with pytest.raises(ConfigError, match=r"p\.counts: 5 comes twice, and would be one under one name; leave one out"):
        Named.parse({"counts": [5, 7, 5], "milestones": []}, where="p")


def test_a_value_that_is_none_of_a_choice_is_told_once():
    with pytest.raises(ConfigError) as raised:
        Named.parse({"counts": [], "milestones": [-1.0]}, where="p")
    expected = "p.milestones.0: Input should be greater than 0, or: Input should be 'end' (given: -1.0)"
    assert str(raised.value) == expected


class Swept(Config):
    intervals: list[Annotated[tuple[float, float], Field(strict=False)]]


def test_a_pair_that_lacks_a_number_is_named():
    with pytest.raises(ConfigError, match=r"p\.intervals\.1\.1: Field required"):
        Swept.parse({"intervals": [[0.0, 1.0], [0.5]]}, where="p")
