"""The scratch folder: locked, published whole, pruned when recorded."""

import errno
import os
import subprocess
import sys

import pytest
from tiny import ROOT, write_params

from stages.runner import scratch as scratch_module
from stages.runner.scratch import LINKED_BYTES, Scratch, dvc_digest, prune


def finished(folder, destination):
    scratch = Scratch(folder)
    scratch.start()
    scratch.output("table", destination).write_text("1")
    scratch.finish({"table": destination})
    return scratch


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "junk"])
def test_what_was_changed_since_it_finished_runs_again(tmp_path, capsys, damage):
    destination = tmp_path / "work" / "folder"
    scratch = Scratch(tmp_path / "run")
    scratch.start()
    folder = scratch.output("folder", destination)
    folder.mkdir()
    (folder / "a").write_bytes(b"12345")
    scratch.finish({"folder": destination})
    assert Scratch(tmp_path / "run").finished
    if damage == "flip":
        (folder / "a").write_bytes(b"12347")
    elif damage == "cut":
        (folder / "a").write_bytes(b"123")
    elif damage == "remove":
        (folder / "a").unlink()
    elif damage == "add":
        (folder / "b").touch()
    else:
        (scratch.root / "finished.json").write_text("{")
    again = Scratch(tmp_path / "run")
    assert not again.finished
    assert "was changed since it finished; it runs again" in capsys.readouterr().err
    again.start()
    assert not (scratch.root / "finished.json").exists()


def test_a_publication_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    destination = tmp_path / "work" / "table"
    scratch = finished(tmp_path / "run", destination)
    destination.parent.mkdir()
    destination.write_text("before")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(scratch_module, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        scratch.publish({"table": destination})
    assert [path.name for path in destination.parent.iterdir()] == ["table"]
    assert destination.read_text() == "before"


def test_a_second_process_waits(tmp_path):
    scratch = Scratch(tmp_path / "run")
    code = "import sys; from pathlib import Path; from stages.runner.scratch import Scratch\n"
    code += "with Scratch(Path(sys.argv[1])).locked(): print('in')"
    with scratch.locked():
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(scratch.root)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr.readline() == f"waiting for process {os.getpid()}, which works on the same run\n"
        assert other.poll() is None
    assert other.communicate(timeout=600)[0] == "in\n"
    assert other.returncode == 0


def test_large_files_are_published_without_a_copy(tmp_path, monkeypatch):
    """One file under two names, read-only under both; where links are not to be had, a copy. Small files are copies."""
    destination = tmp_path / "work" / "shards"
    scratch = Scratch(tmp_path / "run")
    scratch.start()
    folder = scratch.output("shards", destination)
    folder.mkdir()
    with (folder / "large.tar").open("wb") as file:
        file.truncate(LINKED_BYTES)
    (folder / "small.json").write_text("{}")
    scratch.finish({"shards": destination})
    scratch.publish({"shards": destination})
    assert (destination / "large.tar").samefile(folder / "large.tar")
    assert (destination / "large.tar").stat().st_mode & 0o777 == 0o444
    assert not (destination / "small.json").samefile(folder / "small.json")

    def refuse(*names):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    scratch.publish({"shards": destination})
    assert not (destination / "large.tar").samefile(folder / "large.tar")
    assert (destination / "large.tar").stat().st_size == LINKED_BYTES


def test_publishing_replaces_what_is_there(tmp_path):
    destination = tmp_path / "metrics" / "table.json"
    scratch = finished(tmp_path / "run", destination)
    assert scratch.finished
    assert not scratch.folder.exists()
    for old in (None, "old"):
        if old:
            destination.write_text(old)
        scratch.publish({"table": destination})
        assert destination.read_text() == "1"
        assert [path.name for path in destination.parent.iterdir()] == ["table.json"]


def test_start_keeps_checkpoints_and_drops_half_outputs(tmp_path):
    scratch = Scratch(tmp_path / "run")
    scratch.start()
    (scratch.folder / "checkpoint").touch()
    (scratch.outputs / "half").touch()
    scratch.start()
    assert (scratch.folder / "checkpoint").exists()
    assert list(scratch.outputs.iterdir()) == []


@pytest.mark.parametrize("recorded", [True, False])
def test_recorded_runs_are_pruned(tmp_path, recorded):
    destination = tmp_path / "table.json"
    old, current = (finished(tmp_path / "stage" / name, destination) for name in ("old", "current"))
    Scratch(tmp_path / "stage" / "unfinished").start()
    md5 = dvc_digest(old.output("table", destination)) if recorded else "0"
    lock = tmp_path / "dvc.lock"
    write_params({"stages": {"s": {"outs": [{"path": str(destination), "md5": md5}]}}}, lock)
    prune(tmp_path / "stage", current.root, lock)
    kept = {path.name for path in (tmp_path / "stage").iterdir()}
    assert kept == {"current", "unfinished"} | (set() if recorded else {"old"})
