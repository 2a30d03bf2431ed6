"""Jobs as tasks of a real Spark: results, errors of ours in their own words, a process that ends."""

import os
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import ROOT

from vtp.artefact import ArtefactError, read_json
from vtp.config import ConfigError
from vtp.curation.filter.cluster import workers_for
from vtp.processes import WorkerDied


@pytest.fixture
def spark(monkeypatch, tmp_path):
    """On this machine; its processes find the package, and begin in another folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(spark="local[2]")


@pytest.mark.slow
def test_jobs_run_as_tasks(spark, tmp_path):
    (tmp_path / "here.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("{")
    with workers_for(spark) as workers:
        assert sorted(chain.from_iterable(workers.results(abs, range(-9, 0)))) == [(n, -n) for n in range(-9, 0)]
        assert list(chain.from_iterable(workers.results(read_json, [Path("here.json")]))) == [
            (Path("here.json"), {"a": 1})
        ]
        ((_, process),) = chain.from_iterable(workers.results(eval, ["__import__('os').getpid()"]))
        assert process != os.getpid()
        with pytest.raises(ArtefactError, match=r"^bad\.json: not valid JSON"):
            list(workers.results(read_json, [Path("here.json"), Path("bad.json")]))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            list(workers.results(os.listdir, ["nowhere"]))
        with pytest.raises(WorkerDied, match="Spark gave up a task.* finished work is kept, start again"):
            list(workers.results(os._exit, [1]))


def test_what_spark_lacks_is_said_before_the_work(spark, monkeypatch):
    with pytest.raises(ConfigError, match=r"\$VTP_SPARK: no session of Spark at 'nowhere' \(it needs Java 17\): \S"):
        workers_for(SimpleNamespace(spark="nowhere"))
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(ConfigError, match=r"\$VTP_SPARK: pyspark is not installed here: pip install -e '\.\[spark\]'"):
        workers_for(spark)
