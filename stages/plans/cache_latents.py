"""The plan of caching latents."""

import torch

from stages.cache_latents import CacheLatents
from stages.plans.estimate import (
    GIGA,
    LABEL,
    Estimate,
    Figure,
    SplitSize,
    add_input_options,
    add_time,
    inputs_of,
    options_for,
)
from vtp.params import load


def plan(arguments: list[str]) -> Estimate:
    """What caching latents takes."""
    parser = options_for("cache_latents")
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, CacheLatents), inputs_of(options)
    counts = {name: learnt(config, split) for name, split in inputs.splits.items()}
    flips = config.horizontal_flips
    images, passes = sum(counts.values()), 2 if flips else 1
    size = inputs.latent_numbers * getattr(torch, config.dtype).itemsize
    flops = inputs.encoder_flops * passes * images
    estimate = Estimate()

    latents = estimate.section(
        f"latents {list(inputs.latent_shape)} of {images:,} images with {config.of}, {config.dtype}"
    )
    note = ", and as much of its horizontal flip" if flips else ""
    latents["of an image"] = Figure(size, f"{size / 1e3:,.1f} kB{note}")
    work = estimate.section("FLOPs")
    encoder = f"{inputs.encoder_flops / GIGA:,.1f} G an image, {passes} {'passes' if flips else 'pass'}"
    work["encoder"] = Figure(inputs.encoder_flops, encoder)
    work["run"] = Figure(flops, f"{flops:.3e}")
    time = estimate.section("time and disk")
    seconds = add_time(time, options, flops, precision=config.precision)
    time["images per second"] = Figure(images / seconds, f"{images / seconds:,.0f} from storage, each decoded once")
    for name, count in counts.items():
        bytes_ = count * size * passes
        files = -(-count // config.shard_size)
        time[f"latents, {name}"] = Figure(bytes_, f"{bytes_ / GIGA:,.3g} GB in {files} files")
    labels = images * LABEL
    note = "the tables of keys and captions are not counted"
    time["labels"] = Figure(labels, f"{labels / GIGA:.3g} GB; {note}")
    return estimate


def learnt(config: CacheLatents, split: SplitSize) -> int:
    """Pictures of a split that a generator learns."""
    return split.labelled if config.of == "classes" else split.samples
