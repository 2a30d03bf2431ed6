"""The stage download through its real command line: real img2dataset, real server, real kills."""

import csv
import hashlib
import io
import os
import resource
import select
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from downloading import SPARK, Row, Stage, picture_of, write_selection
from PIL import Image
from servers import COLOURS, GOOD, VARIETY, body, serving
from tiny import wait_for

ROWS = 2_100


def processes_of(folder):
    """What still runs for a stage: every process that was started within its folder, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder and "Z" not in (path / "stat").read_text().split(")")[1]:
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def assert_none_left(folder):
    """A killed process may take a moment to be gone."""
    deadline = time.monotonic() + 60
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture
def folder(tmp_path):
    """Of a stage; what a failed test leaves running in it is ended."""
    yield tmp_path.resolve()
    for number in processes_of(tmp_path.resolve()):
        os.kill(number, signal.SIGKILL)


def memory_of(folder):
    """Resident bytes of all processes of a stage, and of the largest."""
    sizes = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder:
                sizes.append(int((path / "statm").read_text().split()[1]) * resource.getpagesize())
        except OSError:
            continue
    return sum(sizes), max(sizes, default=0)


EXPECTED = {
    "moved": None,
    "chunked": None,
    "flaky": None,
    "robots": None,
    "wide": None,
    "large": None,
    "thin": None,
    "missing": "http 404",
    "error": "http 500",
    "impostor": "http 403",
    "loop": "redirect loop",
    "away": "address refused",
    "twice_away": "address refused",
    "drip": "deadline",
    "drip_head": "deadline",
    "relay": "deadline",  # one for all redirects of an attempt: without it they would end at the tenth
    "stalled": "time out",
    "stalled_body": "time out",
    "half": "truncated body",
    "half_chunked": "truncated body",
    "garbage": "bad gateway",
    "headers": "bad gateway",
    "html": "not an image",
    "empty": "not an image",
    "cut": "damaged image",
    "cut_png": "damaged image",
    "bomb": "too many pixels",
    "real_bomb": "too many pixels",
    "big": "too large",
    "big_chunked": "too large",
    "endless": "too large",
    "noai": "opted out",
}
UNREADABLE = ("html", "empty", "cut", "cut_png", "bomb", "real_bomb")
SLOW = ("drip", "drip_head", "relay", "stalled", "stalled_body")  # each holds its shard for two attempts
FEW = dict.fromkeys(SLOW, 1) | {"large": 2, "thin": 2, "endless": 3, "wide": 4}


class Rows:
    """A list in the making. All but few have a sha256."""

    def __init__(self, server):
        self.server = server
        self.rows: list[Row] = []

    def add(self, kind, url, error=None, content=b""):
        digest = hashlib.sha256(content).hexdigest()
        self.rows.append(Row(f"{kind}-{len(self.rows)}", url, kind, digest.upper() if len(url) % 2 else digest, error))

    def add_expected(self, kind, count):
        for n in range(count):
            content = b""
            if kind in ("chunked", "flaky", "robots", "noai"):  # always the same picture
                content = body("jpeg", 1)
            elif kind in ("wide", "large", "thin", *UNREADABLE):
                content = body(kind, n % VARIETY)
            elif kind == "moved":
                content = body("jpeg", n % VARIETY)
            self.add(kind, self.server.url(kind, n), EXPECTED[kind], content)

    def fill(self, total):
        for number in range(total - len(self.rows)):
            kind, n = GOOD[number % len(GOOD)], number // len(GOOD) % VARIETY
            self.add(kind, self.server.url(kind, f"{n}?{number}"), None, body(kind, n))


def awkward_rows(server, port):
    """At least ROWS rows of all kinds; `port` of 127.0.0.2 must never be connected."""
    outside = [f"http://127.0.0.2:{port}/", f"http://[::1]:{port}/", "http://10.0.0.1/", "http://169.254.169.254/a"]
    server.away = [*outside, "file:///etc/passwd", "ftp://127.0.0.1/a"]
    rows = Rows(server)
    for kind in EXPECTED:
        rows.add_expected(kind, len(outside) if "away" in kind else FEW.get(kind, 20))
    for kind in ("away", "twice_away"):
        for n in (4, 5):
            rows.add("scheme_away", server.url(kind, n), "scheme refused")
    for url in (*outside, f"http://2130706434:{port}/a", f"http://[::ffff:127.0.0.2]:{port}/a"):
        rows.add("outside", url, "address refused")
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/a.jpg", "data:image/png;base64,iVBORw0KGgo=", "/etc/passwd", ""):
        rows.add("scheme", url, "scheme refused")
    rows.add("bad_url", "http://127.0.0.1:99999/a", "bad url")
    rows.add("closed", "http://127.0.0.1:9/a", "no connection")
    rows.add("unicode", server.url("jpeg", "5?straße=ü x"), None, body("jpeg", 5))
    for n in range(20):
        rows.add("duplicate", server.url("jpeg", 5), None, body("jpeg", 5))
        rows.add("wrong", server.url("jpeg", n), "sha256 differs")
    rows.fill(ROWS)
    return rows.rows


class Result(NamedTuple):
    stage: Stage
    rows: list[Row]
    pool: dict
    said: str
    seconds: float
    peak: tuple[int, int]
    connected: bool


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """One run over all kinds."""
    stage = Stage(tmp_path_factory.mktemp("big").resolve())
    with serving() as server, socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        rows = awkward_rows(server, other.getsockname()[1])
        write_selection(rows, stage.folder / "selection")
        server.prepare(*GOOD, "large", "wide", "thin", "bomb", "real_bomb", "big", "cut", "cut_png", "html", "empty")
        start = time.monotonic()
        process = stage.start()
        peak = (0, 0)
        reader = threading.Thread(target=lambda: said.append(process.stderr.read()), daemon=True)
        said: list[str] = []
        reader.start()
        while process.poll() is None:
            assert time.monotonic() - start < 600, "it hangs"
            peak = tuple(map(max, peak, memory_of(stage.folder)))
            time.sleep(0.2)
        reader.join()
        assert process.returncode == 0, said
        seconds = time.monotonic() - start
        connected = bool(select.select([other], [], [], 0)[0])
        yield Result(stage, rows, stage.pool, said[0], seconds, peak, connected)


def test_every_class_of_url_ends_as_expected(big):
    wrong = [
        (row, big.pool[row.key]["status"], big.pool[row.key]["error"])
        for row in big.rows
        if (big.pool[row.key]["status"], big.pool[row.key]["error"])
        != ("failed" if row.error else "success", row.error)
    ]
    assert not wrong
    assert len(big.pool) == len(big.rows) >= 2000


def test_nobody_outside_was_connected_and_nothing_is_left_running(big):
    assert not big.connected
    assert_none_left(big.stage.folder)


def test_time_and_memory_are_bounded(big):
    assert big.seconds < 400
    total, largest = big.peak
    assert largest < 1.2e9, "of one process"
    assert total < 4e9, "of all"


def test_pixels_are_right_whatever_the_file_was(big):
    folder = big.stage.folder / "pool"

    def shown(kind):
        row = next(big.pool[row.key] for row in big.rows if row.kind == kind)
        picture = picture_of(folder, row)
        assert picture.format == "JPEG"
        assert picture.mode == "RGB"
        assert picture.size == (row["stored_width"], row["stored_height"])
        return row, np.asarray(picture).astype(int)

    def near(pixel, colour):
        return np.abs(pixel - np.array(colour)).max() < 12

    _, cmyk = shown("cmyk")
    assert near(cmyk[24, 5], COLOURS["red"])
    assert near(cmyk[24, 60], COLOURS["blue"])
    row, turned = shown("turned")  # red was on the left, and is on top
    assert (row["width"], row["height"]) == (48, 64)
    assert near(turned[5, 24], COLOURS["red"])
    assert near(turned[60, 24], COLOURS["blue"])
    assert near(shown("grey16")[1][9, 9], [156] * 3)
    assert near(shown("rgb16")[1][9, 9], COLOURS["red"])
    assert near(shown("alpha")[1][9, 9], [127] * 3)
    row, dot = shown("dot")
    assert dot.shape == (1, 1, 3)
    assert near(dot[0, 0], COLOURS["green"])
    row, _ = shown("wide")
    assert (row["width"], row["height"], row["stored_width"], row["stored_height"]) == (10_000, 500, 256, 13)
    row, _ = shown("large")
    assert (row["width"], row["height"], row["stored_width"], row["stored_height"]) == (5_000, 3_600, 256, 184)
    for kind in ("jpeg", "png", "webp", "gif"):
        rows = [row for row in big.rows if row.kind == kind][:VARIETY]
        for row in rows:
            theirs = Image.open(io.BytesIO(body(kind, int(row.url.split("/")[-1].split("?")[0])))).convert("RGB")
            ours = picture_of(folder, big.pool[row.key])
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean() < 6


def test_a_pool_is_the_selection_with_answers(big):
    folder = big.stage.folder
    names = sorted(path.name for path in (folder / "selection").iterdir())
    assert sorted(path.name for path in (folder / "pool").glob("*.parquet")) == names
    for name in names:
        asked, told = (pq.read_table(folder / part / name) for part in ("selection", "pool"))
        for column in ("key", "order", "url", "caption", "score"):
            assert told[column].equals(asked[column])
        added = ["status", "error", "tar", "offset", "size", "stored_width", "stored_height"]
        assert told.column_names == [*asked.column_names, *added]
    by_key = {row.key: row for row in big.rows}
    for key, row in big.pool.items():
        empty = [row[name] is None for name in ("tar", "offset", "size", "width", "stored_width", "sha256")]
        if row["status"] == "failed":
            assert all(empty)
        else:
            assert not any(empty)
            assert row["sha256"] == by_key[key].sha256.lower()
    tars = {path.relative_to(folder / "pool").as_posix() for path in (folder / "pool" / "tars").iterdir()}
    assert tars == {row["tar"] for row in big.pool.values()} - {None}


def test_tars_are_webdataset_shards_with_captions(big):
    import webdataset

    urls = sorted(map(str, (big.stage.folder / "pool" / "tars").iterdir()))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == sum(row["status"] == "success" for row in big.pool.values())
    assert all(sample["txt"].decode().endswith("ü") and {"jpg", "json"} <= set(sample) for sample in samples)


def test_report_counts_every_cause(big):
    causes = Counter(row.error for row in big.rows if row.error)
    report = big.stage.report
    assert report["causes"] == dict(sorted(causes.items()))
    assert report["rows"] == len(big.rows) == report["success"] + causes.total()
    assert report["bytes"] == sum(row["size"] or 0 for row in big.pool.values())
    with (big.stage.folder / "errors.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["cause"]: int(row["rows"]) for row in table} == causes
    assert [int(row["rows"]) for row in table] == sorted(causes.values(), reverse=True)
    assert all(row["example"] for row in table if row["cause"] != "scheme refused")
    assert "fetching: 100%" in big.said
    assert "with a picture, most others:" in big.said


def good_rows(server, kind, numbers, sha256=None):
    return [Row(f"{kind}-{n}", server.url(kind, n), kind, sha256, None) for n in numbers]


def worker_of(folder):
    """A process that fetches."""
    return next(number for number, command in processes_of(folder).items() if "spawn_main" in command)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_for_nothing_twice(folder):
    changes = {"rows_per_shard": 30, "distributor": {"name": "multiprocessing", "processes": 1, "threads": 8}}
    stage = Stage(folder, changes)
    with serving() as server:
        server.delay = 0.2
        rows = good_rows(server, "photo", range(300))
        write_selection(rows, folder / "selection")
        done: set[str] = set()
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, None):
            before, asked = len(stage.recorded()), len(server.requests)
            process = stage.start()
            wait_for(lambda before=before: len(stage.recorded()) > before, process)
            # The last one loses a process that fetches; its shards are fetched by another.
            os.kill(worker_of(folder) if number is None else process.pid, number or signal.SIGKILL)
            _, said = process.communicate(timeout=300)
            assert process.returncode == {signal.SIGKILL: -9, None: 0}.get(number, 130), said
            assert not {server.url("photo", path.split("/")[-1]) for path in server.requests[asked:]} & done, number
            assert done < {row["url"] for row in stage.recorded()}
            done = {row["url"] for row in stage.recorded()}
            assert_none_left(folder)
    recorded = [row["key"] for row in stage.recorded()]
    assert sorted(recorded) == sorted(row.key for row in rows)
    assert all(row["status"] == "success" for row in stage.pool.values())
    for row in list(stage.pool.values())[::40]:
        assert picture_of(folder / "pool", row).size == (row["stored_width"], row["stored_height"])
    assert not list(folder.glob(".scratch/download/store-*/incoming/*"))


@pytest.mark.slow
def test_appended_rows_are_fetched_and_failed_ones_when_asked(folder):
    one = {"retries": 0, "min_success": 0.1, "distributor": {"name": "multiprocessing", "processes": 1, "threads": 8}}
    stage = Stage(folder, one)
    with serving() as server:
        rows = [row for kind in ("photo", "flaky", "missing") for row in good_rows(server, kind, range(10))]
        write_selection(rows, folder / "selection")
        code, said = stage.run()
        assert code == 0, said
        assert stage.report["causes"] == {"http 404": 10, "http 503": 10}

        more = rows + good_rows(server, "jpeg", range(5))
        write_selection(more, folder / "longer")
        server.requests.clear()
        stage.set(one | {"retry_failed": 1})
        code, said = stage.run("longer")
        assert code == 0, said
        asked = Counter(path.split("/")[1] for path in server.requests)
        assert asked == Counter({"flaky": 10, "missing": 10, "jpeg": 5})
        assert stage.report["causes"] == {"http 404": 10}
        assert {row["attempt"] for row in stage.recorded() if row["key"].startswith("missing")} == {1, 2}

        server.requests.clear()
        stage.set(one | {"retry_failed": 1, "min_success": 0.9})
        code, said = stage.run("longer")
        assert code == 1
        assert "25 of 35 rows have a picture (71.4%), download.min_success asks for 90.0%" in said
        assert "10 http 404" in said
        assert "set download.retry_failed to 2" in said
        assert not server.requests


@pytest.mark.slow
def test_spark_fetches_the_same(folder):
    (folder / "events").mkdir()
    conf = {"spark.driver.memory": "512m", "spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1"}
    conf |= {"spark.eventLog.enabled": "true", "spark.eventLog.dir": (folder / "events").as_uri()}
    conf |= {"spark.eventLog.compress": "false"}
    stage = Stage(folder, {"rows_per_shard": 20, "distributor": SPARK | {"conf": conf}, "min_success": 0.1})
    with serving() as server:
        server.away = ["http://127.0.0.2:80/"]
        rows = [row for kind in ("photo", "turned", "away", "bomb") for row in good_rows(server, kind, [0])]
        rows += good_rows(server, "jpeg", range(36))
        digest = hashlib.sha256(body("png", 1)).hexdigest()
        rows += good_rows(server, "png", [0], digest) + good_rows(server, "png", [1], digest)
        write_selection(rows, folder / "selection")
        code, said = stage.run()
        assert code == 0, said
    assert stage.report["causes"] == {"address refused": 1, "sha256 differs": 1, "too many pixels": 1}
    turned = stage.pool["turned-0"]
    assert (turned["width"], turned["height"]) == (48, 64)
    logs = [path.read_text() for path in (folder / "events").rglob("*") if path.is_file()]
    assert sum(log.count('"Event":"SparkListenerTaskEnd"') for log in logs) == 3  # one per shard
    assert_none_left(folder)
