"""Validate all parameters before any stage works, and digest the code of every stage.

Every other stage depends on the constant file that this one writes last, so a typo anywhere in `params.yaml` stops
`dvc repro` within seconds and leaves every artefact in place. `--schema` prints the JSON schema of `params.yaml`;
`--preset` writes presets into it (`stages.runner.overlays`).
"""

import argparse
import json
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from stages.runner.fingerprint import code_digest
from stages.runner.overlays import apply_presets
from stages.runner.run import BAD_PARAMETERS, config_class
from vtp.artefact import whole_file, whole_folder
from vtp.config import Config, ConfigError, read_yaml, split_address

COMMAND = re.compile(r"python -m stages\.(\w+)\s+(\S+:\S+)")


class Use(BaseModel):
    """A stage of dvc.yaml that reads a section."""

    module: str
    file: Path
    section: str


def uses(dvc_file: Path) -> list[Use]:
    """Every `python -m stages.<module> FILE:SECTION` of a dvc.yaml."""
    stages = YAML(typ="safe", pure=True).load(dvc_file.read_text(encoding="utf-8"))["stages"]
    found = []
    for stage in stages.values():
        if match := COMMAND.search(" ".join(stage["cmd"].split())):
            file, section = split_address(match[2])
            found.append(Use(module=match[1], file=file, section=section))
    return found


def stage_config(module: str) -> type[Config]:
    """The parameter record of a stage."""
    return config_class(import_module(f"stages.{module}").run)


def problems(params: Path, sections: list[Use]) -> list[str]:
    """Everything that is wrong with a parameter file, a message each."""
    values = read_yaml(params)
    wanted = {use.section: use for use in sections}
    found = [f"{params}: section {name!r} is missing" for name in wanted if name not in values]
    for name in values:
        if name not in wanted:
            found.append(f"{params}: no stage reads section {name!r}{did_you_mean(str(name), wanted)}")
    configs: dict[str, Config] = {}
    for name, use in wanted.items():
        if name in values:
            try:
                configs[use.module] = stage_config(use.module).parse(values[name], where=f"{params}:{name}")
            except ConfigError as error:
                found.append(str(error))
    return found + disagreements(configs)


def disagreements(configs: dict[str, Any]) -> list[str]:
    """What is wrong between sections."""
    found = []
    data, pretrain, understanding = (configs.get(n) for n in ("prepare_data", "pretrain", "evaluate_understanding"))
    reference = configs.get("reference")
    if data and pretrain and (side := data.side) is not None and side < pretrain.tokenizer.image_size:
        found.append(
            f"prepare_data: pictures have image_size {side}, pretrain.tokenizer.image_size is "
            f"{pretrain.tokenizer.image_size}: they would be enlarged; write them at that size, or train at theirs"
        )
    if understanding and data and understanding.prompts.name == "openai" and data.source.name == "openmoji":
        found.append("evaluate_understanding.prompts: openai's are for ImageNet; take {name: data_set}")
    if understanding and pretrain and (side := understanding.probes.size) % pretrain.tokenizer.vision.patch_size:
        patch = pretrain.tokenizer.vision.patch_size
        found.append(f"evaluate_understanding.probes.size: {side} is no multiple of {patch}, the encoder's patch_size")
    generate, judged = configs.get("generate"), configs.get("evaluate_generator")
    if generate and judged and max(judged.counts) > generate.samples:
        found.append(f"evaluate_generator.counts: {max(judged.counts)}, generate.samples is {generate.samples}")
    return found + (_of_reference(configs, reference) if reference else [])


def _of_reference(configs: dict[str, Any], reference: Any) -> list[str]:  # noqa: ANN401 - records by name
    """What is wrong between the statistics of real images and who reads them."""
    found, pretrain = [], configs.get("pretrain")
    if pretrain and reference.image_size != (side := pretrain.tokenizer.image_size):
        found.append(f"reference.image_size: {reference.image_size}, pretrain.tokenizer.image_size is {side}")
    imported = configs.get("import_tokenizer")
    side = imported and getattr(imported.source, "image_size", None)  # VTP's own stands in its folder
    if side and reference.image_size != side:
        found.append(f"reference.image_size: {reference.image_size}, import_tokenizer.source.image_size is {side}")
    for name in ("evaluate_reconstruction", "evaluate_generator"):
        if (reads := configs.get(name)) and reads.split not in reference.splits:
            splits = ", ".join(reference.splits)
            found.append(f"{name}.split: {reads.split!r} is none of reference.splits, which has {splits}")
    if (generator := configs.get("evaluate_generator")) and generator.split in reference.splits:
        kept = reference.splits[generator.split].kept
        if kept < generator.compared:
            found.append(
                f"reference.splits.{generator.split}.kept: {kept}, evaluate_generator compares {generator.compared} "
                "features or more with those of real images"
            )
    return found


def did_you_mean(name: str, known: Any) -> str:  # noqa: ANN401 - any collection of names
    """`; did you mean X?` for the nearest known name, or nothing."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def schema(sections: list[Use]) -> dict[str, Any]:
    """The JSON schema of a parameter file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "params.yaml",
        "type": "object",
        "additionalProperties": False,
        "required": [use.section for use in sections],
        "properties": {use.section: stage_config(use.module).model_json_schema() for use in sections},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m stages.check", description=__doc__)
    parser.add_argument("params", type=Path)
    parser.add_argument("--valid", type=Path, help="written when all is well")
    parser.add_argument("--code", type=Path, help="folder for one code digest per stage")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the parameters and exit")
    parser.add_argument(
        "--preset", type=Path, nargs="+", help="write presets into the parameters, print changes and exit"
    )
    arguments = parser.parse_args()
    stages = uses(arguments.params.parent / "dvc.yaml")
    sections = [use for use in stages if use.file == arguments.params]
    if arguments.preset:
        # Those of any file that can take the place of the one in dvc.yaml.
        sys.exit(_apply(arguments.params, arguments.preset, stages))
    if arguments.schema:
        json.dump(schema(sections), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    try:
        found = problems(arguments.params, sections)
    except ConfigError as error:
        found = [str(error)]
    if found:
        _complain(found)
        sys.exit(BAD_PARAMETERS)
    with whole_folder(arguments.code) as temporary:
        for use in sections:
            (temporary / f"{use.module}.txt").write_text(code_digest(f"stages.{use.module}") + "\n")
    with whole_file(arguments.valid) as temporary:
        temporary.write_text("valid\n")


def _apply(params: Path, presets: list[Path], sections: list[Use]) -> int:
    """Write presets into a parameter file; the exit status."""
    try:
        changes = apply_presets(params, presets, check=lambda path: problems(path, sections))
    except ConfigError as error:
        _complain([str(error)])
        return BAD_PARAMETERS
    sys.stdout.write("".join(f"{change}\n" for change in changes) or f"{params} has these values already\n")
    return 0


def _complain(found: list[str]) -> None:
    sys.stderr.write("".join(f"error: {problem}\n" for message in found for problem in message.splitlines()))


if __name__ == "__main__":
    main()
