"""What a stage says of foreign texts: on the terminal, in its log, from ranks."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from stages.runner.environment import explain, log_to, tell
from stages.runner.launch import _report

FOREIGN = "\x1b[31m\nerror: forged\r\x85\u202e\udce9"


def is_plain(text):
    return all(letter == "\n" or letter.isprintable() for letter in text) and "\nerror: forged" not in text


def test_messages_and_records_are_plain(tmp_path, capsys):
    tell(f"error: {FOREIGN}")
    assert is_plain(capsys.readouterr().err)
    log_to(tmp_path / "run.log")
    try:
        logging.warning("%s; another sample takes its place", FOREIGN)
        try:
            raise KeyError(FOREIGN)
        except KeyError:
            logging.exception("the stage failed")
    finally:
        logging.getLogger().handlers[0].close()
        logging.basicConfig(force=True)
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert is_plain(text)
    assert "Traceback" in text
    assert "\n" not in explain(OSError(2, "No such file", f"a{FOREIGN}"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_log_on_a_full_disk_is_a_line(tmp_path, capsys):
    (tmp_path / "run.log").symlink_to("/dev/full")
    log_to(tmp_path / "run.log")
    try:
        logging.warning("one")
        logging.warning("two")
    finally:
        logging.getLogger().handlers.clear()
        logging.basicConfig(force=True)
    assert capsys.readouterr().err == f"the log {tmp_path}/run.log cannot be written: No space left on device\n"


def test_what_is_full_is_named():
    error = OSError(errno.ENOSPC, "No space left on device")  # of a write, which knows no name
    assert explain(error, Path(".scratch/pretrain/1")).startswith(
        "a file in .scratch/pretrain/1: no space is left there"
    )
    assert explain(OSError(errno.ENOSPC, "", "a.tar")).startswith("a.tar: no space")


def test_ranks_are_quoted_plainly(tmp_path, capsys):
    values = {"rank": 0, "message": f"a{FOREIGN}", "consequence": False}
    (tmp_path / "rank-00000.json").write_text(json.dumps(values))
    tell(f"error: {_report(tmp_path, 1, restarts=0)}")
    assert is_plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"\\e[31m\\nerror: forged": 1', r"no stage reads section '\x1b[31m"),
        ('prepare_data: {"a\\e[2K\\nerror: forged": 1}', r"params.yaml:prepare_data.a\x1b[2K\nerror: forged"),
        ('a: "x\\0"', "holds NUL or a lone surrogate"),
        ('"x\\ud800": 1', "holds NUL or a lone surrogate"),
    ],
)
def test_parameters_are_quoted_plainly(tmp_path, text, said):
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "dvc.yaml").write_text(
        "stages: {prepare: {cmd: python -m stages.prepare_data params.yaml:prepare_data --shards x}}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert is_plain(done.stderr)


def test_a_stage_is_told_of_names_that_are_no_text(tmp_path):
    """The real command: foreign names in its source, and one of its own on the command line."""
    source = tmp_path / os.fsdecode(b"caf\xe9\n")
    source.mkdir()
    (source / os.fsdecode(b"\xff\x1b[2K.png")).write_bytes(b"no picture")
    (tmp_path / ".dvc").mkdir()
    values = {"samples_per_shard": 4, "image": {"name": "keep"}, "max_unreadable": 0.0, "location": None}
    held_out = {"name": "held_out", "share": 0.5}
    values["source"] = {"name": "folder", "train": ".", "validation": held_out, "caption": None, "templates": []}
    (tmp_path / "params.yaml").write_text(json.dumps({"prepare_data": values}))
    command = [sys.executable, "-m", "stages.prepare_data", "params.yaml:prepare_data", "--source", source.name]
    command += ["--shards", "shards", "--provenance", "p.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VTP_PROCESSES": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert r"1 of 1 pictures are unreadable" in done.stderr
    assert r"\xff\x1b[2K.png: not an image" in done.stderr
    assert not set(done.stderr) & set("\x1b\udcff")
    log = next(tmp_path.glob(".scratch/prepare_data/*/run.log")).read_text(encoding="utf-8")
    assert r"caf\xe9" in log
