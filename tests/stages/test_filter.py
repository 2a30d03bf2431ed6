"""The real command: killed and resumed, its errors, its memory; every parameter is read."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from launching import ranks_of
from measuring import drawn_pool, tiny_tokenizer
from sifting import random_rows, section, sift, write, write_pool
from tiny import ROOT, wait_for, write_params

from vtp.artefact import digest
from vtp.config import Config

SIZE = {"name": "size", "min_side": 10, "max_side": None, "min_area": None, "max_area": None, "missing": "keep"}
PATTERN = {"name": "pattern", "column": "url", "regex": "[0-9]+", "matches": "keep", "missing": "keep"}
SCORE = {"name": "number", "column": "score", "min": -2.5, "max": None, "missing": "keep"}
LENGTH = {"min_words": None, "max_words": 9, "min_characters": None, "max_characters": None}
TOP = {"name": "top_fraction", "column": "score", "fraction": 0.9, "best": "highest", "missing": "keep"}
RULES = [SIZE, PATTERN, SCORE, {"name": "duplicates", "by": "url", "missing": "keep"}, {"name": "subset", "size": 100}]


def filter_section(rules):
    values = {"columns": {"name": "datacomp"}, "keep_columns": ["score"], "rules": rules}
    return values | {"rows_per_part": 50_000, "max_unreadable": 0.0}


def command(*arguments):
    flags = {"selection": "selection", "funnel": "funnel.json", "examples": "examples.md", "provenance": "p.json"}
    given = [part for name, path in flags.items() for part in (f"--{name}", path)]
    return [sys.executable, "-m", "stages.filter", "params.yaml:filter_metadata", *given, *arguments]


def start(folder, rules, rows, changes=None, tokenizer=None, **settings):
    (folder / ".dvc").mkdir(exist_ok=True, parents=True)
    write_params({"filter_metadata": filter_section(rules) | (changes or {})}, folder / "params.yaml")
    more = ["--tokenizer", str(tokenizer)] if tokenizer else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VTP_PROCESSES": "2", "OMP_NUM_THREADS": "1"} | settings
    return subprocess.Popen(
        command("--rows", str(rows), *more), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    """What the command said; it must have succeeded."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """800,000 rows of a hundred thousand different ones: seven chunks."""
    folder = tmp_path_factory.mktemp("metadata")
    rows = random_rows(2000)
    for number in range(8):
        table = [row | {"uid": f"{number}-{copy}-{row['uid']}"} for copy in range(50) for row in rows]
        write(table, folder / f"{number}.parquet", row_group_size=50_000)
    return folder


def test_killed_and_resumed(metadata, tmp_path):
    """Kill -9 while reading, SIGTERM later; workers die along; the result is that of a run left alone."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(3):
        (rows / f"{number}.parquet").symlink_to(metadata / f"{number}.parquet")
    rules = [*RULES[:-1], TOP, {"name": "subset", "size": 20_000}]
    said = finished(start(tmp_path / "whole", rules, rows))
    assert "rows in" in said
    assert "09_subset" in said
    killed = tmp_path / "killed"
    process = start(killed, rules, rows)
    scratch = killed / ".scratch" / "filter"
    wait_for(lambda: len(list(scratch.glob("*/folder/read/*.json"))) >= 1, process)
    children = workers_of(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_end(children)
    assert not (killed / "selection").exists()
    done = sorted(scratch.glob("*/folder/read/*.json"))
    times = [path.stat().st_mtime_ns for path in done]
    process = start(killed, rules, rows)
    wait_for(lambda: list(scratch.glob("*/folder/rule-00")), process)
    assert [path.stat().st_mtime_ns for path in done] == times
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert not (killed / "selection").exists()
    finished(start(killed, rules, rows, VTP_RANKS="2"))
    assert not list(scratch.glob("*/job.json"))  # no rule needs another rank
    for name in ("selection", "funnel.json", "examples.md"):
        assert digest(killed / name) == digest(tmp_path / "whole" / name)
    assert sum(len(pq.read_table(path)) for path in (killed / "selection").iterdir()) == 20_000
    facts = json.loads((killed / "p.json").read_text())["facts"]
    assert facts == {"rows_in": 300_000, "rows_out": 20_000}


@pytest.mark.slow
def test_spark_writes_the_same_bytes(tmp_path):
    """Kill -9 between two tasks, and go on: on the cluster, or without it."""
    for number in range(3):
        rows = [row | {"uid": f"{number}-{row['uid']}"} for row in random_rows(2000, seed=number)]
        write(rows * 25, tmp_path / "rows" / f"{number}.parquet", row_group_size=50_000)
    rules = [SIZE, SCORE, TOP, {"name": "duplicates", "by": "sha256", "missing": "keep"}]
    cluster = {"VTP_SPARK": "local[2]", "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_CONF_DIR": str(tmp_path / "conf")}
    (tmp_path / "events").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "spark-defaults.conf").write_text(
        "spark.eventLog.enabled true\nspark.eventLog.compress false\nspark.driver.memory 512m\n"
        f"spark.eventLog.dir {(tmp_path / 'events').as_uri()}\n"
    )
    killed = tmp_path / "killed"
    process = start(killed, rules, tmp_path / "rows", **cluster)
    wait_for(lambda: list(killed.glob(".scratch/filter/*/folder/read/*.json")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished(start(killed, rules, tmp_path / "rows", **cluster))
    finished(start(tmp_path / "plain", rules, tmp_path / "rows"))
    for name in ("selection", "funnel.json", "examples.md"):
        assert digest(killed / name) == digest(tmp_path / "plain" / name)
    logs = [path.read_text() for path in (tmp_path / "events").rglob("*") if path.is_file()]
    assert sum(log.count('"Event":"SparkListenerTaskEnd"') for log in logs) >= 10


@pytest.mark.slow
def test_ranks_are_killed_and_others_go_on(tmp_path):
    """A rank is killed, all are asked to stop, and a third number of them ends with the bytes of one process."""
    pool, tokenizer = drawn_pool(tmp_path / "pool", 3000), tiny_tokenizer(tmp_path / "tokenizer")
    score = {"name": "clip_score", "model": {"name": "tokenizer"}, "keep": {"name": "top_fraction", "fraction": 0.5}}
    rules = [{"name": "perceptual_duplicates", "max_distance": 2}, score | {"batch_size": 8, "missing": "drop"}]
    changes = {"columns": {"name": "pool"}, "keep_columns": [], "max_unreadable": 0.1}

    def begin(name, ranks):
        return start(tmp_path / name, rules, pool, changes, tokenizer, VTP_RANKS=str(ranks), VTP_DEVICE="cpu")

    finished(begin("whole", 1))
    process = begin("killed", 2)
    scratch = tmp_path / "killed" / ".scratch" / "filter"
    wait_for(lambda: list(scratch.glob("*/folder/rule-00/image-*.npy")), process)
    os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1, said
    done = sorted(scratch.glob("*/folder/rule-00/image-*.npy"))
    times = [path.stat().st_mtime_ns for path in done]
    process = begin("killed", 2)
    wait_for(lambda: list(scratch.glob("*/folder/rule-01/image-*.npy")), process)
    assert [path.stat().st_mtime_ns for path in done] == times
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130, said
    assert not ranks_of(tmp_path)
    finished(begin("killed", 3))
    for name in ("selection", "funnel.json", "examples.md"):
        assert digest(tmp_path / "killed" / name) == digest(tmp_path / "whole" / name)


def workers_of(parent):
    """Children that take jobs; the other one tracks resources."""
    found = []
    for stat in list((ROOT / "/proc").glob("[0-9]*/stat")):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            line = stat.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == parent and "spawn_main" in line:
            found.append(int(stat.parent.name))
    return found


def wait_for_end(processes):
    for _ in range(6000):
        if not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]:
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError(f"{processes} outlived their parent")


def test_mistakes_end_the_command_in_words(metadata, tmp_path):
    rows = tmp_path / "rows"
    write(random_rows(10), rows / "a.parquet")
    process = start(tmp_path, [SCORE | {"column": "scoore"}], rows)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "a.parquet: no column 'scoore'; it has uid, url" in said
    assert "did you mean 'score'?" in said
    assert "Traceback" not in said
    process = start(tmp_path, [PATTERN | {"regex": "a(b"}], rows)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert "params.yaml:filter_metadata.rules.0.regex: not a regular expression of RE2" in said
    (rows / "b.parquet").write_bytes((rows / "a.parquet").read_bytes()[:-9])
    process = start(tmp_path, [SIZE], rows)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "b.parquet: not a whole parquet file" in said


def test_memory_is_bounded(metadata, tmp_path):
    """Of everything but the libraries: less than a table of all rows would fill, without a copy of it."""
    everything = sum(pq.read_table(path).nbytes for path in metadata.iterdir())
    peaks = {}
    for name, rules in (("none", [{"name": "subset", "size": 1}]), ("all", [*RULES[:-1], TOP])):
        rows = metadata if name == "all" else tmp_path / "one"
        if name == "none":
            write(random_rows(10), rows / "a.parquet")
        finished(start(tmp_path / name, rules, rows, VTP_PROCESSES="0", MALLOC_ARENA_MAX="1"))
        log = next((tmp_path / name).glob(".scratch/filter/*/run.log")).read_text()
        peaks[name] = float(log.rsplit("peak memory ", 1)[1].split()[0]) * 1e9
    assert everything > 100e6
    assert peaks["all"] - peaks["none"] < 0.7 * everything, peaks


def test_every_parameter_is_read(tmp_path):
    """By the run itself, after the parameters were parsed."""
    rows = [row | {"uid": f"{i:032x}"} for i, row in enumerate(random_rows(60))]
    write(rows, tmp_path / "rows" / "a.parquet")
    write_pool(tmp_path / "pool", [("a", "a caption", b"none")] * 0 + [(f"k{i}", "caption", None) for i in range(3)])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "block.txt").write_text("0" * 64 + "\n")
    names = {"key": "uid", "url": "url", "caption": "text", "width": "original_width", "height": "original_height"}
    caption = {"name": "caption_length", **LENGTH, "missing": "keep"}
    rules = [
        *RULES[:-1],
        {"name": "aspect_ratio", "max": 1000.0, "missing": "keep"},
        caption,
        {"name": "language", "allowed": ["en"], "min_probability": 0.0, "missing": "keep"},
        {"name": "category", "column": "nsfw", "allowed": ["NSFW", "UNSURE", "UNLIKELY"], "missing": "keep"},
        {"name": "hash_list", "column": "sha256", "file": "block.txt", "action": "block", "missing": "keep"},
        TOP,
        {"name": "subset", "size": 100},
    ]
    configs = [
        (section(rules, columns={"name": "mapped", **names, "sha256": "sha256"}), tmp_path / "rows"),
        (section([{"name": "perceptual_duplicates", "max_distance": 3}], columns={"name": "pool"}, keep_columns=[],
                 max_unreadable=1.0), tmp_path / "pool"),
    ]  # fmt: skip
    reads, plain = set(), Config.__getattribute__

    def recording(self, name):
        reads.add((type(self).__name__, name))
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "__getattribute__", recording)
        sift(configs[0][0], configs[0][1], tmp_path / "a", lists=tmp_path / "lists")
        with pytest.raises(ValueError, match="no row is left"):
            sift(configs[1][0], configs[1][1], tmp_path / "b")
    written = {key for config, _ in configs for key in fields(config)}
    assert len(written) > 40
    assert written - reads == set()


def fields(config):
    for name in type(config).model_fields:
        value = vars(config)[name]
        if isinstance(value, Config):
            yield from fields(value)
        elif isinstance(value, list):
            yield from (key for item in value if isinstance(item, Config) for key in fields(item))
        elif name != "name":
            yield type(config).__name__, name
