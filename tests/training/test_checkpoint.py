"""Checkpoints of one process: whole, few, checked, without pickles, and no more often than they may cost.

Those of several ranks, sharded or not: tests/test_distributed.py.
"""

import errno

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vtp.artefact import read_json
from vtp.distributed import Ranks, StateError
from vtp.training import checkpoint
from vtp.training.checkpoint import Checkpoints, pieces_of_rank


def test_damaged_checkpoint_is_passed_over(tmp_path):
    checkpoints, x = Checkpoints(tmp_path, kept=2), torch.zeros(3)
    for step in (1, 2, 3):
        x.fill_(step)
        checkpoints.save(step, {"x": x}, {"count": step})
        x.fill_(-1)  # what is written is what was there
    checkpoints.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    piece = next((tmp_path / "step-000000003").glob("rank-*.safetensors"))
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    found = Checkpoints(tmp_path, kept=2).newest({"x": x})
    assert found == (2, {"count": 2})
    assert x.tolist() == [2, 2, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_checkpoint_is_none(tmp_path):
    checkpoints, x = Checkpoints(tmp_path, kept=2), torch.ones(3)
    checkpoints.save(1, {"x": x}, {})
    checkpoints.wait()
    (tmp_path / "step-000000001" / "digests.json").unlink()
    (tmp_path / "step-000000002.tmp").mkdir()
    assert Checkpoints(tmp_path, kept=2).newest({"x": x}) is None
    assert list(tmp_path.iterdir()) == []


def test_kept_is_a_number(tmp_path):
    checkpoints = Checkpoints(tmp_path, kept=1)
    for step in range(4):
        checkpoints.save(step, {"x": torch.ones(1)}, {})
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


def test_the_state_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, kept=1)
    checkpoints.save(1, {"x": torch.ones(2)}, {})
    checkpoints.wait()
    with pytest.raises(StateError, match="delete"):
        Checkpoints(tmp_path, kept=1).newest({"y": torch.ones(2)})


def test_files_are_read_without_unpickling(tmp_path):
    tensors = {"a": torch.arange(6.0).view(3, 2), "step": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    checkpoints = Checkpoints(tmp_path, kept=1)
    checkpoints.save(1, tensors, {})
    checkpoints.wait()
    folder = tmp_path / "step-000000001"
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["counters.json", "digests.json", "rank-00000.safetensors"]
    assert set(read_json(folder / "digests.json")) == set(names) - {"digests.json"}
    with safe_open(folder / names[2], framework="pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118 - no mapping
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_a_full_disk_is_an_error_of_its_kind_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoints, x = Checkpoints(tmp_path, kept=1), torch.ones(3)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        checkpoints.save(1, {"x": x}, {})
        with pytest.raises(OSError, match="No space left") as error:
            checkpoints.wait()
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    fresh = Checkpoints(tmp_path, kept=1)
    fresh.save(2, {"x": x}, {})
    fresh.wait()
    assert fresh.newest({"x": x}).step == 2


def test_other_shapes_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, kept=1)
    checkpoints.save(1, {"x": torch.ones(2)}, {})
    checkpoints.wait()
    with pytest.raises(StateError, match=r"x has shape \[2\], and here \[3\].*delete"):
        checkpoints.newest({"x": torch.ones(3)})


def test_what_every_rank_has_is_shared_out_over_a_machine(monkeypatch):
    """Of 3 machines with 4 ranks each: every tensor once, by the first machine, as evenly as the largest allows."""
    tensors = {f"{number}": torch.empty(7 * number % 50 + 1, 4) for number in range(100)}
    monkeypatch.setattr(checkpoint, "ranks_of_machine", lambda: 4)
    written = []
    for rank in range(12):
        monkeypatch.setattr(checkpoint, "ranks", lambda rank=rank: Ranks(rank, 12))
        written.append(pieces_of_rank(tensors))
    assert sorted(name for pieces in written for name in pieces) == sorted(tensors)
    assert not any(written[4:])
    sizes = [sum(piece.rows.nbytes for piece in pieces.values()) for pieces in written[:4]]
    assert max(sizes) - min(sizes) <= 2 * 16  # two of the smallest


def test_writing_takes_at_most_its_share_of_the_time(tmp_path, monkeypatch):
    """A write of 3 s, of which 2 % may be: the next one is due 150 s after it began."""
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, kept=1)

    def slow(*arguments):
        nonlocal now
        save_file(*arguments)
        now += 3.0

    monkeypatch.setattr(checkpoint, "save_file", slow)

    def due(at, seconds=60.0):
        nonlocal now
        now = at
        return checkpoints.due(seconds=seconds, share=0.02)

    assert [due(at) for at in (59.0, 60.0)] == [False, True]
    now = 100.0
    checkpoints.save(1, {"x": torch.ones(2)}, {})
    checkpoints.wait()
    assert [due(at) for at in (249.0, 250.0)] == [False, True]
    assert [due(at, seconds=200.0) for at in (299.0, 300.0)] == [False, True]
