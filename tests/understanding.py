"""The stage in a process of its own, with chunks and waits that a test chooses: `understanding.py JSON`."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from stages.evaluate_understanding import EvaluateUnderstanding, run
from stages.runner.environment import LocalHost, Runtime
from vtp.distributed import process_group
from vtp.evaluation import extraction

OUTPUTS = {"metrics": "metrics.json", "curves": "curves.csv"}


class QuietHost(LocalHost):
    """Without bars."""

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        pass


def evaluate(folder, params, *, chunk, seconds=0.0, **inputs):
    """Run the stage; its outputs lie in `folder`. `seconds` pass before each batch."""
    extraction.CHUNK = chunk
    plain = extraction.ViewedImages.__getitem__

    def slow(self, index):
        time.sleep(seconds)
        return plain(self, index)

    extraction.ViewedImages.__getitem__ = slow
    try:
        host = QuietHost(folder / "scratch" / "folder", folder, Runtime(device="cpu", workers=0))
        host.folder.mkdir(parents=True, exist_ok=True)
        outputs = {flag: folder / name for flag, name in OUTPUTS.items()}
        run(EvaluateUnderstanding.parse(params, where="test"), **inputs, **outputs, host=host)
    finally:
        extraction.ViewedImages.__getitem__ = plain


def main():
    given = json.loads(sys.argv[1])
    paths = {name: Path(given.pop(name)) for name in ("folder", "shards", "tokenizer")}
    with process_group("cpu", timeout=600):
        evaluate(paths.pop("folder"), given.pop("params"), **given, **paths)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    main()
