"""Rows per second and memory of the stage filter over metadata like DataComp's, against pandas with all rows in memory.

    python -m benchmarks.filter                     # 10 million rows
    python -m benchmarks.filter --rows 1000000

Both run in a process of their own, with the same rules: size, aspect ratio, caption length, a pattern, a score, duplicates
by URL and by sha256, the best 30 % of a score, a subset. Memory is the largest sum over a run's processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.filter import Filter, run
from stages.runner.environment import LocalHost, Runtime
from vtp.curation.rows import order_of

SPAN = 1 << 19  # rows of a file that is written
PATTERN = r"(?i)\b(stock photo|free shipping|click here)\b"
WORDS = [
    "a",
    "the",
    "red",
    "old",
    "small",
    "house",
    "dog",
    "river",
    "on",
    "near",
    "with",
    "sale",
    "stock",
    "photo",
    "cat",
]


def rules(rows: int) -> list[dict[str, Any]]:
    """A list that does most of what lists do."""
    sides = {"max_side": None, "min_area": None, "max_area": None}
    length = {"min_words": 3, "max_words": None, "min_characters": 6, "max_characters": None}
    score = "clip_b32_similarity_score"
    return [
        {"name": "size", "min_side": 200, **sides, "missing": "drop"},
        {"name": "aspect_ratio", "max": 3.0, "missing": "drop"},
        {"name": "caption_length", **length, "missing": "drop"},
        {"name": "pattern", "column": "caption", "regex": PATTERN, "matches": "drop", "missing": "keep"},
        {"name": "number", "column": score, "min": 0.1, "max": None, "missing": "drop"},
        {"name": "duplicates", "by": "url", "missing": "drop"},
        {"name": "duplicates", "by": "sha256", "missing": "keep"},
        {
            "name": "top_fraction",
            "column": "clip_l14_similarity_score",
            "fraction": 0.3,
            "best": "highest",
            "missing": "drop",
        },
        {"name": "subset", "size": max(1, rows // 20)},
    ]


def write_metadata(folder: Path, rows: int) -> None:
    """Rows as DataComp's pools have them; one in ten repeats a URL, one in twenty an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    words = np.array(WORDS)
    for number, start in enumerate(range(0, rows, SPAN)):
        draws = np.random.default_rng(number)
        ids = np.arange(start, min(start + SPAN, rows))
        count = len(ids)
        pages = np.where(draws.random(count) < 0.1, draws.integers(0, rows, count), ids)
        images = np.where(draws.random(count) < 0.05, draws.integers(0, rows, count), ids)
        chosen = words[draws.integers(0, len(words), (count, 12))]
        lengths = draws.integers(1, 13, count)
        texts = [" ".join(row[:length]) for row, length in zip(chosen.tolist(), lengths.tolist(), strict=True)]
        table = {
            "uid": [draws.bytes(16).hex() for _ in range(count)],
            "url": [f"https://pictures{page % 977}.example.com/{page:011}/large/picture-{page}.jpg" for page in pages],
            "text": texts,
            "original_width": draws.integers(50, 2000, count),
            "original_height": draws.integers(50, 2000, count),
            "clip_b32_similarity_score": draws.normal(0.22, 0.06, count).astype(np.float32),
            "clip_l14_similarity_score": draws.normal(0.2, 0.06, count).astype(np.float32),
            "sha256": [f"{image:064x}" for image in images],
        }
        pq.write_table(pa.table(table), folder / f"{number:05}.parquet", row_group_size=1 << 17)


def ours(folder: Path, out: Path, rows: int) -> None:
    """The stage's body."""
    section = {
        "columns": {"name": "datacomp"},
        "keep_columns": ["clip_l14_similarity_score"],
        "rules": rules(rows),
        "rows_per_part": 100_000,
        "max_unreadable": 0.0,
    }
    host = LocalHost(out / "scratch" / "folder", out, Runtime.of(os.environ))
    host.folder.mkdir(parents=True)
    paths = {name: out / name for name in ("selection", "funnel", "examples")}
    run(Filter.parse(section, where="benchmark"), rows=folder, **paths, host=host)


