"""The plans of the stages that measure: images through encoder, decoder and feature networks."""

import argparse
from typing import TYPE_CHECKING

import torch

from stages import _plan
from stages._plan import GIGA, Inputs, print_time, row, title
from vtp.config import load

if TYPE_CHECKING:
    from stages.reference import ReferenceStatistics
    from vtp.evaluation.features import AnyFeaturesConfig

INCEPTION_SIDE = 299
DINO_SIDE = 224


def plan_reference(arguments: list[str]) -> None:
    """Print what statistics of real images take."""
    parser = _plan.options_for("reference")
    _plan.add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = _reference(options.address), _plan.inputs_of(options)
    counts = {name: _images(config, inputs, name) for name in config.splits}
    flops = {f"features of {name}": (count, _features(config)) for name, count in counts.items()}
    _print(options, "reference statistics", flops, precision="float32", stored=sum(counts.values()))


def plan_reconstruction(arguments: list[str]) -> None:
    """Print what measuring reconstructions takes, by the pre-trained decoder and a tuned one."""
    from stages.evaluate_reconstruction import EvaluateReconstruction
    from vtp.objectives.cost import perceptual_flops

    parser = _plan.options_for("evaluate_reconstruction")
    _plan.add_input_options(parser)
    parser.add_argument("--decoders", type=int, default=2, help="2: the pre-trained one and a tuned one")
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, EvaluateReconstruction), _plan.inputs_of(options)
    reference = _reference(_plan.beside(options, "reference"))
    images, decoders = _images(reference, inputs, config.split), options.decoders
    noisy = min(config.noise.samples, images)
    rendered = decoders * (images + noisy * len(config.noise.levels))
    compared = 2 * decoders * images  # both images of a pair
    found: dict[str, tuple[int, float | None]] = {
        "encoder": (images + noisy, inputs.encoder_flops),
        "decoders, of noisy latents too": (rendered, inputs.decoder_flops),
        "perceptual network": (compared, perceptual_flops(config.perceptual, inputs.tokenizer.image_size)),
        "features of reconstructions": (decoders * images, _features(reference)),
    }
    _print(options, f"{decoders} decoders on {images:,} images", found, precision="float32", stored=images + noisy)


def plan_understanding(arguments: list[str]) -> None:
    """Print what measuring the representation takes."""
    from stages.evaluate_understanding import EvaluateUnderstanding
    from vtp.layers.preprocess import CentreView
    from vtp.objectives.cost import encoder_flops, text_flops

    parser = _plan.options_for("evaluate_understanding")
    _plan.add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, EvaluateUnderstanding), _plan.inputs_of(options)
    vision, text, size = inputs.tokenizer.vision, inputs.tokenizer.text, inputs.tokenizer.image_size
    probed = encoder_flops(vision, config.probes.size, bottleneck=False)
    whole = encoder_flops(vision, size, bottleneck=False)
    train = min(config.train_samples, inputs.split("train").labelled)
    validation = inputs.split("validation").labelled
    found: dict[str, tuple[int, float | None]] = {
        "encoder, train": (train, probed),
        "encoder, validation": (validation, probed),
    }
    if config.probes.augment is not None:
        found["encoder, augmented epochs"] = (train * config.probes.multi.epochs, probed)
    asked = config.protocols if text is not None else []
    for protocol in dict.fromkeys(asked):
        if protocol != "centre" or config.probes.view != CentreView(size, size):
            found[f"encoder, zero-shot {protocol}"] = (validation, whole)
    if text is not None:
        prompts = config.prompts
        templates = {"openai": 80, "given": len(getattr(prompts, "templates", []))}.get(prompts.name)
        found["prompts"] = (inputs.classes * (templates or 0), text_flops(text) if templates else None)
    # A picture is read once for all views of it.
    stored = sum(count for name, (count, _) in found.items() if name.startswith("encoder") and "zero" not in name)
    _print(options, "what the encoder understands", found, precision=config.precision, stored=stored)
    row("left out", "the linear heads and nearest neighbours: small beside the encoder")


