"""What a run is known by: code digests, and digests of inputs, which are remembered where they are large."""

import hashlib
import json
import os

import pytest
from data.small_shards import write_shards

from stages.runner.fingerprint import (
    LEFT_OUT,
    closure,
    code_digest,
    input_digest,
    meaning,
    recall_digests,
    store_digests,
)
from vtp import artefact
from vtp.artefact import digest

CODE = '''
"""Docstring."""
import math

class Options(Config):
    """Docstring."""
    width: int = Field(ge=1, description="how wide")

def area(x: float, y: float = 2.0) -> float:
    """Docstring."""
    # comment
    z: float = x * y
    return math.pi * z
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# comment", "# another comment"),
        ('    """Docstring."""\n    # comment', "    # comment"),
        ("x: float, y: float = 2.0) -> float", "x, y=2.0)"),
        ("z: float = x * y", "z = (x  *  y)"),
        ("how wide", "the width"),
    ],
)
def test_what_means_nothing(old, new):
    assert old in CODE
    assert meaning(CODE.replace(old, new)) == meaning(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [("y: float = 2.0", "y: float = 3.0"), ("x * y", "x + y"), ("width: int", "width: float"), ("ge=1", "ge=2")],
)
def test_what_means_something(old, new):
    assert old in CODE
    assert meaning(CODE.replace(old, new)) != meaning(CODE)


def test_closures_are_narrow():
    pretrain, cache = closure("stages.pretrain"), closure("stages.cache_latents")
    assert {"vtp.objectives.pretrain", "vtp.losses.dino", "vtp.models.tokenizer", "vtp.config"} <= set(pretrain)
    assert "vtp.models.tokenizer" in cache
    assert not {name for name in cache if name.startswith(("vtp.losses", "vtp.objectives", "vtp.training"))}
    assert "vtp.models.lightningdit" not in pretrain
    tune = closure("stages.tune_decoder")
    assert not {"vtp.objectives.pretrain", "vtp.objectives.self_distillation", "stages.figures.drawing"} & tune.keys()
    assert len(closure("stages.summary")) < 30


def test_function_level_imports_count():
    """The random VGG is imported at the top of a loss, lpips inside a function; ours are found in both places."""
    assert "vtp.layers.random_vgg" in closure("stages.pretrain")


def test_digest_is_stable_and_differs_between_stages():
    assert code_digest("stages.generate") == code_digest("stages.generate") != code_digest("stages.pretrain")


def test_left_out_modules_exist():
    from importlib.util import find_spec

    assert all(find_spec(name) for name in LEFT_OUT)


def test_large_files_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(artefact, "LARGE", 100)
    store, folder, read = tmp_path / ".scratch" / "digests.json", tmp_path / "shards", []
    folder.mkdir()
    large, small = folder / "a large.tar", folder / "small.json"
    large.write_bytes(b"x" * 100)
    small.write_bytes(b"y" * 99)
    plain = artefact._digest_bytes
    monkeypatch.setattr(artefact, "_digest_bytes", lambda path: read.append(path.name) or plain(path))

    def in_a_new_process() -> str:
        artefact.remembered.clear()
        recall_digests(store)
        sha256 = digest(folder)
        store_digests(store)
        return sha256

    first = in_a_new_process()
    assert sorted(read) == ["a large.tar", "small.json"]
    read.clear()
    assert in_a_new_process() == first
    assert read == ["small.json"]
    large.write_bytes(b"z" * 100)
    os.utime(large, ns=(0, 1))
    assert in_a_new_process() != first
    large.rename(folder / "other.tar")
    assert digest(large.with_name("other.tar")) == hashlib.sha256(b"z" * 100).hexdigest()
    in_a_new_process()
    assert len(json.loads(store.read_text())) == 1  # those of files that are gone are forgotten


@pytest.mark.parametrize("junk", [b"", b"[1]", b"{", b"\xff\xfe{", b'{"/a 1 2 3": 4}'])
def test_a_damaged_store_of_digests_knows_none(tmp_path, junk):
    (tmp_path / "digests.json").write_bytes(junk)
    artefact.remembered.clear()
    recall_digests(tmp_path / "digests.json")
    assert not artefact.remembered


def test_tars_of_shards_are_not_read_for_a_digest(tmp_path, monkeypatch):
    """It is that of the whole folder; what is no tar of the manifest is read, and a damaged table is another input."""
    folder, read = write_shards(tmp_path / "shards", [3, 4]), []
    (folder / "more.tar").write_bytes(b"none of the manifest's")
    whole, plain = digest(folder), artefact._digest_bytes
    monkeypatch.setattr(artefact, "_digest_bytes", lambda path: read.append(path.name) or plain(path))
    assert input_digest(folder) == whole
    assert sorted(read) == ["manifest.json", "more.tar", "train-00000.parquet", "train-00001.parquet"]
    (folder / "train-00000.parquet").write_bytes(b"PAR1")
    assert input_digest(folder) != whole
    (folder / "manifest.json").write_text('{"format_version": 3}')
    assert input_digest(folder) == digest(folder)  # no manifest of shards: every file counts
