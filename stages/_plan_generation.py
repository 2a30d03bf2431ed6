"""The plans of caching latents, of training a generator on them, and of sampling."""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stages import _plan
from stages._plan import FLOAT, GIGA, Inputs, count_of, growth, half, print_time, rounded, row, title
from vtp.config import load
from vtp.flow import SamplerConfig
from vtp.flow.sampler import time_grid

if TYPE_CHECKING:
    from stages.train_generator import TrainGenerator
    from vtp.models.lightningdit import LightningDiT

LABEL = 8  # bytes


class Evaluations(NamedTuple):
    """Forward passes behind one sample."""

    own: int  # of the generator under the sample's label
    weak: int  # of what guidance leads away from


def evaluations(sampler: SamplerConfig) -> Evaluations | None:
    """None for dopri5, which chooses its steps while it draws."""
    if sampler.solver == "dopri5":
        return None
    steps = pairwise(time_grid(sampler.steps, sampler.timestep_shift).tolist())
    times = [t for step in steps for t in (step if sampler.solver == "heun" else step[:1])]
    start, end = sampler.guidance_interval
    return Evaluations(len(times), 0 if sampler.guidance_scale == 1 else sum(start <= t <= end for t in times))


def plan_caching(arguments: list[str]) -> None:
    """Print what caching latents takes."""
    from stages.cache_latents import CacheLatents

    parser = _plan.options_for("cache_latents")
    _plan.add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, CacheLatents), _plan.inputs_of(options)
    counts = {name: split.labelled for name, split in inputs.splits.items()}
    images, ways = sum(counts.values()), 2 if config.flips else 1
    size = inputs.latent_numbers * _bytes_of(config.dtype)

    title(f"latents {list(inputs.latent_shape)} of {images:,} labelled images, {config.dtype}")
    row("of an image", f"{size / 1e3:,.1f} kB{', and as much of its mirror image' if config.flips else ''}")
    title("FLOPs")
    row("encoder", f"{inputs.encoder_flops / GIGA:,.1f} G an image, {ways} {'passes' if config.flips else 'pass'}")
    row("run", f"{inputs.encoder_flops * ways * images:.3e}")
    title("time and disk")
    seconds = print_time(options, inputs.encoder_flops * ways * images, precision=config.precision)
    row("images per second", f"{images / seconds:,.0f} from storage, each decoded once")
    for name, count in counts.items():
        row(f"latents, {name}", f"{count * size * ways / GIGA:,.3g} GB in {-(-count // config.shard_size)} files")
    row("labels", f"{images * LABEL / GIGA:.3g} GB; the tables of keys and captions are not counted")


def plan_training(arguments: list[str]) -> None:
    """Print what training a generator takes."""
    from stages.cache_latents import CacheLatents
    from stages.train_generator import TrainGenerator
    from vtp.layers.flops import TRAINING
    from vtp.training.fit import plan

    parser = _plan.options_for("train_generator")
    _plan.add_training_options(parser)
    _plan.add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, TrainGenerator), _plan.inputs_of(options)
    cache = load(_plan.beside(options, "cache_latents"), CacheLatents)
    model = generator_of(config, inputs)
    forward, count, images = generator_flops(model, inputs), count_of(model), inputs.split("train").labelled
    step = TRAINING * forward * config.batch_size
    length = plan(config.training.length, samples=config.batch_size, flops=step)

    title("parameters")
    row("generator", f"{count / 1e6:,.2f} M")
    title(f"FLOPs of a step: {config.batch_size:,} latents {list(inputs.latent_shape)}")
    row("forward", f"{forward / GIGA:,.1f} G a latent, {forward / 2 / GIGA:,.1f} G multiply-adds")
    row("step", f"{step:.3e} training")
    row("run", f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} latents seen")
    row("epochs", f"{length.samples / images:,.1f} of {images:,} images")
    _print_looks(config, inputs, forward)

    title(f"memory per GPU, {options.gpus} GPUs")
    split = options.gpus if options.fsdp else 1
    averages = {f"average, {momentum:g}": count for momentum in config.objective.ema}
    static = {"weights": count, "gradients": count, "optimiser": 2 * count} | averages
    for name, numbers in static.items():
        row(name, f"{numbers * FLOAT / split / GIGA:,.2f} GB")
    share, micros = _plan.share_of(options, config.batch_size, named="train_generator.batch_size")
    kept = share * activations(config, model, inputs)
    row("activations", f"{kept / GIGA:,.2f} GB for {share:,} latents in one pass, {micros} per step")
    row("sum", f"{(sum(static.values()) * FLOAT / split + kept) / GIGA:,.2f} GB without workspace and tokenizer")

    title("time and disk")
    seconds = print_time(options, length.flops, precision=config.training.precision)
    row("step", f"{seconds / length.steps:.3g} s")
    size = inputs.latent_numbers * _bytes_of(cache.dtype)
    rate = length.samples / seconds
    row("latents per second", f"{rate:,.0f} from storage, {rate * size / GIGA:.3g} GB/s in {cache.dtype}")
    cached = images * size * (2 if cache.flips else 1)
    row("latents", f"{cached / GIGA:,.3g} GB; the faster when they fit into memory")
    state = (3 + len(averages)) * count * FLOAT / GIGA
    row("checkpoint", f"{state:,.1f} GB, and {options.checkpoints_kept} are kept")
    models = len(averages) + len(config.watch.milestones)
    row("generator", f"{models * count * FLOAT / GIGA:,.1f} GB: {models} times its weights, averages and milestones")


