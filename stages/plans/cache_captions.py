"""The plan of caching the features of captions."""

import math

from stages.cache_captions import CacheCaptions
from stages.plans.estimate import (
    GIGA,
    Estimate,
    Figure,
    PlannedInputs,
    add_input_options,
    add_time,
    inputs_of,
    options_for,
)
from stages.plans.train_generator import tower_of
from vtp.models.text_encoder import TextEncoderConfig, TransformersText
from vtp.objectives.cost import text_flops
from vtp.params import load

BFLOAT16 = 2  # bytes


def plan(arguments: list[str]) -> Estimate:
    """What features of captions take: as many as there are pictures, as if no two had the same."""
    parser = options_for("cache_captions")
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, CacheCaptions), inputs_of(options)
    count = sum(split.samples for split in inputs.splits.values())
    length, width, flops = _sizes(config.encoder, inputs)
    estimate = Estimate()

    captions = estimate.section(f"features of {count:,} captions")
    size = length * width * BFLOAT16
    captions["of a caption"] = Figure(
        size, f"{size / 1e3:,.1f} kB at most, {length} tokens of {width}; a short one less"
    )
    work = estimate.section("FLOPs")
    unknown = math.isnan(flops)
    work["encoder"] = Figure(flops, "unknown: of a model that is not here" if unknown else f"{flops / GIGA:,.2f} G")
    whole = 0.0 if unknown else flops * count
    work["run"] = Figure(whole, f"{whole:.3e}")
    time = estimate.section("time and disk")
    add_time(time, options, whole, precision=config.precision)
    time["features"] = Figure(size * count, f"{size * count / GIGA:,.3g} GB at most")
    return estimate


def _sizes(encoder: TextEncoderConfig, inputs: PlannedInputs) -> tuple[int, int, float]:
    """Tokens, numbers of each, FLOPs of a caption."""
    if isinstance(encoder, TransformersText):
        return encoder.length, encoder.width, math.nan
    tower = tower_of(encoder, inputs.text)
    return tower.context_length, tower.embed_dim, text_flops(tower)
