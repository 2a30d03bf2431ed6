"""The stage download at a size of seconds: parameters, lists, and a folder to run it in."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from servers import LIMIT
from tiny import ROOT, merged, write_params

from vtp.curation.rows import order_of

SECTION = {
    "resize": {"name": "keep_ratio_largest", "size": 256, "only_if_bigger": True},
    "encoding": {"name": "jpg", "quality": 95},
    "rows_per_shard": 256,
    "policy": {
        "timeout": 4.0,
        "deadline": 8.0,
        "max_bytes": LIMIT,
        "allowed_networks": ["127.0.0.1/32"],
        "allowed_ports": None,
    },
    "max_pixels": 20_000_000,
    "retries": 1,
    "user_agent_token": None,
    "respect_opt_out": ["noai", "noimageai", "noindex", "noimageindex"],
    "verify_sha256": True,
    "retry_failed": 0,
    "min_success": 0.5,
    "distributor": {"name": "multiprocessing", "processes": 2, "threads": 16},
}
SPARK = {"name": "pyspark", "master": "local[2]", "threads": 8, "conf": {}}


class Row(NamedTuple):
    """A row of the list, and what must become of it."""

    key: str
    url: str
    kind: str
    sha256: str | None
    error: str | None


def write_selection(rows, folder, per_part=1500):
    """As the stage filter writes it: sorted by a hash of the key."""
    folder.mkdir(parents=True)
    rows = sorted(rows, key=lambda row: int(order_of([row.key])[0]))
    for number, start in enumerate(range(0, len(rows), per_part)):
        part = rows[start : start + per_part]
        size = pa.array([1] * len(part), pa.int32())
        columns = {"key": [row.key for row in part], "order": order_of(row.key for row in part)}
        columns |= {"url": [row.url for row in part], "caption": [f"a {row.kind} ü" for row in part]}
        columns |= {"width": size, "height": size, "sha256": pa.array([row.sha256 for row in part], pa.string())}
        pq.write_table(pa.table(columns | {"score": np.arange(len(part)) / 7}), folder / f"part-{number:05d}.parquet")
    return folder


def read_pool(folder):
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def picture_of(folder, row):
    with (folder / row["tar"]).open("rb") as file:
        file.seek(row["offset"])
        return Image.open(io.BytesIO(file.read(row["size"])))


class Stage:
    """`python -m stages.download` in a folder of its own."""

    def __init__(self, folder: Path, changes: dict | None = None) -> None:
        self.folder = folder
        (folder / ".dvc").mkdir(parents=True)
        self.set(changes or {})

    def set(self, changes: dict) -> None:
        write_params({"download": merged(SECTION, changes)}, self.folder / "params.yaml")

    def start(self, selection="selection"):
        flags = {"selection": selection, "pool": "pool", "report": "report.json", "errors": "errors.csv"}
        arguments = [part for name, path in (flags | {"provenance": "p.json"}).items() for part in (f"--{name}", path)]
        command = [sys.executable, "-m", "stages.download", "params.yaml:download", *arguments]
        own = {"PYTHONPATH": str(ROOT), "no_proxy": "*", "NO_PROXY": "*"}
        return subprocess.Popen(command, cwd=self.folder, env=os.environ | own, stderr=subprocess.PIPE, text=True)

    def run(self, selection="selection"):
        """Exit status and what it said."""
        process = self.start(selection)
        _, said = process.communicate(timeout=600)
        return process.returncode, said

    @property
    def pool(self):
        return read_pool(self.folder / "pool")

    @property
    def report(self):
        return json.loads((self.folder / "report.json").read_text())["download"]

    def recorded(self):
        """Rows in the store."""
        files = list(self.folder.glob(".scratch/download/store-*/rows/*.parquet"))
        return [row for path in files for row in pq.read_table(path).to_pylist()]