def plan_sampling(arguments: list[str]) -> None:
    """Print what drawing samples takes."""
    from stages.generate import Generate
    from stages.train_generator import TrainGenerator

    parser = _plan.options_for("generate")
    _plan.add_input_options(parser)
    parser.add_argument(
        "--generator", metavar="FILE:SECTION", help="parameters of train_generator; default: FILE:train_generator"
    )
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, Generate), _plan.inputs_of(options)
    trained = load(options.generator or _plan.beside(options, "train_generator"), TrainGenerator)
    forward = generator_flops(generator_of(trained, inputs), inputs)

    title(f"FLOPs: {config.samples:,} samples per setting, {forward / GIGA:,.1f} G an evaluation")
    flops, unknown = 0.0, []
    for name, sampler in config.all_settings.items():
        asked = evaluations(sampler)
        if asked is None:
            unknown.append(name)
            row(name, "unknown: dopri5 chooses its steps while it draws")
            continue
        of_sample = sum(asked) * forward
        flops += of_sample * config.samples
        hours = of_sample * config.samples / (_plan.peak_of(options, config.precision) * options.utilisation * 3600)
        weak = f" and {asked.weak} of its guide" if asked.weak else ""
        row(name, f"{asked.own} evaluations{weak}, {rounded(of_sample / 1e12)} T a sample, {rounded(hours)} GPU hours")
    if any(sampler.guide == "generator" and sampler.guidance_scale != 1 for sampler in config.all_settings.values()):
        row("a weaker generator", "counted as if it were as large as the generator")
    title("time and disk")
    seconds = print_time(options, flops, precision=config.precision)
    if unknown:
        row("without", f"{', '.join(unknown)}: its solver is dopri5")
    drawn = (len(config.all_settings) - len(unknown)) * config.samples
    row("samples per second", f"{drawn / seconds:,.3g}" if drawn else "unknown")
    kept = (len(config.all_settings) + 1) * config.samples * (inputs.latent_numbers * FLOAT + LABEL)
    row("samples", f"{kept / GIGA:,.3g} GB, the baseline of noise among them")


def generator_of(config: "TrainGenerator", inputs: Inputs) -> "LightningDiT":
    """Without contents."""
    from vtp.models.lightningdit import LightningDiT

    with torch.device("meta"):
        return LightningDiT(config.model.architecture(inputs.latent_shape, inputs.classes))


def generator_flops(model: "LightningDiT", inputs: Inputs) -> float:
    """Of one forward pass of one latent."""
    from vtp.layers.flops import forward_flops

    return forward_flops(model, torch.zeros(1, *inputs.latent_shape), torch.zeros(1), torch.zeros(1).long())


def activations(config: "TrainGenerator", model: "LightningDiT", inputs: Inputs) -> float:
    """Bytes that autograd keeps per latent, without recomputing and compiling."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vtp.flow import flow_matching_loss

    with FakeTensorMode(allow_non_fake_inputs=True), half(config.training.precision):
        model = model.to_empty(device="cpu")

        def forward(count: int) -> list[Tensor]:
            latents, labels = torch.empty(count, *inputs.latent_shape), torch.zeros(count, dtype=torch.long)
            loss = flow_matching_loss(model, latents, labels, t=torch.empty(count), noise=torch.empty_like(latents))
            return [loss.mse.mean() + config.objective.cosine_weight * loss.cosine.mean()]

        return growth(forward)


def _print_looks(config: "TrainGenerator", inputs: Inputs, forward: float) -> None:
    watch, asked = config.watch, evaluations(config.watch.sampler)
    drawn = watch.pictures + (watch.fid.samples if watch.fid else 0)
    of_sample = (sum(asked) if asked else 0) * forward + inputs.decoder_flops
    flops = watch.looks * (watch.validation * forward + drawn * of_sample)
    without = "" if asked else ", without the steps of dopri5"
    row("looks", f"{flops:.3e} in {watch.looks}, for {watch.validation:,} losses and {drawn:,} samples each{without}")


def _bytes_of(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
