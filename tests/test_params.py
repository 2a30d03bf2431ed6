"""Parameter files that say what differs: what they come to, and which file a mistake is in."""

from pathlib import Path

import pytest
from pydantic import Field

from vtp.config import Config, ConfigError, read_yaml
from vtp.params import load, read_parameters, split_address, write_yaml


class Small(Config):
    name: str = Field(pattern="small|large")
    width: int = Field(ge=1)


class Section(Config):
    seed: int
    rate: float
    model: Small
    sizes: dict[str, Small]
    steps: list[int]


ROOT = """
a:
  seed: 0
  rate: 1.0e-3
  model: {name: small, width: 4}
  sizes: {first: {name: small, width: 1}}
  steps: [1, 2]
b: {seed: 1}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    write("root.yaml", ROOT)
    return write


def values(path):
    return read_parameters(path).values


def test_a_file_without_base_is_itself(write, tmp_path):
    assert values(tmp_path / "root.yaml") == read_yaml(tmp_path / "root.yaml")
    assert load(f"{tmp_path}/root.yaml:a", Section).model.width == 4


def test_a_link_to_itself_is_no_file(tmp_path):
    path = tmp_path / "params.yaml"
    path.symlink_to("params.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_parameters(path)


def test_changes_merge_lists_and_values_replace(write):
    path = write("study/params.yaml", "base: ../root.yaml\na: {rate: 2.0, steps: [7], model: {width: 9}}\n")
    expected = read_yaml(path.parent.parent / "root.yaml")
    expected["a"] |= {"rate": 2.0, "steps": [7], "model": {"name": "small", "width": 9}}
    assert values(path) == expected


def test_another_name_is_another_choice(write):
    path = write("p.yaml", "base: root.yaml\na: {model: {name: large}}\n")
    assert values(path)["a"]["model"] == {"name": "large"}
    same = write("q.yaml", "base: root.yaml\na: {model: {name: small, width: 2}, sizes: {second: {name: large}}}\n")
    assert values(same)["a"]["model"] == {"name": "small", "width": 2}
    assert list(values(same)["a"]["sizes"]) == ["first", "second"]


def test_overlays_lie_over_each_other_in_their_order(write):
    write("overlays/fast.yaml", "a: {rate: 5.0, seed: 5}\n")
    write("overlays/faster.yaml", "base: fast.yaml\na: {rate: 6.0}\n")
    write("overlays/paper.yaml", "base: ../root.yaml\na: {seed: 3, steps: [3]}\n")
    path = write("p.yaml", "base: [overlays/paper.yaml, overlays/faster.yaml]\nb: {seed: 2}\n")
    read = read_parameters(path)
    assert (read.values["a"]["rate"], read.values["a"]["seed"], read.values["a"]["steps"]) == (6.0, 5, [3])
    assert [file.name for file in read.files] == ["root.yaml", "paper.yaml", "fast.yaml", "faster.yaml", "p.yaml"]


def test_a_file_that_comes_twice_counts_once(write):
    """Else the second overlay would undo what the first one changed."""
    write("one.yaml", "base: root.yaml\na: {seed: 5}\n")
    write("two.yaml", "base: root.yaml\na: {rate: 5.0}\n")
    both = values(write("p.yaml", "base: [one.yaml, two.yaml]\n"))["a"]
    assert (both["seed"], both["rate"]) == (5, 5.0)


def test_a_mapping_may_begin_as_another(write):
    text = "base: root.yaml\nc: {base: a, seed: 7}\nd: {base: c, model: {base: a.sizes.first, width: 8}}\n"
    found = values(write("p.yaml", text))
    assert found["c"] == found["a"] | {"seed": 7}
    assert found["d"] == found["c"] | {"model": {"name": "small", "width": 8}}
    assert load(f"{write('p.yaml', text)}:d", Section).seed == 7


def test_a_mapping_may_begin_empty(write):
    path = write(
        "p.yaml", "base: root.yaml\na: {sizes: {base: null, only: {name: large, width: 1}}}\nb: {base: null, x: 1}\n"
    )
    assert values(path)["a"]["sizes"] == {"only": {"name": "large", "width": 1}}
    assert values(path)["b"] == {"x": 1}


def test_a_section_may_be_none(write):
    write("none.yaml", "base: root.yaml\nb: null\n")
    path = write("p.yaml", "base: none.yaml\n")
    assert "b" not in values(path)
    with pytest.raises(ConfigError, match="no section 'b'"):
        read_parameters(path).parse("b", Section)
    assert values(write("q.yaml", "base: none.yaml\nb: {x: 1}\n"))["b"] == {"x": 1}


def test_a_record_that_begins_as_another_may_repeat_its_name(write):
    text = "base: root.yaml\na: {sizes: {second: {base: a.model}}}\n"
    write("one.yaml", text)
    path = write("p.yaml", "base: one.yaml\na: {sizes: {second: {name: small, width: 9}}}\n")
    assert values(path)["a"]["sizes"]["second"] == {"name": "small", "width": 9}
    path = write("q.yaml", "base: one.yaml\na: {sizes: {second: {name: small}}}\n")
    assert values(path)["a"]["sizes"]["second"] == {"name": "small", "width": 4}
    path = write("r.yaml", "base: root.yaml\na: {sizes: {name: {name: small, width: 2}}}\n")
    assert values(path)["a"]["sizes"].keys() == {"first", "name"}


def test_a_run_is_one_more_layer(write):
    path = write(
        "p.yaml",
        """
