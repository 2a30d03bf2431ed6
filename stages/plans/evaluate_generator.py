"""The plan of measuring samples."""

from stages.evaluate_generator import EvaluateGenerator
from stages.generate import Generate
from stages.plans.estimate import FLOAT, GIGA, Estimate, Figure, add_input_options, beside, inputs_of, options_for
from stages.plans.reference import Passes, add_passes, reference_flops
from stages.reference import ReferenceStatistics
from vtp.params import load


def plan(arguments: list[str]) -> Estimate:
    """What measuring samples takes."""
    parser = options_for("evaluate_generator")
    add_input_options(parser)
    parser.add_argument("--samples", metavar="FILE:SECTION", help="parameters of generate; default: FILE:generate")
    options = parser.parse_args(arguments)
    config = load(options.address, EvaluateGenerator)
    inputs, reference = inputs_of(options), load(beside(options, "reference"), ReferenceStatistics)
    inputs = inputs.at(reference.image_size)
    drawn = load(options.samples or beside(options, "generate"), Generate)
    settings = len(drawn.all_settings) + 1
    images = settings * drawn.samples + max(config.counts)
    passes: Passes = {
        "decoder": (images, inputs.decoder_flops),
        "features": (images, reference_flops(reference)),
    }
    estimate = Estimate()
    heading = f"{drawn.samples:,} samples of {settings} settings, the baseline of noise among them, and reconstructions"
    seconds = add_passes(estimate, options, heading, passes, precision="float32", stored=None)
    rate = images / seconds
    note = f"{rate:,.0f} from storage, {rate * inputs.latent_numbers * FLOAT / GIGA:.3g} GB/s"
    estimate.sections["time"]["latents per second"] = Figure(rate, note)
    return estimate
