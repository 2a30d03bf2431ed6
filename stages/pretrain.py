"""Pre-train a visual tokenizer jointly on CLIP, self-supervision and reconstruction (paper 3.3 to 3.6)."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from stages._plan import print_plan
from stages._runner import Inputs, OptionalInput, Output, Work, main
from stages._watch import Looks, Milestones, WatchConfig
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import ActiveBatch, PretrainBatches, PretrainDataConfig, Share, count_micros
from vtp.data.dataset import ShardDataset
from vtp.data.stream import Stream
from vtp.distributed import ranks, shard
from vtp.draws import address
from vtp.layers.block import Block
from vtp.losses.perceptual import build_perceptual
from vtp.models.text import CaptionTokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer
from vtp.objectives.cost import pretrain_cost
from vtp.objectives.pretrain import PretrainObjective, PretrainObjectiveConfig
from vtp.objectives.rates import RatesConfig
from vtp.objectives.start import save_exported, save_training_state, start_from
from vtp.training.fit import Run, TrainingConfig, fit, plan
from vtp.training.optim import OptimConfig


class Pretrain(Config):
    """The section `pretrain`."""

    seed: int
    tokenizer: TokenizerConfig
    data: PretrainDataConfig
    objective: PretrainObjectiveConfig
    optim: OptimConfig
    rates: RatesConfig
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
    objective = build_objective(config, work)
    moments = start_from(objective, start) if start is not None else {}
    place(objective, work)
    cost = pretrain_cost(config.architecture, config.data, config.objective, config.active)
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
    plan_of_run = Run(length.steps, config.training, {"model": config.optim}, cost, share.micros)
    moments = fit(objective, batches, plan_of_run, host=work, watchers=[looks, exports], moments=moments)
    save_training_state(objective, moments, state)
    save_exported(objective, tokenizer, weights=config.export)
    if ranks().first:
        parameters = sum(parameter.numel() for parameter in objective.tokenizer.parameters())
        write_json(metrics, {"pretrain": length._asdict() | {"parameters": parameters}})
        curves.write_bytes((work.folder / "curves.csv").read_bytes())
        looks.picture(picture, steps=length.steps)
        exports.publish(milestones)


def build_objective(config: Pretrain, work: Work) -> PretrainObjective:
    """The models with their first weights, equal on all ranks."""
    torch.manual_seed(address(config.seed, "weights"))
    model = VisualTokenizer(config.architecture)
    perceptual = build_perceptual(config.objective.reconstruction.perceptual, weights=work.weights).to(work.device)
    return PretrainObjective(model, config.objective, config.rates, perceptual=perceptual, seed=config.seed)


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


def place(objective: PretrainObjective, work: Work) -> None:
    """Put the models on the device; recompute, compile and shard them as the environment says, in this order."""
    runtime = work.runtime
    objective.to(work.device)
    if runtime.recompute:
        objective.recompute()
    if runtime.compile if runtime.compile is not None else work.device == "cuda":
        torch._dynamo.config.recompile_limit = 64  # a block sees a few shapes, with gradient and without
        for module in objective.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    if runtime.parallel == "fsdp" and ranks().size > 1:
        shard(objective.sharded_units(), work.device)


if __name__ == "__main__":
    main(run, distributed=True, plan=print_plan)
