"""What the documents show is true: links lead somewhere, examples are valid."""

import re
import subprocess

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from tiny import ROOT

from stages.check import check
from stages.prepare_data import PrepareData
from stages.runner.pipeline import Pipeline
from vtp.config import read_yaml
from vtp.params import read_parameters

DOCUMENTS = [ROOT / name for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()]
LINK = re.compile(r"\]\(([^)#\s]+)\)")


def blocks(path, language="yaml"):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = [target for target in LINK.findall(path.read_text()) if not target.startswith("http")]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_paths_that_are_named_exist():
    """In back quotes, of the tree: `vtp/...`, `stages/...`, `pipelines/...`, `docs/...`, `tests/...`."""
    named = re.compile(r"`((?:vtp|stages|pipelines|docs|tests|benchmarks|weights)/[\w./-]+?)(?::[^`]*)?`")
    for path in DOCUMENTS:
        if path.name not in ("CHANGELOG.md", "decisions.md"):
            for name in named.findall(path.read_text()):
                made = name.startswith(("pipelines/datacomp/data", "tests/golden"))
                assert made or (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_study_of_the_readme_is_that_of_its_folder():
    shown = next(block for block in blocks(ROOT / "README.md") if "runs:" in block)
    assert YAML(typ="safe", pure=True).load(shown) == read_yaml(ROOT / "pipelines/compute_scaling/params.yaml")


def test_the_new_study_is_valid(tmp_path):
    """As it stands in the gallery: twelve lines and no more."""
    (shown,) = (block for block in blocks(ROOT / "pipelines/README.md") if "runs:" in block)
    (tmp_path / "params.yaml").write_text(shown.replace("../overlays", str(ROOT / "pipelines/overlays")))
    pipeline = Pipeline.of(ROOT / "pipelines/comparison.dvc.yaml")
    pipeline = pipeline._replace(tracked=[], published=ROOT / "pipelines/published.csv")
    runs = check(tmp_path / "params.yaml", pipeline).runs
    weights = {name: run["pretrain"]["objective"]["weights"]["reconstruction"] for name, run in runs.items()}
    assert weights == {"light": 0.1, "heavy": 1.0}
    assert len(shown.splitlines()) <= 12


def test_sources_of_the_documents_are_valid():
    sources = [block for block in blocks(ROOT / "docs/stages.md") if block.startswith("source:")]
    section = read_parameters(ROOT / "params.yaml").values["prepare_data"]
    for source in sources:
        PrepareData.parse(section | YAML(typ="safe", pure=True).load(source), where="docs/stages.md")
    assert len(sources) == 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_dvc_keeps_the_form_of_what_is_to_be_copied(tmp_path, path):
    for block in blocks(path):
        (tmp_path / "params.yaml").write_text(block)
        apply_overrides(tmp_path / "params.yaml", [])
        assert (tmp_path / "params.yaml").read_text() == block


def test_a_list_of_overlays_is_valid(tmp_path):
    (shown,) = blocks(ROOT / "pipelines/imagenet/README.md")
    (tmp_path / "params.yaml").write_text(shown.replace("..", str(ROOT / "pipelines")))
    values = check(
        tmp_path / "params.yaml", Pipeline.of(ROOT / "pipelines/imagenet/dvc.yaml")._replace(tracked=[])
    ).shared
    assert values["train_generator"]["model"]["size"] == {"name": "XL"}
    assert values["train_generator"]["optim"]["lr"] == 1e-4
    assert values["pretrain"]["tokenizer"]["vision"]["embed_dim"] == 1024
