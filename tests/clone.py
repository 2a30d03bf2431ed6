"""A temporary clone of the project with its own git and DVC, for tests of real pipeline runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

from tiny import ROOT, SMALL, merged, tiny_params, write_params
from warm import folder_of_python

from stages.runner.pipeline import Pipeline
from vtp.artefact import digest
from vtp.config import read_yaml

WEIGHTS = {
    "pretrain": "work/tokenizer/model.safetensors",
    "tune_decoder": "work/decoder/decoder.safetensors",
    "train_generator": "work/generator/model.safetensors",
}


class Clone:
    """A git clone with its own DVC cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The working tree as it is, uncommitted changes included.
        ignore = shutil.ignore_patterns(
            ".git", ".scratch", "work", "cache", "tmp", "*.egg-info", ".venv", "venv", "__pycache__"
        )
        shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
        for project in (folder, *folder.glob("pipelines/*/")):
            for name in ("dvc.lock", "metrics.json", "metrics", "plots"):
                path = project / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.git("init", "-q")
        self.params = tiny_params()
        self.write({})

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.folder, check=True)

    def commit(self, message):
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message)

    def untracked_or_changed(self, folder="."):
        """What git has to say of the working tree."""
        command = ["git", "status", "--porcelain", "--untracked-files=all", folder]
        return subprocess.check_output(command, cwd=self.folder, text=True).splitlines()

    def write(self, changes):
        write_params(merged(self.params, changes), self.folder / "params.yaml")

    def environment(self):
        own = {"VTP_CHECKPOINT_SECONDS": "0", "VTP_CHECKPOINT_SHARE": "1", "VTP_WORKERS": "1"}
        return os.environ | own | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}

    def start(self, *arguments, cwd=None, warm=False, **settings):
        """A dvc command, whose stages are interpreters of their own, or those of `warm`."""
        # The first `python` on the path is that of a stage's command.
        python = folder_of_python() if warm else Path(sys.executable).parent
        path = f"{python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = self.environment() | settings | {"PATH": path}
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=cwd or self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *arguments, cwd=None, seconds=1800, **settings):
        """Output of a dvc command and its status."""
        process = self.start(*arguments, cwd=cwd, warm=True, **settings)
        output, _ = process.communicate(timeout=seconds)
        return output, process.returncode

    def asked(self, *arguments, cwd=None):
        """Output of a dvc command that succeeds."""
        output, status = self.dvc(*arguments, cwd=cwd)
        assert status == 0, output
        return output

    def run_queue(self, name, cwd=None):
        """Run what is queued, which is the experiment `name`."""
        self.asked("queue", "start", cwd=cwd)
        deadline = time.monotonic() + 900
        while True:
            rows = [line.split() for line in self.asked("queue", "status", cwd=cwd).splitlines() if line]
            states = {row[1]: row[-1] for row in rows}
            assert states[name] != "Failed", self.asked("queue", "logs", name, cwd=cwd)
            if states[name] == "Success":
                return
            assert time.monotonic() < deadline, states
            time.sleep(1)

    def make_study(self, name):
        """What the README tells to do once pipelines/NAME has its params.yaml."""
        command = [sys.executable, "-m", "stages.runner.project", f"pipelines/{name}"]
        subprocess.run(command, cwd=self.folder, env=self.environment() | {"PYTHONPATH": str(self.folder)}, check=True)

    def repro(self, *arguments, **settings):
        output, status = self.dvc("repro", *arguments, **settings)
        assert status == 0, output
        return output

    def forget(self):
        """Go back to before the first run: no lock, no outputs, no run cache, no scratch."""
        for name in ("work", "plots", ".scratch", ".dvc/cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "dvc.lock").unlink(missing_ok=True)

    def weights(self, stage):
        return digest(self.folder / WEIGHTS[stage])


class Study:
    """A folder of pipelines/ in a clone, at tiny size; sections `without` are small by `changes` alone.

    Its parameters stay an overlay, and the clone's root is tiny already.
    """

    def __init__(self, clone: Clone, name: str, *, without=(), **changes) -> None:
        self.clone = clone
        self.name = name
        self.folder = clone.folder / "pipelines" / name
        sections = {use.section for use in Pipeline.of(self.folder / "dvc.yaml").uses} - {"prepare_data", *without}
        small = {section: deepcopy(change) for section, change in SMALL.items() if section in sections}
        values = read_yaml(self.folder / "params.yaml")
        self.values = merged(merged(values, small, new=True), changes, new=True)
        self.write({})

    def write(self, changes):
        write_params(merged(self.values, changes, new=True), self.folder / "params.yaml")

    def dvc(self, *arguments, status=0, seconds=1800):
        output, ended = self.clone.dvc(*arguments, cwd=self.folder, seconds=seconds)
        assert ended == status, output
        return output

    def json(self, path):
        return json.loads((self.folder / path).read_text())


def ran(output):
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
