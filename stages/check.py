"""Resolve and validate all parameters before any stage works, and digest the code of every stage.

    python -m stages.check params.yaml --resolved work/check/params.yaml --code work/check/code

What `params.yaml` comes to with the files that it is based on (`vtp.params`) is written where the stages of `dvc.yaml` read
it, and DVC tracks it there: so a typo anywhere stops `dvc repro` within seconds and leaves every artefact in place, and a
change runs what depends on it. `--runs` writes the parameters of every run and seed of a comparison (`runs:`, `seeds:`)
likewise, as RUN/SEED.json. `--schema` prints the JSON schema of parameter files, `--plan` what a comparison takes:

    python -m stages.check pipelines/objectives/params.paper.yaml --plan --gpus 8
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from stages.figures.published import Published
from stages.plans.estimate import Estimate
from stages.plans.rules import disagreements
from stages.plans.study import plan_study
from stages.pretrain import Pretrain
from stages.runner.environment import tell
from stages.runner.fingerprint import code_digest
from stages.runner.pipeline import Pipeline, Use
from stages.runner.project import HERE, derived
from stages.runner.run import BAD_PARAMETERS, config_class
from stages.runner.schema import schema_of
from stages.summary import Summary
from vtp.artefact import ArtefactError, whole_folder, write_json
from vtp.config import Config, ConfigError, did_you_mean
from vtp.params import (
    BASE,
    PICTURES,
    POINTS,
    RUNS,
    SEEDS,
    Origin,
    Parameters,
    milestone_name,
    read_parameters,
    write_yaml,
)

NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
SEEDED_STAGES = ("pretrain", "tune_decoder", "train_generator", "generate")  # which a seed of a study reaches


class Checked(NamedTuple):
    """Parameters that are valid together."""

    shared: dict[str, Any]  # sections that the pipeline reads once
    runs: dict[str, dict[str, Any]]  # those of every run, before its seeds
    modules: list[str]
    seeds: list[int]
    seeded: list[str]  # sections of a run to whose seeds they are added

    def of_seeds(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Name, seed and sections of everything that is trained."""
        for name, sections in self.runs.items():
            for seed in self.seeds:
                own = {section: sections[section] | _seed(sections[section], seed) for section in self.seeded}
                yield name, seed, sections | own


def _seed(section: Mapping[str, Any], seed: int) -> dict[str, int]:
    """The seed of a section in a run of this seed."""
    return {"seed": section["seed"] + seed}


def check(params: Path, pipeline: Pipeline) -> Checked:
    """Resolve a parameter file for a pipeline. Raises ConfigError with everything that is wrong, a line each."""
    parameters = read_parameters(params)
    problems = _untracked(parameters, pipeline) + _unread(parameters, pipeline)
    of_runs = [use for use in pipeline.uses if use.of_runs]
    if of_runs and not parameters.runs:
        problems.append(f"{params}: no {RUNS}; name at least one, such as `{RUNS}: {{joint: {{}}}}`")
    problems += (malformed := _malformed_seeds(parameters) if of_runs else [])
    if pipeline.has_points:
        problems += _malformed_points(parameters)
    problems += _misplaced_pictures(parameters) if pipeline.has_pictures else []
    once = [use for use in pipeline.uses if not use.of_runs]
    shared, wrong = _configs(parameters, once)
    problems += wrong
    written: dict[str, dict[str, Any]] = {}
    seeded = sorted({use.section for use in of_runs if use.module in SEEDED_STAGES})
    for name in parameters.runs if of_runs else ():
        try:
            _require_own(parameters, name, of_runs, pipeline.taken)
            own = parameters.of_run(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        configs, wrong = _configs(own, of_runs)
        between = [
            f"{params}:{RUNS}.{name}: {problem}" for problem in disagreements({**shared, **configs}, pipeline.uses)
        ]
        problems += [*wrong, *between, *_points(own, name, configs)]
        problems += [] if malformed else _too_large(own, seeded, configs)
        written[name] = {section: own.values[section] for section in configs}
    if not written:
        problems += [f"{params}: {problem}" for problem in disagreements(shared, pipeline.uses)]
    problems += _not_here(parameters) if of_runs else []
    problems += _unknown_runs(parameters, shared) if of_runs else []
    problems += _unpublished(parameters, shared, pipeline.published)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys("\n".join(problems).split("\n"))))
    modules = sorted({use.module for use in pipeline.uses})
    shared_values = {section: parameters.values[section] for section in shared}
    return Checked(shared_values, written, modules, parameters.values.get(SEEDS, []), seeded)


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
    compares = any(use.of_runs for use in pipeline.uses)
    known = {use.section for use in pipeline.uses} | ({POINTS} if pipeline.has_points else set())
    known |= {PICTURES} if pipeline.has_pictures else set()
    known |= {SEEDS} if compares else set()
    keys = known | {BASE} | ({RUNS} if compares else set())
    stages = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")}
    unread = [
        name
        for name in parameters.values
        if name not in known | parameters.bases
        and not (name in stages and parameters.origins[(name,)].file != parameters.path)
    ]
    if parameters.runs and not compares:
        unread.append(RUNS)
    return [
        f"{parameters.origins.get((name,), Origin(parameters.path, ())).file}: no stage reads section "
        f"{name!r}{did_you_mean(name, keys)}"
        for name in unread
    ]


