"""Freed memory stays: tensors that come and go fault no pages in."""

import subprocess
import sys

import pytest
from tiny import ROOT

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
