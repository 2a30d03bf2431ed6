"""The state of a pre-training: what a run leaves beside its tokenizer, and what another can begin from.

    config.json             the tokenizer's architecture, under `kind: pretrain_state`
    model.safetensors       student, heads, teacher, centres
    optimizer.safetensors   moments and step counts of AdamW

A run can begin from such a folder, or from any tokenizer, official releases included: those have neither heads nor
teacher, so heads begin afresh and the teacher as a copy of the student.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vtp.artefact import ArtefactError, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.distributed import ranks, whole
from vtp.models.base import TrainableTokenizer
from vtp.objectives.pretrain import PretrainObjective
from vtp.objectives.self_distillation import SelfDistillation

KIND = "pretrain_state"
FORMAT_VERSION = 1


def save_pretrain_state(objective: PretrainObjective, optimizer: Mapping[str, Tensor], folder: Path) -> None:
    """Write the whole state; every rank calls this, the first writes."""
    model = {name: whole(tensor) for name, tensor in objective.state_dict().items()}
    state = {name: whole(tensor) for name, tensor in optimizer.items()}
    if not ranks().first:
        return
    with whole_folder(folder) as temporary:
        description = objective.tokenizer.architecture()
        write_json(
            temporary / "config.json", {"kind": KIND, "state_format_version": FORMAT_VERSION, "tokenizer": description}
        )
        save_tensors(temporary / "model.safetensors", model)
        save_tensors(temporary / "optimizer.safetensors", state)


def export_tokenizer(objective: PretrainObjective, folder: Path, *, weights: str) -> None:
    """Write the tokenizer with the `student`'s weights, or with the `teacher`'s where it has some; all ranks call."""
    state = {name: whole(tensor) for name, tensor in objective.tokenizer.state_dict().items()}
    if weights == "teacher" and objective.ssl is not None:
        of_teacher = {name: whole(tensor) for name, tensor in objective.ssl.teacher.state_dict().items()}
        state |= {name: tensor for name, tensor in of_teacher.items() if name in state}
    if ranks().first:
        objective.tokenizer.save(folder, state)


def load_pretrain_state(objective: PretrainObjective, folder: Path) -> dict[str, Tensor]:
    """Load a training state or a tokenizer into `objective`, which is not sharded yet; the optimiser's state, by name.

    Raises ArtefactError naming what does not fit. Parts that the folder does not have stay as they are: a text tower
    that was not trained, heads and teacher of a tokenizer.
    """
    config = read_json(folder / "config.json")
    if config.get("kind") != KIND:
        _load_tokenizer(objective, folder)
        return {}
    if config.get("state_format_version") != FORMAT_VERSION:
        version = config.get("state_format_version")
        raise ArtefactError(f"{folder}: training state of format {version!r}, this code reads {FORMAT_VERSION}")
    _load_parts(objective, load_tensors(folder / "model.safetensors"), folder)
    optimizer = load_tensors(folder / "optimizer.safetensors")
    known = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in optimizer.items() if name.split("/")[1] in known}


def _load_tokenizer(objective: PretrainObjective, folder: Path) -> None:
    theirs = objective.tokenizer.from_pretrained(folder)
    _require_equal(objective.tokenizer, theirs, folder)
    weights = {f"tokenizer.{name}": tensor for name, tensor in theirs.state_dict().items()}
    _load_parts(objective, weights, folder)
    if objective.ssl is not None:
        heads = objective.ssl.heads
        objective.ssl = SelfDistillation(objective.vit, objective.config.ssl)
        objective.ssl.heads.load_state_dict(heads.state_dict())
        objective.ssl.teacher.heads.load_state_dict(heads.state_dict())


def _require_equal(ours: TrainableTokenizer, theirs: TrainableTokenizer, folder: Path) -> None:
    """Other widths show as shapes; other meanings of equal shapes do not. A part that they lack begins afresh."""
    there = theirs.settings()
    for part, settings in ours.settings().items():
        for name, value in settings.items():
            if part in there and (other := there[part][name]) != value:
                raise ArtefactError(f"{folder}: {part}.{name} is {other!r} there, tokenizer.{part}.{name} is {value!r}")


def _load_parts(objective: PretrainObjective, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy what both sides have; a part is taken whole or not at all."""
    state = objective.state_dict()
    parts = {name: _part(name) for name in state}
    offered = {_part(name) for name in tensors}
    for name, part in parts.items():
        if part not in offered:
            continue
        if name not in tensors or tensors[name].shape != state[name].shape:
            problem = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise ArtefactError(
                f"{folder}: {name} {problem}, this run needs {list(state[name].shape)}; "
                "begin from a model of the same architecture, or leave --init-from out"
            )
        state[name].copy_(tensors[name])


def _part(name: str) -> str:
    """tokenizer.trunk.blocks.0.x -> tokenizer.trunk; ssl.teacher.heads.dino.x -> ssl.teacher.heads."""
    pieces = name.split(".")
    return ".".join(pieces[:3] if pieces[0] == "ssl" else pieces[:2])
