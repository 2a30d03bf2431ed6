"""Pre-train a visual tokenizer jointly on CLIP, self-supervision and reconstruction (paper 3.3 to 3.6)."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from stages._adversary import AdversaryConfig, build_adversary
from stages._place import place
from stages._plan_pretrain import plan_pretraining
from stages._runner import Inputs, OptionalInput, Output, Work, main
from stages._watch import Looks, Milestones, WatchConfig
from vtp.artefact import write_json
from vtp.config import Config, ConfigError
from vtp.data.batches import ActiveBatch, PretrainBatches, PretrainDataConfig, Share, count_micros
from vtp.data.dataset import ShardDataset
from vtp.data.stream import Stream
from vtp.distributed import ranks
from vtp.draws import address
from vtp.losses.perceptual import build_perceptual
from vtp.models.text import CaptionTokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer
from vtp.objectives.cost import pretrain_cost
from vtp.objectives.pretrain import PretrainObjective, PretrainObjectiveConfig
from vtp.objectives.rates import RatesConfig
from vtp.objectives.start import save_exported, save_training_state, start_from
from vtp.training.fit import Run, TrainingConfig, fit, plan
from vtp.training.log import gradient_figures
from vtp.training.optim import OptimConfig


class Pretrain(Config):
    """The section `pretrain`."""

    seed: int
    tokenizer: TokenizerConfig
    data: PretrainDataConfig
    objective: PretrainObjectiveConfig
    optim: OptimConfig
    rates: RatesConfig
    adversary: AdversaryConfig | None = Field(description="a GAN term from the start; null, as in the paper: none")
    training: TrainingConfig
    watch: WatchConfig
    export: Literal["student", "teacher"] = Field(description="whose weights the tokenizer gets")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.objective.weights.clip and self.tokenizer.text is None:
            raise ValueError("objective.weights.clip is above 0, so tokenizer.text must not be null")
        patch_size, views = self.tokenizer.vision.patch_size, self.data.ssl_views
        for name, size in (
            ("data.clip_view.size", self.data.clip_view.size),
            ("data.ssl_views.global_size", views.global_size),
            ("data.ssl_views.local_size", views.local_size),
        ):
            if size % patch_size:
                raise ValueError(f"{name} {size} is not a multiple of tokenizer.vision.patch_size {patch_size}")
        if self.data.reconstruction_view.name == "shared" and self.data.clip_view.size != self.tokenizer.image_size:
            raise ValueError(
                "data.clip_view.size and tokenizer.image_size differ, and data.reconstruction_view is shared"
            )
        active = self.active
        if self.data.subsets == "disjoint" and active.ssl and active.pool == active.ssl:
            raise ValueError("data.subsets is disjoint, and no image is left beside those of self-supervision")
        critic = self.adversary.discriminator if self.adversary else None
        if critic is not None and critic.name == "features" and critic.network.name == "tokenizer":
            raise ValueError("adversary.discriminator reads the encoder, which is in training; choose patch, or timm")
        return self

    @property
    def active(self) -> ActiveBatch:
        """Batch sizes of the objectives with a weight."""
        weights, batch = self.objective.weights, self.data.batch
        return ActiveBatch(batch.clip if weights.clip else 0, batch.ssl if weights.ssl else 0, batch.reconstruction)

    @property
    def architecture(self) -> TokenizerConfig:
        """The tokenizer; without the CLIP objective it has no text tower, and the contrast decides how logits begin."""
        contrast = self.objective.contrast
        bias = contrast.bias if contrast.name == "sigmoid" else None
        first = {"init_logit_scale": math.log(contrast.scale), "init_logit_bias": bias}
        return self.tokenizer.model_copy(update=first if self.objective.weights.clip else {"text": None})


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: Pretrain,
    *,
    shards: Inputs,
    start: OptionalInput = None,
    tokenizer: Output,
    state: Output,
    milestones: Output,
    metrics: Output,
    curves: Output,
    picture: Output,
    work: Work,
) -> None:
    blocks, size = config.active.reconstruction, config.active.pool // config.active.reconstruction
    largest = max(1, (work.runtime.micro_batch or config.active.pool) // size)
    share = Share(*ranks(), count_micros(blocks, ranks().size, largest))
    if config.adversary is not None and work.runtime.parallel == "fsdp" and ranks().size > 1:
        raise ConfigError("pretrain.adversary needs whole weights on every rank: unset VTP_PARALLEL, or set it to ddp")
    objective = build_objective(config, work)
    moments = start_from(objective, start) if start is not None else {}
    place(objective, work)
    cost = pretrain_cost(config.architecture, config.data, config.objective, config.active)
    if objective.adversary is not None:
        adversarial = objective.adversary.step_flops(config.tokenizer.image_size) * config.active.reconstruction
        cost = cost._replace(flops=cost.flops + adversarial)
    length = plan(config.training.length, samples=config.active.pool, flops=cost.flops)
    work.record(**length._asdict())
    train, validation = (ShardDataset(shards[0], split, cache=work.cache) for split in ("train", "validation"))
    looks = Looks(objective, train, validation, config.watch, folder=work.folder / "looks", device=work.device)
    exports = Milestones(
        objective,
        config.watch.milestones,
        step_flops=cost.flops,
        folder=work.folder / "milestones",
        weights=config.export,
    )
    sources = [train, *(ShardDataset(folder, "train", cache=work.cache) for folder in shards[1:])]
    stream = Stream(sources, config.data.stream, seed=config.seed)
    batches = build_batches(config, stream, share, colour_later=work.device != "cpu")
    optim = {"model": config.optim} | ({"critic": config.adversary.optim} if config.adversary else {})
    plan_of_run = Run(length.steps, config.training, optim, cost, share.micros)
    moments = fit(objective, batches, plan_of_run, host=work, watchers=[looks, exports], moments=moments)
    save_training_state(objective, moments, state)
    save_exported(objective, tokenizer, weights=config.export)
    if ranks().first:
        parameters = sum(parameter.numel() for parameter in objective.tokenizer.parameters())
        figures = {"parameters": parameters} | gradient_figures(work.folder / "curves.csv", "model")
        write_json(metrics, {"pretrain": length._asdict() | figures})
        curves.write_bytes((work.folder / "curves.csv").read_bytes())
        looks.picture(picture, steps=length.steps)
        exports.publish(milestones)


def build_objective(config: Pretrain, work: Work) -> PretrainObjective:
    """The models with their first weights, equal on all ranks."""
    torch.manual_seed(address(config.seed, "weights"))
    model = VisualTokenizer(config.architecture)
    perceptual = build_perceptual(config.objective.reconstruction.perceptual, weights=work.weights).to(work.device)
    adversary = None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, work, seed=config.seed, tokenizer=model, features=None)
    return PretrainObjective(
        model, config.objective, config.rates, perceptual=perceptual, seed=config.seed, adversary=adversary
    )


def build_batches(config: Pretrain, stream: Stream, share: Share, *, colour_later: bool = False) -> PretrainBatches:
    """A rank's micro-batches."""
    text = config.architecture.text
    return PretrainBatches(
        stream,
        config.data,
        active=config.active,
        image_size=config.tokenizer.image_size,
        patch_size=config.tokenizer.vision.patch_size,
        tokenize=CaptionTokenizer(text) if text else None,
        share=share,
        colour_later=colour_later,
    )


if __name__ == "__main__":
    main(run, distributed=True, plan=plan_pretraining)
