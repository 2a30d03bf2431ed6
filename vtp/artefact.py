"""Files that describe themselves: whole or absent, equal bytes for equal content, digests.

A stage's result is a folder of `*.safetensors` and JSON files. Each is written under a temporary name and renamed when
it is complete, so that a reader never sees half of one. Nothing here pickles.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from vtp.texts import listed, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    M = TypeVar("M", bound=nn.Module)

# torch is imported where it is used: processes that handle rows and images alone do without its 0.3 GB.
CHUNK = 1 << 20
WAYS = 100  # on which links may lead to a folder
LARGE = 16_000_000  # bytes; the digests of smaller files are taken every time
PARTS_LEFT_OUT = 4  # a model may be built with so many times the parameters that it keeps

remembered: dict[str, str] = {}  # digests of large files of this process by `_identity`


class StateError(RuntimeError):
    """A saved state cannot be read, now or ever."""


class ArtefactError(ValueError):
    """A file or folder is missing, damaged or of another kind; the message names it and the remedy."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        remove(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold a file, or all of a folder, so that a name which appears after this never lacks its bytes."""
    for each in [*files(path), *(Path(parent) for parent, _, _ in os.walk(path))] if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; nothing when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline; refuses NaN and infinities, which are not JSON.

    Half of a character, as in names of files that are not UTF-8, becomes an escape of JSON, and is read again as it was.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtefactError when it is missing or damaged."""
    require_no_pipe(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError(f"{path}: no such file; {siblings(path)}") from None
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise ArtefactError(f"{path}: not valid JSON ({error}); write it again") from None
    if not isinstance(values, dict):
        raise ArtefactError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file. At most one metadata key: the library writes several in an order that varies."""
    from safetensors.torch import save

    if metadata is not None and len(metadata) > 1:
        raise ValueError("safetensors metadata is byte-stable with one key only; put one JSON string under it")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(plain, None if metadata is None else dict(metadata)))


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """All tensors of a safetensors file, on the CPU. Raises ArtefactError when it is missing or damaged."""
    from safetensors.torch import load_file

    with reading_tensors(path):
        return load_file(path)


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """What safetensors raises for a file, which names none, becomes an ArtefactError that does."""
    from safetensors import SafetensorError

    require_no_pipe(path)
    try:
        yield
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; {siblings(path)}") from None
    except OSError as error:  # a folder, a file of another user
        raise ArtefactError(f"{path}: cannot be read ({error}); make or fetch it again") from None
    except SafetensorError as error:
        raise ArtefactError(f"{path}: not a complete safetensors file ({error}); make or fetch it again") from None


def load_module(
    build: "Callable[[], M]", tensors: "Mapping[str, Tensor]", *, where: Path, name: Callable[[str], str] = str
) -> "M":
    """The module that `build` makes, with these weights, in its own precision; buffers outside its state have no contents.

    What a file says that a model is like is held against its weights before memory is spent on it: `build` has the meta
    device alone, and ends when it has made many more parameters than there are tensors. `name` says what a key is called
    in the file `where`.

    Raises ArtefactError for a module that cannot be built, or that these are not the weights of.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made, most, here = count(1), PARTS_LEFT_OUT * max(len(tensors), 100), get_ident()
    config = where.parent / "config.json"

    def weigh(*_: object) -> None:
        if get_ident() == here and next(made) > most:
            raise ArtefactError(
                f"asks for more than {most} tensors, {where.name} holds {len(tensors)}; fetch both files again"
            )

    handle = register_module_parameter_registration_hook(weigh)
    try:
        with torch.device("meta"):
            module = build()
    except ArtefactError as error:
        raise ArtefactError(f"{config}: {error}") from None
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ArtefactError(f"{config}: describes no model that can be built ({reason}); fetch it again") from None
    finally:
        handle.remove()
    assign_weights(module, tensors, where=where, name=name)
    return module


def assign_weights(
    module: "nn.Module", tensors: "Mapping[str, Tensor]", *, where: Path, name: Callable[[str], str] = str
) -> None:
    """Give a module its weights, in its own precision; it may be on the meta device.

    `name` says what a key is called in the file.

    Raises ArtefactError that lists what is missing, unknown, of another shape, or no number.
    """
    state = module.state_dict()
    expected = {key: list(value.shape) for key, value in state.items()}
    problems = [f"missing {name(key)}" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown {name(key)}" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name(key)} has shape {list(tensors[key].shape)}, config.json asks for {expected[key]}"
        for key in sorted(expected.keys() & tensors.keys())
        if list(tensors[key].shape) != expected[key]
    ]
    problems += [
        f"{name(key)} is {tensors[key].dtype}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].is_floating_point() != state[key].is_floating_point()
    ]
    if problems:
        raise ArtefactError(f"{where} does not fit its config.json: {listed(problems, '; ')}; fetch both files again")
    if bad := [name(key) for key in sorted(tensors) if not tensors[key].isfinite().all()]:
        raise ArtefactError(f"{where}: tensors hold NaN or infinity: {listed(bad)}; fetch it again")
    module.load_state_dict({key: value.to(state[key].dtype) for key, value in tensors.items()}, assign=True)


def digest(path: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative paths and bytes. Raises ArtefactError when missing.

    That of a large file is taken once: a start that reads terabytes first takes hours. A file is the one that was read
    when its path, inode, size and time of change are, as for DVC. `known` has digests of files in a folder, by relative
    path, which are taken as they stand: whoever reads these files holds them to it.
    """
    if path.is_dir():
        known = known or {}
        lines = [
            b"%s %s\n" % ((known.get(str(name)) or digest(path / name)).encode(), _name(name))
            for name in (file.relative_to(path) for file in files(path))
        ]
        return hashlib.sha256(b"".join(lines)).hexdigest()
    if not path.exists():
        raise ArtefactError(f"{path}: no such file or folder; {siblings(path)}")
    require_no_pipe(path)
    status = path.stat()
    if status.st_size < LARGE:
        return _digest_bytes(path)
    place = os.fsencode(path.resolve()).decode(errors="backslashreplace")
    identity = f"{place} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    if identity not in remembered:
        remembered[identity] = _digest_bytes(path)
    return remembered[identity]


