"""The plan of training a generator on cached latents, and what it shares with that of sampling."""

import argparse
import math
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from stages.cache_latents import CacheLatents
from stages.plans.cache_latents import learnt
from stages.plans.estimate import (
    FLOAT,
    GIGA,
    Estimate,
    Figure,
    PlannedInputs,
    add_input_options,
    add_time,
    add_training_options,
    autocast,
    beside,
    count_of,
    counted_once,
    gigabytes,
    inputs_of,
    kept_moments,
    kept_per_sample,
    millions,
    options_for,
    per_gpu,
)
from stages.train_generator import TrainGenerator
from vtp.config import ConfigError, number_name
from vtp.data.sizes import SizesConfig
from vtp.flow import SamplerConfig, flow_matching_loss
from vtp.flow.sampler import time_grid
from vtp.layers.flops import TRAINING
from vtp.models.captions import TextCondition
from vtp.models.lightningdit import LightningDiT
from vtp.models.text import TextConfig
from vtp.models.text_encoder import OpenClipText, TokenizerText, TransformersText
from vtp.params import load, read_parameters, split_address
from vtp.step import hidden_matrices
from vtp.training.conditioning import CaptionCondition, ClassCondition
from vtp.training.fit import run_length


class ForwardPasses(NamedTuple):
    """Of the models behind one sample."""

    own: int  # of the generator under the sample's label
    weak: int  # of what guidance leads away from


def forward_passes(sampler: SamplerConfig) -> ForwardPasses | None:
    """None for dopri5, which chooses its steps while it draws."""
    if sampler.adaptive:
        return None
    steps = pairwise(time_grid(sampler.steps, sampler.timestep_shift).tolist())
    timesteps = [t for step in steps for t in (step if sampler.solver == "heun" else step[:1])]
    start, end = sampler.guidance_interval
    return ForwardPasses(len(timesteps), 0 if not sampler.guides else sum(start <= t <= end for t in timesteps))


def plan(arguments: list[str]) -> Estimate:
    """What training a generator takes."""
    parser = options_for("train_generator")
    add_training_options(parser)
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, TrainGenerator), inputs_of(options)
    cache = load(beside(options, "cache_latents"), CacheLatents)
    sizes = learnt_sizes(options, config)
    inputs = inputs if sizes is None else inputs.at(sizes.square.height)
    shapes = [inputs.latent_shape] if sizes is None else inputs.latents_of(sizes.all)
    alike = "" if sizes is None else f", on average over {len(shapes)} sizes, as if all came alike"
    model = generator_of(config, inputs)
    forward = fmean(generator_flops(model, shape) for shape in shapes)
    count, images = count_of(model), learnt(cache, inputs.split("train"))
    encoding = 0.0 if config.images is None else fmean(inputs.encoding_flops(config.images.sizes.all))
    per_step = (TRAINING * forward + encoding) * config.batch_size
    length = run_length(config.training.length, samples=config.batch_size, flops=per_step)
    estimate = Estimate()

    estimate.section("parameters")["generator"] = millions(count)
    of_latents = f"{list(inputs.latent_shape)}" if sizes is None else f"of {len(shapes)} sizes"
    step = estimate.section(f"FLOPs of a step: {config.batch_size:,} latents {of_latents}")
    note = f"{forward / GIGA:,.1f} G a latent, {forward / 2 / GIGA:,.1f} G multiply-adds{alike}"
    step["forward"] = Figure(forward, note)
    if config.images is not None:
        step["encoder"] = Figure(encoding, f"{encoding / GIGA:,.1f} G a picture{alike}")
    step["step"] = Figure(per_step, f"{per_step:.3e} training")
    step["run"] = Figure(length.flops, f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} latents seen")
    step["epochs"] = Figure(length.samples / images, f"{length.samples / images:,.1f} of {images:,} images")
    step["evaluations along the run"] = _evaluations(config, inputs, generator_flops(model, inputs.latent_shape))

    memory = estimate.section(f"memory per GPU, {options.gpus} GPUs")
    split = options.gpus if options.fsdp else 1
    averages = {f"average, {number_name(momentum)}": count for momentum in config.objective.ema}
    moments = kept_moments(count, hidden_matrices(model.blocks), config.optim)
    static = {"weights": count, "gradients": count, "optimiser": moments} | averages
    memory |= {name: gigabytes(numbers * FLOAT / split) for name, numbers in static.items()}
    share, passes = per_gpu(options, config.batch_size, named="train_generator.batch_size")
    kept = share * activations(config, model, max(shapes, key=math.prod))
    largest = "" if sizes is None else " of the largest size"
    memory["activations"] = gigabytes(kept, f" for {share:,} latents{largest} in one pass, {passes} per step")
    note = " without workspace and tokenizer"
    memory["sum"] = gigabytes(sum(static.values()) * FLOAT / split + kept, note)

    time = estimate.section("time and disk")
    seconds = add_time(time, options, length.flops, precision=config.training.precision)
    time["duration of a step"] = Figure(seconds / length.steps, f"{seconds / length.steps:.3g} s")
    rate = length.samples / seconds
    if config.images is not None:
        time["pictures per second"] = Figure(rate, f"{rate:,.0f} from storage, decoded on the way")
    else:
        size = fmean(map(math.prod, shapes)) * getattr(torch, cache.dtype).itemsize
        note = f"{rate:,.0f} from storage, {rate * size / GIGA:.3g} GB/s in {cache.dtype}"
        time["latents per second"] = Figure(rate, note)
        cached = (
            images * size * (2 if cache.horizontal_flips else 1) * (len(cache.sizes.short_edges) if cache.sizes else 1)
        )
        time["latents"] = Figure(cached, f"{cached / GIGA:,.3g} GB; the faster when they fit into memory")
    state = ((1 + len(averages)) * count + moments) * FLOAT
    time["checkpoint"] = Figure(state, f"{state / GIGA:,.1f} GB, and {options.checkpoints_kept} are kept")
    models = len(averages) + len(config.monitor.milestones)
    note = f"{models * count * FLOAT / GIGA:,.1f} GB: {models} times its weights, averages and milestones"
    time["generator's folder"] = Figure(models * count * FLOAT, note)
    return estimate