def reference(folder: Path, out: Path, rows: int) -> None:
    """The same in pandas, all rows in memory."""
    import pandas as pd

    frame: Any = pd.read_parquet(folder)  # pandas' stubs know no columns
    shorter = frame[["original_width", "original_height"]].min(axis=1)
    longer = frame[["original_width", "original_height"]].max(axis=1)
    frame = frame[(shorter >= 200) & (longer <= 3 * shorter)]
    frame = frame[(frame.text.str.split().str.len() >= 3) & (frame.text.str.len() >= 6)]
    frame = frame[~frame.text.str.contains(PATTERN.replace("(stock", "(?:stock"), regex=True)]
    frame = frame[frame.clip_b32_similarity_score >= 0.1]
    frame = frame.assign(order=order_of(frame.uid)).sort_values(["order", "uid"])
    frame = frame.drop_duplicates("uid").drop_duplicates("url").drop_duplicates("sha256")
    best = frame.clip_l14_similarity_score.sort_values(ascending=False, kind="stable").index
    frame = frame.loc[best[: len(frame) * 3 // 10]].sort_values(["order", "uid"]).head(max(1, rows // 20))
    frame.to_parquet(out / "reference.parquet")


class Measured(NamedTuple):
    """One run in its own process."""

    seconds: float
    gigabytes: float  # at the peak, of all its processes
    largest: float  # of one of them


def measure(which: str, folder: Path, out: Path, rows: int) -> Measured:
    """Start this file again and watch it."""
    command = [sys.executable, "-m", "benchmarks.filter", "--rows", str(rows), "--run", which, str(folder), str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = largest = 0
    while process.poll() is None:
        sizes = [_resident(pid) for pid in _family(process.pid)]
        peak, largest = max(peak, sum(sizes)), max([largest, *sizes])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{which} ended with {process.returncode}")
    return Measured(time.perf_counter() - start, peak / 1e9, largest / 1e9)


def _family(root: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = [root]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def main() -> None:
    """Generate, measure, compare, print."""
    options = _options()
    if options.run:
        which, folder, out = options.run
        {"ours": ours, "reference": reference}[which](Path(folder), Path(out), options.rows)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, out = Path(temporary) / "rows", Path(temporary) / "out"
        out.mkdir()
        write_metadata(folder, options.rows)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        print(f"{options.rows:,} rows, {size:.2f} GB of parquet, {Runtime.of(os.environ).cores} processes", flush=True)
        found = {which: measure(which, folder, out, options.rows) for which in ("ours", "reference")}
        for which, name in (("ours", "filter"), ("reference", "pandas")):
            seconds, gigabytes, largest = found[which]
            rate = options.rows / seconds
            print(f"{name:8}{seconds:8.1f} s {rate:12,.0f} rows/s   {gigabytes:6.2f} GB, {largest:.2f} in one process")
        ours_, theirs = found["ours"], found["reference"]
        print(
            f"filter is {theirs.seconds / ours_.seconds:.2f}x pandas' speed at "
            f"{ours_.gigabytes / theirs.gigabytes:.2f} of its memory"
        )
        print(f"rows left agree: {_agree(out)}")


def _agree(out: Path) -> bool:
    """Same keys, in the same order."""
    import pyarrow.parquet as pq

    keys = pq.read_table(out / "selection", columns=["key"])["key"].to_pylist()
    rows_out = json.loads((out / "funnel").read_text())["filter"]["rows_out"]
    return (
        keys == pq.read_table(out / "reference.parquet", columns=["uid"])["uid"].to_pylist() and len(keys) == rows_out
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="for temporary files; several GB")
    parser.add_argument("--run", nargs=3, metavar=("WHICH", "ROWS", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
