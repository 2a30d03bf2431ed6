"""A stage on two real ranks, by its command line."""

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
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.glob(f".scratch/{stage}/*/job.json"))  # ranks were started
