"""One's own data and weights under real DVC, at the root and in a study: nothing is lost, and nothing is left over.

The root and a study are cut to the stages `check` and `prepare_data`, which reads own pictures: plain commands end in
seconds. One clone serves all tests, in order.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from clone import Clone, ran
from PIL import Image
from ruamel.yaml import YAML
from test_docs import blocks
from tiny import ROOT, write_params

from vtp.artefact import digest, files
from vtp.config import read_yaml

pytestmark = pytest.mark.slow
QUIET = ["Data and pipelines are up to date."]
ROOMS = ("data", "mine", "weights")


class Project(NamedTuple):
    """The root of a clone, or a study of it."""

    clone: Clone
    folder: Path

    def asked(self, *arguments):
        return self.clone.asked(*arguments, cwd=self.folder)

    def own(self):
        """Digests of all own files."""
        paths = [path for room in ROOMS for path in files(self.folder / room)]
        return {str(path.relative_to(self.folder)): digest(path) for path in paths}

    def status(self):
        return self.clone.untracked_or_changed(self.folder)


def write_pictures(folder):
    """Two classes."""
    for red, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (16, 16), (red * 200, index * 30, 0)).save(folder / name / f"{index}.png")


def write_own(folder):
    """Data inside and outside of `data/`, at any depth, with names that a repository would ignore; weights."""
    for pictures in ("data/pets", "data/deep/work/pets", "mine/pets"):
        write_pictures(folder / pictures)
    for name in ("x.tmp", "__pycache__/x.pyc", ".scratch/x", ".venv/x", "a.egg-info/x", "work/.x.tmp", "plots/.x.tmp"):
        for odd in ("data/odd", "mine/odd"):
            (folder / odd / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / odd / name).write_text(name)
    for name in ("data/table.csv", "weights/network.pth", "weights/net/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


TRACKED = ["data/pets", "data/deep/work/pets", "mine/pets", "data/odd", "mine/odd", "data/table.csv"]
TRACKED += ["weights/network.pth", "weights/net"]


def cut(folder, pictures, of):
    """The first two stages of the root, `of`, on own pictures: as docs/stages.md says."""
    yaml = YAML(typ="safe", pure=True)
    stages = yaml.load((of / "dvc.yaml").read_text())["stages"]
    prepare = stages["prepare_data"]
    prepare["cmd"] = prepare["cmd"].replace("--shards", f"--source {pictures} --shards")
    prepare["deps"].append(pictures)
    source = next(block for block in blocks(ROOT / "docs/stages.md") if "name: folder" in block)
    section = read_yaml(of / "params.yaml")["prepare_data"] | yaml.load(source)
    write_params({"stages": {name: stages[name] for name in ("check", "prepare_data")}}, folder / "dvc.yaml")
    write_params({"prepare_data": section}, folder / "params.yaml")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = Clone(tmp_path_factory.mktemp("own") / "clone")
    study = clone.folder / "pipelines/mine"
    study.mkdir()
    cut(study, "mine/pets", clone.folder)
    cut(clone.folder, "data/pets", clone.folder)
    clone.make_study("mine")
    clone.commit("start")
    return clone


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The repository with its own parameters, comments and all."""
    clone = Clone(tmp_path_factory.mktemp("whole") / "clone")
    shutil.copy(ROOT / "params.yaml", clone.folder)
    clone.commit("start")
    return clone


@pytest.fixture(scope="module", params=["root", "study"])
def project(request, clone):
    """With own data that nobody added yet."""
    project = Project(clone, clone.folder if request.param == "root" else clone.folder / "pipelines/mine")
    assert project.status() == []
    write_own(project.folder)
    return project


def test_own_data_outlive_the_first_experiment(project):
    before = project.own()
    project.asked("add", *TRACKED)
    added = project.own()
    assert before.items() <= added.items()
    news = {name.rpartition("/")[2] for name in added.keys() - before.keys()}
    assert news == {".gitignore"} | {f"{path.rpartition('/')[2]}.dvc" for path in TRACKED}
    assert ran(project.asked("exp", "run", "-n", "first"))[-1] == "prepare_data"  # `check` of the root serves the study
    assert project.own() == added
    assert project.asked("status").splitlines() == QUIET


