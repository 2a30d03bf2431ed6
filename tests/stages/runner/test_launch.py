"""Real ranks of a real stage: they stop when asked, and a rank that dies or hangs ends the job with its name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ranks_of
from tiny import ROOT, merged, tiny_params, wait_for, write_params, write_shards

from stages.runner.environment import Runtime
from stages.runner.launch import command_of, count_nodes, count_ranks
from vtp.config import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder)
    return folder


class Stage:
    """`python -m stages.pretrain` in a folder of its own."""

    def __init__(self, folder: Path, shards: Path, changes: dict) -> None:
        self.folder = folder
        (folder / ".dvc").mkdir()
        endless = {"training": {"length": {"name": "samples", "samples": 80000}}}
        write_params(merged(tiny_params(), {"pretrain": merged(endless, {}) | changes}), folder / "params.yaml")
        flags = {"shards": shards, "tokenizer": "tokenizer", "state": "state", "milestones": "milestones"}
        flags |= {"metrics": "metrics.json", "curves": "curves.csv", "picture": "looks.png", "provenance": "p.json"}
        arguments = [part for name, path in flags.items() for part in (f"--{name}", str(path))]
        self.command = [sys.executable, "-m", "stages.pretrain", "params.yaml:pretrain", *arguments]

    def start(self, **settings):
        own = {"VTP_WORKERS": "0", "VTP_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment = os.environ | own | settings
        return subprocess.Popen(self.command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)

    def file(self, pattern):
        return next(iter(self.folder.glob(f".scratch/pretrain/*/{pattern}")), None)


@pytest.fixture
def stage(tmp_path, shards):
    def build(**changes):
        return Stage(tmp_path, shards, changes)

    yield build
    for number in ranks_of(tmp_path).values():
        os.kill(number, signal.SIGKILL)


def begin(stage, **settings):
    """Start two ranks and wait until they train; none begins again, unless `settings` say so."""
    process = stage.start(**{"VTP_RANKS": "2", "VTP_RESTARTS": "0"} | settings)
    wait_for(lambda: stage.file("folder/curves.csv"), process)
    return process


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on(stage):
    training = stage()
    process = begin(training, VTP_CHECKPOINT_SECONDS="1000")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "the next start goes on from here" in said
    saved = training.file("folder/checkpoints/step-*")
    assert json.loads((saved / "counters.json").read_text())["skipped"] == 0
    process = begin(training)
    wait_for(lambda: "resumed after step" in training.file("run.log").read_text(), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 130


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(stage):
    training = stage()
    process = begin(training)
    os.kill(ranks_of(training.folder)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "the last checkpoint is kept" in said
    assert "rank      : 1" in said  # torchrun's report
    assert "SIGKILL" in said


@pytest.mark.slow
def test_a_dead_rank_costs_a_restart(stage):
    """Both ranks begin again, from the last checkpoint, without anybody's help; the run stops when it is asked to."""
    training = stage()
    process = begin(training, VTP_RESTARTS="1", VTP_CHECKPOINT_SECONDS="0")
    wait_for(lambda: training.file("folder/checkpoints/step-*[0-9]"), process)
    before = ranks_of(training.folder)
    os.kill(before[1], signal.SIGKILL)
    log = training.file("run.log")
    wait_for(lambda: "resumed after step" in log.read_text(), process)
    assert [f"rank {rank} begins again, for the 1. time" in log.read_text() for rank in (0, 1)] == [True, True]
    after = ranks_of(training.folder)
    assert set(after) == {0, 1}
    assert not set(after.values()) & set(before.values())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job_within_the_timeout(stage):
    training = stage()
    process = begin(training, VTP_TIMEOUT_SECONDS="8")
    os.kill(ranks_of(training.folder)[1], signal.SIGSTOP)
    _, said = process.communicate(timeout=600)  # much less than the default
    assert process.returncode == 1
    assert "rank 0: waited for another rank, at most 8 s" in said
    assert not ranks_of(training.folder)


@pytest.mark.slow
def test_an_error_of_a_rank_is_told(stage):
    training = stage(data={"batch": {"clip": 128, "ssl": 4, "reconstruction": 2}})
    process = training.start(VTP_RANKS="2")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "error: rank 0: the training shards hold 64 samples and a batch takes 128" in said
    assert "Traceback" in training.file("run.log").read_text()
    assert training.file("run.log").read_text().count("rank 0 failed") == 1  # it would come again, so nobody tried


@pytest.mark.slow
def test_an_adversary_needs_whole_weights(stage):
    adversary = tiny_params()["tune_decoder"]["adversary"]
    process = stage(adversary=adversary).start(VTP_RANKS="2", VTP_PARALLEL="fsdp")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "pretrain.adversary needs whole weights on every rank: unset VTP_PARALLEL" in said


def test_commands(monkeypatch, tmp_path):
    job = tmp_path / "abc" / "job.json"
    assert count_ranks(Runtime.of({"VTP_DEVICE": "cpu"})) == 1
    one = Runtime.of({"VTP_RANKS": "8"})
    assert count_ranks(one) == 8
    command = command_of(job, one)
    assert "--standalone" in command
    assert "--nproc-per-node=8" in command
    assert command[-3:] == ["-m", "stages.runner.rank", str(job)]
    with pytest.raises(ConfigError, match=r"VTP_NODES is 2: set \$VTP_RENDEZVOUS to HOST:PORT"):
        command_of(job, Runtime.of({"VTP_RANKS": "8", "VTP_NODES": "2"}))
    head = command_of(job, Runtime.of({"VTP_RANKS": "8", "VTP_NODES": "2", "VTP_RENDEZVOUS": "a:1"}))
    assert {"--nnodes=2", "--rdzv-endpoint=a:1", "--rdzv-id=abc"} <= set(head)
    # A Slurm job of several machines; scontrol is theirs, so a script stands in for it.
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\necho node7\necho node8\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}.items():
        monkeypatch.setenv(name, value)
    assert count_nodes(one) == 2
    command = command_of(job, one)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert "--rdzv-endpoint=node7:29500" in command
    assert "--max-restarts=3" in command
    for name, cores in (("SLURM_CPUS_ON_NODE", "128"), ("SLURM_CPUS_PER_TASK", "96")):  # the latter is what was asked
        monkeypatch.setenv(name, cores)
        assert f"--cpus-per-task={cores}" in command_of(job, one)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("VTP_RANK", "2", "did you mean $VTP_RANKS"),
        ("VTP_RANKS", "two", "VTP_RANKS"),
        ("VTP_PARALLEL", "zero", "VTP_PARALLEL"),
        ("VTP_TIMEOUT_SECONDS", "-1", "VTP_TIMEOUT_SECONDS"),
    ],
)
def test_wrong_settings_are_named(name, value, said):
    with pytest.raises(ConfigError) as error:
        Runtime.of({name: value, "PATH": "x"})
    assert said in str(error.value)
