"""Pre-train a visual tokenizer jointly on CLIP, self-supervision and reconstruction (paper 3.3 to 3.6).

Or the convolutional autoencoder of the paper's table 1, on reconstruction alone.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from stages.monitors.tokenizer import TokenizerMilestones, TokenizerMonitor, TokenizerMonitorConfig
from stages.runner.run import Inputs, OptionalInput, Output, main
from vtp.artefact import write_json
from vtp.config import Config, ConfigError
from vtp.data.batches import RankSlice, count_micro_batches
from vtp.data.dataset import ShardDataset
from vtp.data.pretrain_batches import ActiveBatch, PretrainBatches, PretrainDataConfig
from vtp.data.remote import ShardCache
from vtp.data.stream import Stream
from vtp.distributed import ranks
from vtp.draws import address
from vtp.host import Host
from vtp.losses.perceptual import build_perceptual
from vtp.models.diffusers_vae import ConvolutionalConfig
from vtp.models.text import VOCABULARY, CaptionTokenizer
from vtp.models.tokenizer import TokenizerConfig
from vtp.models.trainable import AnyTokenizerConfig, build_tokenizer
from vtp.objectives.adversary import DISCRIMINATOR, Adversary, AdversaryConfig, build_adversary
from vtp.objectives.cost import pretrain_cost
from vtp.objectives.pretrain import PretrainObjective, PretrainObjectiveConfig
from vtp.objectives.pretrain_state import export_tokenizer, load_pretrain_state, save_pretrain_state
from vtp.objectives.rates import RatesConfig
from vtp.params import milestone_name
from vtp.step import OptimConfig, StepCost
from vtp.training.fit import Run, TrainingConfig, fit, run_length
from vtp.training.log import gradient_figures
from vtp.training.parallelize import parallelize


class Pretrain(Config):
    """The section `pretrain`."""

    seed: int = Field(description="seed of weights, data and masks")
    tokenizer: AnyTokenizerConfig
    data: PretrainDataConfig
    objective: PretrainObjectiveConfig
    optim: OptimConfig
    rates: RatesConfig
    adversary: AdversaryConfig | None = Field(description="a GAN term from the start; null, as in the paper: none")
    training: TrainingConfig
    monitor: TokenizerMonitorConfig
    without_captions: Literal["refuse", "no_clip"] = Field(
        description="what becomes of a training with clip where no picture has a caption: it is refused, or goes on without"
    )
    export: Literal["student", "teacher"] = Field(
        description="weights that the tokenizer gets: those of the student or of the teacher"
    )

    @model_validator(mode="after")
    def _tokenizer_serves(self) -> Self:
        if isinstance(self.tokenizer, ConvolutionalConfig):
            return self
        if self.objective.reconstruction.kl:
            raise ValueError(
                f"objective.reconstruction.kl is {self.objective.reconstruction.kl}, and a ViT's latents have no posterior; "
                "set it to 0, or tokenizer.name to convolutional"
            )
        if self.objective.weights.clip and self.tokenizer.text is None:
            raise ValueError(
                f"objective.weights.clip is {self.objective.weights.clip} and tokenizer.text null: CLIP needs a text tower; "
                "give one, or set the weight to 0"
            )
        if (text := self.tokenizer.text) is not None and text.vocab_size != VOCABULARY:
            raise ValueError(f"tokenizer.text.vocab_size {text.vocab_size} is not {VOCABULARY}, open_clip's byte pairs")
        if self.objective.weights.clip and not self.tokenizer.compares_captions:
            raise ValueError("tokenizer.text.pool_type is none: the contrast needs one token that stands for a caption")
        if self.tokenizer.decoder is None or self.tokenizer.upscale != self.tokenizer.vision.patch_size:
            raise ValueError("tokenizer needs a decoder, whose decoder_upscale is vision.patch_size, or null for that")
        if self.adversary is not None and not self.objective.weights.reconstruction:
            raise ValueError(
                "objective.weights.reconstruction is 0: nothing is reconstructed for adversary; set that to null, and leave "
                "the decoder to tune_decoder"
            )
        discriminator = self.adversary.discriminator if self.adversary else None
        if discriminator is not None and discriminator.name == "features" and discriminator.network.name == "tokenizer":
            raise ValueError("adversary.discriminator reads the encoder, which is in training; choose patch, or timm")
        return self

    @model_validator(mode="after")
    def _bottleneck_is_trained(self) -> Self:
        if isinstance(self.tokenizer, ConvolutionalConfig):
            return self
        weights, vision = self.objective.weights, self.tokenizer.vision
        read = [
            weights.reconstruction,
            weights.clip and not vision.bottleneck_ae_only,
            weights.ssl and self.objective.ssl.features == "latent",
        ]
        if vision.has_bottleneck and not any(read):
            raise ValueError(
                "objective.weights.reconstruction is 0, and nothing else trains tokenizer.vision.feature_bottleneck: set "
                "that to null, and the encoder's features are the latents; or let objective.ssl.features be latent, or "
                "vision.bottleneck_ae_only false"
            )
        return self

    @model_validator(mode="after")
    def _convolutions_reconstruct_alone(self) -> Self:
        if not isinstance(self.tokenizer, ConvolutionalConfig):
            return self
        objective, lacks = self.objective, "tokenizer.name is convolutional, which has"
        for name, weight in (("clip", objective.weights.clip), ("ssl", objective.weights.ssl)):
            if weight:
                raise ValueError(
                    f"objective.weights.{name} is {weight}, and {lacks} no features beside its latents: it learns by "
                    "reconstruction alone; set the weight to 0"
                )
        if objective.drop_path.reconstruction:
            raise ValueError(
                f"objective.drop_path.reconstruction is {objective.drop_path.reconstruction}, and {lacks} no stochastic "
                "depth; set it to 0"
            )
        if self.monitor.probe is not None:
            raise ValueError(f"monitor.probe reads class tokens, and {lacks} none; set it to null")
        if objective.reconstruction.kl and self.adversary is not None:
            raise ValueError(
                f"objective.reconstruction.kl is {objective.reconstruction.kl} beside an adversary, whose weight is "
                "balanced at the pixels; set kl to 0, or adversary to null and tune the decoder against one (tune_decoder)"
            )
        return self

    @model_validator(mode="after")
    def _images_fit(self) -> Self:
        patch_size, views = self.tokenizer.pixels_per_latent, self.data.ssl_views
        sizes = {
            "data.clip_view.size": self.data.clip_view.size,
            "data.ssl_views.global_size": views.global_size,
            "data.ssl_views.local_size": views.local_size,
        }
        for name, size in sizes.items() if isinstance(self.tokenizer, TokenizerConfig) else ():
            if size % patch_size:
                raise ValueError(f"{name} {size} is not a multiple of tokenizer.vision.patch_size {patch_size}")
        if self.data.reconstruction_view.name == "shared" and self.data.clip_view.size != self.tokenizer.image_size:
            raise ValueError(
                f"data.clip_view.size {self.data.clip_view.size} and tokenizer.image_size {self.tokenizer.image_size} "
                "differ, and data.reconstruction_view is shared"
            )
        active = self.active
        if self.data.subsets == "disjoint" and active.reconstruction and active.ssl == active.pool:
            raise ValueError(
                f"data.subsets is disjoint, and of {active.pool} images none is left beside data.batch.ssl {active.ssl}"
            )
        if (group := self.objective.ssl.koleo_group) is not None and active.ssl % group:
            raise ValueError(f"data.batch.ssl {active.ssl} is no multiple of objective.ssl.koleo_group {group}")
        return self

    @property
    def vit(self) -> TokenizerConfig:
        """The tokenizer's architecture. Raises ConfigError for convolutions, where a ViT is asked for."""
        if isinstance(record := self.architecture, ConvolutionalConfig):
            raise ConfigError(f"tokenizer.name is {record.name}, and this needs the record of a ViT, which has no name")
        return record

    @property
    def active(self) -> ActiveBatch:
        """Batch sizes of the objectives with a weight."""
        weights, batch = self.objective.weights, self.data.batch
        return ActiveBatch(*(getattr(batch, name) if getattr(weights, name) else 0 for name in ActiveBatch._fields))

    @property
    def architecture(self) -> TokenizerConfig | ConvolutionalConfig:
        """The tokenizer; without the CLIP objective it has no text tower, and the contrast decides how logits begin."""
        if isinstance(self.tokenizer, ConvolutionalConfig):
            return self.tokenizer
        contrast = self.objective.contrast
        bias = contrast.bias if contrast.name == "sigmoid" else None
        first = {"init_logit_scale": math.log(contrast.scale), "init_logit_bias": bias}
        return self.tokenizer.model_copy(update=first if self.objective.weights.clip else {"text": None})


