"""The steps of the Dockerfile, executed without Docker: what is copied, what is installed, what runs.

Docker is no dependency of the tests, so no image is built here: that `apt-get` finds its packages and that `pip` resolves
in the base image are not shown. The instructions are read strictly; an unknown one fails, rather than goes unchecked.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest
from clone import Clone
from packaging.specifiers import SpecifierSet
from tiny import ROOT

KNOWN = ("FROM", "RUN", "WORKDIR", "COPY", "CMD")


class Step(NamedTuple):
    name: str
    argument: str


def read(text):
    """The instructions of a Dockerfile, in order; lines may go on with a backslash."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    steps = [Step(*line.strip().split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    for step in steps:
        assert step.name in KNOWN, f"{step.name}: this reader does not know what it does"
        assert step.name == "CMD" or step.argument[0] not in "-[", f"{step}: plain forms only"
    assert steps[0].name == "FROM"
    assert [step.name for step in steps[1:]].count("FROM") == 0
    return steps


def sent(path, patterns):
    """Whether Docker sends `path` of the folder: the last pattern that matches it, or a folder above it, decides."""
    above = ["/".join(path.split("/")[:end]) for end in range(1, path.count("/") + 2)]
    ignored = False
    for pattern in patterns:
        expression = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, name) for name in above):
            ignored = not pattern.startswith("!")
    return not ignored


STEPS = read((ROOT / "Dockerfile").read_text())
RUNS = [step.argument for step in STEPS if step.name == "RUN"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The folder that COPY makes of a tree in use: with history, data, results, and keys of its owner."""
    clone = Clone(tmp_path_factory.mktemp("container") / "clone")
    for name in (
        ".dvc/config.local",
        ".dvc/cache/files/md5/ab/c",
        "pipelines/objectives/.dvc/config.local",
        "pipelines/objectives/.dvc/tmp/x",
        "pipelines/vtp/data/labelled/x.tar",
        "pipelines/objectives/work/x",
        "data/pets/cat/1.png",
        "weights/network.pth",
        "pipelines/vtp/weights/network.pth",
        "work/tokenizer/model.safetensors",
        ".scratch/pretrain/x",
        ".venv/bin/x",
        "vtp/losses/__pycache__/x.pyc",
        "vtp.egg-info/PKG-INFO",
    ):
        (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (clone.folder / name).write_text("mine")
    clone.commit("start")
    listed = subprocess.check_output(["git", "ls-files"], cwd=clone.folder, text=True).splitlines()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    found = [
        os.path.relpath(os.path.join(folder, name), clone.folder)
        for folder, folders, names in os.walk(clone.folder)
        for name in (*names, *(name for name in folders if os.path.islink(os.path.join(folder, name))))
    ]
    context = [name for name in found if sent(name, patterns)]
    assert [step.argument for step in STEPS if step.name == "COPY"] == [". ."]
    assert [step.argument for step in STEPS if step.name == "WORKDIR"] == ["/vtp"]
    image = tmp_path_factory.mktemp("image") / "vtp"
    for name in context:
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone.folder / name, image / name, follow_symlinks=False)
    return image, set(context), set(listed)


def execute(command, cwd):
    """In the present environment, in the place of the image's."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONPATH": ""}
    environment |= {"GIT_CEILING_DIRECTORIES": str(cwd.parent)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_copy_is_what_git_holds_and_no_more(image):
    """Neither data nor results nor keys get into an image."""
    _, context, listed = image
    assert context == listed


def test_the_install_command_is_that_of_the_readme(image):
    folder, _, _ = image
    shown = re.search(r"^(pip install .*?) && dvc repro", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    (install,) = (run for run in RUNS if run.startswith("pip "))
    assert install.replace(" --no-cache-dir", "") == shown
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert all((folder / name).is_file() for name in ("constraints.txt", project["readme"], *project["license-files"]))
    base, version = re.fullmatch(r"(python):(\d+\.\d+)-slim", STEPS[0].argument).groups()
    assert base == "python"
    assert SpecifierSet(project["requires-python"]).contains(version)


def test_the_order_of_steps(image):
    """The system's packages, the code, its packages; git and a compiler are among the first."""
    assert [step.name for step in STEPS] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "RUN", "CMD"]
    words = RUNS[0].split()
    assert {"git", "g++"} < set(words[words.index("install") :])


def test_what_runs_in_the_image_runs_in_its_copy(image):
    """Its settings and its command, which here ends with the first stage."""
    folder, _, _ = image
    (setting,) = (run for run in RUNS if run.startswith("dvc "))
    execute(setting.split(), folder)
    command = json.loads(STEPS[-1].argument)
    assert command == ["dvc", "repro"]
    assert "Running stage 'check'" in execute([*command, "check"], folder)
    assert "sample" in execute(["python", "-m", "vtp", "--help"], folder)


def test_documents_run_the_image_on_a_tree_outside():
    text = (ROOT / "docs/running.md").read_text()
    assert "docker build -t vtp ." in text
    assert f':{next(step.argument for step in STEPS if step.name == "WORKDIR")}" vtp' in text


@pytest.mark.parametrize(
    "text", ["FROM a\nADD x y\n", "FROM a\nRUN --mount=type=cache x\n", "RUN x\n", "FROM a\nFROM b\n"]
)
def test_the_reader_is_strict(text):
    with pytest.raises(AssertionError):
        read(text)
