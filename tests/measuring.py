"""A filter of pictures on real ranks, of which the test chose the faults: `torchrun tests/measuring.py FOLDER MODE`.

Also imported, for what one process makes of the same pool. Pieces are of two pictures, parts of eight rows.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sifting
import torch
from PIL import Image
from sifting import section, sift, write_pool
from tiny import ROOT, tiny_params

from stages.runner.environment import Runtime
from vtp.curation.filter import engine, measure_images
from vtp.curation.filter.engine import FilterError
from vtp.distributed import process_group, ranks
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer
from vtp.processes import WorkerDied

PATIENCE = 4  # seconds of a rank for another
RULES = [
    {"name": "perceptual_duplicates", "max_distance": 1},
    {
        "name": "clip_score",
        "model": {"name": "tokenizer"},
        "keep": {"name": "top_fraction", "fraction": 0.7},
        "batch_size": 2,
        "missing": "keep",
    },
    {"name": "subset", "size": 12},
]


def drawn_pool(folder, count):
    """Pictures, every tenth of which is that of the one before it, a few broken ones, one without a caption."""
    pictures = []
    for index in range(count):
        draws, file = np.random.default_rng(index - (index % 10 == 9)), io.BytesIO()
        noise = Image.fromarray(draws.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        noise.resize((24, 20 + index // 10)).save(file, "JPEG")
        content = b"no image" if index % 12 == 5 else file.getvalue()
        pictures.append((f"key-{index}", None if index == 7 else f"caption {index}", content))
    return write_pool(folder, pictures)


def tiny_tokenizer(folder):
    torch.manual_seed(1)
    config = TokenizerConfig.parse(tiny_params()["pretrain"]["tokenizer"], where="tokenizer")
    VisualTokenizer(config).save_pretrained(folder)
    return folder


def filtered(pool, tokenizer, folder, *, max_unreadable=0.2, processes=0):
    """The filter in `folder`; the pieces that this rank took."""
    taken, plain = [], measure_images.ImageMeasurement._own

    def noted(self, number, jobs):
        for job in plain(self, number, jobs):
            taken.append(f"{number}-{job.done.name}")
            self._board.post(f"came {number} {ranks().rank}", "")
            while not all(self._board.read(f"came {number} {rank}") == "" for rank in range(ranks().size)):
                time.sleep(0.01)  # nobody takes all before the others came
            yield job

    config = section(RULES, columns={"name": "pool"}, keep_columns=[], max_unreadable=max_unreadable)
    settings = {"device": "cpu", "timeout_seconds": PATIENCE}
    with (
        patch.object(measure_images, "PIECE", 2),
        patch.object(engine, "span_of", lambda rows: 8),
        patch.object(measure_images.ImageMeasurement, "_own", noted),
        patch.object(sifting, "Runtime", lambda **values: Runtime(**values, **settings)),
    ):
        sift(config, pool, folder, processes=processes, tokenizer=tokenizer)
    return taken


def on_ranks(size, folder, mode):
    """The end of the launch, and what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [__file__, str(folder), mode]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def main(folder, mode):
    plain = measure_images.ImageMeasurement.measure

    def late(self, parts, folder):
        if self._asked:  # the second rule
            time.sleep(2 * PATIENCE)
        return plain(self, parts, folder)

    def hanging(*_, **__):
        time.sleep(1000)

    # All have imported torch before they wait for each other as long as PATIENCE only.
    (folder / f"{mode}-{os.environ['RANK']}").touch()
    while not all((folder / f"{mode}-{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
    with process_group("cpu", timeout=PATIENCE):
        if mode == "late":  # what is between two rules takes longer than anyone waits for a rank
            patch.object(measure_images.ImageMeasurement, "measure", late).start()
        if mode == "hanging" and not ranks().first:
            patch.object(measure_images, "score_images", hanging).start()
        most = 0.06 if mode == "strict" else 0.2
        try:
            taken = filtered(folder / "pool", folder / "tokenizer", folder / mode, max_unreadable=most, processes=1)
        except (FilterError, WorkerDied) as error:
            sys.stderr.write(f"rank {ranks().rank}: {error}\n")
            os._exit(1)  # as a rank of a stage does
        (folder / f"taken-{mode}-{ranks().size}-{ranks().rank}.json").write_text(json.dumps(taken))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
