"""Resolve and validate all parameters before any stage works, and digest the code of every stage.

    python -m stages.check params.yaml --resolved work/check/params.yaml --code work/check/code

What `params.yaml` comes to with the files that it is based on (`vtp.params`) is written where the stages of `dvc.yaml` read
it, and DVC tracks it there: so a typo anywhere stops `dvc repro` within seconds and leaves every artefact in place, and a
change runs what depends on it. `--runs` writes the parameters of every run of a comparison (`runs:`) likewise.
`--schema` prints the JSON schema of parameter files.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ruamel.yaml import YAML

from stages.evaluate_generator import EvaluateGenerator
from stages.evaluate_reconstruction import EvaluateReconstruction
from stages.evaluate_understanding import EvaluateUnderstanding
from stages.generate import Generate
from stages.import_tokenizer import ImportTokenizer
from stages.monitors.tokenizer import milestone_name
from stages.prepare_data import PrepareData
from stages.pretrain import Pretrain
from stages.reference import ReferenceStatistics
from stages.runner.fingerprint import code_digest
from stages.runner.run import BAD_PARAMETERS, config_class
from stages.runner.schema import schema_of
from vtp.artefact import whole_folder, write_json
from vtp.config import Config, ConfigError, did_you_mean
from vtp.params import BASE, POINTS, RUNS, Parameters, read_parameters, write_yaml

C = TypeVar("C", bound=Config)
NAME = re.compile(r"\w[\w.-]*", re.ASCII)
COMMAND = re.compile(r"python -m stages\.(\w+)\s+(\S+):(\w+)")


class Use(NamedTuple):
    """A stage of dvc.yaml that reads a section."""

    module: str
    section: str
    of_runs: bool  # it reads the section of every run


class Pipeline(NamedTuple):
    """What a dvc.yaml says about parameters."""

    uses: list[Use]
    tracked: list[Path]  # dependencies of its stage `check`

    @classmethod
    def of(cls, dvc_file: Path) -> "Pipeline":
        """Read `python -m stages.<module> FILE:SECTION` of every stage; a file of runs has ${item.run} in its name."""
        stages = YAML(typ="safe", pure=True).load(dvc_file.read_text(encoding="utf-8"))["stages"]
        uses = []
        for stage in stages.values():
            if match := COMMAND.search(" ".join(stage["cmd"].split())):
                uses.append(Use(match[1], match[3], "${item.run}" in match[2]))
        tracked = [dvc_file.parent / path for path in stages.get("check", {}).get("deps", [])]
        return cls(list(dict.fromkeys(uses)), tracked)


class Checked(NamedTuple):
    """Parameters that are valid together."""

    shared: dict[str, Any]  # sections that the pipeline reads once
    runs: dict[str, dict[str, Any]]  # those of every run
    modules: list[str]


def check(params: Path, pipeline: Pipeline) -> Checked:
    """Resolve a parameter file for a pipeline. Raises ConfigError with everything that is wrong, a line each."""
    parameters = read_parameters(params)
    problems = _untracked(parameters, pipeline) + _unread(parameters, pipeline)
    runs: dict[str, Any] = parameters.values.get(RUNS) or {}
    if any(use.of_runs for use in pipeline.uses) and not runs:
        problems.append(f"{params}: no {RUNS}; name at least one, such as `{RUNS}: {{joint: {{}}}}`")
    shared, wrong = _configs(parameters, [use for use in pipeline.uses if not use.of_runs])
    problems += wrong
    of_runs = [use for use in pipeline.uses if use.of_runs]
    written: dict[str, dict[str, Any]] = {}
    for name, changes in runs.items():
        try:
            own = parameters.changed(_of_run(changes, name, params, of_runs), at=(RUNS, name))
        except ConfigError as error:
            problems.append(str(error))
            continue
        configs, wrong = _configs(own, of_runs)
        problems += [*wrong, *disagreements({**shared, **configs}), *_points(own, name, configs)]
        written[name] = {section: own.values[section] for section in configs}
    if not runs:
        problems += disagreements(shared)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    modules = sorted({use.module for use in pipeline.uses})
    return Checked({section: parameters.values[section] for section in shared}, written, modules)


def _configs(parameters: Parameters, uses: Iterable[Use]) -> tuple[dict[str, Config], list[str]]:
    """The records of sections, and what is wrong with the others."""
    configs: dict[str, Config] = {}
    problems = []
    for use in uses:
        if use.section not in parameters.values:
            problems.append(f"{parameters.path}: section {use.section!r} is missing")
            continue
        try:
            configs[use.section] = parameters.parse(use.section, stage_config(use.module))
        except ConfigError as error:
            problems.append(str(error))
    return configs, problems


def _unread(parameters: Parameters, pipeline: Pipeline) -> list[str]:
    """Sections that no stage reads. A base may hold what another pipeline reads, under the name of a stage."""
    known = {use.section for use in pipeline.uses}
    known |= {section.get(BASE) for section in parameters.values.values() if isinstance(section, dict)}
    stages = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")}
    reserved = {RUNS, POINTS} if any(use.of_runs for use in pipeline.uses) else set()
    return [
        f"{parameters.origins[(name,)].file}: no stage reads section {name!r}{did_you_mean(name, known)}"
        for name in parameters.values
        if name not in known | reserved and not (name in stages and parameters.origins[(name,)].file != parameters.path)
    ]


def _untracked(parameters: Parameters, pipeline: Pipeline) -> list[str]:
    """Files of the chain that DVC would not notice a change of."""
    tracked = [path.resolve() for path in pipeline.tracked]
    return [
        f"{parameters.path}: based on {file}, which dvc.yaml does not track: add it to the deps of its stage check"
        for file in parameters.files[:-1]
        if tracked and not any(file.resolve().is_relative_to(path) for path in tracked)
    ]


def _of_run(changes: Any, name: str, params: Path, uses: list[Use]) -> Mapping[str, Any]:  # noqa: ANN401 - YAML's
    """The changes of a run. Raises ConfigError for those of a section that all runs share, and for a name of no folder."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{params}:{RUNS}.{name}: a run is a folder; name it with letters, digits, ., _ and -")
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{params}:{RUNS}.{name}: expected changes of sections, or {{}} for none; found {changes!r}")
    own = {use.section for use in uses}
    for section in changes:
        if section not in own:
            hint = did_you_mean(section, own)
            known = ", ".join(sorted(own))
            raise ConfigError(f"{params}:{RUNS}.{name}.{section}: a run changes {known}{hint}")
    return changes