def run(  # noqa: PLR0913 - inputs and outputs of the stage
    config: Pretrain,
    *,
    shards: Annotated[
        Inputs, "folders of prepare_data; of the first also the validation split, all in the shares of data.stream"
    ],
    init_from: Annotated[
        OptionalInput,
        "state of a pre-training, or any tokenizer of this architecture, to begin from; default: fresh weights",
    ] = None,
    tokenizer: Annotated[Output, "folder for the tokenizer"],
    state: Annotated[Output, "folder for heads, teacher and optimiser, from which another run may begin"],
    milestones: Annotated[Output, "folder for the tokenizers at monitor.milestones"],
    metrics: Annotated[Output, "JSON file for the figures of the training"],
    curves: Annotated[Output, "CSV file for losses and gradients by step"],
    picture: Annotated[Output, "PNG file for reconstructions along the training"],
    host: Host,
) -> None:
    train, validation = (ShardDataset(shards[0], split, cache=ShardCache.of(host)) for split in ("train", "validation"))
    others = [ShardDataset(folder, "train", cache=ShardCache.of(host)) for folder in shards[1:]]
    config, remark = _with_captions(config, [train, *others])
    rank_slice = slice_of(config, host)
    objective = build_objective(config, host)
    optimizer_state = load_pretrain_state(objective, init_from) if init_from is not None else {}
    parallelize(objective, host, communication=config.training.travels)
    cost = step_cost(config, objective.adversary)
    length = run_length(config.training.length, samples=config.active.pool, flops=cost.flops)
    _require_reachable(config.monitor.milestones, length.flops)
    data = "; ".join(each.manifest.summary("train") for each in (train, *others))
    host.record(**length._asdict(), data=data + remark)
    stream = Stream([train, *others], config.data.stream, seed=config.seed)
    batches = build_batches(config, stream, rank_slice, colour_later=host.device != "cpu")
    monitor = TokenizerMonitor(objective, train, validation, config.monitor, host=host)
    exports = TokenizerMilestones(
        objective,
        config.monitor.milestones,
        step_flops=cost.flops,
        flops=length.flops,
        weights=config.export,
        host=host,
    )

    optim = {"model": config.optim.for_batch(config.active.pool)}
    if config.adversary is not None:
        optim[DISCRIMINATOR] = config.adversary.optim.for_batch(config.active.reconstruction)
    training = Run(length.steps, config.training, optim, cost, rank_slice.micro_batches)
    optimizer_state = fit(
        objective, batches, training, host=host, monitors=[monitor, exports], optimizer_state=optimizer_state
    )

    save_pretrain_state(objective, optimizer_state, state)
    export_tokenizer(objective, tokenizer, weights=config.export)
    if ranks().first:
        parameters = sum(parameter.numel() for parameter in objective.tokenizer.parameters())
        figures = {"parameters": parameters, "images": len(stream)}
        figures |= gradient_figures(host.folder / "curves.csv", "model")
        write_json(metrics, {"pretrain": length._asdict() | figures})
        curves.write_bytes((host.folder / "curves.csv").read_bytes())
        monitor.draw(picture, steps=length.steps)
        exports.publish(milestones)


