"""Presets are written whole, and nothing else of a file changes."""

import shutil
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from stages.check import main
from vtp.config import read_yaml

STUDY = ROOT / "pipelines/imagenet"
PRESETS = sorted((STUDY / "presets").glob("*.yaml"))
REFERENCE_SETS = {  # size, steps, samples drawn, samples compared
    "B-80ep": ("B", 100_091, 10_000, [10_000]),
    "XL-80ep": ("XL", 100_091, 50_000, [10_000, 50_000]),
    "XL-600ep": ("XL", 750_684, 50_000, [10_000, 50_000]),
    "1p0B-80ep": ("1p0B", 100_091, 50_000, [10_000, 50_000]),
}


@pytest.fixture
def params(tmp_path):
    shutil.copy(STUDY / "dvc.yaml", tmp_path)
    return Path(shutil.copy(STUDY / "params.paper.yaml", tmp_path / "params.yaml"))


@pytest.fixture
def apply(params, monkeypatch, capsys):
    def run(*presets):
        """Exit status, and what was said."""
        monkeypatch.setattr(sys, "argv", ["check", str(params), "--preset", *map(str, presets)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return run


def written(folder, text):
    (folder / "own.yaml").write_text(text)
    return folder / "own.yaml"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_changes_what_it_says_and_no_other_line(params, apply, preset):
    before = params.read_text().splitlines()
    status, said = apply(preset)
    assert status == 0, said
    after = params.read_text().splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == len(said.splitlines()) > 0
    values = read_yaml(params)
    trained = values["train_generator"]
    steps = trained["training"]["length"]["samples"] / trained["batch_size"]
    found = (
        trained["model"]["size"]["name"],
        steps,
        values["generate"]["samples"],
        values["evaluate_generator"]["counts"],
    )
    assert found == REFERENCE_SETS.get(preset.stem, found)


def test_there_is_every_reference_set():
    assert REFERENCE_SETS.keys() | {"stable"} == {path.stem for path in PRESETS}


def test_nothing_to_change(params, apply):
    apply(STUDY / "presets/stable.yaml")
    assert apply(STUDY / "presets/stable.yaml") == (0, f"{params} has these values already\n")


def test_presets_compose_in_their_order(params, apply):
    status, said = apply(STUDY / "presets/XL-600ep.yaml", STUDY / "presets/stable.yaml")
    values = read_yaml(params)["train_generator"]
    assert status == 0
    assert values["model"]["size"] == {"name": "XL"}
    assert values["model"]["use_qknorm"] is True
    assert (values["optim"]["lr"], values["optim"]["beta2"], values["optim"]["clip_norm"]) == (1e-4, 0.999, 1.0)
    assert "train_generator.optim.lr: 0.0002 -> 0.0001" in said
    assert "use_qknorm" not in said  # off by the first, on again by the second


def test_comments_stay_and_choices_are_replaced_whole(params, apply, tmp_path):
    params.write_text(params.read_text().replace("size: {name: B}", "size: {name: B} # or own"))
    own = "train_generator: # mine\n  model:\n    size: {name: own, hidden_size: 64, depth: 2, num_heads: 2} # too\n"
    assert apply(written(tmp_path, own))[0] == 0
    assert "size: {name: own, hidden_size: 64, depth: 2, num_heads: 2} # or own" in params.read_text()
    assert "mine" not in params.read_text()
    assert apply(STUDY / "presets/B-80ep.yaml")[0] == 0
    assert "    size: {name: B} # or own\n" in params.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "generate: {samples: 7}\ntrain_generator: {optim: {lrr: 1.0e-4}}",
            "own.yaml: train_generator.optim.lrr: the parameter file has no such key; did you mean 'lr'?",
        ),
        ("generat: {samples: 7}", "did you mean 'generate'?"),
        ("generate: {samples: 0}", "params.yaml:generate.samples: Input should be greater than or equal to 1"),
        ("reference: {image_size: 128}", "reference.image_size: 128, pretrain.tokenizer.image_size is 256"),
        ("- generate", "expected sections with keys"),
    ],
)
def test_what_does_not_fit_changes_nothing(params, apply, tmp_path, text, message):
    before = params.read_text()
    status, said = apply(STUDY / "presets/XL-80ep.yaml", written(tmp_path, text))
    assert status == 2
    assert message in said
    assert params.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dvc.yaml", "own.yaml", "params.yaml"]
