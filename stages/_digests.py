"""Digests of inputs. Those of large files are remembered, because a start that reads terabytes first takes hours.

A file is the one that was read when its path, inode, size and time of change are, as for DVC.
"""

import fcntl
import json
from pathlib import Path

from vtp.artefact import digest, write_json

LARGE = 16_000_000  # bytes; smaller files are read every time


class Digests:
    """Remembered in the file `store`, which several stages may use at a time."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known = self._load()
        self._new: dict[str, str] = {}

    def of(self, path: Path) -> str:
        """SHA-256 of a file or folder, as `vtp.artefact.digest` gives it. Raises ArtefactError when missing."""
        found = digest(path, of_file=self._of_file)
        if self._new:
            self._save()
        return found

    def _of_file(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < LARGE:
            return digest(path)
        name = f"{path.resolve()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
        if name not in self._known:
            self._known[name] = self._new[name] = digest(path)
        return self._known[name]

    def _load(self) -> dict[str, str]:
        return json.loads(self._store.read_text(encoding="utf-8")) if self._store.exists() else {}

    def _save(self) -> None:
        self._store.parent.mkdir(parents=True, exist_ok=True)
        with self._store.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            gone = [name for name in self._known if not Path(name.rsplit(" ", 3)[0]).exists()]
            known = {name: value for name, value in (self._load() | self._new).items() if name not in gone}
            write_json(self._store, known)
        self._new.clear()
