"""The folders of pipelines/ as DVC projects of their own, and the dvc.yaml files that are derived.

    python -m stages.runner.project pipelines/NAME ...   make these folders projects; without a name, all of them
    python -m stages.runner.project --replace            write derived dvc.yaml files over those that differ

Each folder is a project, so that DVC speaks of that study alone; all share one cache, where DVC finds the run of a stage
that another project made by what went in. `stages` and `vtp` are links to the code, so that DVC watches it, and an
experiment in a temporary copy runs its own.

Derived are `imagenet`, `own_data` and `vtp`, whose stages are the root's with another source, and every folder whose
params.yaml compares runs, whose stages are those of `pipelines/comparison.dvc.yaml`. A comparison whose parameters prepare
no data reads shards that lie there: captioned ones for pre-training, labelled ones for all else. Where runs say
`import_tokenizer`, each takes its tokenizer in from elsewhere, and none is pre-trained. With a section `cache_captions`
generators are told captions, in the features of one text encoder for all: the tower of the run `clip` and the first seed.
"""

import re
import sys
from argparse import ArgumentParser
from pathlib import Path

from vtp.artefact import whole_file
from vtp.config import ConfigError, read_yaml
from vtp.params import RUNS, read_parameters
from vtp.texts import message, shown

CONFIG = """\
[core]
    analytics = false
    autostage = true
[cache]
    dir = ../../../.dvc/cache
    type = "reflink,hardlink,symlink,copy"
"""
IGNORED = "/config.local\n/tmp\n/cache\n"
HERE = Path(__file__).resolve().parents[2]  # a study has a link to the code
CHAIN = "../../params.yaml, ../overlays"  # what parameter files of studies are based on
DERIVED_FROM_ROOT = {
    "imagenet": "# The whole recipe on ImageNet: the stages are those of the root, and prepare_data reads data/imagenet.",
    "own_data": "# The whole recipe on own pictures: the stages of the root, and prepare_data reads what params.yaml names.",
    "vtp": "# The paper's recipe: the stages are those of the root, on captioned images first and labelled ones after.",
}
IMPORT = """\
  import_tokenizer:
{matrix}
    desc: take the tokenizer of a run in, and give it a decoder with fresh weights where it has none
    cmd: >-
      python -m stages.import_tokenizer {file}:import_tokenizer
      --tokenizer {milestones}/end --provenance {provenance}/import_tokenizer.json
    params: ["{file}": [import_tokenizer]]
    deps: [work/check/code/import_tokenizer.txt]
    outs: ["{milestones}/end", "{provenance}/import_tokenizer.json"]

"""
TEXT_ENCODER = "work/clip/${seeds[0]}/tokenizer"
CAPTIONS = f"""\
  cache_captions:
    desc: features of all captions, by one text encoder for all runs
    cmd: >-
      python -m stages.cache_captions work/check/params.yaml:cache_captions
      --shards work/shards --text-encoder {TEXT_ENCODER}
      --captions work/captions --provenance work/provenance/cache_captions.json
    params: [work/check/params.yaml: [cache_captions]]
    deps: [work/check/code/cache_captions.txt, work/shards, "{TEXT_ENCODER}"]
    outs: [work/captions, work/provenance/cache_captions.json]

"""
DETECTOR = """\
  train_detector:
    desc: learn to read composed scenes, by which samples of their captions are judged
    cmd: >-
      python -m stages.train_detector work/check/params.yaml:train_detector
      --detector work/detector --metrics work/metrics/detector.json --curves plots/train_detector.csv
      --provenance work/provenance/train_detector.json
    params: [work/check/params.yaml: [train_detector]]
    deps: [work/check/code/train_detector.txt]
    outs: [work/detector, work/metrics/detector.json, work/provenance/train_detector.json]
    plots: [plots/train_detector.csv: {cache: false}]

"""
# What stages behind take with captions: flags on the command, and deps.
TOLD = {
    "train_generator": {"captions": "work/captions"},
    "generate": {"captions": "work/captions", "latents": "work/${item.run}/${item.seed}/${item.at}/latents"},
    "evaluate_generator": {"shards": "work/shards", "clip": TEXT_ENCODER},
}
SOURCES = {"imagenet": "data/imagenet", "own_data": '"${pictures}"'}  # which DVC reads in params.yaml