def _points(parameters: Parameters, name: str, configs: Mapping[str, Config]) -> list[str]:
    """Points of the comparison at which a run exports no tokenizer."""
    milestones = [
        each for config in configs.values() if isinstance(config, Pretrain) for each in config.monitor.milestones
    ]
    exported = [milestone_name(milestone) for milestone in milestones]
    return [
        f"{parameters.path}:{POINTS}: {point!r} is none of the milestones of the run {name}: {', '.join(exported)}"
        for point in parameters.values.get(POINTS, [])
        if point not in exported
    ]


def stage_config(module: str) -> type[Config]:
    """The parameter record of a stage."""
    return config_class(import_module(f"stages.{module}").run)


def disagreements(configs: Mapping[str, Config]) -> list[str]:
    """What is wrong between sections that are right by themselves."""
    recipe = Recipe(configs)
    return [problem for rule in RULES for problem in rule(recipe)]


class Recipe:
    """The sections of a pipeline by the kind of their record."""

    def __init__(self, configs: Mapping[str, Config]) -> None:
        self._configs = configs

    def of(self, kind: type[C]) -> Iterator[tuple[str, C]]:
        """Names and records of this kind."""
        for name, config in self._configs.items():
            if isinstance(config, kind):
                yield name, config


def _pictures_are_not_enlarged(recipe: Recipe) -> Iterator[str]:
    for name, data in recipe.of(PrepareData):
        for own, pretrain in recipe.of(Pretrain):
            if (side := data.side) is not None and side < pretrain.tokenizer.image_size:
                yield (
                    f"{name}: pictures have image_size {side}, {own}.tokenizer.image_size is "
                    f"{pretrain.tokenizer.image_size}: they would be enlarged; write them at that size, or train at theirs"
                )


