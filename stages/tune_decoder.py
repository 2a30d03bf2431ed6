"""Tune the pixel decoder with a GAN objective; the encoder and its latents stay as they are (paper 3.2)."""

import torch
from pydantic import Field

from stages._runner import Input, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import ImageBatches
from vtp.data.dataset import ShardDataset
from vtp.draws import address
from vtp.losses.perceptual import build_perceptual
from vtp.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from vtp.models.loading import save_decoder
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.decoder import DecoderObjective, DecoderObjectiveConfig
from vtp.training.fit import Run, TrainingConfig, fit, plan
from vtp.training.optim import OptimConfig


class TuneDecoder(Config):
    """The section `tune_decoder`."""

    seed: int
    batch_size: int = Field(ge=1)
    discriminator: DiscriminatorConfig
    objective: DecoderObjectiveConfig
    decoder_optim: OptimConfig
    critic_optim: OptimConfig
    training: TrainingConfig


def run(
    config: TuneDecoder,
    *,
    shards: Input,
    tokenizer: Input,
    decoder: Output,
    metrics: Output,
    curves: Output,
    work: Work,
) -> None:
    model = VisualTokenizer.from_pretrained(tokenizer).to(work.device)
    images = ShardDataset(shards, "train", cache=work.cache)
    batches = ImageBatches(images, size=model.config.image_size, batch_size=config.batch_size, seed=config.seed)
    torch.manual_seed(address(config.seed, "weights"))
    critic = PatchDiscriminator(config.discriminator)
    perceptual = build_perceptual(config.objective.perceptual, weights=work.weights).to(work.device)
    objective = DecoderObjective(model, critic, config.objective, perceptual=perceptual, seed=config.seed)
    objective = objective.to(work.device)
    cost = objective.step_cost(batches[0])
    length = plan(config.training.length, samples=config.batch_size, flops=cost.flops)
    work.record(**length._asdict())
    optim = {"decoder": config.decoder_optim, "critic": config.critic_optim}
    fit(objective, batches, Run(length.steps, config.training, optim, cost), host=work)
    model.pixel_decoder.load_state_dict(objective.average.state_dict())
    save_decoder(model, decoder)
    write_json(metrics, {"tune_decoder": length._asdict()})
    curves.write_bytes((work.folder / "curves.csv").read_bytes())


if __name__ == "__main__":
    main(run)
