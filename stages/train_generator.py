"""Train a LightningDiT on cached latents by flow matching (paper 4.1)."""

from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from stages.monitors.generator import FidReference, GeneratorMilestones, GeneratorMonitor, GeneratorMonitorConfig
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import write_json
from vtp.config import Config, ConfigError, number_name
from vtp.data.batches import LatentBatches, RankSlice, count_micro_batches
from vtp.data.latents import LatentDataset
from vtp.distributed import ranks
from vtp.draws import address
from vtp.evaluation.features import build_features
from vtp.evaluation.reference import Reference
from vtp.host import Host
from vtp.models.generator_folder import SIZES, GeneratorSize, LightningDiTConfig, save_generator
from vtp.models.lightningdit import LightningDiT
from vtp.models.loading import load_tokenizer
from vtp.objectives.generation import GenerationObjective, GenerationObjectiveConfig
from vtp.step import OptimConfig
from vtp.training.fit import Run, TrainingConfig, fit, run_length
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

    size: Annotated[NamedSize | OwnSize, Field(discriminator="name")]
    mlp_ratio: float = Field(ge=0.1, le=100, description="hidden width of the feed-forward layers over the width")
    patch_size: int = Field(ge=1, description="side of a token in latents")
    use_qknorm: bool = Field(description="normalise queries and keys per head; steadies training")
    use_swiglu: bool = Field(description="SwiGLU in the feed-forward layers, else GELU")
    use_rope: bool = Field(description="rotary positions beside the fixed sine table")
    use_rmsnorm: bool = Field(description="RMSNorm with weights, else LayerNorm without")
    wo_shift: bool = Field(description="leave the shifts out of adaLN")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        self.architecture((1, self.patch_size, self.patch_size), classes=1)
        return self

    def architecture(self, shape: tuple[int, int, int], classes: int) -> LightningDiTConfig:
        """For latents (d, h, w) of so many classes."""
        channels, side, _ = shape
        own = self.size
        size = GeneratorSize(own.depth, own.hidden_size, own.num_heads) if isinstance(own, OwnSize) else SIZES[own.name]
        options = self.model_dump(exclude={"size"}) | size._asdict()
        return LightningDiTConfig(input_size=side, in_channels=channels, num_classes=classes, **options)


class TrainGenerator(Config):
    """The section `train_generator`."""

    seed: int = Field(description="seed of weights, data, noise and timesteps")
    batch_size: int = Field(ge=1, description="latents of a step over all devices")
    model: GeneratorConfig
    objective: GenerationObjectiveConfig
    optim: OptimConfig
    training: TrainingConfig
    monitor: GeneratorMonitorConfig


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: TrainGenerator,
    *,
    latents: Annotated[Input, "folder of cache_latents, which the generator learns"],
    tokenizer: Annotated[Input, "folder of the tokenizer of these latents"],
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
    largest = host.micro_batch or config.batch_size
    named = "train_generator.batch_size"
    rank_slice = RankSlice(*ranks(), count_micro_batches(config.batch_size, ranks().size, largest, named=named))
    data, validation = (LatentDataset(latents, split) for split in ("train", "validation"))
    pixels = load_tokenizer(tokenizer, decoder).to(host.device)
    pixels.require_decoder(tokenizer)
    data.require_encoder(pixels.encoder_digest(), str(tokenizer))
    batches = LatentBatches(data, batch_size=config.batch_size, seed=config.seed, rank_slice=rank_slice)

    torch.manual_seed(address(config.seed, "weights"))
    model = LightningDiT(config.model.architecture(data.shape, len(data.classes)))
    objective = GenerationObjective(model, config.objective)
    cost = objective.step_cost(batches[0], batch_size=config.batch_size)
    parallelize(objective, host)
    length = run_length(config.training.length, samples=config.batch_size, flops=cost.flops)
    host.record(**length._asdict())

    monitor = GeneratorMonitor(
        objective,
        validation,
        pixels,
        config.monitor,
        labels=data.space.labels,
        seed=config.seed,
        precision=config.training.precision,
        reference=_reference(config, reference, pixels.image_size, host),
        host=host,
    )
    milestones = GeneratorMilestones(objective, config.monitor.milestones, folder=host.folder / "milestones")
    optim = {"model": config.optim.for_batch(config.batch_size)}
    training = Run(length.steps, config.training, optim, cost, rank_slice.micro_batches)
    fit(objective, batches, training, host=host, monitors=[monitor, milestones])

    averages = [f"ema-{number_name(momentum)}" for momentum in config.objective.ema]
    states = {name: objective.averaged(number) for number, name in enumerate(averages)}
    if not ranks().first:
        return
    result = states.pop(averages[0])
    sampler = config.monitor.sampler.model_dump(mode="json")
    others = states | milestones.saved()
    save_generator(generator, model.config, result, space=data.space, sampler=sampler, others=others)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = length.samples / len(data)
    figures = {"parameters": parameters, "epochs": epochs} | monitor.convergence(steps=length.steps, epochs=epochs)
    write_json(metrics, {"train_generator": length._asdict() | figures})
    curves.write_bytes((host.folder / "curves.csv").read_bytes())
    monitor.draw(picture, steps=length.steps)


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
    main(run, distributed=True)
