"""Some faults of every family, and that the campaign sees what it looks for (`python -m benchmarks.faults` tries more)."""

import os
import signal
import sys
import time

import pytest

from benchmarks._fault_families import FAMILIES
from benchmarks._faulty import Project, Stage, different, ended
from benchmarks.faults import failures

CASES = {"parameters": 10, "pictures": 30, "values": 2, "artefacts": 3, "scratch": 3, "disks": 2, "signals": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("faults") / "project")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_faults_are_survived(project, family):
    assert failures(project, family, 0, range(CASES[family])) == []


def refuse(line):
    sys.stderr.write(f"{line}\n")
    sys.exit(2)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "died of signal 15"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: sys.exit(1), "status 1, said ''"),
        (lambda: refuse("error: b: no such file"), "names none of a.json: error: b"),
    ],
)
def test_what_is_no_refusal_is_seen(tmp_path, function, said):
    assert said in ended(function, tmp_path, seconds=100).refusal("a.json")


def test_what_hangs_is_seen(tmp_path):
    assert "hung for" in ended(lambda: time.sleep(1000), tmp_path, seconds=1).refusal("a.json")


def test_a_refusal_names_what_it_refuses(tmp_path):
    result = ended(lambda: refuse("error: a.json: no such file"), tmp_path, seconds=100)
    assert result.status == 2
    assert result.refusal("a.json") is None


def test_other_bits_are_seen(tmp_path):
    for name, text in (("whole", "1"), ("other", "2"), ("equal", "1")):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / "a").write_text(text)
    stage = Stage("s", [], outputs=("out",))
    assert different(stage, tmp_path / "whole", tmp_path / "other") == "other bits in silence: out/a"
    assert different(stage, tmp_path / "whole", tmp_path / "equal") is None
    assert different(stage, tmp_path / "whole", tmp_path / "missing") is not None
