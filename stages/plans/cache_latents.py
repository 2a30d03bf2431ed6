"""The plan of caching latents."""

import math
from typing import NamedTuple

import torch

from stages.cache_latents import CacheLatents
from stages.plans.estimate import (
    GIGA,
    LABEL,
    Estimate,
    Figure,
    PlannedInputs,
    SplitSize,
    add_input_options,
    add_time,
    inputs_of,
    options_for,
)
from vtp.data.sizes import SizesConfig
from vtp.params import load


class _Encoded(NamedTuple):
    """Of one picture, at all sizes at which it is stored."""

    numbers: float  # of its latents
    flops: float


def _at_all_edges(sizes: SizesConfig, inputs: PlannedInputs) -> _Encoded:
    """Of a picture that is large enough for every edge, on average over the ratios."""
    numbers = sum(math.prod(shape) for shape in inputs.latents_of(sizes.all))
    return _Encoded(numbers / len(sizes.ratios), sum(inputs.encoding_flops(sizes.all)) / len(sizes.ratios))


def plan(arguments: list[str]) -> Estimate:
    """What caching latents takes."""
    parser = options_for("cache_latents")
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, CacheLatents), inputs_of(options)
    counts = {name: learnt(config, split) for name, split in inputs.splits.items()}
    flips = config.horizontal_flips
    images, passes = sum(counts.values()), 2 if flips else 1
    encoded = {name: _Encoded(inputs.latent_numbers, inputs.encoder_flops) for name in counts}
    several = ""
    if config.sizes is not None:
        inputs = inputs.at(config.sizes.square.height)
        encoded = {name: _Encoded(inputs.latent_numbers, inputs.encoder_flops) for name in counts}
        encoded["train"] = _at_all_edges(config.sizes, inputs)
        several = f" at {len(config.sizes.short_edges)} edges, as if all were large enough"
    itemsize = getattr(torch, config.dtype).itemsize
    size = encoded["train"].numbers * itemsize
    flops = sum(encoded[name].flops * count for name, count in counts.items()) * passes
    estimate = Estimate()

    shape = list(inputs.latent_shape) if config.sizes is None else f"of {len(config.sizes.all)} sizes"
    latents = estimate.section(f"latents {shape} of {images:,} images with {config.of}, {config.dtype}")
    note = ", and as much of its horizontal flip" if flips else ""
    latents["of an image"] = Figure(size, f"{size / 1e3:,.1f} kB{several}{note}")
    work = estimate.section("FLOPs")
    of_image = encoded["train"].flops
    encoder = f"{of_image / GIGA:,.1f} G an image{several}, {passes} {'passes' if flips else 'pass'}"
    work["encoder"] = Figure(of_image, encoder)
    work["run"] = Figure(flops, f"{flops:.3e}")
    time = estimate.section("time and disk")
    seconds = add_time(time, options, flops, precision=config.precision)
    time["images per second"] = Figure(images / seconds, f"{images / seconds:,.0f} from storage, each decoded once")
    for name, count in counts.items():
        bytes_ = count * encoded[name].numbers * itemsize * passes
        files = -(-count // config.shard_size)
        of_sizes = config.sizes is not None and name == "train"
        where = "files of one size each" if of_sizes else f"{files} files"
        time[f"latents, {name}"] = Figure(bytes_, f"{bytes_ / GIGA:,.3g} GB in {where}")
    labels = images * LABEL
    note = "the tables of keys and captions are not counted"
    time["labels"] = Figure(labels, f"{labels / GIGA:.3g} GB; {note}")
    return estimate


def learnt(config: CacheLatents, split: SplitSize) -> int:
    """Pictures of a split that a generator learns."""
    return split.labelled if config.of == "classes" else split.samples
