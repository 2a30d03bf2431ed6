"""Processes that fetch: those of this machine and Spark's, what they print, and how they end. Real ones of both."""

import os
import signal
import time
from functools import partial
from itertools import chain

import pytest

from vtp.config import ConfigError
from vtp.curation.download import session
from vtp.curation.download.session import LocalPool, spark_pool
from vtp.processes import WorkerDied

CONF = {"spark.driver.memory": "512m", "spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1"}


@pytest.fixture(autouse=True)
def own_java(monkeypatch):
    """A Java process outlives its session, and prints where it was told to print by another test of this process."""
    from pyspark import SparkContext

    for name in ("_gateway", "_jvm"):
        monkeypatch.setattr(SparkContext, name, None)


def process(job):
    os.write(1, f"said {job}\n".encode())
    return os.getpid()


def all_of(pool, function, jobs):
    return dict(chain.from_iterable(pool.results(function, jobs)))


def test_processes_of_this_machine_are_replaced_and_print_to_a_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(session, "SHARDS_OF_A_PROCESS", 2)
    with LocalPool(1, tmp_path / "log") as pool:
        told = all_of(pool, process, range(5))
    assert [told[n] == told[0] for n in range(5)] == [True, True, False, False, False]
    assert told[2] == told[3] != told[4]
    assert (tmp_path / "log").read_text().splitlines() == [f"said {n}" for n in range(5)]
    assert "said" not in capfd.readouterr().out


def test_nobody_waits_for_processes_when_there_is_an_error(tmp_path):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), LocalPool(2, tmp_path / "log") as pool:
        for _ in pool.results(time.sleep, [600, 600]):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 300


def test_a_killed_process_is_told_with_what_to_do(tmp_path):
    with (
        pytest.raises(WorkerDied, match=r"set download\.distributor\.processes lower"),
        LocalPool(1, tmp_path / "log") as pool,
    ):
        all_of(pool, os._exit, [1])


def test_spark_that_does_not_start_is_told(tmp_path):
    """Its own words are in the log, whose end the stage shows."""
    with pytest.raises(ConfigError, match="no session of Spark at 'no-such-master'"):
        spark_pool("no-such-master", CONF, tmp_path / "log")
    assert "Master must" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_spark_is_a_pool_like_the_other(tmp_path, capfd):
    """Each job is one task; an error of the disk is that error, one of a process is that of the pool."""
    before = signal.getsignal(signal.SIGINT)
    with spark_pool("local[2]", CONF, tmp_path / "log") as pool:
        assert signal.getsignal(signal.SIGINT) is before
        assert pool.room() == 4
        assert all_of(pool, partial(max, 3), range(6)) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 4, 5: 5}
        with pytest.raises(FileNotFoundError, match="/no/such/folder/here"):
            all_of(pool, os.mkdir, ["/no/such/folder/here"])
        with pytest.raises(WorkerDied, match="Spark gave up a task.* start again"):
            all_of(pool, os._exit, [1])
        assert all_of(pool, abs, [-1]) == {-1: 1}
    assert "crashed" in (tmp_path / "log").read_text()
    assert capfd.readouterr() == ("", "")
