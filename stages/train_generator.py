"""Train a LightningDiT by flow matching, told classes or captions (paper 4.1, 5): on cached latents, or on pictures that
are encoded as they come.

These may be of several sizes (paper 5): a batch is of one size, the same on all devices. Times of `auto` follow that size,
and the FLOPs of a step, by which lengths may be given, are those that are expected over all sizes, encoding included.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from stages.monitors.generator import FidReference, GeneratorMilestones, GeneratorMonitor, GeneratorMonitorConfig
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError, write_json
from vtp.config import Config, ConfigError, number_name
from vtp.data.batches import RankSlice, count_micro_batches
from vtp.data.sized_batches import EncodedImagesConfig
from vtp.distributed import ranks
from vtp.draws import address
from vtp.evaluation.features import build_features
from vtp.evaluation.reference import Reference
from vtp.host import Host
from vtp.models.base import Tokenizer
from vtp.models.captions import TextCondition
from vtp.models.generator_folder import SIZES, GeneratorSize, LightningDiTConfig, OtherSizes, save_generator
from vtp.models.lightningdit import LightningDiT
from vtp.models.loading import load_tokenizer
from vtp.objectives.generation import GenerationObjective, GenerationObjectiveConfig
from vtp.step import OptimConfig
from vtp.training.conditioning import AnyCondition, Conditioning, build_conditioning
from vtp.training.fit import Run, TrainingConfig, fit, run_length
from vtp.training.latent_source import Batching, LatentSource, cached_source, encoded_source
from vtp.training.parallelize import parallelize


class NamedSize(Config):
    """A size of LightningDiT: S 33 M parameters, B 131 M, L 458 M, XL 675 M, 1p0B, 1p6B (64 channels, patch 1)."""

    name: Literal["S", "B", "L", "XL", "1p0B", "1p6B"]


class OwnSize(Config):
    """Any other size."""

    name: Literal["own"]
    hidden_size: int = Field(ge=1, description="width of the transformer")
    depth: int = Field(ge=1, description="number of blocks")
    num_heads: int = Field(ge=1, description="number of attention heads")


class GeneratorConfig(Config):
    """LightningDiT; latent size, channels and classes come from the latents."""

    condition: AnyCondition
    size: Annotated[NamedSize | OwnSize, Field(discriminator="name")]
    mlp_ratio: float = Field(ge=0.1, le=100, description="hidden width of the feed-forward layers over the width")
    patch_size: int = Field(ge=1, description="side of a token in latents")
    use_qknorm: bool = Field(description="normalise queries and keys per head; steadies training")
    use_swiglu: bool = Field(description="SwiGLU in the feed-forward layers, else GELU")
    use_rope: bool = Field(description="rotary positions beside the fixed sine table")
    use_rmsnorm: bool = Field(description="RMSNorm with weights, else LayerNorm without")
    wo_shift: bool = Field(description="leave the shifts out of adaLN")
    other_sizes: OtherSizes = Field(
        description="positions on grids of other sizes than the smallest square's: plain indices, or scaled to its span"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        self.architecture((1, self.patch_size, self.patch_size), classes=1, text=None)
        return self

    def architecture(
        self, shape: tuple[int, int, int], *, classes: int, text: TextCondition | None
    ) -> LightningDiTConfig:
        """For latents (d, h, w), told one of so many classes, or captions."""
        channels, side, _ = shape
        own = self.size
        size = GeneratorSize(own.depth, own.hidden_size, own.num_heads) if isinstance(own, OwnSize) else SIZES[own.name]
        options = self.model_dump(exclude={"size", "condition"}) | size._asdict()
        known = {"num_classes": 0 if text else classes, "text": text}
        return LightningDiTConfig(input_size=side, in_channels=channels, **known, **options)


class TrainGenerator(Config):
    """The section `train_generator`."""

    seed: int = Field(description="seed of weights, data, noise and timesteps")
    residual: Literal["float32", "bfloat16"] = Field(
        description="precision of what blocks add to, in training and its monitors; bfloat16 moves half of the bytes, and "
        "asks for training.precision bfloat16"
    )
    batch_size: int = Field(ge=1, description="latents of a step over all devices")
    images: EncodedImagesConfig | None = Field(
        description="pictures of the command's --shards that are encoded as they come; null: cached latents"
    )
    model: GeneratorConfig
    objective: GenerationObjectiveConfig
    optim: OptimConfig
    training: TrainingConfig
    monitor: GeneratorMonitorConfig

    @model_validator(mode="after")
    def _residual_fits_the_layers(self) -> Self:
        if self.residual == "bfloat16" and self.training.precision != "bfloat16":
            raise ValueError(
                f"residual is bfloat16 and training.precision {self.training.precision}: set both to bfloat16, or residual "
                "to float32"
            )
        return self

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """What a LightningDiT's `residual` is."""
        return torch.bfloat16 if self.residual == "bfloat16" else None


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: TrainGenerator,
    *,
    latents: Annotated[
        OptionalInput,
        "folder of cache_latents, which the generator learns, or whose statistics it takes; default: none",
    ] = None,
    shards: Annotated[
        OptionalInput, "folder of prepare_data, whose pictures are encoded as they come; default: none"
    ] = None,
    captions: Annotated[OptionalInput, "folder of cache_captions, for a generator that is told captions"] = None,
    text_encoder: Annotated[
        OptionalInput, "folder of the text encoder, where condition.features is `encoded`; see cache_captions"
    ] = None,
    tokenizer: Annotated[Input, "folder of the tokenizer of the latents"],
    decoder: Annotated[
        OptionalInput, "folder of a tuned decoder, through which monitors look; default: the tokenizer's own"
    ] = None,
    reference: Annotated[
        OptionalInput, "folder of the stage reference, which monitor.fid compares with; not needed without it"
    ] = None,
    generator: Annotated[Output, "folder for the generator, with slower averages and milestones"],
    metrics: Annotated[Output, "JSON file for the figures of the training"],
    curves: Annotated[Output, "CSV file for losses by step"],
    picture: Annotated[Output, "PNG file for samples of fixed noise along the training"],
    host: Host,
) -> None:
    rank_slice = RankSlice(*ranks(), micro_batches_of(config, ranks().size, host.micro_batch))
    pixels = load_tokenizer(tokenizer, decoder).to(host.device)
    pixels.require_decoder(tokenizer)
    batching = Batching(config.batch_size, config.seed, rank_slice)
    told = build_conditioning(config.model.condition, captions=captions, text_encoder=text_encoder, host=host)
    source = _source(config, told, batching, pixels, latents, shards, host)
    if source.space.encoder != pixels.encoder_digest():
        raise ArtefactError(
            f"{latents} holds the latents of another encoder than that of {tokenizer}; run cache_latents again"
        )
    patch_size = config.model.patch_size
    if uneven := [shape for shape in source.shapes if shape[1] % patch_size or shape[2] % patch_size]:
        raise ConfigError(
            f"train_generator.model.patch_size: {patch_size}, and some latents are {' x '.join(map(str, uneven[0]))}; set "
            "cache_latents.sizes.multiple to a multiple of it times the pixels per latent"
        )

    torch.manual_seed(address(config.seed, "weights"))
    classes = len(source.space.classes)
    model = LightningDiT(config.model.architecture(source.square, classes=classes, text=told.text))
    model.residual = config.residual_dtype
    objective = GenerationObjective(model, config.objective)
    cost = objective.step_cost(source.shapes, batch_size=config.batch_size)
    cost = cost._replace(flops=cost.flops + source.encoding_flops * config.batch_size)
    parallelize(objective, host, shapes=len(source.shapes), communication=config.training.travels)
    length = run_length(config.training.length, samples=config.batch_size, flops=cost.flops)
    host.record(**length._asdict())

    monitor = GeneratorMonitor(
        objective,
        source.validation,
        pixels,
        config.monitor,
        conditions=told.of(source.validation),
        drawn=told.drawn(source.space, source.validation, host.device),
        seed=config.seed,
        precision=config.training.precision,
        reference=_reference(config, reference, source.square[1] * pixels.pixels_per_latent, host),
        host=host,
    )
    milestones = GeneratorMilestones(objective, config.monitor.milestones, folder=host.folder / "milestones")
    optim = {"model": config.optim.for_batch(config.batch_size)}
    training = Run(length.steps, config.training, optim, cost, rank_slice.micro_batches)
    fit(objective, source.batches, training, host=host, monitors=[monitor, milestones])

    averages = [f"ema-{number_name(momentum)}" for momentum in config.objective.ema]
    states = {name: objective.averaged(number) for number, name in enumerate(averages)}
    if not ranks().first:
        return
    result = states.pop(averages[0])
    sampler = config.monitor.sampler.model_dump(mode="json")
    others = states | milestones.saved()
    space = source.space if told.record is None else source.space._replace(classes=[], untrained=[])
    save_generator(
        generator, model.config, result, space=space, sampler=sampler, text_encoder=told.record, others=others
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = length.samples / source.samples
    figures = {"parameters": parameters, "epochs": epochs} | monitor.convergence(steps=length.steps, epochs=epochs)
    write_json(metrics, {"train_generator": length._asdict() | figures})
    curves.write_bytes((host.folder / "curves.csv").read_bytes())
    monitor.draw(picture, steps=length.steps)


def _source(
    config: TrainGenerator,
    told: Conditioning,
    batching: Batching,
    tokenizer: Tokenizer,
    latents: Path | None,
    shards: Path | None,
    host: Host,
) -> LatentSource:
    """Raises ConfigError when the command gives another kind of input than the parameters speak of."""
    if config.images is None:
        if latents is None or shards is not None:
            raise ConfigError(
                "train_generator.images is null: give the command --latents alone, or set it for the pictures of --shards"
            )
        return cached_source(latents, told, batching)
    if shards is None:
        raise ConfigError("train_generator.images needs --shards work/shards on the command, and under its deps")
    return encoded_source(
        shards,
        latents,
        tokenizer,
        config.images,
        told,
        batching,
        patch_size=config.model.patch_size,
        held_out=config.monitor.validation,
        host=host,
    )


def micro_batches_of(config: TrainGenerator, devices: int, most: int | None) -> int:
    """Micro-batches of a step on each of so many devices, of at most `most` latents (None: all). Raises ValueError."""
    named = "train_generator.batch_size"
    return count_micro_batches(config.batch_size, devices, most or config.batch_size, named=named)


def _reference(config: TrainGenerator, folder: Path | None, size: int, host: Host) -> FidReference | None:
    """What the online distance compares with. Raises ConfigError when it is asked for and nothing is given."""
    if config.monitor.fid is None:
        return None
    if folder is None:
        raise ConfigError(
            "train_generator.monitor.fid needs --reference work/reference on the command, and under its deps"
        )
    reference = Reference.load(folder)
    reference.require_size(size)
    extractor = build_features(reference.features[0], weights=host.weights, device=host.device)
    return FidReference(extractor, reference.of("train").networks[extractor.name].statistics)


if __name__ == "__main__":
    main(run, distributed=True, divides=micro_batches_of)
