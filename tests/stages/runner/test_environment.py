"""Freed memory stays; devices and cores are those that are asked for; fetched shards lie on a disk of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from stages.runner.environment import LocalHost, Runtime
from vtp.config import ConfigError
from vtp.distributed import Ranks

CODE = """
import resource
import torch
from stages.runner.environment import Runtime, keep_freed_memory

if {kept}:
    keep_freed_memory(Runtime(device="{device}"))
for count in range(20):  # of 64 MB
    if count == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept: bool, device: str) -> int:
    code = CODE.format(kept=kept, device=device)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again():
    assert faults(kept=True, device="cpu") < 100


@pytest.mark.parametrize(("kept", "device"), [(False, "cpu"), (True, "cuda")])
def test_otherwise_it_goes_back(kept, device):
    assert faults(kept=kept, device=device) > 100


def start(tmp_path, **variables):
    """A stage whose input is not there, which is found after the environment and before any work."""
    command = ["stages.reference", "nowhere.yaml:reference", "--shards", "a", "--reference", "b", "--provenance", "c"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
    return done.stderr


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "cuda:0", "", "CPU", "mps"])
def test_a_device_that_is_none_is_said_in_a_line(tmp_path, device):
    said = start(tmp_path, VTP_DEVICE=device)
    assert said == f"error: $VTP_DEVICE: Input should be 'cpu' or 'cuda' (given: {device!r})\n"


def test_a_gpu_where_there_is_none(tmp_path):
    said = start(tmp_path, VTP_DEVICE="cuda")
    assert said == "error: $VTP_DEVICE: 'cuda', and torch finds no GPU here; unset it, or set it to 'cpu'\n"
    assert start(tmp_path, VTP_DEVICE="cpu") == "error: nowhere.yaml: no such parameter file\n"


def test_other_values_are_said_with_what_is_given(tmp_path):
    said = start(tmp_path, VTP_RANKS="two")
    assert said.startswith("error: $VTP_RANKS: Input should be a valid integer")
    assert said.endswith("(given: 'two')\n")


@pytest.mark.parametrize(
    ("size", "local", "processes", "share"),
    [(1, 8, 96, 96), (8, 8, 96, 12), (16, 8, 100, 12), (8, 8, 4, 1), (8, 8, 0, 0)],
)
def test_ranks_share_the_cores_of_their_machine(monkeypatch, size, local, processes, share):
    """A stage of one process has all, also where several ranks would run."""
    monkeypatch.setattr("stages.runner.environment._ranks", lambda: Ranks(0, size))
    host = LocalHost(Path(), Path(), Runtime(device="cpu", ranks=local, processes=processes))
    assert host.processes == processes
    assert host.rank_processes == share


def test_fetched_shards_lie_on_a_disk_of_the_machine(tmp_path, monkeypatch):
    """In the folder of the Slurm job, or the temporary one; apart for every project, and never in another user's."""

    def cache(root, **environment):
        return LocalHost(tmp_path, root, Runtime.of({"VTP_DEVICE": "cpu"} | environment)).shard_cache

    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    one, other = (cache(tmp_path / name / "project") for name in "ab")
    assert one.parent == other.parent == tmp_path / "tmp"
    assert one != other
    assert one.name.startswith(f"vtp-{os.getuid()}-project-")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    assert cache(tmp_path / "a" / "project") == tmp_path / "job" / one.name
    assert cache(tmp_path, VTP_CACHE=str(tmp_path / "own")) == tmp_path / "own"
    (tmp_path / "job" / one.name).mkdir(parents=True)
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)  # as somebody else
    (tmp_path / "job" / cache_name(one, os.geteuid() + 1)).mkdir()
    with pytest.raises(ConfigError, match=r"is another user's; set \$VTP_CACHE"):
        cache(tmp_path / "a" / "project")


def cache_name(path, user) -> str:
    return "-".join(["vtp", str(user), *path.name.split("-")[2:]])