def _with_captions(config: Pretrain, sources: Sequence[ShardDataset]) -> tuple[Pretrain, str]:
    """The training that the captions of the data allow, and a remark where it is another than the parameters'.

    Raises ConfigError when more samples than `data.stream.max_replaced` have no caption for clip, unless none of all has one
    and `without_captions` says what then.
    """
    weights, shares = config.objective.weights, [source.split.share_without_caption for source in sources]
    if not weights.clip or max(shares) <= config.data.stream.max_replaced:
        return config, ""
    if min(shares) == 1 and config.without_captions == "no_clip":
        values = config.model_dump()
        values["objective"]["weights"]["clip"] = 0.0
        logging.warning("no picture has a caption: training goes on without clip, as pretrain.without_captions says")
        return Pretrain.parse(values, where="pretrain, without clip"), "; without captions, and so without clip"
    share, source = max(zip(shares, sources, strict=True), key=lambda pair: pair[0])
    which, also = (
        ("no training picture has a caption", "pretrain.without_captions to no_clip")
        if share == 1
        else (
            f"{share:.2%} of the training pictures have no caption",
            f"data.stream.max_replaced to {share:.2g} or more",
        )
    )
    raise ConfigError(
        f"{source.folder}: {which}, and pretrain.objective.weights.clip is {weights.clip:g}; give the source captions, or "
        f"set the weight to 0, or {also}"
    )


