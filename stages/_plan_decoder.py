"""The plan of tuning a decoder: encoder, decoder, perceptual network and critic."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import _plan
from stages._plan import FLOAT, GIGA, Inputs, count_of, growth, half, print_time, row, title
from vtp.config import load

if TYPE_CHECKING:
    from stages.tune_decoder import TuneDecoder
    from vtp.losses.perceptual import PerceptualConfig
    from vtp.models.discriminator import Critic, TimmFeaturesConfig
    from vtp.models.tokenizer import VisualTokenizer


def plan_tuning(arguments: list[str]) -> None:
    """Print what tuning a decoder takes."""
    from stages.tune_decoder import TuneDecoder
    from vtp.models.tokenizer import VisualTokenizer
    from vtp.training.fit import plan

    parser = _plan.options_for("tune_decoder")
    _plan.add_training_options(parser)
    _plan.add_input_options(parser)
    options = parser.parse_args(arguments)
    config, inputs = load(options.address, TuneDecoder), _plan.inputs_of(options)
    with torch.device("meta"):
        model = VisualTokenizer(inputs.tokenizer)
    critic = critic_of(config, model)
    parts = cost(config, inputs, critic)
    step = sum(parts.values()) * config.batch_size
    length = plan(config.training.length, samples=config.batch_size, flops=step)
    counts = {"decoder": count_of(model.pixel_decoder), "critic": 0 if critic is None else count_of(critic)}

    title("parameters")
    for name, count in counts.items():
        row(f"{name}, trained", f"{count / 1e6:,.2f} M")
    title(f"FLOPs of a step: {config.batch_size:,} images, with all parts at work")
    for name, flops in parts.items():
        row(name, f"{flops / GIGA:,.1f} G an image ({flops / sum(parts.values()):.1%})")
    row("run", f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} images seen")

    title(f"memory per GPU, {options.gpus} GPUs; weights are whole on each")
    trained = sum(counts.values())
    frozen = count_of(model.trunk) + count_of(network_of(config.objective.perceptual))
    static = {"encoder and perceptual network": frozen, "weights": trained, "gradients": trained}
    static |= {"optimiser": 2 * trained, "average": counts["decoder"]}
    for name, count in static.items():
        row(name, f"{count * FLOAT / GIGA:,.2f} GB")
    share, micros = _plan.share_of(options, config.batch_size, named="tune_decoder.batch_size")
    kept = {name: share * size for name, size in activations(config, inputs, model, critic).items()}
    for name, size in kept.items():
        row(f"activations, {name}", f"{size / GIGA:,.2f} GB for {share:,} images in one pass, {micros} per step")
    # The losses are differentiated down to the pixels one by one, while the decoder's activations wait.
    peak = kept.pop("decoder") + max(kept.values())
    row("largest sum", f"{(sum(static.values()) * FLOAT + peak) / GIGA:,.2f} GB without workspace and frozen critics")

    title("time and disk")
    seconds = print_time(options, length.flops, precision=config.training.precision)
    row("step", f"{seconds / length.steps:.3g} s")
    row("images per second", f"{length.samples / seconds:,.0f} from storage")
    state = (3 * trained + counts["decoder"]) * FLOAT / GIGA
    row("checkpoint", f"{state:,.2f} GB, and {options.checkpoints_kept} are kept")
    row("decoder", f"{counts['decoder'] * FLOAT / GIGA:,.2f} GB")


def cost(config: "TuneDecoder", inputs: Inputs, critic: "Critic | None") -> dict[str, float]:
    """FLOPs per image of a step by part, as `DecoderObjective.step_cost` sums them up."""
    from vtp.layers.flops import FROZEN, TRAINING
    from vtp.objectives.adversary import Adversary
    from vtp.objectives.cost import perceptual_flops

    side, of_decoder = inputs.tokenizer.image_size, inputs.decoder_flops
    network = perceptual_flops(config.objective.perceptual, side)
    found = {"encoder": inputs.encoder_flops, "decoder": TRAINING * of_decoder}
    found["perceptual network"] = (1 + FROZEN) * network  # of the two images one passes a gradient on
    if critic is not None and config.adversary is not None:
        found["critic"] = Adversary(critic, config.adversary, seed=config.seed).step_flops(side)
        found["fakes without noise"] = of_decoder if config.objective.noise.std else 0.0
    return {name: flops for name, flops in found.items() if flops}


def critic_of(config: "TuneDecoder", tokenizer: "VisualTokenizer") -> "Critic | None":
    """The critic without contents; that of --critic-features is taken to be as large as `tokenizer`."""
    from vtp.models.critic_features import TokenizerFeatures
    from vtp.models.discriminator import FeatureCritic, PatchCritic, PatchCriticConfig, TimmFeaturesConfig

    if config.adversary is None:
        return None
    critic = config.adversary.discriminator
    with torch.device("meta"):
        if isinstance(critic, PatchCriticConfig):
            return PatchCritic(critic)
        network = critic.network
        if isinstance(network, TimmFeaturesConfig):
            features = _TimmShapes(network)
        else:
            features = TokenizerFeatures(tokenizer, blocks=network.blocks, size=network.image_size)
        return FeatureCritic(critic, features, dim=features.dim, heads=network.blocks)


def network_of(config: "PerceptualConfig") -> nn.Module:
    """The convolutions behind a perceptual distance, without contents; LPIPS is a VGG16 too."""
    from vtp.layers.random_vgg import STAGES, ConvStages

    stages = config.stages if config.name == "random_vgg16" else len(STAGES)
    with torch.device("meta"):
        return ConvStages(STAGES[:stages]).requires_grad_(False)


def activations(
    config: "TuneDecoder", inputs: Inputs, model: "VisualTokenizer", critic: "Critic | None"
) -> dict[str, float]:
    """Bytes that autograd keeps per image, without recomputing and compiling."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vtp.models.discriminator import PatchCritic

    side, perceptual = inputs.tokenizer.image_size, network_of(config.objective.perceptual)
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder, perceptual = model.pixel_decoder.to_empty(device="cpu"), perceptual.to_empty(device="cpu")

        def decode(count: int) -> list[Tensor]:
            return [decoder(torch.empty(count, *inputs.latent_shape))]

        def compare(count: int) -> list[Tensor]:
            directions = perceptual(torch.empty(count, 3, side, side, requires_grad=True))
            return [(F.normalize(stage, dim=1) - torch.empty_like(stage)).square() for stage in directions]

        with half(config.training.precision):
            found = {"decoder": growth(decode)}
            if isinstance(critic, PatchCritic):
                judge = critic.to_empty(device="cpu")
                found["critic"] = growth(lambda count: [judge(torch.empty(2 * count, 3, side, side))])
        return found | {"perceptual network": growth(compare)}


class _TimmShapes(nn.Module):
    """`TimmFeatures` without its weights."""

    def __init__(self, config: "TimmFeaturesConfig") -> None:
        from vtp.models.critic_features import spread
        from vtp.models.frozen_backbone import bare_backbone

        super().__init__()
        self._size = config.image_size
        self.backbone = bare_backbone(config.model, config.image_size).requires_grad_(False)
        self.dim: int = self.backbone.embed_dim
        self._chosen = spread(config.blocks, len(self.backbone.blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.interpolate(images, (self._size, self._size))
        of_blocks = self.backbone.forward_intermediates(
            x, indices=self._chosen, output_fmt="NLC", intermediates_only=True
        )
        return [tokens.transpose(1, 2) for tokens in of_blocks]
