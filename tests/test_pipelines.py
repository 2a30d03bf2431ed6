"""Wiring: dvc.yaml, params.yaml, the stages and the schema agree."""

import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from stages.check import problems, schema, uses
from stages.pretrain import Pretrain
from stages.runner.run import path_flags, stage_name
from vtp.config import load, read_yaml
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import paper_flops

ROOT = Path(__file__).parents[1]
DVC_FILES = [ROOT / "dvc.yaml", *sorted((ROOT / "pipelines").glob("*/dvc.yaml"))]


def stages():
    for file in DVC_FILES:
        for name, stage in YAML(typ="safe", pure=True).load(file)["stages"].items():
            yield pytest.param(file, stage, id=f"{file.parent.name}:{name}")


def flags_of(words):
    """`--flag path ...` by flag; a flag that reads several has several."""
    given = {}
    for word in words:
        if word.startswith("--"):
            given[word] = []
        else:
            given[list(given)[-1]].append(word)
    assert all(given.values())
    return given


def paths(entries):
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]


@pytest.mark.parametrize(("file", "stage"), list(stages()))
def test_stage_is_wired(file, stage):
    python, dash, module, address, *flags = shlex.split(stage["cmd"])
    assert (python, dash) == ("python", "-m")
    deps = paths(stage.get("deps"))
    outs = paths(stage.get("outs")) + paths(stage.get("metrics")) + paths(stage.get("plots"))
    given = flags_of(flags)
    assert stage["desc"]
    assert not any(isinstance(entry, dict) and "persist" in str(entry) for entry in stage["outs"])
    if module == "stages.check":
        assert {path for paths in given.values() for path in paths} == set(outs)
        return
    run = import_module(module).run
    assert f"stages.{stage_name(run)}" == module
    inputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "input")}
    outputs = {f"--{name.replace('_', '-')}" for name in path_flags(run, "output")} | {"--provenance"}
    optional = {f"--{name.replace('_', '-')}" for name in path_flags(run, "optional")}
    assert inputs | outputs >= set(given) >= (inputs | outputs) - optional
    inputs &= set(given)
    outputs &= set(given) | {"--provenance"}
    read = {path for flag in inputs for path in given[flag]}
    assert read <= set(deps)
    assert {path for flag in outputs for path in given[flag]} == set(outs)
    # All else that a stage depends on is what `check` writes: the constant and its own code digest.
    checks = {"work/check/valid", f"work/check/code/{module.removeprefix('stages.')}.txt"}
    assert set(deps) - read == checks
    _, section = address.split(":")
    assert stage["params"] == [section]
    first = next(iter(run.__annotations__.values()))
    load(f"{file.parent}/{address}", first)


PARAMETERS = [(file, params) for file in DVC_FILES for params in sorted(file.parent.glob("params*.yaml"))]


