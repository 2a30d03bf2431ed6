"""`info`: what a folder is, as far as it says so itself. Contents are read where that is what verifies it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vtp.artefact import ArtefactError, digest, files, read_json, reading_tensors, siblings
from vtp.commands.pictures import SUFFIX, describe_latents
from vtp.data.captions import CachedCaptions
from vtp.data.latents import LatentsArtefact, read_latents_config
from vtp.data.shards import Manifest
from vtp.evaluation.features import features_name
from vtp.evaluation.reference import Reference
from vtp.evaluation.samples import Samples
from vtp.models.base import Tokenizer
from vtp.models.frozen_backbone import FrozenBackbone
from vtp.models.lightningdit import LightningDiT
from vtp.models.loading import load_decoder, load_tokenizer
from vtp.models.scene_detector import SceneDetector
from vtp.objectives.pretrain_state import KIND as PRETRAIN_STATE

Lines = dict[str, str]  # what is said, by its name
SHOWN = 5  # names of classes
MAKERS = {  # stages by the kind of what they make, for provenance
    "tokenizer": ("pretrain", "import_tokenizer"),
    "training state": ("pretrain",),
    "milestones": ("pretrain",),
    "decoder": ("tune_decoder",),
    "latents": ("cache_latents",),
    "generator": ("train_generator",),
    "samples": ("generate",),
    "shards": ("prepare_data",),
    "reference": ("reference",),
    "captions": ("cache_captions",),
    "detector": ("train_detector",),
}


def info(path: Path) -> str:
    """A line for each thing that is known of an artefact.

    Raises ArtefactError or ConfigError that says what is wrong with a folder that is damaged, or is none, OSError.
    """
    if not path.exists():
        raise ArtefactError(f"{path}: no such folder; {siblings(path)}")
    kind, describe = _kind(path)
    lines = {"path": str(path), "kind": kind} | describe(path)
    if path.is_dir():
        lines |= {"size": _bytes(path)} | _provenance(path, MAKERS.get(kind, ()), lines.get("encoder"))
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in lines.items())


def _kind(path: Path) -> tuple[str, Callable[[Path], Lines]]:
    """What it is, by what only that has, and who describes it."""
    if path.is_file():
        if path.suffix == SUFFIX:
            return "file of latents", _latents_file
        raise ArtefactError(f"{path}: a file; name the folder of an artefact, or a file of latents, ending in {SUFFIX}")
    if (path / "manifest.json").exists():
        return "shards", _shards
    if (path / "index.json").exists():
        return "milestones", _milestones
    if (path / "counters.json").exists():
        return "checkpoint", _checkpoint
    if any(path.glob("step-*/counters.json")):
        return "checkpoints", _checkpoints
    if (path / "config.json").exists():
        values = read_json(path / "config.json")
        for key, kind, describe in _BY_KEY:
            if key in values:
                return kind, describe
        raise ArtefactError(f"{path / 'config.json'}: has {_some(values)}, and is that of no artefact of this project")
    known = [entry.name for entry in sorted(path.iterdir()) if _described(entry)]
    held = [entry.name for entry in sorted(path.iterdir())]
    where = f"its folders {_some(known)} are; name one" if known else f"it holds {_some(held) if held else 'nothing'}"
    raise ArtefactError(f"{path}: no artefact: neither config.json nor manifest.json is there; {where}")


def _described(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "manifest.json", "index.json", "counters.json"))


def _tokenizer(folder: Path) -> Lines:
    tokenizer = load_tokenizer(folder)
    channels, height, width = tokenizer.latent_shape
    side = tokenizer.image_size
    config = read_json(folder / "config.json")
    lines = {"model": _model(tokenizer, config), "format": _tokenizer_format(config)}
    lines["images"] = f"{side} x {side} pixels"
    lines["latents"] = f"{channels} x {height} x {width}, {tokenizer.pixels_per_latent} pixels along a side each"
    lines["compression"] = (
        f"{3 * side * side / (channels * height * width):.3g} numbers of an image to one of its latents"
    )
    lines["parameters"] = _parameters(tokenizer)
    blocks = f"{tokenizer.num_blocks} blocks, {tokenizer.feature_dim} wide"
    lines["features"] = blocks if tokenizer.has_features else "none beside its latents"
    return lines | {"encoder": tokenizer.encoder_digest()}


def _model(tokenizer: Tokenizer, config: Mapping[str, Any]) -> str:
    if isinstance(tokenizer, FrozenBackbone):
        return f"frozen backbone {tokenizer.config.model}"
    if config.get("model_type") == "vtp":
        return f"VTP, {'with' if config.get('train_clip') else 'without'} a text tower"
    return "AutoencoderKL"


def _tokenizer_format(config: Mapping[str, Any]) -> str:
    if config.get("model_type") != "vtp":
        return str(config.get("format_version", "of diffusers"))
    ours = config.get("vtp_pipeline")
    return f"{ours['format_version']}, in the official layout" if ours else "official layout"


def _decoder(folder: Path) -> Lines:
    config, decoder = load_decoder(folder)
    lines = {"model": f"{config.decoder.name}, in place of a tokenizer's own", "format": str(config.format_version)}
    return lines | {"parameters": _parameters(decoder), "encoder": config.encoder}


def _generator(folder: Path) -> Lines:
    model = LightningDiT.from_pretrained(folder)
    config = model.config
    ours = read_json(folder / "config.json").get("vtp_pipeline")
    lines = {
        "model": f"LightningDiT, {config.depth} blocks, {config.hidden_size} wide, {config.num_heads} heads",
        "format": str(ours["format_version"]) if ours else "official layout",
        "latents": f"{' x '.join(map(str, model.latent_shape))}, tokens of {config.patch_size} x {config.patch_size}",
        "parameters": _parameters(model),
    }
    names = model.space.classes if model.space is not None else []
    lines["classes"] = _classes(names) if names else f"{config.num_classes}, without names"
    sampler = model.sampler
    lines["sampler"] = "none" if sampler is None else f"{sampler.get('solver')}, {sampler.get('steps')} steps"
    lines["encoder"] = model.space.encoder if model.space is not None else "not said: of whose latents is unknown"
    inside = [entry.name for entry in sorted(folder.iterdir()) if (entry / "config.json").is_file()]
    return lines | ({"also there": ", ".join(inside)} if inside else {})


def _latents(folder: Path) -> Lines:
    config: LatentsArtefact = read_latents_config(folder)
    _require(folder, config.files)
    if not config.splits:
        raise ArtefactError(f"{folder / 'config.json'}: has no split; run cache_latents again")
    *_, shapes = [
        _latent_shapes(folder / split.shards[0]) for split in config.splits.values()
    ]  # the last are of squares
    flips = "with those of flipped images" if "flipped" in shapes else "without those of flipped images"
    lines = {"format": str(config.format_version), "images": f"{config.image_size} x {config.image_size} pixels"}
    if config.sizes is not None:
        lines["images"] += f", those of training of up to {len(config.sizes.all)} sizes, WIDTHxHEIGHT"
    lines["latents"] = f"{' x '.join(map(str, shapes['latents'][1:]))} in {config.dtype}, {flips}"
    lines |= _splits(
        {name: f"{split.samples:,} in {_count(split.shards, 'file')}" for name, split in config.splits.items()}
    )
    lines["statistics"] = f"of {config.statistics_images:,} images"
    return lines | {"classes": _classes(config.classes), "encoder": config.encoder}


def _samples(folder: Path) -> Lines:
    samples = Samples(folder)
    config = samples.config
    _require(folder, config.files)
    shape = _latent_shapes(folder / config.shards[0].name)["latents"][1:]
    lines = {"format": str(config.format_version), "latents": " x ".join(map(str, shape))}
    lines["settings"] = ", ".join(f"{name} ({samples.guidance(name)})" for name in config.settings) + ", and noise"
    lines["samples"] = f"{config.samples:,} of each setting, labels {config.labels}"
    return lines | {"classes": _classes(config.classes), "encoder": config.encoder}


def _reference(folder: Path) -> Lines:
    reference = Reference.load(folder)
    config = reference.config
    _require(folder, config.files)
    lines = {"format": str(config.format_version), "features": ", ".join(map(features_name, config.features))}
    lines["images"] = f"{config.image_size} x {config.image_size} pixels, cropped by {config.crop}"
    said = {
        name: f"{split.count:,} {'labelled ' if split.labelled else ''}images, features of {split.kept:,} kept"
        for name, split in config.splits.items()
    }
    return lines | _splits(said) | {"data": config.data}


def _captions(folder: Path) -> Lines:
    cached = CachedCaptions(folder)
    config = cached.config
    lines = {"captions": f"{len(cached):,}, in {_count(config.shards, 'file')}"}
    lines["features"] = f"{config.width} numbers for each of {config.length} tokens at most, bfloat16"
    return lines | {"text encoder": f"{config.text_encoder['encoder']['name']}, {config.text_encoder['digest']}"}


def _detector(folder: Path) -> Lines:
    model = SceneDetector.from_pretrained(folder)
    lines = {"model": f"detector of scenes, {model.config.width} wide, cells of {model.config.stride} pixels"}
    lines["images"] = f"{model.image_size} pixels along the short edge"
    return lines | {"parameters": _parameters(model), "classes": _classes(model.classes)}


def _shards(folder: Path) -> Lines:
    manifest = Manifest.load(folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            _require(folder, [Path(shard.name).with_suffix(".parquet").name])
            if manifest.location is None:
                _require(folder, [shard.name])
                if (there := (folder / shard.name).stat().st_size) != shard.bytes:
                    raise ArtefactError(f"{folder / shard.name}: {there:,} bytes, manifest.json says {shard.bytes:,}")
    side = manifest.image_size
    lines = {"format": str(manifest.format_version), "source": manifest.source}
    lines["images"] = f"{side} x {side} pixels" if side else "of their own sizes"
    said = {
        name: f"{split.samples:,} in {_count(split.shards, 'shard')}, {split.bytes / 1e6:,.1f} MB"
        for name, split in manifest.splits.items()
    }
    lines |= _splits(said) | {"classes": _classes(manifest.classes)}
    lines["lies at"] = manifest.location or "beside the manifest"
    return lines | (
        {"attribution": manifest.attribution.strip().splitlines()[0]} if manifest.attribution.strip() else {}
    )


def _pretrain_state(folder: Path) -> Lines:
    config = read_json(folder / "config.json")
    if config["kind"] != PRETRAIN_STATE:
        raise ArtefactError(f"{folder / 'config.json'}: kind is {config['kind']!r}, expected {PRETRAIN_STATE!r}")
    counts = {}
    for name in ("model", "optimizer"):
        _require(folder, [f"{name}{SUFFIX}"])
        counts[name] = sum(math.prod(shape) for shape in _shapes(folder / f"{name}{SUFFIX}").values())
    lines = {"model": "tokenizer, heads, teacher and optimiser of a pre-training"}
    lines["format"] = str(config.get("state_format_version"))
    return lines | {"numbers": ", ".join(f"{count / 1e6:,.3g} M in {name}{SUFFIX}" for name, count in counts.items())}


def _milestones(folder: Path) -> Lines:
    names = read_json(folder / "index.json").get("milestones")
    if not isinstance(names, list):
        raise ArtefactError(
            f"{folder / 'index.json'}: has no list `milestones`; it is that of no artefact of this project"
        )
    _require(folder, [f"{name}/config.json" for name in names])
    return {"tokenizers": ", ".join(map(str, names)) or "none was chosen or reached"}


def _checkpoint(folder: Path) -> Lines:
    digests = read_json(folder / "digests.json")
    for name, expected in digests.items():
        if digest(folder / name) != expected:
            raise ArtefactError(f"{folder / name}: not the file that was written; the checkpoint before it is used")
    counters = read_json(folder / "counters.json")
    shown = ", ".join(f"{name} {value}" for name, value in counters.items() if isinstance(value, int | float | str))
    return {"step": folder.name.removeprefix("step-").lstrip("0") or "0", "counters": shown or "none", "state": "whole"}


def _checkpoints(folder: Path) -> Lines:
    paths = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    return {path.name: f"{len(files(path))} files, {_bytes(path)}" for path in paths}


def _latents_file(path: Path) -> Lines:
    shape = _latent_shapes(path)["latents"]
    said = describe_latents(path)
    lines = {"latents": " x ".join(map(str, shape))}
    if said is None:
        return lines | {"encoder": "not said"}
    lines |= {"format": str(said.format_version), "images": f"{said.size} x {said.size} pixels"}
    return lines | {"pictures": _some(said.pictures), "encoder": said.encoder}


# A key of config.json that only this kind has; the first that is there counts.
_BY_KEY: list[tuple[str, str, Callable[[Path], Lines]]] = [
    ("model_type", "tokenizer", _tokenizer),
    ("_class_name", "tokenizer", _tokenizer),
    ("kind", "training state", _pretrain_state),
    ("decoder", "decoder", _decoder),
    ("settings", "samples", _samples),
    ("crop", "reference", _reference),
    ("captions", "captions", _captions),
    ("detector", "detector", _detector),
    ("statistics_images", "latents", _latents),
    ("hidden_size", "generator", _generator),
    ("in_channels", "generator", _generator),
    ("vtp_pipeline", "generator", _generator),
]


def _provenance(folder: Path, makers: tuple[str, ...], encoder: str | None) -> Lines:
    """The file of the stage that made it, where recipes put it: one that is alone in naming such a stage.

    A file that names another encoder is that of another tokenizer or decoder.
    """
    for parent in folder.resolve().parents[:2]:
        found = {}
        for path in sorted((parent / "provenance").glob("*.json")):
            values = read_json(path)
            facts = values.get("facts")
            facts = facts if isinstance(facts, dict) else {}
            if values.get("stage") in makers and facts.get("encoder", encoder) == encoder:
                found[path] = f"stage {values['stage']}" + "".join(
                    f", {name} {value}" for name, value in facts.items() if name != "encoder"
                )
        if len(found) == 1:
            ((path, said),) = found.items()
            return {"provenance": f"{path}: {said}"}
        if found:
            return {"provenance": f"one of {', '.join(path.name for path in found)} in {parent / 'provenance'}"}
    return {"provenance": "no file of the stage that made it lies in a folder `provenance` beside it"} if makers else {}


def _require(folder: Path, names: Any) -> None:  # noqa: ANN401 - any iterable of names
    for name in names:
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name}: no such file; {siblings(folder / name)}; fetch the folder again")


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors of a file, of which the head alone is read. Raises ArtefactError for a file that is cut."""
    from safetensors import safe_open

    with reading_tensors(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping


def _latent_shapes(path: Path) -> dict[str, list[int]]:
    """The same of a file that holds latents. Raises ArtefactError for another one."""
    shapes = _shapes(path)
    if len(shapes.get("latents", ())) != 4:
        raise ArtefactError(f"{path}: holds {_some(shapes) or 'nothing'}, and no latents [N, d, h, w]")
    return shapes


def _parameters(module: nn.Module) -> str:
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in module.named_children()}
    largest = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])[:4]
    total = sum(each.numel() for each in module.parameters())
    parts = ", ".join(f"{name} {counts[name]:,}" for name in largest)
    return f"{total:,}{f' ({parts})' if len(largest) > 1 else ''}"


def _splits(said: Mapping[str, str]) -> Lines:
    return {f"split {name}": text for name, text in said.items()}


def _classes(names: list[str]) -> str:
    return f"{len(names):,}: {_some(names)}" if names else "none"


def _some(names: Any) -> str:  # noqa: ANN401 - any collection of names
    names = [str(name) for name in names]
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _count(things: list[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _bytes(folder: Path) -> str:
    paths = files(folder)
    total = sum(path.stat().st_size for path in paths)
    return (
        f"{total / 1e6:,.1f} MB in {_count(paths, 'file')}"
        if total >= 1e5
        else f"{total:,} bytes in {_count(paths, 'file')}"
    )
