"""The plan of evaluating a representation."""

import math

from stages.evaluate_understanding import EvaluateUnderstanding
from stages.plans.estimate import Estimate, Figure, add_input_options, inputs_of, options_for
from stages.plans.reference import Passes, add_passes
from vtp.layers.preprocess import CentreView
from vtp.models.tokenizer import TokenizerConfig
from vtp.objectives.cost import encoder_flops, text_flops
from vtp.params import load


def plan(arguments: list[str]) -> Estimate:
    """What evaluating a representation takes."""
    parser = options_for("evaluate_understanding")
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, EvaluateUnderstanding), inputs_of(options)
    size = inputs.tokenizer.image_size
    if isinstance(inputs.tokenizer, TokenizerConfig):
        vision, text = inputs.tokenizer.vision, inputs.tokenizer.text
        probed, whole = (encoder_flops(vision, side, bottleneck=False) for side in (config.probes.size, size))
    else:
        probed = whole = inputs.encoder_flops * (config.probes.size / size) ** 2  # but for attention
        text = None
    train = min(config.train_samples, inputs.split("train").labelled)
    validation = inputs.split("validation").labelled
    passes: Passes = {"encoder, train": (train, probed), "encoder, validation": (validation, probed)}
    if config.probes.augment is not None:
        passes["encoder, augmented epochs"] = (train * config.probes.multi.epochs, probed)
    asked = config.protocols if text is not None else []
    for protocol in dict.fromkeys(asked):
        if protocol != "centre" or config.probes.view != CentreView(size, size):
            passes[f"encoder, zero-shot {protocol}"] = (validation, whole)
    if text is not None:
        prompts = config.prompts
        templates = {"openai": 80, "given": len(getattr(prompts, "templates", []))}.get(prompts.name)
        passes["prompts"] = (inputs.classes * (templates or 0), text_flops(text) if templates else None)
    # A picture is read once for all views of it.
    stored = sum(count for name, (count, _) in passes.items() if name.startswith("encoder") and "zero" not in name)
    estimate = Estimate()
    add_passes(estimate, options, "evaluation of the representation", passes, precision=config.precision, stored=stored)
    note = "the linear heads and nearest neighbours: small beside the encoder"
    estimate.sections["time"]["left out"] = Figure(math.nan, note)
    return estimate
