"""Tune the pixel decoder with a GAN objective; the encoder and its latents stay as they are (paper 3.2).

The same stage trains the fresh decoder of a frozen backbone from scratch, as RAE's first stage does. Weights are whole on
every rank, under VTP_PARALLEL=fsdp too: the adaptive weight needs one layer's gradient apart, and a decoder is small.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stages._adversary import AdversaryConfig, build_adversary
from stages._place import place
from stages._plan_decoder import plan_tuning
from stages._runner import Input, OptionalInput, Output, Work, main
from stages._tuning import DecoderLooks, DecoderWatchConfig
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import ImageBatches, Share, count_micros
from vtp.data.dataset import ShardDataset
from vtp.data.stream import Stream, StreamConfig
from vtp.data.views import CentreCropView, RandomCropView
from vtp.distributed import own_rows, ranks, total
from vtp.layers.images import normalise
from vtp.losses.perceptual import build_perceptual
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer, save_decoder
from vtp.objectives.decoder import DecoderObjective, DecoderObjectiveConfig
from vtp.training.fit import Run, TrainingConfig, fit, plan
from vtp.training.log import gradient_figures
from vtp.training.optim import OptimConfig


class TuneDecoder(Config):
    """The section `tune_decoder`."""

    seed: int
    batch_size: int = Field(ge=1, description="images of a step over all devices")
    stream: StreamConfig
    view: Annotated[CentreCropView | RandomCropView, Field(discriminator="name")]
    objective: DecoderObjectiveConfig
    adversary: AdversaryConfig | None = Field(description="null tunes without a discriminator")
    optim: OptimConfig = Field(description="of the decoder")
    training: TrainingConfig
    watch: DecoderWatchConfig


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: TuneDecoder,
    *,
    shards: Input,
    tokenizer: Input,
    critic_features: OptionalInput = None,
    decoder: Output,
    metrics: Output,
    curves: Output,
    picture: Output,
    work: Work,
) -> None:
    train, validation = (ShardDataset(shards, split, cache=work.cache) for split in ("train", "validation"))
    model = load_tokenizer(tokenizer).to(work.device).eval().requires_grad_(False)
    model.pixel_decoder.requires_grad_(True)
    encoder = model.encoder_digest()
    work.record(encoder=encoder)
    adversary = None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, work, seed=config.seed, tokenizer=model, features=critic_features)
    perceptual = build_perceptual(config.objective.perceptual, weights=work.weights).to(work.device)
    largest = work.runtime.micro_batch or config.batch_size
    share = Share(*ranks(), count_micros(config.batch_size, ranks().size, largest, named="tune_decoder.batch_size"))
    stream = Stream([train], config.stream, seed=config.seed)
    batches = ImageBatches(stream, config.view, size=model.image_size, batch_size=config.batch_size, share=share)
    noise = config.objective.noise
    std = None
    if noise.std:
        std = channel_std(model, train, noise.samples, config.batch_size, work.device)
        work.record(latent_std=" ".join(f"{value:.6g}" for value in std.tolist()))
    objective = DecoderObjective(
        model, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=config.seed
    )
    cost = objective.step_cost(config.batch_size)
    looks = DecoderLooks(
        model,
        objective.average,
        validation,
        config.watch,
        perceptual=perceptual,
        folder=work.folder / "looks",
        device=work.device,
    )
    place(objective, work)
    length = plan(config.training.length, samples=config.batch_size, flops=cost.flops)
    work.record(**length._asdict())
    optim = {"decoder": config.optim} | ({"critic": config.adversary.optim} if config.adversary else {})
    fit(objective, batches, Run(length.steps, config.training, optim, cost, share.micros), host=work, watchers=[looks])
    if not ranks().first:
        return
    model.pixel_decoder.load_state_dict(objective.average.state_dict())
    if model.encoder_digest() != encoder:
        raise RuntimeError("the encoder changed while its decoder was tuned")
    save_decoder(model, decoder)
    write_json(metrics, {"tune_decoder": length._asdict() | gradient_figures(work.folder / "curves.csv", "decoder")})
    curves.write_bytes((work.folder / "curves.csv").read_bytes())
    looks.picture(picture, steps=length.steps)


@torch.no_grad()
def channel_std(model: Tokenizer, images: ShardDataset, samples: int, batch_size: int, device: str) -> Tensor:
    """Standard deviation [d] of the latents' channels over the first training images; ranks share them."""
    own = own_rows(min(samples, len(images)))
    sums = torch.zeros(2, model.latent_shape[0], dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for first in range(own.start, own.stop, batch_size):
        rows = range(first, min(first + batch_size, own.stop))
        latents = model.encode(normalise(images.images(rows, model.image_size).to(device))).cpu().double()
        values = latents.transpose(0, 1).flatten(1)  # [d, B h w]
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        count += values.shape[1]
    first, second = total(sums) / total(count)
    return (second - first.square()).clamp_min(0).sqrt().float()


if __name__ == "__main__":
    main(run, distributed=True, plan=plan_tuning)
