"""How threads wait: set before torch is loaded, in a stage, its ranks and workers, and never over the user's own choice."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT

FREE = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
FREE |= {"PYTHONPATH": str(ROOT)}
SAY = "import stages.pretrain, os, torch; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "PASSIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "1000"}, "None 1000"),
    ],
)
def test_a_choice_of_ones_own_stays(given, said):
    run = subprocess.run([sys.executable, "-c", SAY], env=FREE | given, capture_output=True, text=True, check=True)
    assert run.stdout.split() == said.split()


def test_libgomp_reads_it_when_torch_is_loaded():
    """What the library says of itself, with torch imported after the stages as in every stage."""
    environment, command = FREE | {"OMP_DISPLAY_ENV": "true"}, [sys.executable, "-c", "import stages.pretrain"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said.replace("[host] ", "")
