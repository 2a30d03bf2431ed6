"""The plan of tuning a decoder: encoder, decoder, perceptual network and discriminator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.plans.adversary import discriminator_of
from stages.plans.estimate import (
    FLOAT,
    GIGA,
    Estimate,
    Figure,
    PlannedInputs,
    add_input_options,
    add_time,
    add_training_options,
    autocast,
    count_of,
    gigabytes,
    inputs_of,
    kept_moments,
    kept_per_sample,
    millions,
    options_for,
    per_gpu,
)
from stages.tune_decoder import TuneDecoder
from vtp.layers.block import Block
from vtp.layers.flops import FROZEN, TRAINING
from vtp.losses.perceptual import perceptual_shapes
from vtp.models.base import TrainableTokenizer
from vtp.models.discriminator import Discriminator, PatchDiscriminator
from vtp.models.trainable import build_tokenizer
from vtp.objectives.adversary import Adversary
from vtp.objectives.cost import perceptual_flops
from vtp.params import load
from vtp.step import hidden_matrices
from vtp.training.fit import run_length


def plan(arguments: list[str]) -> Estimate:
    """What tuning a decoder takes."""
    parser = options_for("tune_decoder")
    add_training_options(parser)
    add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, TuneDecoder), inputs_of(options)
    with torch.device("meta"):
        model = build_tokenizer(inputs.tokenizer)
    discriminator = discriminator_of(config.adversary, model)
    parts = cost(config, inputs, discriminator)
    of_image = sum(parts.values())
    length = run_length(config.training.length, samples=config.batch_size, flops=of_image * config.batch_size)
    counts = {
        "decoder": count_of(model.pixel_decoder),
        "discriminator": 0 if discriminator is None else count_of(discriminator),
    }
    estimate = Estimate()

    parameters = estimate.section("parameters")
    parameters |= {f"{name}, trained": millions(count) for name, count in counts.items()}
    step = estimate.section(f"FLOPs of a step: {config.batch_size:,} images, with all parts at work")
    for name, flops in parts.items():
        step[name] = Figure(flops, f"{flops / GIGA:,.1f} G an image ({flops / of_image:.1%})")
    step["run"] = Figure(length.flops, f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} images seen")

    memory = estimate.section(f"memory per GPU, {options.gpus} GPUs; weights are whole on each")
    trained = sum(counts.values())
    frozen = count_of(model.encoder_layers()) + count_of(perceptual_shapes(config.objective.perceptual))
    static = {"encoder and perceptual network": frozen, "weights": trained, "gradients": trained}
    hidden = hidden_matrices(module for module in model.pixel_decoder.modules() if isinstance(module, Block))
    moments = kept_moments(trained, hidden, config.optim)
    static |= {"optimiser": moments, "average": counts["decoder"]}
    memory |= {name: gigabytes(count * FLOAT) for name, count in static.items()}
    share, passes = per_gpu(options, config.batch_size, named="tune_decoder.batch_size")
    kept = {name: share * size for name, size in activations(config, inputs, model, discriminator).items()}
    for name, size in kept.items():
        memory[f"activations, {name}"] = gigabytes(size, f" for {share:,} images in one pass, {passes} per step")
    # The losses are differentiated down to the pixels one by one, while the decoder's activations wait.
    peak = kept.pop("decoder") + max(kept.values())
    note = " without workspace and frozen discriminators"
    memory["largest sum"] = gigabytes(sum(static.values()) * FLOAT + peak, note)

    time = estimate.section("time and disk")
    seconds = add_time(time, options, length.flops, precision=config.training.precision)
    time["step"] = Figure(seconds / length.steps, f"{seconds / length.steps:.3g} s")
    rate = length.samples / seconds
    time["images per second"] = Figure(rate, f"{rate:,.0f} from storage")
    state = (trained + moments + counts["decoder"]) * FLOAT
    time["checkpoint"] = gigabytes(state, f", and {options.checkpoints_kept} are kept")
    time["decoder"] = gigabytes(counts["decoder"] * FLOAT)
    return estimate


def cost(config: TuneDecoder, inputs: PlannedInputs, discriminator: Discriminator | None) -> dict[str, float]:
    """FLOPs per image of a step by part, as `DecoderObjective.step_cost` sums them up."""
    side, of_decoder = inputs.tokenizer.image_size, inputs.decoder_flops
    network = perceptual_flops(config.objective.perceptual, side)
    parts = {"encoder": inputs.encoder_flops, "decoder": TRAINING * of_decoder}
    parts["perceptual network"] = (1 + FROZEN) * network  # of the two images one passes a gradient on
    if discriminator is not None and config.adversary is not None:
        parts["discriminator"] = Adversary(discriminator, config.adversary, seed=config.seed).step_flops(side)
        parts["fakes without noise"] = of_decoder if config.objective.noise.std else 0.0
    return {name: flops for name, flops in parts.items() if flops}


def activations(
    config: TuneDecoder, inputs: PlannedInputs, model: TrainableTokenizer, discriminator: Discriminator | None
) -> dict[str, float]:
    """Bytes that autograd keeps per image, without recomputing and compiling."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    side, perceptual = inputs.tokenizer.image_size, perceptual_shapes(config.objective.perceptual)
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder, perceptual = model.pixel_decoder.to_empty(device="cpu"), perceptual.to_empty(device="cpu")

        def decode(count: int) -> list[Tensor]:
            return [decoder(torch.empty(count, *inputs.latent_shape))]

        def compare(count: int) -> list[Tensor]:
            directions = perceptual(torch.empty(count, 3, side, side, requires_grad=True))
            return [(F.normalize(stage, dim=1) - torch.empty_like(stage)).square() for stage in directions]

        with autocast(config.training.precision):
            kept = {"decoder": kept_per_sample(decode)}
            if isinstance(discriminator, PatchDiscriminator):
                judge = discriminator.to_empty(device="cpu")
                kept["discriminator"] = kept_per_sample(lambda count: [judge(torch.empty(2 * count, 3, side, side))])
        return kept | {"perceptual network": kept_per_sample(compare)}
