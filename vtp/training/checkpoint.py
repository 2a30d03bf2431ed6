"""Checkpoints in a stage's scratch folder: whole, the newest few kept, damage detected, for any number of ranks.

    step-000000120/             state of 120 completed steps
        rank-00003.safetensors  what a rank wrote: of each tensor all rows, or those of its shard
        counters.json           numbers
        digests.json            SHA-256 of every other file, written last

Each number is written once. What every rank has is shared out over the ranks of the first machine; shards are written by
those who hold them. A rank copies its part, without waiting for a GPU, into memory that is kept for the run, and writes it
in the background, under a temporary name that the first rank replaces when all parts are there. (Why not
torch.distributed.checkpoint: every rank copies everything, the plans of all are made and unpickled on one, and what it
writes, or its index, are pickles.)
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtp.artefact import ArtefactError, digest, read_json, write_json
from vtp.distributed import (
    StateError,
    StateMismatchError,
    StatePiece,
    barrier,
    gather_objects,
    is_sharded,
    piece_of,
    ranks,
    ranks_of_machine,
)

PIECES = (
    "pieces"  # key of a file's metadata: by name the shape of the whole tensor, and the number of the first row here
)


class Checkpoint(NamedTuple):
    """What was read: the tensors are in place already."""

    step: int
    counters: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together, but for `due`."""

    def __init__(self, folder: Path, *, kept: int) -> None:
        self.folder = folder
        self.kept = kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._begun = time.monotonic()
        self._cost = 0.0  # seconds from the beginning of the last one to its end
        if ranks().first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover)
        barrier()

    def due(self, *, seconds: float, share: float) -> bool:
        """Whether the last one is at least `seconds` ago, and so long that writing took at most `share` of the time.

        As if training stood still meanwhile, which it does not. Of a rank that writes: others know no cost.
        """
        busy = self._writing is not None and not self._writing.done()
        return not busy and time.monotonic() - self._begun >= max(seconds, self._cost / share)

    def save(self, step: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Begin to write the state after `step` steps; tensors may change as soon as this returns."""
        self.wait()
        self._begun = time.monotonic()
        pieces = pieces_of_rank(tensors)
        copied = self._stage(pieces)
        temporary = self.folder / f"{_name(step)}.tmp"
        self._writing = self._thread.submit(self._write, temporary, pieces, copied, counters)

    def wait(self) -> None:
        """Until the last one is written. Raises what its writing raised on any rank, such as OSError of a full disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def newest(self, tensors: Mapping[str, Tensor]) -> Checkpoint | None:
        """Read the newest undamaged checkpoint into `tensors`, in place; damaged ones are deleted on the way."""
        # The first rank says which there are, so that all read the same.
        for path in reversed(gather_objects(self._paths() if ranks().first else [])[0]):
            if not all(gather_objects(_undamaged(path))):
                if ranks().first:
                    logging.warning("%s is damaged; the checkpoint before it is used", path)
                    shutil.rmtree(path)
                continue
            try:
                load_pieces(path, tensors)
            except StateMismatchError as error:
                raise StateMismatchError(
                    f"{error}; the checkpoint is that of other code or another device: delete {path.parent}"
                ) from None
            except StateError as error:
                raise StateError(f"{error}; the checkpoint is undamaged and kept: start again") from None
            return Checkpoint(int(path.name[5:]), read_json(path / "counters.json"))
        return None

    def _stage(self, pieces: "Mapping[str, WrittenPiece]") -> torch.cuda.Event | None:
        """Copy to the host, and say when a GPU has: it does so in the order of its work, before a step changes anything."""
        on_gpu = any(piece.rows.is_cuda for piece in pieces.values())
        for name, piece in pieces.items():
            if name not in self._staged:
                self._staged[name] = torch.empty(piece.rows.shape, dtype=piece.rows.dtype, pin_memory=on_gpu)
            self._staged[name].copy_(piece.rows, non_blocking=True)
        if not on_gpu:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _write(
        self,
        temporary: Path,
        pieces: "Mapping[str, WrittenPiece]",
        copied: torch.cuda.Event | None,
        counters: Mapping[str, Any],
    ) -> None:
        """In the background: every rank its part; the first gives the folder its name when all are written."""

        def begin() -> dict[str, str]:
            if ranks().first:
                temporary.mkdir()
                write_json(temporary / "counters.json", counters)
            return {}

        def write() -> dict[str, str]:
            if copied is not None:
                copied.synchronize()
            return self._write_pieces(temporary / f"rank-{ranks().rank:05d}.safetensors", pieces)

        try:
            _on_all_ranks(begin)
            digests = _on_all_ranks(write)
        except BaseException:
            if ranks().first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if ranks().first:
            digests["counters.json"] = digest(temporary / "counters.json")
            write_json(temporary / "digests.json", digests)
            temporary.rename(temporary.with_suffix(""))
            for path in self._paths()[: -self.kept]:
                shutil.rmtree(path)
        self._cost = time.monotonic() - self._begun

    def _write_pieces(self, path: Path, pieces: "Mapping[str, WrittenPiece]") -> dict[str, str]:
        """What was copied of this rank; the file's digest by its name."""
        if not pieces:
            return {}
        places = {name: (piece.shape, piece.first) for name, piece in pieces.items()}
        save_file({name: self._staged[name] for name in pieces}, path, {PIECES: json.dumps(places)})
        return {path.name: digest(path)}

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".tmp")