def _untracked(parameters: Parameters, pipeline: Pipeline) -> list[str]:
    """Files of the chain that DVC would not notice a change of."""
    tracked = [Path(os.path.realpath(path)) for path in pipeline.tracked]
    return [
        f"{parameters.path}: based on {file}, which dvc.yaml does not track: add it to the deps of its stage check"
        for file in parameters.files[:-1]
        if tracked and not any(Path(os.path.realpath(file)).is_relative_to(path) for path in tracked)
    ]


def _require_own(parameters: Parameters, name: str, uses: list[Use], taken: frozenset[str]) -> None:
    """Raises ConfigError for changes of a section that all runs share, and for a name that can be no folder's."""
    own = {use.section for use in uses}
    for layer in parameters.runs[name]:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{layer.origin}: a run is a folder; name it with up to 64 letters, digits, ., _ and -")
        if name in taken:
            raise ConfigError(f"{layer.origin}: what all runs share is in a folder {name}; choose another name")
        for section in layer.values:
            if section not in own:
                hint = did_you_mean(section, own)
                raise ConfigError(f"{layer.origin.then(section)}: a run changes {', '.join(sorted(own))}{hint}")


def _malformed_seeds(parameters: Parameters) -> list[str]:
    """What is wrong with the seeds by themselves."""
    place, seeds = parameters.origins.get((SEEDS,), Origin(parameters.path, (SEEDS,))), parameters.values.get(SEEDS)
    if not isinstance(seeds, list) or not seeds:
        return [f"{place}: expected integers in a list, such as [0] or [0, 1, 2]; found {seeds!r}"]
    problems = [f"{place}: {seed!r} is no integer from 0 on" for seed in seeds if type(seed) is not int or seed < 0]
    repeated = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
    return problems or [f"{place}: {seed} comes twice, and would be trained once" for seed in repeated]


def _too_large(own: Parameters, sections: list[str], configs: Mapping[str, Config]) -> list[str]:
    """Seeds of sections that have no room for the largest of the study."""
    largest, problems = max(own.values[SEEDS]), []
    for section in (name for name in sections if name in configs):
        try:
            type(configs[section]).parse(own.values[section] | _seed(own.values[section], largest), where=section)
        except ConfigError as error:
            problems.append(f"{own.origins[SEEDS,]}: {largest} is added to the seed of a section: {error}")
    return problems


def _not_here(parameters: Parameters) -> list[str]:
    """Runs, seeds and points of another file: DVC reads those of the file itself alone."""
    places = [layer.origin for layers in parameters.runs.values() for layer in layers]
    places += [parameters.origins[key,] for key in (SEEDS, POINTS) if (key,) in parameters.origins]
    return [
        f"{place}: DVC reads {RUNS}, {SEEDS} and {POINTS} from {parameters.path} alone; say it there"
        for place in places
        if place.file != parameters.path
    ]


def _misplaced_pictures(parameters: Parameters) -> list[str]:
    """What is wrong with the place of own pictures, apart from what lies there."""
    place, path = parameters.origins.get((PICTURES,)), parameters.values.get(PICTURES)
    if place is None or place.file != parameters.path:
        return [f"{parameters.path}: no {PICTURES}, which DVC reads from this file alone; say where yours lie there"]
    if not isinstance(path, str) or not path.strip() or path.startswith("~"):
        return [
            f"{place}: {path!r} is no path of a folder; write it out, from the root / or from the folder of this file"
        ]
    return []


def _unknown_runs(parameters: Parameters, configs: Mapping[str, Config]) -> list[str]:
    """Runs that the summary speaks of, and that there are not."""
    return [
        f"{parameters.path}:summary.{place}: no such run: {name!r}{did_you_mean(name, parameters.runs)}"
        for config in configs.values()
        if isinstance(config, Summary)
        for place, name in config.named_runs()
        if name not in parameters.runs
    ]


def _unpublished(parameters: Parameters, configs: Mapping[str, Config], path: Path | None) -> list[str]:
    """Figures that are published nowhere, and that panels of the summary name."""
    try:
        known = None if path is None else Published.read(path)
        for config in configs.values():
            if isinstance(config, Summary) and known is not None:
                config.require_published(known)
    except ArtefactError as error:
        return [f"{parameters.path}:summary: {error}"]
    return []