@pytest.mark.parametrize(("file", "params"), PARAMETERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_parameters_are_valid(file, params):
    assert problems(params, uses(file)) == []


def test_the_papers_recipe_runs_the_stages_of_the_root():
    """Studies differ from the root in the folders of their data alone."""
    ours, vtp, imagenet, datacomp = (
        YAML(typ="safe", pure=True).load(folder / "dvc.yaml")["stages"]
        for folder in (ROOT, *(ROOT / "pipelines" / name for name in ("vtp", "imagenet", "datacomp")))
    )
    assert vtp.keys() == ours.keys() - {"prepare_data"}
    assert imagenet.keys() == ours.keys()
    for name in vtp.keys() - {"check"}:
        text = json.dumps(vtp[name])
        for folder in ("data/captioned", "data/labelled"):
            text = text.replace(folder, "work/shards")
        assert json.loads(text) == ours[name], name
        assert imagenet[name] == ours[name], name
    assert datacomp["pretrain"] == ours["pretrain"]
    assert {"filter_metadata", "download", "filter_images", "prepare_data"} < datacomp.keys()


@pytest.mark.parametrize("study", ["datacomp", "imagenet"])
def test_small_and_paper_size_have_one_schema(study):
    """They run by changing parameters alone: same sections, same stages."""
    small, paper = (read_yaml(ROOT / "pipelines" / study / name) for name in ("params.yaml", "params.paper.yaml"))
    assert small.keys() == paper.keys()
    assert small["prepare_data"]["source"]["name"] == paper["prepare_data"]["source"]["name"]


def test_the_official_study_prints_the_authors_figures():
    """Their README's, in our units: shares, not percent; of the metrics under the names of their protocols."""
    study = ROOT / "pipelines/official_vtp"
    small, paper = (read_yaml(study / name) for name in ("params.yaml", "params.paper.yaml"))
    assert small.keys() == paper.keys()
    assert small["summary"]["published"] == {}
    assert {run: list(figures.values()) for run, figures in paper["summary"]["published"].items()} == {
        "Small": [0.667, 0.775, 0.98, 5.46],
        "Base": [0.732, 0.81, 0.74, 3.88],
        "Large": [0.782, 0.857, 0.36, 2.81],
    }
    names = ["zero_shot_top1_squash", "linear_probe_multi_best_on_val", "rfid_inception_50k"]
    names.append("gfid_inception_50k_unguided_balanced")
    for figures in paper["summary"]["published"].values():
        assert list(figures) == paper["summary"]["metrics"]
        assert [name.rpartition(".")[2] for name in figures] == names
    large = paper["train_generator_large"]["objective"].pop("timesteps")
    assert large == {"name": "logit_normal", "mu": -0.75, "sigma": 1.0}
    assert paper["train_generator"]["objective"].pop("timesteps") == {"name": "logit_normal", "mu": -0.5, "sigma": 1.25}
    assert paper["train_generator_large"] == paper["train_generator"]


def test_the_scaling_study_evaluates_every_milestone():
    """Its folders are named by FLOPs; YAML must not read a name as a number."""
    study = ROOT / "pipelines/scaling"
    milestones = [f"{flops:.3e}" for flops in read_yaml(study / "params.yaml")["joint"]["monitor"]["milestones"]]
    stages = YAML(typ="safe", pure=True).load(study / "dvc.yaml")["stages"].values()
    matrices = [stage["matrix"] for stage in stages if "matrix" in stage]
    assert matrices
    assert all(matrix == {"run": ["joint", "ae"], "at": milestones} for matrix in matrices)


def test_two_runs_of_the_scaling_study_differ_in_their_objectives_alone():
    values = read_yaml(ROOT / "pipelines/scaling/params.yaml")
    assert values["ae"]["objective"].pop("weights") == {"reconstruction": 0.1, "clip": 0.0, "ssl": 0.0}
    del values["joint"]["objective"]["weights"]
    assert values["ae"] == values["joint"]


@pytest.mark.parametrize(
    (
        "name",
        "parameters",
        "flops",
    ),  # millions, G; B and L are the paper's table 1, the others the same encoders counted
    [("S", 43.2, None), ("B", 171.2, 87.7), ("L", 607.2, 311.1), ("ablation", 354.9, None)],
)
def test_reference_sets_are_the_papers(name, parameters, flops):
    config = load(f"{ROOT}/pipelines/vtp/params.{name}.yaml:pretrain", Pretrain)
    with torch.device("meta"):
        model = VisualTokenizer(config.architecture)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.trunk, model.pixel_decoder)]
    assert sum(counts) / 1e6 == pytest.approx(parameters, rel=2e-3)
    if flops is not None:
        assert paper_flops(sum(counts)) / 1e9 == pytest.approx(flops, rel=2e-3)
    assert config.active == (16384, 4096, 2048)
    assert config.training.length.samples == 1.1e9
    assert config.objective.weights.model_dump() == {"reconstruction": 0.1, "clip": 1.0, "ssl": 1.0}


def test_schema_is_current():
    """Else: python -m stages.check params.yaml --schema > params.schema.json"""
    assert json.loads((ROOT / "params.schema.json").read_text()) == schema(uses(ROOT / "dvc.yaml"))


def test_every_section_has_a_comment_or_a_description():
    """What a number does stands beside it or in the schema."""
    text = (ROOT / "params.yaml").read_text()
    assert text.count("#") > 40