def update(folder: Path, root: Path = HERE, *, replace: bool = False) -> list[Path]:
    """Make `folder` a project; the files that were written.

    Raises ConfigError when it is none of pipelines/, when it has no params.yaml, and, unless told to `replace`, when it has
    a dvc.yaml that is not the derived one: it may hold somebody's edits.
    """
    if folder.resolve().parent != root / "pipelines":
        raise ConfigError(f"{folder}: a study is a folder of {root / 'pipelines'}")
    folder, params = folder.resolve(), folder / "params.yaml"
    if not params.is_file():
        raise ConfigError(f"{params}: no such file; write the study's changes there first")
    wanted = {folder / ".dvc" / ".gitignore": IGNORED}
    wanted[folder / ".dvcignore"] = (root / ".dvcignore").read_text(encoding="utf-8")
    if not (folder / ".dvc" / "config").is_file():  # else it may hold a team's remote
        wanted[folder / ".dvc" / "config"] = CONFIG
    if (text := derived(folder, root)) is not None:
        wanted[dvc_file := folder / "dvc.yaml"] = text
        if not replace and dvc_file.is_file() and dvc_file.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{dvc_file} has stages of its own; --replace writes the derived ones over them")
    elif not (folder / "dvc.yaml").is_file():
        raise ConfigError(
            f"{params}: no `runs`, and no dvc.yaml beside it; a study that compares no runs writes its own"
        )
    for package in ("stages", "vtp"):
        _link(folder / package, Path("..", "..", package))
    return [path for path, text in wanted.items() if _write(path, text)]


def derived(folder: Path, root: Path = HERE, params: str = "params.yaml") -> str | None:
    """The dvc.yaml of a study that has none of its own making, with these parameters; None for the others."""
    if folder.name in DERIVED_FROM_ROOT:
        return _from_root(folder.name, (root / "dvc.yaml").read_text(encoding="utf-8"))
    if (runs := read_yaml(folder / params).get(RUNS)) is None:
        return None
    text = (root / "pipelines/comparison.dvc.yaml").read_text(encoding="utf-8")
    sections = read_parameters(folder / params).values
    told = "cache_captions" in sections
    if told:
        if "clip" not in runs:
            raise ConfigError(f"{folder / params}: no run `clip`, whose text tower reads the captions of all; add it")
        text = _told_captions(text, detector="train_detector" in sections)
    if "prepare_data" not in sections:
        text = _on_given_shards(text, labelled=("evaluate_understanding",) if told else ())
    return _importing(text) if any("import_tokenizer" in (changes or ()) for changes in runs.values()) else text


def _importing(text: str) -> str:
    """The same stages behind tokenizers that were trained elsewhere."""
    before, _, rest = text.partition("  pretrain:\n")
    pretrain, separator, rest = rest.partition("  tune_decoder:\n")
    written = {
        "matrix": r"^( +matrix: .*)$",
        "file": r"stages\.pretrain (\S+):pretrain",
        "milestones": r"--milestones (\S+)",
        "provenance": r"--provenance (\S+)/pretrain\.json",
    }
    found = {name: re.search(pattern, pretrain, re.MULTILINE) for name, pattern in written.items()}
    if missing := [name for name, match in found.items() if match is None]:
        raise ConfigError(
            f"comparison.dvc.yaml: its stage pretrain has no {missing[0]}; bring stages/runner/project.py up to date with it"
        )
    return before + IMPORT.format(**{name: match[1] for name, match in found.items() if match}) + separator + rest