def _malformed_points(parameters: Parameters) -> list[str]:
    """What is wrong with the points by themselves."""
    place, points = parameters.origins.get((POINTS,), Origin(parameters.path, (POINTS,))), parameters.values.get(POINTS)
    if not isinstance(points, list) or not points:
        return [f"{place}: expected names of milestones in a list, such as [end]; found {points!r}"]
    problems = [f"{place}: {point!r} is no text; put it into quotes" for point in points if not isinstance(point, str)]
    repeated = sorted({str(point) for point in points if points.count(point) > 1})
    return problems + [f"{place}: {point!r} comes twice" for point in repeated]


def _points(parameters: Parameters, name: str, configs: Mapping[str, Config]) -> list[str]:
    """Points of the comparison at which a run exports no tokenizer."""
    milestones = [
        milestone_name(each)
        for config in configs.values()
        if isinstance(config, Pretrain)
        for each in config.monitor.milestones
    ]
    points = parameters.values.get(POINTS)
    return [
        f"{parameters.origins[POINTS,]}: {point!r} is none of {name}'s pretrain.monitor.milestones, which are called "
        f"{', '.join(milestones)}"
        for point in (points if isinstance(points, list) and milestones else ())
        if isinstance(point, str) and point not in milestones
    ]


def stage_config(module: str) -> type[Config]:
    """The parameter record of a stage."""
    return config_class(import_module(f"stages.{module}").run)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m stages.check", description=__doc__)
    parser.add_argument(
        "params", type=Path, nargs="?", default=Path("params.yaml"), help="parameter file; default: params.yaml"
    )
    parser.add_argument("--resolved", type=Path, help="where to write the sections that stages read")
    parser.add_argument("--runs", type=Path, help="folder for a file per run and seed of a comparison")
    parser.add_argument("--code", type=Path, help="folder for one code digest per stage")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of parameter files and exit")
    parser.add_argument(
        "--plan", action="store_true", help="print FLOPs and GPU hours of a comparison and exit; takes options of plans"
    )
    arguments, of_plans = parser.parse_known_args()
    if of_plans and not arguments.plan:
        parser.error(f"unrecognized arguments: {' '.join(of_plans)}")
    try:
        if arguments.schema:
            sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
        elif arguments.plan:
            sys.stdout.write(plan(arguments.params, of_plans).text() + "\n")
        else:
            checked = check(arguments.params, Pipeline.of(arguments.params.parent / "dvc.yaml"))
            _write(checked, code=arguments.code, runs=arguments.runs, resolved=arguments.resolved)
    except ValueError as error:  # ConfigError is one, and what plans cannot split
        for problem in (*str(error).split("\n"), *_outdated(arguments.params.parent)):
            tell(f"error: {problem}")
        sys.exit(BAD_PARAMETERS)


def _write(checked: Checked, *, code: Path | None, runs: Path | None, resolved: Path | None) -> None:
    """The files that were asked for."""
    if code is not None:
        with whole_folder(code) as temporary:
            for module in checked.modules:
                (temporary / f"{module}.txt").write_text(code_digest(f"stages.{module}") + "\n")
    if runs is not None:
        with whole_folder(runs) as temporary:
            for name, seed, sections in checked.of_seeds():
                (temporary / name).mkdir(exist_ok=True)
                write_json(temporary / name / f"{seed}.json", sections)
    if resolved is not None:
        write_yaml(resolved, checked.shared)


def plan(params: Path, arguments: list[str]) -> Estimate:
    """What a comparison takes with these parameters. Raises ConfigError."""
    text = derived(params.resolve().parent, params=params.name)
    if text is None or not (parameters := read_parameters(params)).runs:
        raise ConfigError(f"{params}: compares no {RUNS}; the stages of its dvc.yaml have a --plan each")
    pipeline = Pipeline.of_text(text, params.parent)
    checked, points = check(params, pipeline), len(parameters.values[POINTS])
    return plan_study(pipeline.uses, checked.shared, checked.runs, arguments, seeds=len(checked.seeds), points=points)


def _outdated(folder: Path) -> list[str]:
    """Whether the derived dvc.yaml of a study is that of other parameters, which is what may be wrong with them."""
    dvc_file = folder / "dvc.yaml"
    if folder.resolve().parent != HERE / "pipelines" or not dvc_file.is_file():
        return []
    try:
        text = derived(folder.resolve())
    except ConfigError:  # said already
        return []
    if text is None or text == dvc_file.read_text(encoding="utf-8"):
        return []
    return [
        f"{dvc_file}: is that of other parameters; from the root: python -m stages.runner.project --replace "
        f"{folder.resolve().relative_to(HERE)}"
    ]


def schema() -> dict[str, Any]:
    """Of parameter files, overlays too."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "check")
    return schema_of({module: stage_config(module) for module in modules})


if __name__ == "__main__":
    main()
