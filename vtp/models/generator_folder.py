"""A generator's folder: what it is built from, its weights, and all else that drawing pictures from it takes."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtp.artefact import ArtefactError, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.config import Config
from vtp.layers.latent_space import LatentSpace, LatentStatistics
from vtp.models.captions import TextCondition

FORMAT_VERSION = 2
STATISTICS_FILE, SAMPLER_FILE, TEXT_FILE = "statistics.safetensors", "sampler.json", "text_encoder.json"
OtherSizes = Literal["extrapolate", "interpolate"]  # of positions, on grids of other sizes than the stored one


class LightningDiTConfig(Config):
    """Architecture, under the official argument names; what those have no name for is `vtp_pipeline`'s in the file."""

    input_size: int = Field(ge=1, description="side of the latent grid whose positions are stored")
    patch_size: int = Field(ge=1, description="side of a token in latents")
    in_channels: int = Field(ge=1, description="latent channels")
    hidden_size: int = Field(ge=1, description="width")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="attention heads")
    mlp_ratio: float = Field(ge=0.1, le=100, description="hidden width of the feed-forward layers over the width")
    num_classes: int = Field(ge=0, description="classes; one more entry stands for no class; 0 with text")
    use_qknorm: bool = Field(description="normalise queries and keys per head; steadies training")
    use_swiglu: bool = Field(description="SwiGLU, else GELU feed-forward layers")
    use_rope: bool = Field(description="rotary positions beside the fixed sine table")
    use_rmsnorm: bool = Field(description="RMSNorm with weights, else LayerNorm without")
    wo_shift: bool = Field(description="leave the shifts out of adaLN")
    other_sizes: OtherSizes = Field(description="positions on other grids: plain indices, or scaled to the stored span")
    text: TextCondition | None = Field(None, description="captions in place of classes")

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by 4 and by num_heads {self.num_heads}")
        if self.use_rope and self.hidden_size // self.num_heads % 4:
            raise ValueError(f"use_rope needs heads of a width divisible by 4, got {self.hidden_size}/{self.num_heads}")
        if (self.num_classes == 0) != (self.text is not None):
            raise ValueError(f"num_classes {self.num_classes}: a generator is told classes, or captions as text has it")
        return self


class GeneratorOrigin(Config):
    """`vtp_pipeline` in `config.json`: of the latents that the generator learnt, and what has no official name."""

    format_version: int
    other_sizes: OtherSizes = "extrapolate"
    encoder: str | None = None  # digest; None: the folder does not say
    classes: list[str] | None = None  # names
    untrained: list[int] = Field(default=[])  # labels of those without a training picture
    pixels_per_latent: int | None = Field(default=None, ge=1)  # along a side


# Defaults of the official constructor, for published config files that leave keys out.
OFFICIAL_DEFAULTS: Mapping[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 32,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "use_qknorm": False,
    "use_swiglu": False,
    "use_rope": False,
    "use_rmsnorm": False,
    "wo_shift": False,
}
_TRAINING_ONLY = ("class_dropout_prob", "use_checkpoint")


