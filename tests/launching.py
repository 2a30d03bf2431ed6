"""A stage on two real ranks, by its command line, and the ranks that are at work."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny import ROOT, write_params


def on_two_ranks(
    folder: Path, stage: str, params: dict[str, Any], paths: Mapping[str, Path | str], **settings: str
) -> None:
    """Run `stage` in `folder`, with one thread per rank; `paths` by flag, those of outputs relative to it."""
    (folder / ".dvc").mkdir()
    write_params({stage: params}, folder / "params.yaml")
    command = [sys.executable, "-m", f"stages.{stage}", f"params.yaml:{stage}", "--provenance", "provenance.json"]
    command += [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
    own = {"VTP_RANKS": "2", "VTP_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_ROOT": ""}
    environment = {name: value for name, value in (os.environ | own | settings).items() if value}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.glob(f".scratch/{stage}/*/job.json"))  # ranks were started


def ranks_of(folder: Path) -> dict[int, int]:
    """Process numbers of the ranks that work in a folder, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().rstrip("\0").split("\0")
            environment = (path / "environ").read_text().split("\0")
        except OSError:
            continue
        values = dict(entry.split("=", 1) for entry in environment if "=" in entry)
        if "stages.runner.rank" in command and "RANK" in values and Path(command[-1]).is_relative_to(folder):
            found[int(values["RANK"])] = int(path.name)
    return found