base: root.yaml
c: {base: a}
runs:
  plain: {}
  mine: {a: {seed: 4, model: {base: a.sizes.first}}}
  empty: {a: {sizes: {base: null, only: {name: large, width: 1}}}}
  other: {b: {base: null, sizes: {base: c.sizes, only: {name: large, width: 1}}}}
""",
    )
    read = read_parameters(path)
    assert list(read.runs) == ["plain", "mine", "empty", "other"]
    assert read.of_run("plain").values == read.values
    assert "runs" not in read.values
    mine = read.of_run("mine").values
    assert mine["a"]["seed"] == mine["c"]["seed"] == 4  # what is based on a changed section follows
    assert mine["a"]["model"] == mine["c"]["model"] == {"name": "small", "width": 1}
    assert read.values["a"]["seed"] == 0
    assert read.of_run("empty").values["a"]["sizes"] == {"only": {"name": "large", "width": 1}}
    assert read.of_run("other").values["b"]["sizes"].keys() == {"first", "only"}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("[a, b]", "p.yaml:runs: expected changes by the name of a run, such as {joint: {}}; found ['a', 'b']"),
        ("{1: {}}", "p.yaml:runs.1: the name of a run is text; put it into quotes"),
        ("{base: {}}", "p.yaml:runs.base: `base` says where a mapping begins; choose another name for the run"),
        ("{a: null}", "p.yaml:runs.a: expected changes of sections, or {} for none; found None"),
        ("{mine: {aa: {}}}", "p.yaml:runs.mine.aa: no such section; did you mean 'a'?"),
        ("{mine: {a: {rates: 4}}}", "p.yaml:runs.mine.a.rates: unknown key; did you mean 'rate'? (given: 4)"),
        ("{mine: {a: {base: d}}}", "p.yaml:runs.mine.a.base: no mapping 'd' to begin as"),
    ],
)
def test_runs_that_cannot_be(write, tmp_path, monkeypatch, runs, message):
    monkeypatch.chdir(tmp_path)
    write("p.yaml", f"base: root.yaml\nruns: {runs}\n")
    with pytest.raises(ConfigError) as raised:
        read_parameters(Path("p.yaml")).of_run("mine").parse("a", Section)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("overlay", "params", "message"),
    [
        ("a: {rat: 1.0}", "", "overlays/one.yaml:a.rat: unknown key; did you mean 'rate'?"),
        ("a: {rate: fast}", "", "overlays/one.yaml:a.rate: Input should be a valid number (given: 'fast')"),
        ("a: {rate: fast}", "a: {rate: 1.0}", None),
        ("a: {rate: 2.0}", "a: {model: {widht: 1}}", "params.yaml:a.model.widht: unknown key; did you mean 'width'?"),
        ("a: {sizes: {x: {name: small, width: 0}}}", "", "overlays/one.yaml:a.sizes.x.width: Input should be greater"),
        ("a: {steps: [1, two]}", "", "overlays/one.yaml:a.steps.1: Input should be a valid integer"),
        ("a: {model: {name: large}}", "", "overlays/one.yaml:a.model.width: Field required"),
        ("a: {model: {name: tiny}}", "", "overlays/one.yaml:a.model.name: String should match"),
    ],
)
def test_a_mistake_is_in_the_file_that_made_it(write, tmp_path, monkeypatch, overlay, params, message):
    monkeypatch.chdir(tmp_path)
    write("overlays/one.yaml", f"base: ../root.yaml\n{overlay}\n")
    write("params.yaml", f"base: overlays/one.yaml\n{params}\n")
    if message is None:
        assert load("params.yaml:a", Section).rate == 1.0
        return
    with pytest.raises(ConfigError) as raised:
        load("params.yaml:a", Section)
    assert message in str(raised.value)


def test_what_is_inherited_is_wrong_where_it_stands(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("p.yaml", "base: root.yaml\na: {extra: 1}\nc: {base: a, seed: x}\n")
    with pytest.raises(ConfigError) as raised:
        load("p.yaml:c", Section)
    assert str(raised.value).splitlines() == [
        "p.yaml:c.seed: Input should be a valid integer (given: 'x')",
        "p.yaml:a.extra: unknown key; remove it or correct its spelling (given: 1)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [nowhere.yaml, gone.yaml]", "p.yaml: base names what is no file: nowhere.yaml, gone.yaml"),
        ("base: rot.yaml", "no file: rot.yaml; did you mean 'root.yaml'?"),
        ("base: 3", "p.yaml: base is 3; expected a file or a list of files"),
        ("base: [root.yaml, 3]", "expected a file or a list of files"),
        ("base: p.yaml", "p.yaml: based on itself: p.yaml -> p.yaml"),
        ("base: loop.yaml", "p.yaml: based on itself: p.yaml -> loop.yaml -> p.yaml"),
        ("base: root.yaml\nc: {base: bb}", "p.yaml:c.base: no mapping 'bb' to begin as; did you mean 'b'?"),
        ("base: root.yaml\nc: {base: a.seed}", "p.yaml:c.base: no mapping 'a.seed' to begin as"),
        ("base: root.yaml\nc: {base: d}\nd: {base: c}", "p.yaml:d.base: based on itself: c -> d -> c"),
        ("base: root.yaml\nc: {base: c}", "based on itself: c -> c"),
        ("base: root.yaml\nc: {d: {base: c}}", "p.yaml:c.d.base: based on itself: c.d -> c"),
        ("base: root.yaml\nc: {base: 3}", "no mapping 3 to begin as"),
        ("- base", "expected sections with keys, found list"),
    ],
)
def test_a_base_that_cannot_be(write, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    write("loop.yaml", "base: p.yaml")
    write("p.yaml", text)
    with pytest.raises(ConfigError) as raised:
        read_parameters(Path("p.yaml"))
    assert message in str(raised.value)


def test_written_values_read_back(tmp_path):
    values = {"a": {"x": None, "y": [1, 2.5e-7, True], "z": {"w": "text: with"}}, "b": 1.75e13}
    write_yaml(tmp_path / "out.yaml", values)
    assert read_yaml(tmp_path / "out.yaml") == values
    first = (tmp_path / "out.yaml").read_bytes()
    write_yaml(tmp_path / "out.yaml", read_yaml(tmp_path / "out.yaml"))
    assert (tmp_path / "out.yaml").read_bytes() == first


def test_addresses():
    assert split_address("some/params.yaml:pretrain") == (Path("some/params.yaml"), "pretrain")
    for wrong in ("params.yaml", ":pretrain", "params.yaml:"):
        with pytest.raises(ConfigError, match="expected FILE:SECTION"):
            split_address(wrong)