def _prompts_are_for_the_data(recipe: Recipe) -> Iterator[str]:
    for name, understanding in recipe.of(EvaluateUnderstanding):
        for _, data in recipe.of(PrepareData):
            if understanding.prompts.name == "openai" and data.source.name == "openmoji":
                yield f"{name}.prompts: openai's are for ImageNet; take {{name: data_set}}"


def _probes_see_whole_patches(recipe: Recipe) -> Iterator[str]:
    for name, understanding in recipe.of(EvaluateUnderstanding):
        for _, pretrain in recipe.of(Pretrain):
            side, patch = understanding.probes.size, pretrain.tokenizer.vision.patch_size
            if side % patch:
                yield f"{name}.probes.size: {side} is no multiple of {patch}, the encoder's patch_size"


def _samples_suffice(recipe: Recipe) -> Iterator[str]:
    for name, evaluation in recipe.of(EvaluateGenerator):
        for own, generate in recipe.of(Generate):
            if max(evaluation.counts) > generate.samples:
                yield f"{name}.counts: {max(evaluation.counts)}, {own}.samples is {generate.samples}"


def _reference_has_the_size_of_the_tokenizer(recipe: Recipe) -> Iterator[str]:
    for name, reference in recipe.of(ReferenceStatistics):
        sides = [(f"{own}.tokenizer", pretrain.tokenizer.image_size) for own, pretrain in recipe.of(Pretrain)]
        # VTP's own stands in its folder.
        imported = [(f"{own}.source", imported.source) for own, imported in recipe.of(ImportTokenizer)]
        sides += [(own, side) for own, source in imported if (side := getattr(source, "image_size", None))]
        for own, side in sides:
            if reference.image_size != side:
                yield f"{name}.image_size: {reference.image_size}, {own}.image_size is {side}"


def _reference_has_the_splits(recipe: Recipe) -> Iterator[str]:
    for name, reference in recipe.of(ReferenceStatistics):
        splits = ", ".join(reference.splits)
        readers = [*recipe.of(EvaluateReconstruction), *recipe.of(EvaluateGenerator)]
        for own, reader in readers:
            if reader.split not in reference.splits:
                yield f"{own}.split: {reader.split!r} is none of {name}.splits, which has {splits}"


def _reference_keeps_enough(recipe: Recipe) -> Iterator[str]:
    for name, reference in recipe.of(ReferenceStatistics):
        for own, evaluation in recipe.of(EvaluateGenerator):
            split = reference.splits.get(evaluation.split)
            if split is not None and split.kept < evaluation.compared:
                yield (
                    f"{name}.splits.{evaluation.split}.kept: {split.kept}, {own} compares {evaluation.compared} features "
                    "or more with those of real images"
                )


RULES = (
    _pictures_are_not_enlarged,
    _prompts_are_for_the_data,
    _probes_see_whole_patches,
    _samples_suffice,
    _reference_has_the_size_of_the_tokenizer,
    _reference_has_the_splits,
    _reference_keeps_enough,
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m stages.check", description=__doc__)
    parser.add_argument("params", type=Path, nargs="?", default=Path("params.yaml"))
    parser.add_argument("--resolved", type=Path, help="where to write the sections that stages read")
    parser.add_argument("--runs", type=Path, help="folder for a file per run of a comparison")
    parser.add_argument("--code", type=Path, help="folder for one code digest per stage")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of parameter files and exit")
    arguments = parser.parse_args()
    if arguments.schema:
        json.dump(schema(), sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    try:
        checked = check(arguments.params, Pipeline.of(arguments.params.parent / "dvc.yaml"))
    except ConfigError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in str(error).splitlines()))
        sys.exit(BAD_PARAMETERS)
    if arguments.code is not None:
        with whole_folder(arguments.code) as temporary:
            for module in checked.modules:
                (temporary / f"{module}.txt").write_text(code_digest(f"stages.{module}") + "\n")
    if arguments.runs is not None:
        with whole_folder(arguments.runs) as temporary:
            for name, sections in checked.runs.items():
                write_json(temporary / f"{name}.json", sections)
    if arguments.resolved is not None:
        write_yaml(arguments.resolved, checked.shared)


def schema() -> dict[str, Any]:
    """Of parameter files, overlays too."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "check")
    return schema_of({module: stage_config(module) for module in modules})


if __name__ == "__main__":
    main()