def test_git_holds_what_dvc_says_of_own_data_and_no_data(project):
    project.clone.commit("own data")
    listed = subprocess.check_output(["git", "ls-files", *ROOMS], cwd=project.folder, text=True).split()
    names = {name for name in listed if not name.endswith(".gitignore") and name != "weights/README.md"}
    assert names == {f"{path}.dvc" for path in TRACKED}
    assert project.status() == []


@pytest.mark.parametrize("how", ["", "--temp", "--queue"])
def test_own_data_outlive_experiments(project, how):
    before, name = project.own(), f"own{how}"
    size = {"": 5, "--temp": 6, "--queue": 7}[how]
    key = f"prepare_data.samples_per_shard={size}"
    output = project.asked("exp", "run", *filter(None, [how]), "-n", name, "-S", key)
    if how == "--queue":
        assert project.status() == []
        project.clone.run_queue(name, project.folder)
    else:
        assert ran(output)[-1] == "prepare_data"
    assert project.own() == before
    changed = [line.split()[1].rpartition("/")[2] for line in project.status()]
    assert changed == ([] if how else ["dvc.lock", "params.yaml"])
    project.asked("exp", "apply", name)
    assert read_yaml(project.folder / "params.yaml")["prepare_data"]["samples_per_shard"] == size
    assert project.asked("status").splitlines() == QUIET
    project.clone.git("checkout", "-q", "--", ".")
    project.asked("checkout")
    assert project.own() == before
    assert project.status() == []


def test_a_change_of_own_data_is_an_experiment(project):
    pictures = "mine/pets" if project.folder.name == "mine" else "data/pets"
    shutil.copy(project.folder / pictures / "cat/1.png", project.folder / pictures / "cat/new.png")
    before = project.own()
    assert ran(project.asked("exp", "run", "-n", "more")) == ["prepare_data"]
    assert before.keys() == project.own().keys()
    names = {line.split()[1].rpartition("/")[2] for line in project.status()}
    assert names == {"pets.dvc", "dvc.lock"}
    project.clone.git("checkout", "-q", "--", ".")
    project.asked("checkout")
    assert not (project.folder / pictures / "cat/new.png").exists()


def test_weights_are_imported_as_their_readme_says(project, tmp_path):
    (tmp_path / "other.pth").write_text("other")
    project.asked("import-url", str(tmp_path / "other.pth"), "weights/other.pth")
    assert (project.folder / "weights/other.pth").read_text() == "other"
    assert [line.partition("weights/")[2] for line in project.status()] == ["other.pth.dvc"]
    project.clone.commit("imported")
    assert project.asked("status", "weights/other.pth.dvc").splitlines()[-1:] == QUIET


def test_what_is_not_tracked_is_left_alone(project):
    """Neither DVC nor `git add` takes what only lies in these folders."""
    loose = [project.folder / name for name in ("data/loose/x.png", "data/x.csv", "weights/loose.pth")]
    for path in loose:
        path.parent.mkdir(exist_ok=True)
        path.write_text("loose")
    (project.folder / "data/link").symlink_to(project.folder / "mine/pets")
    assert project.status() == []
    project.asked("exp", "run", "-n", "loose", "-S", "prepare_data.samples_per_shard=8")
    project.clone.git("checkout", "-q", "--", ".")
    project.asked("checkout")
    assert all(path.read_text() == "loose" for path in loose)
    assert (project.folder / "data/link").is_symlink()
    for path in (*loose, project.folder / "data/link"):
        path.unlink()
    loose[0].parent.rmdir()


def test_own_data_are_pushed_and_pulled(project, tmp_path):
    before = project.own()
    project.asked("remote", "add", "-d", "store", str(tmp_path / "store"))
    project.asked("push")
    project.clone.commit("remote")
    subprocess.run(["git", "clone", "-q", project.clone.folder, tmp_path / "other"], check=True)
    folder = tmp_path / "other" / project.folder.relative_to(project.clone.folder)
    other = project._replace(folder=folder)
    other.asked("pull")
    assert other.own() == before
    assert other.asked("status").splitlines()[-1:] == QUIET
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=folder) == b""


