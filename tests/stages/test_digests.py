"""Digests of inputs: those of large files are remembered, and forgotten when the file is another."""

import os
from pathlib import Path

from stages import _digests
from stages._digests import Digests
from vtp.artefact import digest


def test_large_files_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_digests, "LARGE", 100)
    store, folder, read = tmp_path / ".scratch" / "digests.json", tmp_path / "shards", []
    folder.mkdir()
    large, small = folder / "a large.tar", folder / "small.json"
    large.write_bytes(b"x" * 100)
    small.write_bytes(b"y" * 99)

    def reading(path: Path, **how):
        read.extend([path.name] if path.is_file() and not how else [])
        return digest(path, **how)

    monkeypatch.setattr(_digests, "digest", reading)
    for expected in (["a large.tar", "small.json"], ["small.json"]):
        read.clear()
        assert Digests(store).of(folder) == digest(folder)
        assert sorted(read) == expected
    assert Digests(store).of(large) == digest(large)
    large.write_bytes(b"z" * 100)
    os.utime(large, ns=(0, 1))
    assert Digests(store).of(folder) == digest(folder)
    large.rename(folder / "other.tar")
    assert Digests(store).of(folder) == digest(folder)
    assert len(Digests(store)._known) == 1
