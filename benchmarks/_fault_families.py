"""Families of faults. Each tries a case that `draws` chooses, in `folder`, and gives what it was and what went wrong."""

import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image

from benchmarks._faulty import ROOT, Project, Stage, different, ended, tiny_params, unprivileged, write_params
from vtp.artefact import load_tensors
from vtp.config import read_yaml
from vtp.layers.decode import DecodeError, decode_rgb

Tried = tuple[str, str | None]  # a case, and what went wrong
Family = Callable[[Project, Path, Random], Tried]
Ways = dict[str, Callable[[], object]]

QUICK, LARGE = 2.0, 2e9  # CPU seconds and bytes of `check`, and of the decoding of a picture
PATIENCE, LONG, STOPPING = 90.0, 30.0, 20.0  # seconds: of a stage, of one with other parameters, of one that is to stop
# fmt: off
VALUES: list[Any] = [0, -1, 1, 2, 1e308, 1e-320, math.nan, math.inf, None, 2**70, 10**400, True, "", "wrong", "\x1b[2J",
                     "../..", [], {}, [[]], {"name": 3}]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in
                                               zip("abcdefgh", "bcdefghi", strict=True))
TEXTS = [BOMB, "", "\0", "- 1", "a: b: c", "[" * 5000, "x: !!python/object:os.system {}", "? [a]\n: 1", "1: 2", "d: .nan",
         "a: &x\n  b: *x", "base: params.yaml", "pretrain: !!binary aGk=", "\ufeff", "a: 0x" + "f" * 9000]