def _require_reachable(milestones: Sequence[float | str], flops: float) -> None:
    """Raises ConfigError for a milestone behind the end of the run, which would never be exported."""
    if beyond := [each for each in milestones if not isinstance(each, str) and each > flops]:
        raise ConfigError(
            f"pretrain.monitor.milestones: {milestone_name(beyond[0])} FLOPs are more than the {milestone_name(flops)} of "
            "the whole run; lower it, or train for longer (training.length)"
        )


def slice_of(config: Pretrain, host: Host) -> RankSlice:
    """What this rank takes of every step. Raises ConfigError or ValueError for what no rank could do."""
    if config.adversary is not None and host.parallel != "ddp" and ranks().size > 1:
        raise ConfigError("pretrain.adversary needs whole weights on every rank: unset VTP_PARALLEL, or set it to ddp")
    return RankSlice(*ranks(), micro_batches_of(config, ranks().size, host.micro_batch))


def micro_batches_of(config: Pretrain, devices: int, most: int | None) -> int:
    """Micro-batches of a step on each of so many devices, of at most `most` images (None: all).

    Raises ValueError when a device or a micro-batch would hold parts of blocks.
    """
    blocks = config.data.batch.reconstruction
    size = config.active.pool // blocks
    if most is not None and most < size:
        raise ValueError(
            f"a micro-batch of {most} images is less than a block of pretrain.data.batch, whose {size} stay together; set "
            f"VTP_MICRO_BATCH to {size} or more"
        )
    largest = blocks if most is None else most // size
    return count_micro_batches(blocks, devices, largest, named="pretrain.data.batch.reconstruction")


def build_objective(config: Pretrain, host: Host) -> PretrainObjective:
    """The models with their first weights, equal on all ranks."""
    torch.manual_seed(address(config.seed, "weights"))
    model = build_tokenizer(config.architecture)
    perceptual = build_perceptual(config.objective.reconstruction.perceptual, weights=host.weights).to(host.device)
    adversary = None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, host, seed=config.seed, tokenizer=model, features=None)
    return PretrainObjective(
        model, config.objective, config.rates, perceptual=perceptual, seed=config.seed, adversary=adversary
    )


def step_cost(config: Pretrain, adversary: Adversary | None) -> StepCost:
    """Of a global step, the adversary included."""
    cost = pretrain_cost(config.architecture, config.data, config.objective, config.active)
    if adversary is None:
        return cost
    adversarial = adversary.step_flops(config.tokenizer.image_size) * config.active.reconstruction
    return cost._replace(flops=cost.flops + adversarial)


def build_batches(
    config: Pretrain, stream: Stream, rank_slice: RankSlice, *, colour_later: bool = False
) -> PretrainBatches:
    """A rank's micro-batches."""
    text = None if isinstance(config.tokenizer, ConvolutionalConfig) else config.vit.text
    return PretrainBatches(
        stream,
        config.data,
        active=config.active,
        image_size=config.tokenizer.image_size,
        patch_size=config.tokenizer.pixels_per_latent,
        tokenize=CaptionTokenizer(text) if text else None,
        rank_slice=rank_slice,
        colour_later=colour_later,
    )


if __name__ == "__main__":
    main(run, distributed=True, divides=micro_batches_of)
