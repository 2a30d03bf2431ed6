"""Where a command works and writes: seen to before anything is read or computed."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def device_of(name: str | None) -> str:
    """The device of that name, or a GPU where there is one. Raises ValueError when this machine has none such."""
    import torch

    device = name if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--device {device}: not on this machine ({reason})") from None
    return device


def require_file(out: Path, suffix: str, kind: str, inputs: Sequence[Path] = ()) -> None:
    """Raises ValueError or OSError when `out` cannot become a file with that suffix, or is one of the inputs."""
    if out.suffix != suffix or out.is_dir():
        raise ValueError(f"--out {out}: the name of a {kind} file, ending in {suffix}")
    if out.exists() and any(path.exists() and path.samefile(out) for path in inputs):
        raise ValueError(f"--out {out}: this is what is read; name another file")
    _require_parent(out)


def require_new_folder(out: Path) -> None:
    """Raises ValueError or OSError when `out` cannot become a folder, or is one that holds something."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file has this name; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: this folder holds something already; name a new one")
    _require_parent(out)


def _require_parent(out: Path) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