class WrittenPiece(NamedTuple):
    """What a rank writes of a tensor."""

    rows: Tensor  # a tensor without dimensions is one
    first: int  # number of the first row
    shape: list[int]  # of the whole tensor


def pieces_of_rank(tensors: Mapping[str, Tensor]) -> dict[str, WrittenPiece]:
    """What this rank writes, by name: shards that it is the first to hold, and its share of what every rank has.

    That is shared out by size over the ranks of the first machine, which all copy and write at once.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    loads, own = [0] * ranks_of_machine(), {}
    for name in sorted(tensors, key=lambda name: (-sizes[name], name)):
        tensor, piece = tensors[name].detach(), piece_of(tensors[name].detach())
        mine = piece.foremost and piece.rows.numel() > 0
        if not is_sharded(tensor):
            owner = loads.index(min(loads))
            loads[owner] += sizes[name]
            mine = owner == ranks().rank
        if mine:
            own[name] = WrittenPiece(piece.rows, piece.first, list(tensor.shape))
    return own


def load_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place, whatever number of ranks wrote the folder, and whether they held shards.

    Raises StateMismatchError for tensors of other names or shapes, StateError when a file cannot be read.
    """
    try:
        places = {path: _places(path) for path in sorted(folder.glob("rank-*.safetensors"))}
        shapes = {name: shape for of_file in places.values() for name, (shape, _) in of_file.items()}
        _require_equal(folder, shapes, {name: list(tensor.shape) for name, tensor in tensors.items()})
        own = {name: piece_of(tensor.detach()) for name, tensor in tensors.items()}
        for path, of_file in places.items():
            with safe_open(path, framework="pt") as file:
                for name, (_, first) in of_file.items():
                    if name in own:
                        _copy_rows(file, name, first, own[name])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{folder}: {type(error).__name__}: {error}") from None


def _places(path: Path) -> dict[str, tuple[list[int], int]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[PIECES])


def _require_equal(folder: Path, found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise StateMismatchError(f"{folder}: holds no {name}")
        if found[name] != shape:
            raise StateMismatchError(f"{folder}: {name} has shape {found[name]}, and here {shape}")


def _copy_rows(file: Any, name: str, first: int, own: StatePiece) -> None:  # noqa: ANN401 - the library does not say of what kind
    """Those rows of a piece in a file, which begins with row `first`, that this rank holds."""
    if not own.rows.ndim:
        own.rows.copy_(file.get_tensor(name))
        return
    rows = file.get_slice(name)
    low, high = max(first, own.first), min(first + rows.get_shape()[0], own.first + len(own.rows))
    if low < high:
        own.rows[low - own.first : high - own.first].copy_(rows[low - first : high - first])


def _on_all_ranks(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `work` gives on all ranks, together. Raises on all of them what it raised on the first that failed."""
    problem, found = None, {}
    try:
        found = work()
    except OSError as error:
        problem = error
    except Exception as error:
        problem = StateError(f"{type(error).__name__}: {error}")
    gathered = gather_objects((problem, found), background=True)
    for other, _ in gathered:
        if other is not None:
            raise other
    return {name: value for _, of_rank in gathered for name, value in of_rank.items()}


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _undamaged(path: Path) -> bool:
    """Whether the files are those that were written, as far as this rank's share of them tells."""
    try:
        digests = read_json(path / "digests.json")
        shares = sorted(digests.items())[ranks().rank :: ranks().size]
        return all(digest(path / name) == expected for name, expected in shares)
    except ArtefactError:
        return False
