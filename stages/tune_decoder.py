"""Tune the pixel decoder with a GAN objective; the encoder and its latents stay as they are (paper 3.2).

The same stage trains the fresh decoder of a frozen backbone from scratch, as RAE's first stage does. Weights are whole on
every rank, under VTP_PARALLEL=fsdp too: the adaptive weight needs one layer's gradient apart, and a decoder is small.
"""

from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.monitors.decoder import DecoderMonitor, DecoderMonitorConfig
from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import ImageBatches, RankSlice, count_micro_batches
from vtp.data.crops import cropped
from vtp.data.dataset import ShardDataset
from vtp.data.remote import ShardCache
from vtp.data.stream import Stream, StreamConfig
from vtp.data.views import OwnViewConfig
from vtp.distributed import own_rows, ranks, total
from vtp.host import Host
from vtp.layers.images import normalise
from vtp.losses.perceptual import build_perceptual
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer, save_decoder
from vtp.objectives.adversary import DISCRIMINATOR, AdversaryConfig, build_adversary
from vtp.objectives.decoder import DecoderObjective, DecoderObjectiveConfig
from vtp.step import OptimConfig
from vtp.training.fit import Run, TrainingConfig, fit, run_length
from vtp.training.log import gradient_figures
from vtp.training.parallelize import parallelize


class TuneDecoder(Config):
    """The section `tune_decoder`."""

    seed: int = Field(description="seed of data, noise and the discriminator's weights")
    batch_size: int = Field(ge=1, description="images of a step over all devices")
    stream: StreamConfig
    view: OwnViewConfig
    objective: DecoderObjectiveConfig
    adversary: AdversaryConfig | None = Field(description="null tunes without a discriminator")
    optim: OptimConfig = Field(description="optimiser of the decoder")
    training: TrainingConfig
    monitor: DecoderMonitorConfig

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        self.stream.require_batch(self.batch_size, "batch_size")
        return self


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: TuneDecoder,
    *,
    shards: Annotated[Input, "folder of prepare_data, with the pictures to reconstruct"],
    tokenizer: Annotated[Input, "folder of the tokenizer whose decoder is tuned"],
    discriminator_features: Annotated[
        OptionalInput, "tokenizer on whose features the discriminator looks; default: the one that is tuned"
    ] = None,
    decoder: Annotated[Output, "folder for the tuned decoder"],
    metrics: Annotated[Output, "JSON file for the figures of the training"],
    curves: Annotated[Output, "CSV file for losses by step"],
    picture: Annotated[Output, "PNG file for reconstructions along the training"],
    host: Host,
) -> None:
    rank_slice = RankSlice(*ranks(), micro_batches_of(config, ranks().size, host.micro_batch))
    train, validation = (ShardDataset(shards, split, cache=ShardCache.of(host)) for split in ("train", "validation"))
    model = load_tokenizer(tokenizer).to(host.device).eval().requires_grad_(False)
    model.require_decoder(tokenizer)
    model.pixel_decoder.requires_grad_(True)
    encoder = model.encoder_digest()
    host.record(encoder=encoder)

    objective = build_objective(config, model, train, discriminator_features, host)
    cost = objective.step_cost(config.batch_size)
    monitor = DecoderMonitor(
        model,
        objective.average,
        validation,
        config.monitor,
        perceptual=objective.perceptual,
        host=host,
    )
    parallelize(objective, host, communication=config.training.travels)
    length = run_length(config.training.length, samples=config.batch_size, flops=cost.flops)
    host.record(**length._asdict())

    stream = Stream([train], config.stream, seed=config.seed)
    batches = ImageBatches(
        stream, config.view, size=model.image_size, batch_size=config.batch_size, rank_slice=rank_slice
    )
    optim = {"decoder": config.optim} | ({DISCRIMINATOR: config.adversary.optim} if config.adversary else {})
    optim = {phase: of_phase.for_batch(config.batch_size) for phase, of_phase in optim.items()}
    training = Run(length.steps, config.training, optim, cost, rank_slice.micro_batches)
    fit(objective, batches, training, host=host, monitors=[monitor])

    if not ranks().first:
        return
    model.pixel_decoder.load_state_dict(objective.average.state_dict())
    if model.encoder_digest() != encoder:
        raise RuntimeError("the encoder changed while its decoder was tuned")
    save_decoder(model, decoder)
    write_json(metrics, {"tune_decoder": length._asdict() | gradient_figures(host.folder / "curves.csv", "decoder")})
    curves.write_bytes((host.folder / "curves.csv").read_bytes())
    monitor.draw(picture, steps=length.steps)


def micro_batches_of(config: TuneDecoder, devices: int, most: int | None) -> int:
    """Micro-batches of a step on each of so many devices, of at most `most` images (None: all). Raises ValueError."""
    return count_micro_batches(config.batch_size, devices, most or config.batch_size, named="tune_decoder.batch_size")


def build_objective(
    config: TuneDecoder, model: Tokenizer, train: ShardDataset, discriminator_features: Path | None, host: Host
) -> DecoderObjective:
    """The frozen encoder, the decoder that is tuned, and the adversary with its first weights, equal on all ranks."""
    adversary = None
    if config.adversary is not None:
        adversary = build_adversary(
            config.adversary, host, seed=config.seed, tokenizer=model, features=discriminator_features
        )
    perceptual = build_perceptual(config.objective.perceptual, weights=host.weights).to(host.device)
    noise, std = config.objective.noise, None
    if noise.std:
        std = channel_std(model, train, noise.samples, config.batch_size, host)
        host.record(latent_std=" ".join(f"{value:.6g}" for value in std.tolist()))
    return DecoderObjective(
        model, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=config.seed
    )


@torch.no_grad()
def channel_std(model: Tokenizer, images: ShardDataset, samples: int, batch_size: int, host: Host) -> Tensor:
    """Standard deviation [d] of the latents' channels over the first training images; ranks share them."""
    own = own_rows(min(samples, len(images)))
    sums = torch.zeros(2, model.latent_shape[0], dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    rows = np.arange(own.start, own.stop)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    for pixels in cropped(images, batches, model.image_size, host):
        latents = model.encode(normalise(pixels)).cpu().double()
        values = latents.transpose(0, 1).flatten(1)  # [d, B h w]
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        count += values.shape[1]
    first, second = total(sums) / total(count)
    return (second - first.square()).clamp_min(0).sqrt().float()


if __name__ == "__main__":
    main(run, distributed=True, divides=micro_batches_of)