def plan_comparison(arguments: list[str]) -> None:
    """Print what measuring samples takes."""
    from stages.evaluate_generator import EvaluateGenerator
    from stages.generate import Generate

    parser = _plan.options_for("evaluate_generator")
    _plan.add_input_options(parser)
    parser.add_argument("--samples", metavar="FILE:SECTION", help="parameters of generate; default: FILE:generate")
    options = parser.parse_args(arguments)
    load(options.address, EvaluateGenerator)
    inputs, reference = _plan.inputs_of(options), _reference(_plan.beside(options, "reference"))
    drawn = load(options.samples or _plan.beside(options, "generate"), Generate)
    settings = len(drawn.all_settings) + 1
    images = settings * drawn.samples
    found = {"decoder": (images, inputs.decoder_flops), "features": (images, _features(reference))}
    heading = f"{drawn.samples:,} samples of {settings} settings, the baseline of noise among them"
    seconds = _print(options, heading, found, precision="float32", stored=None)
    rate = images / seconds * inputs.latent_numbers * _plan.FLOAT / GIGA
    row("latents per second", f"{images / seconds:,.0f} from storage, {rate:.3g} GB/s")


def features_flops(config: "AnyFeaturesConfig", image_size: int) -> float | None:
    """Of one image; None where shapes do not tell."""
    from vtp.layers.flops import forward_flops
    from vtp.losses.perceptual import RandomVggDistanceConfig
    from vtp.objectives.cost import perceptual_flops

    if config.name == "random_vgg16":
        same = RandomVggDistanceConfig(name="random_vgg16", seed=config.seed, stages=5)
        return perceptual_flops(same, image_size)
    if config.name == "clip":
        return None
    with torch.device("meta"):
        if config.name == "inception":
            from torchvision.models import inception_v3

            # FID's network differs in pooling alone, which costs no products.
            network = inception_v3(weights=None, aux_logits=False, init_weights=False)
            return forward_flops(network, torch.empty(1, 3, INCEPTION_SIDE, INCEPTION_SIDE))
        import timm

        from vtp.evaluation.networks import DINO_SIZES

        name = f"vit_{DINO_SIZES[config.architecture]}_patch14_dinov2"
        network = timm.create_model(name, num_classes=0, img_size=DINO_SIDE)
        return forward_flops(network, torch.empty(1, 3, DINO_SIDE, DINO_SIDE))


def _reference(address: str) -> "ReferenceStatistics":
    from stages.reference import ReferenceStatistics

    return load(address, ReferenceStatistics)


def _features(config: "ReferenceStatistics") -> float | None:
    return features_flops(config.features, config.image_size)


def _images(config: "ReferenceStatistics", inputs: Inputs, split: str) -> int:
    """Of a split, those that count."""
    wanted, sizes = config.splits[split], inputs.split(split)
    there = sizes.labelled if wanted.labelled else sizes.samples
    return there if wanted.samples is None else min(there, wanted.samples)


def _print(
    options: argparse.Namespace,
    heading: str,
    parts: dict[str, tuple[int, float | None]],
    *,
    precision: str,
    stored: int | None,
) -> float:
    """Passes and FLOPs by part, time, images from storage; seconds are returned."""
    title(f"FLOPs: {heading}")
    for name, (count, flops) in parts.items():
        said = "not counted" if flops is None else f"{flops / GIGA:,.2f} G each, {count * flops:.3e} in all"
        row(name, f"{count:,} passes, {said}" if count else said)
    everything = sum(count * flops for count, flops in parts.values() if flops is not None)
    row("run", f"{everything:.3e}")
    title("time")
    seconds = print_time(options, everything, precision=precision)
    if stored is not None:
        row("images per second", f"{stored / seconds:,.0f} from storage")
    return seconds
