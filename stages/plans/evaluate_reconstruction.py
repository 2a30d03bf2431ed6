"""The plan of measuring reconstructions, by the pre-trained decoder and a tuned one."""

from stages.evaluate_reconstruction import EvaluateReconstruction
from stages.plans.estimate import Estimate, add_input_options, beside, inputs_of, options_for
from stages.plans.reference import Passes, add_passes, images_of, reference_flops
from stages.reference import ReferenceStatistics
from vtp.objectives.cost import perceptual_flops
from vtp.params import load


def plan(arguments: list[str]) -> Estimate:
    """What measuring reconstructions takes."""
    parser = options_for("evaluate_reconstruction")
    add_input_options(parser)
    parser.add_argument("--decoders", type=int, default=2, help="2: the pre-trained one and a tuned one")
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, EvaluateReconstruction), inputs_of(options)
    reference = load(beside(options, "reference"), ReferenceStatistics)
    inputs = inputs.at(reference.image_size)
    images, decoders = images_of(reference, inputs, config.split), options.decoders
    noisy = min(config.noise.samples, images)
    rendered = decoders * (images + noisy * len(config.noise.levels))
    compared = 2 * decoders * images  # both images of a pair
    passes: Passes = {
        "encoder": (images + noisy, inputs.encoder_flops),
        "decoders, of noisy latents too": (rendered, inputs.decoder_flops),
        "perceptual network": (compared, perceptual_flops(config.perceptual, inputs.tokenizer.image_size)),
        "features of reconstructions": (decoders * images, reference_flops(reference)),
    }
    estimate = Estimate()
    heading = f"{decoders} decoders on {images:,} images"
    add_passes(estimate, options, heading, passes, precision="float32", stored=images + noisy)
    return estimate
