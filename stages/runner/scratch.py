"""The scratch folder of one run: `$DVC_ROOT/.scratch/<stage>/<fingerprint>`, outside of what DVC deletes.

    folder/        the stage's own: checkpoints, live curves, finished parts
    outputs/       results, complete only when `finished.json` is there
    lock           held while a process works here

A finished run stays until its outputs stand in dvc.lock: when dvc is killed before it writes that file, it deletes the
outputs at the next start, and they are published again from here.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.runner.environment import tell
from stages.runner.sinks import STATE
from stages.runner.starts import STARTS
from vtp.artefact import ArtefactError, files, read_json, remove, require_no_pipe, sync, write_json
from vtp.config import ConfigError, read_yaml

LINKED_BYTES = 16_000_000  # files of this size and more are linked to their place, not copied


class Scratch:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.folder = folder / "folder"
        self.outputs = folder / "outputs"
        self._finished = folder / "finished.json"
        self.lock_descriptor = -1

    @property
    def finished(self) -> bool:
        """Whether all outputs are there with the digests that they had when they were complete."""
        if not self._finished.exists():
            return False
        try:
            digests = read_json(self._finished)["digests"]
            whole = all(dvc_digest(self.outputs / name) == expected for name, expected in digests.items())
        except (ArtefactError, OSError, KeyError, AttributeError):
            whole = False
        if not whole:
            tell(f"{self.root}: what this run made was changed since it finished; it runs again")
        return whole

    def output(self, flag: str, destination: Path) -> Path:
        """Where the stage writes the output `flag`; it keeps the suffix of its destination."""
        return self.outputs / f"{flag}{destination.suffix}"

    def forget(self) -> None:
        """Drop what earlier starts left, checkpoints too."""
        for path in (self._finished, self.outputs, self.folder, self.root / STATE, self.root / STARTS):
            remove(path)

    def start(self) -> None:
        """Make the folder; outputs of an earlier attempt are dropped, its checkpoints stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(self._finished)
        remove(self.outputs)
        self.outputs.mkdir()

    def finish(self, destinations: dict[str, Path]) -> None:
        """Mark the outputs as complete, with the digests that DVC will give them; drop the checkpoints."""
        written = {path: self.output(flag, path) for flag, path in destinations.items()}
        for output in written.values():
            sync(output)
        digests = {output.name: dvc_digest(output) for output in written.values()}
        recorded = {str(path): digests[output.name] for path, output in written.items()}
        write_json(self._finished, {"outputs": recorded, "digests": digests})
        shutil.rmtree(self.folder)

    def publish(self, destinations: dict[str, Path]) -> None:
        """Put every output in its place, each whole."""
        for flag, destination in destinations.items():
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary = destination.with_name(f".{destination.name}.tmp")
            remove(temporary)
            try:
                _copy(self.output(flag, destination), temporary)
                sync(temporary)
            except BaseException:
                remove(temporary)
                raise
            remove(destination)
            temporary.rename(destination)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; wait, saying so, for whoever holds it now, such as an orphan of a killed dvc.

        A child that inherits `lock_descriptor` goes on holding it when this process is killed.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                tell(f"waiting for process {lock.read().strip()}, which works on the same run")
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            self.lock_descriptor = lock.fileno()
            yield


def prune(stage_folder: Path, keep: Path, lock_file: Path) -> None:
    """Delete finished runs of a stage whose outputs stand in dvc.lock, except `keep`."""
    others = [folder for folder in stage_folder.iterdir() if folder != keep] if stage_folder.is_dir() else []
    if not others or not lock_file.exists():  # reading it takes a moment
        return
    try:
        stages = read_yaml(lock_file)["stages"]
        known = {(out["path"], out["md5"]) for stage in stages.values() for out in stage.get("outs", [])}
    except (ConfigError, KeyError, TypeError, AttributeError):  # cut by a kill: DVC will say so
        return
    for folder in others:
        if _recorded(folder / "finished.json") <= known:
            shutil.rmtree(folder)


def _recorded(finished: Path) -> set[tuple[str, str]]:
    """Outputs of a finished run with their digests; one that is in no lock file, when it cannot be read."""
    try:
        return set(read_json(finished)["outputs"].items())
    except (ArtefactError, KeyError, AttributeError, TypeError):
        return {("", "")}


def dvc_digest(path: Path) -> str:
    """The md5 that DVC records: of a file's bytes, or of the list of a folder's files."""
    if path.is_dir():
        entries = [{"md5": dvc_digest(file), "relpath": file.relative_to(path).as_posix()} for file in files(path)]
        entries.sort(key=lambda entry: entry["relpath"])
        return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
    require_no_pipe(path)
    state = hashlib.md5()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _copy(source: Path, destination: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, destination, copy_function=_copy_file)
    else:
        _copy_file(source, destination)


def _copy_file(source: Path | str, destination: Path | str) -> None:
    """A link where a copy would cost disk; the file is read-only from then on, under both names, as DVC leaves it.

    Small files are copied: people edit those.
    """
    if os.stat(source).st_size >= LINKED_BYTES:
        try:
            os.link(source, destination)
            os.chmod(destination, 0o444)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, destination)
