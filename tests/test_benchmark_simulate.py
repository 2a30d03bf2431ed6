"""One of four simulated ranks on two machines: it starts, steps, communicates, and plans a checkpoint."""

import subprocess
import sys

from tiny import ROOT, merged, tiny_params, write_params


def test_a_rank_of_many_gets_through(tmp_path):
    batch = {"pretrain": {"data": {"batch": {"clip": 8, "ssl": 8, "reconstruction": 4}}}}
    write_params(merged(tiny_params(), batch), tmp_path / "params.yaml")
    command = [sys.executable, "-m", "benchmarks.simulate", f"{tmp_path / 'params.yaml'}:pretrain"]
    command += ["--ranks", "4", "--machine", "2", "--parallel", "hsdp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines() if line}
    assert {"start", "step 0", "step 1", "checkpoint, planned"} <= told.keys()
    # Shards are gathered and reduced within a machine, and what is left is summed between the two.
    gathered = [line for line in done.stdout.splitlines() if "allgather" in line or "reduce_scatter" in line]
    assert len(gathered) == 2
    assert "allreduce" in done.stdout