def _name(path: Path) -> bytes:
    """One line: names are bytes, not every one is UTF-8, and an end of a line in one must not pass for another file."""
    return os.fsencode(path).replace(b"\\", b"\\\\").replace(b"\n", b"\\n")


def _digest_bytes(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def is_endless(path: Path) -> bool:
    """Whether a pipe, a socket or a device is there: who reads one may wait for ever, or never come to an end."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def require_no_pipe(path: Path) -> None:
    """Raises ArtefactError where a reader may never come to an end."""
    if is_endless(path):
        raise ArtefactError(
            f"{path}: a pipe, a socket or a device, not a file; remove it, and make or fetch the file again"
        )


def verify_files(folder: Path, digests: Mapping[str, str], *, remedy: str) -> None:
    """See that files of a folder have their digests, by name.

    Raises ArtefactError that names those that are missing or were changed, cut or exchanged.
    """
    problems = []
    for name, expected in digests.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is {'no file' if (folder / name).exists() else 'missing'}")
        elif (actual := digest(folder / name)) != expected:
            problems.append(f"{name} has sha256 {actual[:12]}..., not {expected[:12]}...")
    if problems:
        raise ArtefactError(f"{folder}: not the files that were written there: {listed(problems, '; ')}; {remedy}")


def files(folder: Path) -> list[Path]:
    """All files under `folder`, sorted by relative path. Links are followed, save those to a folder on the way to them.

    Raises ArtefactError when links lead to one folder again and again.
    """
    paths = [path for path, entry in walk(folder) if path.is_file()]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def walk(
    folder: Path, enter: Callable[[os.DirEntry[str]], bool] = lambda entry: True
) -> Iterator[tuple[Path, os.DirEntry[str]]]:
    """What lies below `folder` and is no folder that is entered, in any order.

    Links to folders are followed, save those to a folder on the way to them; `enter` says of a folder whether it is
    entered. Raises ArtefactError when links lead to one folder more than WAYS times, as they do when folders
    are linked crosswise.
    """
    ways: Counter[str] = Counter()
    stack: list[tuple[Path, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while stack:
        here, above = stack.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                path = here / entry.name
                real = os.path.realpath(path) if _is_folder(entry) else None
                if real is None or real in above or not enter(entry):
                    yield path, entry
                    continue
                ways[real] += 1
                if ways[real] > WAYS:
                    raise ArtefactError(f"{path}: links lead to {real} on more than {WAYS} ways; take some out")
                stack.append((path, (*above, real)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def contains(folder: str, path: str) -> bool:
    """Whether a path is a folder or lies in it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def siblings(path: Path) -> str:
    """What lies where `path` should be, for messages."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(shown(entry.name) for entry in path.parent.iterdir())
    return f"{path.parent} holds {listed(names)}"


def verified_weights(
    path: Path, sha256: str, what: str, *, instead: str = "choose efficientnet_lite0, which has its own"
) -> Path:
    """`path`, if it is there and has the digest. Raises ArtefactError that says what to put where."""
    remedy = f"put {what} there, by hand or with `dvc import-url`, or {instead}"
    if not path.is_file():
        raise ArtefactError(f"{path}: no such weights; {remedy}")
    if (actual := digest(path)) != sha256:
        raise ArtefactError(f"{path}: sha256 is {actual}, params.yaml expects {sha256}; {remedy}")
    return path