def generator_of(config: TrainGenerator, inputs: PlannedInputs) -> LightningDiT:
    """Without contents."""
    text = text_of(config.model.condition, inputs.text)
    with torch.device("meta"):
        return LightningDiT(config.model.architecture(inputs.latent_shape, classes=inputs.labels, text=text))


def text_of(condition: ClassCondition | CaptionCondition, tower: TextConfig | None) -> TextCondition | None:
    """The features that a generator reads, without loading what makes them; None for classes.

    `tower`: what a text tower of a tokenizer is taken to be. Raises ConfigError where nothing says it.
    """
    if isinstance(condition, ClassCondition):
        return None
    encoder = condition.encoder
    if isinstance(encoder, TransformersText):
        length, width = encoder.length, encoder.width
    else:
        known = tower_of(encoder, tower)
        length, width = known.context_length, known.embed_dim
    return TextCondition(width=width, length=length, reading=condition.reading)


def tower_of(encoder: TokenizerText | OpenClipText, tower: TextConfig | None) -> TextConfig:
    """A text tower without its weights; that of a tokenizer is taken to be `tower`. Raises ConfigError for none."""
    if isinstance(encoder, TokenizerText):
        if tower is None:
            raise ConfigError("a plan takes the text tower of pretrain.tokenizer.text, and there is none; write one")
        return tower
    from open_clip import get_model_config

    known = (get_model_config(encoder.architecture) or {}).get("text_cfg")
    if known is None:
        raise ConfigError(f"open_clip has no architecture {encoder.architecture!r}")
    size = {"embed_dim": known["width"], "depth": known["layers"], "num_heads": known["heads"]}
    return TextConfig(context_length=known["context_length"], vocab_size=known["vocab_size"], **size)


def learnt_sizes(options: argparse.Namespace, config: TrainGenerator) -> SizesConfig | None:
    """Of the pictures that a generator learns; None: the tokenizer's squares."""
    if config.images is not None:
        return config.images.sizes
    file, section = split_address(beside(options, "cache_latents"))
    return load(f"{file}:{section}", CacheLatents).sizes if section in read_parameters(file).values else None


def generator_flops(model: LightningDiT, shape: tuple[int, int, int]) -> float:
    """Of one forward pass of one latent (d, h, w)."""
    channels, *sides = shape
    key = model.config.model_dump_json(), channels, *sorted(sides)  # as wide as high, or the other way round
    return counted_once(key, model, torch.zeros(1, *shape), torch.zeros(1), model.shape_of_condition(1))


def activations(config: TrainGenerator, model: LightningDiT, shape: tuple[int, int, int]) -> float:
    """Bytes that autograd keeps per latent (d, h, w), without recomputing and compiling."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), autocast(config.training.precision):
        model = model.to_empty(device="cpu")
        model.residual = config.residual_dtype

        def forward(count: int) -> list[Tensor]:
            latents, told = torch.empty(count, *shape), model.shape_of_condition(count)
            loss = flow_matching_loss(model, latents, told, t=torch.empty(count), noise=torch.empty_like(latents))
            return [loss.mse.mean() + config.objective.cosine_weight * loss.cosine.mean()]

        return kept_per_sample(forward)


def _evaluations(config: TrainGenerator, inputs: PlannedInputs, forward: float) -> Figure:
    monitor, passes = config.monitor, forward_passes(config.monitor.sampler)
    drawn = monitor.pictures + (monitor.fid.samples if monitor.fid else 0)
    of_sample = (sum(passes) if passes else 0) * forward + inputs.decoder_flops
    flops = monitor.evaluations * (monitor.validation * forward + drawn * of_sample)
    each = f"{monitor.validation:,} losses and {drawn:,} samples each"
    return Figure(flops, f"{flops:.3e} in {monitor.evaluations}, for {each}")
