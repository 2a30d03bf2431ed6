"""Whole files, stable bytes, digests."""

import os
from pathlib import Path

import pytest
import torch

from stages.runner.scratch import dvc_digest
from vtp.artefact import (
    ArtefactError,
    digest,
    load_tensors,
    read_json,
    save_tensors,
    verify_files,
    whole_file,
    whole_folder,
    write_json,
)
from vtp.config import ConfigError, read_yaml


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "a.txt"
    with pytest.raises(RuntimeError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"


def test_folders_replace_their_predecessor_when_whole(tmp_path):
    target = tmp_path / "folder"
    with whole_folder(target) as temporary:
        (temporary / "old").touch()
    with pytest.raises(RuntimeError), whole_folder(target) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    with whole_folder(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_tensors_have_stable_bytes(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2).T}
    save_tensors(tmp_path / "x", tensors, {"format": "pt"})
    save_tensors(tmp_path / "y", dict(reversed(tensors.items())), {"format": "pt"})
    assert digest(tmp_path / "x") == digest(tmp_path / "y")
    assert torch.equal(load_tensors(tmp_path / "x")["b"], tensors["b"])
    with pytest.raises(ValueError, match="one key"):
        save_tensors(tmp_path / "z", tensors, {"a": "1", "b": "2"})


def test_json_refuses_what_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ArtefactError, match="not valid JSON"):
        read_json(tmp_path / "b.json")


def test_json_holds_names_that_are_no_text(tmp_path):
    values = {"caf\udce9": ["\ud800", "\x1b\n\u2028", "größe"]}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_name_with_an_end_of_a_line_is_no_other_file(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "y").write_text("2")
    (tmp_path / "b" / f"x\n{digest(tmp_path / 'a' / 'y')} y").write_text("1")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_digest_of_a_folder_sees_names_and_contents(tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("y" if name == "b" else "x")).write_text(content)
    assert len({digest(tmp_path / name) for name in "abc"}) == 3
    with pytest.raises(ArtefactError, match="no such file or folder; .* holds a, b, c"):
        digest(tmp_path / "d")


def test_all_files_that_were_changed_are_named(tmp_path):
    digests = {}
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_text(name)
        digests[name] = digest(tmp_path / name)
    verify_files(tmp_path, digests, remedy="make them again")
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").unlink()
    (tmp_path / "d").unlink()
    os.mkfifo(tmp_path / "d")
    with pytest.raises(
        ArtefactError, match=r"b has sha256 \w+\.\.\., not \w+\.\.\.; c is missing; d is no file; make them"
    ):
        verify_files(tmp_path, digests, remedy="make them again")


def unreadable(folder):
    """What may lie where a file belongs."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    (folder / "utf16").write_text("{}", encoding="utf-16")
    (folder / "deep").write_text("[" * 1500 + "]" * 1500)
    (folder / "cut").write_text('{"a": [1,')
    (folder / "zeros").write_bytes(bytes(100))
    return sorted([*folder.iterdir(), folder / "missing", folder / "zeros" / "below", Path("a\0b"), Path("x" * 300)])


@pytest.mark.parametrize("read", [read_json, load_tensors, read_yaml])
def test_what_is_no_file_is_an_error_at_once(tmp_path, read):
    """Never a wait for a pipe, or memory full of a device; what the system itself says is an OSError."""
    for path in unreadable(tmp_path):
        with pytest.raises((ArtefactError, ConfigError, OSError)) as raised:
            read(path)
        assert isinstance(raised.value, OSError) or str(raised.value).startswith(f"{path}: ")
        if path.name in ("pipe", "device"):
            assert "a pipe, a socket or a device" in str(raised.value)


@pytest.mark.parametrize("read", [digest, read_json, load_tensors, dvc_digest])
def test_nobody_waits_for_a_pipe(tmp_path, read):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ArtefactError, match="config.json: a pipe, a socket or a device, not a file; remove it"):
        read(tmp_path / "config.json")


def test_a_folder_that_stands_where_tensors_should_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ArtefactError, match=r"model\.safetensors: cannot be read \(.*\); make or fetch it again"):
        load_tensors(tmp_path / "model.safetensors")
