"""The benchmark of `filter` compares what it says that it compares."""

import re
import subprocess
import sys

import pytest
from tiny import ROOT

from benchmarks.filter import main


@pytest.mark.slow
def test_all_engines_leave_the_same_rows():
    command = [sys.executable, "-m", "benchmarks.filter", "--rows", "4000"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for engine in ("ours", "duckdb", "polars"):
        assert re.search(rf"^{engine}( +[\d.,]+){{5}}   200 equal$", said, re.MULTILINE), said


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    monkeypatch.setattr(sys, "argv", ["filter", "--rows", "10"])
    with pytest.raises(
        SystemExit, match=r"polars is not installed here: pip install -c constraints.txt -e '.\[benchmarks"
    ):
        main()
