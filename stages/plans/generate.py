"""The plan of sampling."""

import math

from stages.generate import Generate
from stages.plans.estimate import (
    FLOAT,
    GIGA,
    LABEL,
    Estimate,
    Figure,
    add_input_options,
    add_time,
    beside,
    inputs_of,
    options_for,
    peak_of,
    rounded,
)
from stages.plans.train_generator import forward_passes, generator_flops, generator_of, learnt_sizes
from stages.train_generator import TrainGenerator
from vtp.data.sizes import PictureSize
from vtp.params import load


def plan(arguments: list[str]) -> Estimate:
    """What drawing samples takes."""
    parser = options_for("generate")
    add_input_options(parser)
    parser.add_argument(
        "--generator", metavar="FILE:SECTION", help="parameters of train_generator; default: FILE:train_generator"
    )
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, Generate), inputs_of(options)
    trained = load(options.generator or beside(options, "train_generator"), TrainGenerator)
    sizes = learnt_sizes(options, trained)
    inputs = inputs if sizes is None else inputs.at(sizes.square.height)
    shape = inputs.latent_shape
    if config.size is not None:
        (shape,) = inputs.latents_of([PictureSize(config.size.height, config.size.width)])
    forward = generator_flops(generator_of(trained, inputs), shape)
    estimate = Estimate()

    heading = f"FLOPs: {config.samples:,} samples per setting, {forward / GIGA:,.1f} G a forward pass"
    settings = estimate.section(heading)
    flops, unknown = 0.0, []
    for name, sampler in config.all_settings.items():
        passes = forward_passes(sampler)
        if passes is None:
            unknown.append(name)
            settings[name] = Figure(math.nan, "unknown: dopri5 chooses its steps while it draws")
            continue
        of_sample = sum(passes) * forward
        flops += of_sample * config.samples
        hours = of_sample * config.samples / (peak_of(options, config.precision) * options.utilisation * 3600)
        weak = f" and {passes.weak} of its guide" if passes.weak else ""
        said = f"{passes.own} forward passes{weak}, {rounded(of_sample / 1e12)} T a sample, {rounded(hours)} GPU hours"
        settings[name] = Figure(of_sample, said)
    if any(sampler.guide == "generator" and sampler.guides for sampler in config.all_settings.values()):
        settings["a weaker generator"] = Figure(math.nan, "counted as if it were as large as the generator")
    settings["run"] = Figure(flops, f"{flops:.3e}")
    time = estimate.section("time and disk")
    seconds = add_time(time, options, flops, precision=config.precision)
    if unknown:
        time["without"] = Figure(math.nan, f"{', '.join(unknown)}: its solver is dopri5")
    drawn = (len(config.all_settings) - len(unknown)) * config.samples
    rate = drawn / seconds if drawn else math.nan
    time["samples per second"] = Figure(rate, f"{rate:,.3g}" if drawn else "unknown")
    kept = (len(config.all_settings) + 1) * config.samples * (math.prod(shape) * FLOAT + LABEL)
    time["samples"] = Figure(kept, f"{kept / GIGA:,.3g} GB, the baseline of noise among them")
    return estimate