class GeneratorSize(NamedTuple):
    """Depth, width and heads of a named model."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES: Mapping[str, GeneratorSize] = {
    "S": GeneratorSize(12, 384, 6),
    "B": GeneratorSize(12, 768, 12),
    "L": GeneratorSize(24, 1024, 16),
    "XL": GeneratorSize(28, 1152, 16),
    "1p0B": GeneratorSize(24, 1536, 24),
    "1p6B": GeneratorSize(28, 1792, 28),
}


class StoredGenerator(NamedTuple):
    """What a folder, or a published checkpoint, holds."""

    config: LightningDiTConfig
    weights: dict[str, Tensor]
    where: Path  # the weights are
    space: LatentSpace | None  # of its latents; None: it does not say
    sampler: dict[str, Any] | None  # how to draw from it; None: it does not say
    text_encoder: dict[str, Any] | None  # whose captions it reads; None: it reads none, or does not say


def read_generator(source: Path) -> StoredGenerator:
    """A folder of ours, or an official `.pt` beside its `config.json`, of which `ema` is taken first, or `model`.

    Raises ArtefactError naming what does not fit.
    """
    folder = source if source.is_dir() or source.suffix != ".pt" else source.parent
    weights = folder / "model.safetensors" if source == folder else source
    if not weights.exists() and source == folder and (checkpoints := sorted(folder.glob("*.pt"))):
        if len(checkpoints) > 1:
            names = ", ".join(path.name for path in checkpoints)
            raise ArtefactError(f"{folder} holds several checkpoints ({names}); give the path of one")
        weights = checkpoints[0]
    config, space = _read_config(folder)
    tensors = _official_checkpoint(weights) if weights.suffix == ".pt" else load_tensors(weights)
    sampler, text = (
        read_json(folder / name) if (folder / name).exists() else None for name in (SAMPLER_FILE, TEXT_FILE)
    )
    return StoredGenerator(config, tensors, weights, space, sampler, text)


def save_generator(
    folder: Path,
    config: LightningDiTConfig,
    weights: Mapping[str, Tensor],
    *,
    space: LatentSpace | None,
    sampler: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a generator, given by its state dict: a folder that says all that drawing pictures from it takes.

    config.json               architecture; of its latents the digest of the encoder, and the names of the classes
    model.safetensors         the weights
    statistics.safetensors    what normalised its latents
    sampler.json              how to draw, unless one says otherwise; a record of vtp.flow.SamplerConfig
    text_encoder.json         of one that reads captions: whose features; a record of vtp.models.text_encoder

    `others`, such as slower averages, become folders inside of it with the same files.
    """
    pipeline: dict[str, Any] = {"format_version": FORMAT_VERSION, "other_sizes": config.other_sizes}
    # Official files know neither.
    architecture = config.model_dump(exclude={"other_sizes"} | ({"text"} if config.text is None else set()))
    if space is not None:
        pipeline |= {"encoder": space.encoder, "classes": space.classes}
        pipeline |= {"untrained": space.untrained} if space.untrained else {}
        pipeline |= {"pixels_per_latent": space.pixels_per_latent} if space.pixels_per_latent else {}
    with whole_folder(folder) as temporary:
        for place, state in {".": weights, **(others or {})}.items():
            (temporary / place).mkdir(exist_ok=True)
            write_json(temporary / place / "config.json", architecture | {"vtp_pipeline": pipeline})
            save_tensors(temporary / place / "model.safetensors", state)
            if space is not None:
                space.statistics.save(temporary / place / STATISTICS_FILE)
            for name, record in ((SAMPLER_FILE, sampler), (TEXT_FILE, text_encoder)):
                if record is not None:
                    write_json(temporary / place / name, record)


def _read_config(folder: Path) -> tuple[LightningDiTConfig, LatentSpace | None]:
    """The architecture, and the space of its latents if the folder says it."""
    path = folder / "config.json"
    given = read_json(path)
    if "model_type" in given:
        raise ArtefactError(f"{path}: model_type is {given['model_type']!r}; this is no generator's folder")
    values = dict(OFFICIAL_DEFAULTS) | given
    known = values.pop("vtp_pipeline", {"format_version": FORMAT_VERSION})
    if not isinstance(known, dict) or known.get("format_version") != FORMAT_VERSION:
        version = known.get("format_version") if isinstance(known, dict) else known
        raise ArtefactError(f"{path}: format {version!r}, this code reads {FORMAT_VERSION}; train the generator again")
    pipeline = GeneratorOrigin.parse(known, where=f"{path}:vtp_pipeline")
    if values.pop("learn_sigma", False):
        raise ArtefactError(f"{path}: learn_sigma is not supported; no LightningDiT was published with it")
    for key in _TRAINING_ONLY:
        values.pop(key, None)
    values.setdefault("other_sizes", pipeline.other_sizes)
    config = LightningDiTConfig.parse(values, where=str(path))
    if pipeline.encoder is None or pipeline.classes is None:
        return config, None
    statistics = LatentStatistics.load(folder / STATISTICS_FILE)
    space = LatentSpace(pipeline.encoder, pipeline.classes, statistics, pipeline.untrained, pipeline.pixels_per_latent)
    channels = list(space.statistics.mean.shape)
    if len(space.classes) != config.num_classes or channels != [1, config.in_channels, 1, 1]:
        raise ArtefactError(
            f"{folder}: {len(space.classes)} names and statistics of shape {channels}, config.json "
            f"has {config.num_classes} classes and {config.in_channels} channels; fetch the folder again"
        )
    if space.classes and not space.labels:
        raise ArtefactError(f"{path}: no class had a training picture; fetch the folder again")
    return config, space


def _official_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ArtefactError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ArtefactError(f"{path}: not a checkpoint of plain tensors ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: holds a {type(content).__name__}, expected a dict with ema or model")
    for name in ("ema", "model"):
        if name in content:
            return {key.removeprefix("module."): value for key, value in content[name].items()}
    raise ArtefactError(f"{path}: holds {', '.join(map(str, content))}, expected ema or model")
