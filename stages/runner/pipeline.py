"""What a dvc.yaml says about parameters: which stage reads which section."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from vtp.config import ConfigError, read_yaml
from vtp.params import PICTURES

SEED = "${seeds"  # of a path with the seed of a run, which all runs read
RUN, AT = "${item.run}", "${item.at}"  # name of a run, of a point
OWN = f"${{{PICTURES}}}"
COMMAND = re.compile(r"python -m stages\.(\w+)\s+(\S+):(\S+)")
PUBLISHED = re.compile(r"--published\s+(\S+)")


class Use(NamedTuple):
    """A stage of dvc.yaml that reads a section."""

    module: str
    section: str
    of_runs: bool  # it reads the section of every run
    flags: frozenset[str] = frozenset()  # of its command
    at_points: bool = False  # it runs at every point of a run


class Pipeline(NamedTuple):
    """What a dvc.yaml says about parameters."""

    uses: list[Use]
    tracked: list[Path]  # dependencies of its stage `check`
    taken: frozenset[str] = frozenset()  # names beside the folders of runs
    has_points: bool = False  # stages that run at every point of a run
    has_pictures: bool = False  # a stage that reads them where the parameter file says
    published: Path | None = None  # file with figures of others

    @classmethod
    def of(cls, dvc_file: Path) -> "Pipeline":
        """Read `python -m stages.<module> FILE:SECTION` of every stage; a file of runs has ${item.run} in its name.

        Raises ConfigError when there is no such file.
        """
        try:
            stages = read_yaml(dvc_file)["stages"] if dvc_file.exists() else {}
        except KeyError:
            stages = {}
        if not stages:
            raise ConfigError(f"{dvc_file}: no file with stages; an overlay is checked where a pipeline reads it")
        return cls._of_stages(stages, dvc_file.parent)

    @classmethod
    def of_text(cls, text: str, folder: Path) -> "Pipeline":
        """The same of a text that no file need hold yet; `folder` is where its paths begin."""
        return cls._of_stages(YAML(typ="safe", pure=True).load(text)["stages"], folder)

    @classmethod
    def _of_stages(cls, stages: Mapping[str, Any], folder: Path) -> "Pipeline":
        uses = []
        words: set[str] = set()
        published = None
        for stage in stages.values():
            command = (stage.get("do") or stage).get("cmd", "")
            commands = [command] if isinstance(command, str) else command
            for command in commands:
                words |= set(command.split())
                if match := PUBLISHED.search(command):
                    published = folder / match[1]
                if match := COMMAND.search(" ".join(command.split())):
                    flags = frozenset(word for word in command.split() if word.startswith("--"))
                    uses.append(Use(match[1], match[3], RUN in match[2], flags, AT in command))
        deps = stages.get("check", {}).get("deps", [])
        tracked = [folder / (dep if isinstance(dep, str) else next(iter(dep))) for dep in deps]
        has_points, has_pictures = (any(name in word for word in words) for name in (AT, OWN))
        return cls(list(dict.fromkeys(uses)), tracked, _taken(words), has_points, has_pictures, published)


def _taken(paths: Iterable[str]) -> frozenset[str]:
    """What lies beside a folder of a run; so can be no name of one. A path with a seed lies within one."""
    split = [path.split("/") for path in paths if SEED not in path]
    parents = {tuple(parts[: parts.index(RUN)]) for parts in split if RUN in parts}
    beside = {parts[len(parent)] for parts in split for parent in parents if tuple(parts[:-1])[: len(parent)] == parent}
    return frozenset(name for name in beside if "$" not in name)
