"""The plan of measuring real images, and what all plans of measuring stages share: passes through networks."""

import argparse
import math

import torch

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
from stages.reference import ReferenceStatistics
from vtp.evaluation.features import AnyFeaturesConfig
from vtp.evaluation.networks import DINO_SIZES, EfficientNetLite, TimmNetwork
from vtp.layers.flops import forward_flops
from vtp.losses.perceptual import RandomVggDistanceConfig
from vtp.objectives.cost import perceptual_flops
from vtp.params import load

INCEPTION_SIDE = 299
DINO_SIDE = 224
Passes = dict[str, tuple[int, float | None]]  # by part: how many, and FLOPs of each; None: not counted


def plan(arguments: list[str]) -> Estimate:
    """What statistics of real images take."""
    parser = options_for("reference")
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, ReferenceStatistics), inputs_of(options)
    counts = {name: images_of(config, inputs, name) for name in config.splits}
    passes: Passes = {f"features of {name}": (count, reference_flops(config)) for name, count in counts.items()}
    estimate = Estimate()
    add_passes(estimate, options, "reference statistics", passes, precision="float32", stored=sum(counts.values()))
    return estimate


def add_passes(
    estimate: Estimate,
    options: argparse.Namespace,
    heading: str,
    passes: Passes,
    *,
    precision: str,
    stored: int | None,
) -> float:
    """Passes and FLOPs by part, time, `stored` images read; the seconds."""
    work = estimate.section(f"FLOPs: {heading}")
    for name, (count, flops) in passes.items():
        said = "not counted" if flops is None else f"{flops / GIGA:,.2f} G each, {count * flops:.3e} in all"
        text = f"{count:,} passes, {said}" if count else said
        work[name] = Figure(math.nan if flops is None else count * flops, text)
    everything = sum(count * flops for count, flops in passes.values() if flops is not None)
    work["run"] = Figure(everything, f"{everything:.3e}")
    time = estimate.section("time")
    seconds = add_time(time, options, everything, precision=precision)
    if stored is not None:
        time["images per second"] = Figure(stored / seconds, f"{stored / seconds:,.0f} from storage")
    return seconds


def images_of(config: ReferenceStatistics, inputs: PlannedInputs, split: str) -> int:
    """Of a split, those that count."""
    wanted, sizes = config.splits[split], inputs.split(split)
    there = sizes.labelled if wanted.labelled else sizes.samples
    return there if wanted.samples is None else min(there, wanted.samples)


def reference_flops(config: ReferenceStatistics) -> float | None:
    """Of the features of one image, by all networks; None where the shapes of one do not say."""
    flops = [features_flops(each, config.image_size) for each in config.features]
    return None if None in flops else sum(filter(None, flops))


def features_flops(config: AnyFeaturesConfig, image_size: int) -> float | None:
    """Of one image; None where shapes do not say."""
    if config.name == "random_vgg16":
        same = RandomVggDistanceConfig(name="random_vgg16", seed=config.seed, stages=5)
        return perceptual_flops(same, image_size)
    if config.name == "clip":
        return None
    with torch.device("meta"):
        if config.name == "efficientnet_lite0":
            network = EfficientNetLite(config.side, weights=False)
            return forward_flops(network, torch.empty(1, 3, config.side, config.side))
        if config.name == "timm":
            network = TimmNetwork(config.model, config.side, config.reading, None)
            return forward_flops(network, torch.empty(1, 3, config.side, config.side))
        if config.name == "inception":
            from torchvision.models import inception_v3

            # FID's network differs in pooling alone, which costs no products.
            network = inception_v3(weights=None, aux_logits=False, init_weights=False)
            return forward_flops(network, torch.empty(1, 3, INCEPTION_SIDE, INCEPTION_SIDE))
        import timm

        name = f"vit_{DINO_SIZES[config.architecture]}_patch14_dinov2"
        network = timm.create_model(name, num_classes=0, img_size=DINO_SIDE)
        return forward_flops(network, torch.empty(1, 3, DINO_SIDE, DINO_SIDE))