JUNK = [b"{}", b"[]", b"null", b'{"format_version": 1}', b"[" * 9999, b"\xff\xfe\0", b"1" * 5000]
MODES = {"PNG": ["RGB", "RGBA", "L", "P", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "WEBP": ["RGB", "RGBA"],
         "TIFF": ["RGB", "L", "CMYK", "I;16", "F"], "GIF": ["P", "L"], "BMP": ["RGB", "L", "1"]}
# fmt: on
FIELDS = [b"", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\0\0\0\1"]
TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def parameters(project: Project, folder: Path, draws: Random) -> Tried:
    """A parameter file is damaged: `check` accepts it, or names file and key in a line per problem, quickly."""
    ignored = shutil.ignore_patterns("stages", "vtp", ".dvc")
    shutil.copytree(ROOT / "pipelines", folder / "pipelines", ignore=ignored)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    path = draws.choice(sorted(path for path in folder.rglob("params*.yaml") if (path.parent / "dvc.yaml").exists()))
    case, key = _other_parameters(path, draws)
    result = ended(Stage("check", [path.name]), path.parent, seconds=LONG)
    problem = None
    if result.status != 0:
        problem = result.refusal(".yaml") or result.refusal(key)
    if result.status == 1 or result.cpu > QUICK or result.peak > LARGE:
        problem = problem or f"status {result.status}, {result.cpu:.1f} CPU s, {result.peak / 1e9:.1f} GB"
    return f"{path.relative_to(folder)}: {case}{' is accepted' if result.status == 0 else ''}", problem


def _other_parameters(path: Path, draws: Random) -> tuple[str, str]:
    """What is done to a parameter file, and the key that a message must name."""
    kind, text = draws.randrange(10), path.read_text()
    if kind == 0:
        path.write_text(added := draws.choice(["", f"{text}\n"]) + draws.choice(TEXTS))
        return f"text {added[-40:]!r}", ""
    if kind == 1:
        path.write_bytes(text.replace("#", "# é", 1).encode(coding := draws.choice(["utf-16", "latin-1", "utf-32"])))
        return coding, ""
    if kind == 2:
        return damage(path, draws), ""
    values = read_yaml(path)
    case = change(values, draws, lambda old: draws.choice(VALUES))
    write_params(values, path)
    return case


def change(values: dict[str, Any], draws: Random, new: Callable[[Any], Any]) -> tuple[str, str]:
    """Change something in nested mappings and lists; what, and its key."""
    place, node, key = draws.choice(list(_places(values)))
    if isinstance(node, dict) and draws.random() < 0.1:
        other = draws.choice(list(node))
        node[key], node[other] = node[other], node[key]
        return f"{place} exchanged with {other}", place.split(".")[0]
    if isinstance(node, dict) and draws.random() < 0.1:
        node[f"{key}x"] = node.pop(key)
        return f"{place} is called {key}x", f"{key}x"
    node[key] = new(node[key])
    return f"{place} = {node[key]!r:.40}", [name for name in place.split(".") if not name.isdecimal()][-1]


def _places(values: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401 - YAML's
    """Everything, as its dotted name, what it is in, and its key there."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield f"{above}{key}", values, key
        yield from _places(value, f"{above}{key}.")


def values(project: Project, folder: Path, draws: Random) -> Tried:
    """One value of the tiny recipe is another: where `check` accepts it, its stage gives finite results or refuses."""
    stage = draws.choice(project.stages)
    project.copy(folder, stage)
    sections = tiny_params()
    case = f"{stage.name}.{change(sections[stage.name], draws, lambda old: draws.choice(_like(old)))[0]}"
    write_params(sections, folder / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", folder)
    check = Stage("check", ["params.yaml", "--resolved", "work/check/params.yaml"])
    if ended(check, folder, seconds=LONG).status != 0:
        return case, None
    result = ended(stage, folder, seconds=LONG)
    problem = None
    if result.status not in (0, None):  # None: more work than there is patience for
        problem = result.refusal()
    elif result.status == 0:
        problem = next((f"{path.name} is not finite" for path in stage.files(folder) if not _finite(path)), None)
    return f"{case} is accepted, and ends with {result.status} after {result.seconds:.1f} s", problem


def _like(old: Any) -> list[Any]:  # noqa: ANN401 - YAML's
    """Other values that `check` may accept."""
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [0, 1, 2, 3, old + 1, old // 2, 2 * old, 7 * old]
    if isinstance(old, float):
        return [0.0, 1.0, -old, old / 2, 2 * old, 1e-30, 1e30]
    return [old[:1], old[1:], 2 * old] if isinstance(old, list) else [None]


def _finite(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return all(tensor.isfinite().all() for tensor in load_tensors(path).values())
    return path.suffix != ".csv" or not {"nan", "inf", "-inf"} & set(path.read_text().replace("\n", ",").split(","))


def damage(path: Path, draws: Random) -> str:
    """Do something to a file; what."""
    content = path.read_bytes()
    siblings = sorted(each for each in path.parent.iterdir() if each.is_file() and each != path)
    sibling = draws.choice(siblings or [path])
    ways: Ways = {
        "cut": lambda: path.write_bytes(content[: draws.randrange(len(content) or 1)]),
        "bit flipped": lambda: path.write_bytes(_flipped(content, 1, len(content), draws)),
        "empty": lambda: path.write_bytes(b""),
        "longer": lambda: path.write_bytes(content + draws.randbytes(20)),
        "junk": lambda: path.write_bytes(draws.choice(JUNK)),
        "of version 7": lambda: path.write_bytes(content.replace(b'"format_version": ', b'"format_version": 7')),
        f"exchanged with {sibling.name}": lambda: (
            path.write_bytes(sibling.read_bytes()),
            sibling.write_bytes(content),
        ),
        "deleted": path.unlink,
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a FIFO": lambda: (path.unlink(), os.mkfifo(path)),
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path.name)),
        "without permission": lambda: path.chmod(0),
    }
    way = draws.choice(sorted(ways))
    ways[way]()
    return way


def _flipped(content: bytes, count: int, within: int, draws: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(count if content else 0):
        changed[draws.randrange(within)] ^= 1 << draws.randrange(8)
    return bytes(changed)


def artefacts(project: Project, folder: Path, draws: Random) -> Tried:
    """An input of a stage is damaged: it refuses by name, or gives what it gave before."""
    stage = draws.choice([each for each in project.stages if each.inputs])
    project.copy(folder, stage)
    inputs = [path for each in stage.inputs for path in (folder / each, *(folder / each).rglob("*"))]
    path = draws.choice(sorted(path for path in inputs if path.is_file()))
    case = f"{stage.name} with {path.relative_to(folder)} {damage(path, draws)}"
    return case, _refused_or_equal(project, stage, folder, path.name, path.parent.name)


def scratch(project: Project, folder: Path, draws: Random) -> Tried:
    """What a finished run left, or dvc.lock, is damaged, and its outputs are lost: the next run makes them again."""
    stage = draws.choice(project.stages)
    project.copy(folder, stage, scratch=True)
    run = next((folder / ".scratch" / stage.name).iterdir())
    outputs = json.loads((run / "finished.json").read_text())["outputs"]
    outs = [{"path": path, "md5": md5} for path, md5 in outputs.items()]
    write_params({"stages": {stage.name: {"outs": outs}}}, folder / "dvc.lock")
    (folder / ".scratch/digests.json").write_text('{"/gone 1 2 3": "0"}')
    of_run = [path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "run.log")]
    path = draws.choice([folder / "dvc.lock", folder / ".scratch/digests.json", run / "finished.json", *sorted(of_run)])
    case = f"{stage.name} with {path.relative_to(folder)} {damage(path, draws)}"
    return case, _refused_or_equal(project, stage, folder, path.name)


def _refused_or_equal(project: Project, stage: Stage, folder: Path, *names: str) -> str | None:
    result = ended(unprivileged(stage), folder, seconds=PATIENCE)
    if stage.name == "report" and result.status == 0:
        return None  # it shows the tables and pictures that there are; nothing says which they were
    return result.refusal(*names) if result.status != 0 else different(stage, project.folder, folder)


def pictures(project: Project, folder: Path, draws: Random) -> Tried:
    """A broken picture is decoded, or refused with a reason; of a folder of them prepare_data takes or counts every one."""
    if draws.random() < 0.02:
        return _many_pictures(folder, draws)
    case, content = broken_picture(draws)

    def decode() -> None:
        with suppress(DecodeError):
            assert np.asarray(decode_rgb(content)).ndim == 3

    result = ended(decode, folder, seconds=LONG)
    problem = f"status {result.status}: {result.said[-300:]}" if result.status != 0 else None
    if result.peak > LARGE or result.cpu > 5 * QUICK:
        problem = f"{result.peak / 1e9:.1f} GB, {result.cpu:.1f} s"
    return case, problem


def broken_picture(draws: Random) -> tuple[str, bytes]:
    """A picture file in which bytes are changed, and what it is."""
    name, side = draws.choice(sorted(MODES)), draws.choice([1, 16, 64, 301])
    mode = draws.choice(MODES[name])
    pixels = np.random.default_rng(draws.randrange(2**32)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode)
    file = io.BytesIO()
    picture.save(file, name, **({"exif": TURNED} if name == "JPEG" else {}))
    content = file.getvalue()
    within = min(len(content), draws.choice([64, 200, len(content)]))
    at, length = draws.randrange(within), draws.randrange(1, 400)
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:at],
        "bits flipped": lambda: _flipped(content, draws.choice([1, 3, 30]), within, draws),
        "field overwritten": lambda: content[:at] + draws.choice(FIELDS) + content[at + 4 :],
        "piece lost": lambda: content[:at] + content[at + length :],
        "piece doubled": lambda: content[: at + length] + content[at:],
    }
    way = draws.choice(sorted(ways))
    return f"{name} {mode} {side} px, {way}", ways[way]()


def _many_pictures(folder: Path, draws: Random) -> Tried:
    source, count = folder / "source/class", 80
    source.mkdir(parents=True)
    for number in range(count):
        (source / f"{number:03}.png").write_bytes(broken_picture(draws)[1])
        if number % 4 == 0:
            PIL.Image.new("RGB", (16, 16), (number, 0, 0)).save(source / f"{number:03}.png")
    record = tiny_params()["prepare_data"] | {"image": {"name": "centre_crop", "size": 16}, "max_unreadable": 0.99}
    record["source"] = {"name": "folder", "train": ".", "validation": {"name": "held_out", "share": 0.3}}
    record["source"] |= {"caption": "a {}", "templates": []}
    write_params({"prepare_data": record}, folder / "params.yaml")
    words = "params.yaml:prepare_data --source source --shards shards --provenance provenance.json"
    result = ended(Stage("prepare_data", words.split()), folder, seconds=PATIENCE)
    if result.status != 0:
        return "prepare_data", result.refusal() or result.said[-300:]
    splits = json.loads((folder / "shards/manifest.json").read_text())["splits"]
    taken = sum(shard["samples"] for split in splits.values() for shard in split["shards"])
    refused = len((folder / "shards/unreadable.csv").read_text().splitlines()) - 1
    wrong = None if taken + refused == count else f"{taken} taken of {count}"
    return f"prepare_data, {refused} of {count} unreadable", wrong


def disks(project: Project, folder: Path, draws: Random) -> Tried:
    """No room for a file, a full disk or a read-only folder: a line says so, nothing half stays, the next run is whole."""
    stage, size = draws.choice(project.stages), int(2 ** draws.uniform(12, 20))
    project.copy(folder, stage)
    kind = draws.choice(["files", "disk", "read-only"])
    own = folder / ".scratch" / stage.name
    place = draws.choice(
        [own, *(folder / each for each in (".scratch", "work/provenance", "work/metrics", "work", "plots"))]
    )
    place = own if kind == "disk" else place
    place.mkdir(parents=True, exist_ok=True)
    if kind == "files":
        case, place = f"files of at most {size // 64} bytes", folder
        limits = (size // 64, resource.RLIM_INFINITY)
        result = ended(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, limits), stage()), folder, seconds=PATIENCE)
    elif kind == "read-only":
        case = f"{place.relative_to(folder)} read-only"
        place.chmod(0o555)
        result = ended(unprivileged(stage), folder, seconds=PATIENCE)
        place.chmod(0o755)
    else:
        case = f"{size} bytes in {place.relative_to(folder)}"
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return "nobody may mount a disk here", None
        result = ended(stage, folder, seconds=PATIENCE)
    problem = result.refusal() if result.status != 0 else None
    left = [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]
    problem = problem or (f"left {', '.join(left)}" if left else None)
    if kind == "disk":
        subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
    problem = problem or _whole(stage, project.folder, folder)
    if kind == "disk":
        subprocess.run(["umount", place], check=True)
    return f"{stage.name}, {case}, ends with {result.status}", problem


def signals(project: Project, folder: Path, draws: Random) -> Tried:
    """A stage gets a signal at any moment: it stops in time, and the next run ends with the bits of a whole one."""
    several = draws.random() < 0.25
    stage = draws.choice([each for each in project.stages if each.distributed or not several])
    number = draws.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    whole, seconds = project.on_two_ranks(stage) if several else (project.folder, project.seconds[stage.name])
    delay = draws.uniform(0, seconds)
    stage = stage._replace(ranks=2 if several else 1)
    project.copy(folder, stage)

    def interrupt(process: int) -> None:
        time.sleep(delay)
        os.kill(process, number)

    result = ended(stage, folder, seconds=STOPPING * stage.ranks, during=interrupt)
    case = f"{stage.name} on {stage.ranks}, {number.name} after {delay:.2f} s, ends with {result.status}"
    # Of a process that was killed at once it is torchrun that speaks, of its parent's end.
    told = "Traceback" in result.said and number is not signal.SIGKILL
    problem = "hung" if result.status is None else result.said[-400:] if told else None
    return f"{case} after {result.seconds:.2f} s", problem or _whole(stage, whole, folder)


def _whole(stage: Stage, whole: Path, folder: Path) -> str | None:
    """What is wrong with the next run."""
    again = ended(stage, folder, seconds=PATIENCE * stage.ranks)
    return (
        f"the next run ends with {again.status}: {again.said[-300:]}"
        if again.status != 0
        else different(stage, whole, folder)
    )


FAMILIES: dict[str, Family] = {
    each.__name__: each for each in (parameters, values, artefacts, scratch, pictures, disks, signals)
}