def test_a_study_of_the_gallery_begins_with_own_data(whole, tmp_path):
    """As pipelines/README.md says: a file, a command; then what DVC and git are asked, before and after a commit."""
    study = Project(whole, whole.folder / "pipelines/light")
    study.folder.mkdir()
    (shown,) = (block for block in blocks(ROOT / "pipelines/README.md") if "runs:" in block)
    (study.folder / "params.yaml").write_text(shown)
    whole.make_study("light")
    write_own(study.folder)
    study.asked("add", *TRACKED)
    before = study.own()
    study.asked("exp", "run", "-n", "early", "check")
    assert study.own() == before
    whole.commit("study")
    listed = subprocess.check_output(["git", "ls-files"], cwd=study.folder, text=True).split()
    rest = {name for name in listed if not name.startswith(ROOMS)}
    made = {".dvc/.gitignore", ".dvc/config", ".dvcignore", "stages", "vtp"}
    assert rest == made | {"dvc.lock", "dvc.yaml", "params.yaml"}
    for how in ("", "--temp"):
        study.asked("exp", "run", *filter(None, [how]), "-n", f"late{how}", "-S", "summary.title=Mine", "check")
        assert study.own() == before
        whole.git("checkout", "-q", "--", ".")
        study.asked("checkout", "check", *(f"{path}.dvc" for path in TRACKED))
        assert whole.untracked_or_changed() == []
    study.asked("remote", "add", "-d", "store", str(tmp_path / "store"))
    study.asked("push")
    whole.git("checkout", "-q", "--", ".")
    assert not any(name in whole.asked("status") for name in ("light", "pets"))


@pytest.mark.parametrize(
    ("folder", "keys", "removed", "added"),
    [
        (
            ".",
            ["pretrain.optim.lr=0.002", "prepare_data.location=s3://mine/shards", "prepare_data.max_unreadable=0.1"],
            [
                "  max_unreadable: 0.0 # share of pictures that may be left out, or the stage fails",
                "  location: # of the tars; or a URL such as s3://bucket/folder",
                "    lr: 1.0e-3",
            ],
            [
                "  max_unreadable: 0.1 # share of pictures that may be left out, or the stage fails",
                "  location: s3://mine/shards # of the tars; or a URL such as s3://bucket/folder",
                "    lr: 0.002",
            ],
        ),
        (
            "pipelines/compute_scaling",
            ["summary.title=Mine", "+pretrain.seed=1"],
            ["  title: More compute for the tokenizer"],
            ["  title: Mine", "pretrain:", "  seed: 1"],
        ),
    ],
)
def test_an_experiment_changes_the_lines_of_its_keys(whole, folder, keys, removed, added):
    changes = [word for key in keys for word in ("-S", key)]
    whole.asked("exp", "run", *changes, "check", cwd=whole.folder / folder)
    diff = subprocess.check_output(["git", "diff", "-U0", "--", "*params.yaml"], cwd=whole.folder, text=True)
    lines = [line for line in diff.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert [line[1:] for line in lines if line[0] == "-"] == removed
    assert [line[1:] for line in lines if line[0] == "+"] == added
    whole.git("checkout", "-q", "--", ".")


def test_an_archive_runs_without_git(clone, tmp_path):
    """What docs/running.md says of it: one setting, then everything but experiments."""
    folder, programs = tmp_path / "unpacked", tmp_path / "programs"
    folder.mkdir()
    first = subprocess.check_output(["git", "rev-list", "--max-parents=0", "HEAD"], cwd=clone.folder, text=True).strip()
    archive = subprocess.check_output(["git", "archive", first], cwd=clone.folder)
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    environment = clone.environment() | {"PATH": str(programs), "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    assert shutil.which("git", path=environment["PATH"]) is None

    def dvc(*arguments, cwd=folder):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr, done.returncode

    setting = "dvc config --local core.no_scm true"
    assert setting in (ROOT / "docs/running.md").read_text()
    for project in (folder, folder / "pipelines/mine"):
        output, status = dvc("repro", cwd=project)
        assert status != 0
        assert "is not a git repository" in output
        assert dvc(*setting.split()[1:], cwd=project)[1] == 0
        write_own(project)
        assert dvc("add", *TRACKED, cwd=project)[1] == 0
        output, status = dvc("repro", cwd=project)
        assert status == 0, output
        assert ran(output)[-1] == "prepare_data"
        assert dvc("status", cwd=project)[0].splitlines()[-1:] == QUIET
        logs = (folder / ".scratch/prepare_data").glob("*/run.log")  # of the last run, others are pruned
        assert ["commit unknown" in log.read_text() for log in logs] == [True]