def _told_captions(text: str, *, detector: bool) -> str:
    """The same stages for generators that are told captions, and where asked for the detector that judges scenes."""
    for stage, folders in TOLD.items():
        judge = {"detector": "work/detector"} if detector and stage == "evaluate_generator" else {}
        given = folders | judge
        before, separator, rest = text.partition(f"  {stage}:\n")
        own, following, rest = rest.partition("\n\n")
        flags = "".join(f"      --{name} {path}\n" for name, path in given.items())
        deps = "".join(f'      - "{path}"\n' for path in given.values())
        code = f"      - work/check/code/{stage}.txt\n"
        own = _replaced(_replaced(own, "      --provenance", f"{flags}      --provenance"), code, code + deps)
        text = before + separator + own + following + rest
    own = CAPTIONS + (DETECTOR if detector else "")
    return _replaced(text, "  cache_latents:\n", f"{own}  cache_latents:\n")


def _from_root(study: str, text: str) -> str:
    """The root's dvc.yaml with another source of data."""
    _, separator, stages = text.partition("stages:\n")
    note = "# Derived from the root's by `python -m stages.runner.project`; README.md says where the data lie."
    checked = "deps: [params.yaml, vtp, stages]"
    stages = _replaced(stages, checked, f"deps: [params.yaml, {CHAIN}, vtp, stages]")
    text = f"{DERIVED_FROM_ROOT[study]}\n{note}\n{separator}{stages}"
    before, _, rest = text.partition("  prepare_data:\n")
    prepare, _, rest = rest.partition("  reference:\n")
    if (source := SOURCES.get(study)) is not None:
        prepare = _replaced(prepare, "--shards work/shards", f"--source {source} --shards work/shards")
        prepare = _replaced(prepare, "prepare_data.txt]", f"prepare_data.txt, {source}]")
        prepare = _replaced(prepare, "compose captioned pictures into shards", "write the pictures as canonical shards")
        return f"{before}  prepare_data:\n{prepare}  reference:\n{rest}"
    return _on_given_shards(text)


def _on_given_shards(text: str, *, labelled: tuple[str, ...] = ()) -> str:
    """Without the stage that makes shards: captioned ones are there for pre-training, and labelled ones for all else.

    Or labelled ones for those stages alone.
    """
    before, _, rest = text.partition("  prepare_data:\n")
    stages = re.split(r"(?m)^  (?=\w+:$)", rest.partition("  reference:\n")[2])
    found = ["reference:\n" + stages[0], *stages[1:]]
    _replaced(text, "  pretrain:\n", "")
    for number, stage in enumerate(found):
        name = stage.partition(":")[0]
        captioned = name not in labelled if labelled else name == "pretrain"
        found[number] = stage.replace("work/shards", "data/captioned" if captioned else "data/labelled")
    return before + "".join(f"  {stage}" for stage in found)


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ConfigError(f"dvc.yaml: expected {old!r} in it; bring stages/runner/project.py up to date with it")
    return text.replace(old, new)


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    if link.exists() and not link.is_symlink():
        raise ConfigError(f"{link}: is to be a link to {target}, and is a file or a folder; move it away")
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _write(path: Path, text: str) -> bool:
    """Whether the file was another one before."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def main() -> None:
    """Command line."""
    parser = ArgumentParser("python -m stages.runner.project", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="*", help="a study, such as pipelines/scaling; all"
    )
    parser.add_argument("--replace", action="store_true", help="write derived dvc.yaml files over those that differ")
    arguments = parser.parse_args()
    every = sorted(path.parent for path in (HERE / "pipelines").glob("*/params.yaml"))
    try:
        for folder in arguments.folders or every:
            for path in update(folder, replace=arguments.replace):
                print(shown(f"{path.relative_to(HERE)}: written"))
    except ConfigError as error:
        sys.exit(message(f"error: {error}"))


if __name__ == "__main__":
    main()
