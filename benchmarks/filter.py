"""The stage filter over metadata like DataComp's, beside DuckDB and polars: rows per CPU second, memory, and equality.

    python -m benchmarks.filter                     # 10 million rows
    python -m benchmarks.filter --rows 1000000

It needs `pip install -c constraints.txt -e '.[benchmarks]'`. Each runs in a process of its own, on as many cores, with the
same rules: size, aspect ratio, caption length, a pattern, a score, duplicates by URL and by sha256, the best 30 % of a
score, a subset. The hash by which rows are sorted is ours in all of them. What the others lack is a funnel with examples,
bytes that are no text, and going on after a kill. CPU seconds are those of the work, without imports; memory is the
largest sum over a run's processes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.filter import Filter, run
from stages.runner.environment import LocalHost, Runtime
from vtp.curation.rows import order_of

if TYPE_CHECKING:
    import pyarrow as pa

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


def by_duckdb(folder: Path, out: Path, rows: int) -> None:
    """The same in SQL, within a limit of memory; what does not fit goes to disk."""
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    cores = max(1, Runtime.of(os.environ).cores)
    settings = {"memory_limit": "1GB", "threads": cores, "temp_directory": str(out / "spilled")}
    database = duckdb.connect(str(out / "duckdb"), config=settings)
    leading = database.cursor().sql(f"""
        SELECT * FROM '{folder}/*.parquet'
        WHERE least(original_width, original_height) >= 200
          AND greatest(original_width, original_height) <= 3 * least(original_width, original_height)
          AND len(regexp_extract_all(text, '\\S+')) >= 3 AND length(text) >= 6
          AND NOT regexp_matches(text, '{PATTERN}') AND clip_b32_similarity_score::DOUBLE >= 0.1""")
    reader = leading.to_arrow_reader(1 << 17)
    schema = reader.schema.append(pa.field("hash", pa.uint64()))
    hashed = (batch.append_column("hash", order_of(batch["uid"].to_pylist())) for batch in reader)
    ordered = pa.RecordBatchReader.from_batches(schema, hashed)  # read by name below
    kept = "key, url, caption, width, height, sha256, clip_l14_similarity_score"
    database.execute("CREATE TABLE passed AS SELECT * FROM ordered")
    database.execute("""
        CREATE TABLE placed AS SELECT uid AS key, url, text AS caption, original_width AS width,
            original_height AS height, lower(sha256) AS sha256, clip_l14_similarity_score,
            row_number() OVER (ORDER BY hash, uid) AS place FROM passed""")
    database.execute("""
        CREATE TABLE firsts AS SELECT * FROM placed
            SEMI JOIN (SELECT min(place) AS place FROM placed GROUP BY url) USING (place)""")
    database.execute("""
        CREATE TABLE singles AS SELECT * FROM firsts
            SEMI JOIN (SELECT min(place) AS place FROM firsts GROUP BY sha256) USING (place)""")
    (count,) = database.sql("SELECT count(*) FROM singles").fetchall()[0]
    best = f"SELECT * FROM singles ORDER BY clip_l14_similarity_score DESC, place LIMIT {count * 3 // 10}"
    chosen = database.sql(f"SELECT {kept} FROM ({best}) ORDER BY place LIMIT {max(1, rows // 20)}")
    pq.write_table(chosen.to_arrow_reader().read_all(), out / "duckdb.parquet")
    del ordered


def by_polars(folder: Path, out: Path, rows: int) -> None:
    """The same in polars, whose rows lie in memory from the first rule about all rows on."""
    import polars as pl

    shorter, longer = (f("original_width", "original_height") for f in (pl.min_horizontal, pl.max_horizontal))
    words, score = pl.col("text").str.extract_all(r"\S+").list.len(), "clip_l14_similarity_score"
    frame: Any = (
        pl.scan_parquet(folder / "*.parquet")
        .filter((shorter >= 200) & (longer <= 3 * shorter))
        .filter((words >= 3) & (pl.col("text").str.len_chars() >= 6) & ~pl.col("text").str.contains(PATTERN))
        .filter(pl.col("clip_b32_similarity_score").cast(pl.Float64) >= 0.1)
        .collect(engine="streaming")
    )
    frame = frame.with_columns(hash=pl.Series(order_of(frame["uid"]))).sort("hash", "uid").with_row_index("place")
    for column in ("uid", "url", "sha256"):
        frame = frame.unique(column, keep="first", maintain_order=True)
    frame = frame.sort(score, "place", descending=[True, False]).head(len(frame) * 3 // 10)
    frame = frame.sort("place").head(max(1, rows // 20))
    frame.select(
        *(pl.col("uid").alias("key"), "url", pl.col("text").alias("caption"), pl.col("original_width").alias("width")),
        *(pl.col("original_height").alias("height"), pl.col("sha256").str.to_lowercase(), score),
    ).write_parquet(out / "polars.parquet")


ENGINES: dict[str, Callable[[Path, Path, int], None]] = {"ours": ours, "duckdb": by_duckdb, "polars": by_polars}


class Measured(NamedTuple):
    """One run in its own process."""

    seconds: float
    cpu_seconds: float
    gigabytes: float  # at the peak, of all its processes
    largest: float  # of one of them


def measure(which: str, folder: Path, out: Path, rows: int) -> Measured:
    """Start this file again and watch it."""
    command = [sys.executable, "-m", "benchmarks.filter", "--rows", str(rows), "--run", which, str(folder), str(out)]
    process = subprocess.Popen(command)
    peak = largest = 0
    while process.poll() is None:
        sizes = [_resident(pid) for pid in _family(process.pid)]
        peak, largest = max(peak, sum(sizes)), max([largest, *sizes])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{which} ended with {process.returncode}")
    seconds, cpu_seconds = json.loads((out / f"{which}.json").read_text())
    return Measured(seconds, cpu_seconds, peak / 1e9, largest / 1e9)


def _run(which: str, folder: Path, out: Path, rows: int) -> None:
    """Do the work in this process, and write what it took."""
    start, before = time.perf_counter(), _cpu_seconds()
    ENGINES[which](folder, out, rows)
    (out / f"{which}.json").write_text(json.dumps([time.perf_counter() - start, _cpu_seconds() - before]))


def _cpu_seconds() -> float:
    """Of this process and those of its own that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


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
        _run(which, Path(folder), Path(out), options.rows)
        return
    for package in ("duckdb", "polars"):
        if find_spec(package) is None:
            raise SystemExit(f"{package} is not installed here: pip install -c constraints.txt -e '.[benchmarks]'")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, out = Path(temporary) / "rows", Path(temporary) / "out"
        out.mkdir()
        write_metadata(folder, options.rows)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        print(f"{options.rows:,} rows, {size:.2f} GB of parquet, {Runtime.of(os.environ).cores} processes", flush=True)
        print(f"{'':8}{'seconds':>9}{'CPU s':>9}{'rows/CPU s':>13}{'GB':>8}{'in one':>8}   rows in their order")
        for which in ENGINES:
            seconds, cpu_seconds, gigabytes, largest = measure(which, folder, out, options.rows)
            rate = options.rows / cpu_seconds
            verdict = "equal" if _rows(which, out).equals(_rows("ours", out)) else "DIFFERENT"
            numbers = f"{seconds:9.1f}{cpu_seconds:9.1f}{rate:13,.0f}{gigabytes:8.2f}{largest:8.2f}"
            print(f"{which:8}{numbers}   {len(_rows(which, out)):,} {verdict}", flush=True)


def _rows(which: str, out: Path) -> "pa.Table":
    """What is left, in its order: texts and numbers of one type each, whatever an engine chose."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, numbers = ("key", "url", "caption", "sha256"), ("width", "height")
    kinds = dict.fromkeys(texts, pa.string()) | dict.fromkeys(numbers, pa.int64())
    schema = pa.schema(kinds | {"clip_l14_similarity_score": pa.float32()})
    path = out / ("selection" if which == "ours" else f"{which}.parquet")
    return pq.read_table(path, columns=schema.names).cast(schema)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="for temporary files; several GB")
    parser.add_argument("--run", nargs=3, metavar=("WHICH", "ROWS", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
