"""The plan of pre-training: parameters, FLOPs, memory, time and disk."""

from argparse import Namespace
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stages.plans.adversary import discriminator_of
from stages.plans.estimate import (
    FLOAT,
    GIGA,
    Estimate,
    Figure,
    add_time,
    add_training_options,
    autocast,
    count_of,
    gigabytes,
    kept_moments,
    kept_per_sample,
    millions,
    options_for,
)
from stages.pretrain import Pretrain, micro_batches_of, step_cost
from vtp.models.base import TrainableTokenizer
from vtp.models.diffusers_vae import ConvolutionalConfig
from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer
from vtp.models.trainable import build_tokenizer
from vtp.objectives.adversary import Adversary
from vtp.objectives.cost import convolution_flops, items, paper_flops
from vtp.objectives.rates import groups
from vtp.params import load
from vtp.training.fit import RunLength, run_length


def plan(arguments: list[str]) -> Estimate:
    """What the run takes that the command line names."""
    parser = options_for("pretrain")
    add_training_options(parser)
    options = parser.parse_args(arguments)
    config = load(options.address, Pretrain)
    with torch.device("meta"):
        model = build_tokenizer(config.architecture)
        heads = _heads(config)
    active = config.active
    passes = micro_batches_of(config, options.gpus, options.micro_batch)
    discriminator = discriminator_of(config.adversary, model)
    adversary = None
    if discriminator is not None and config.adversary is not None:
        adversary = Adversary(discriminator, config.adversary, seed=config.seed)
    cost = step_cost(config, adversary)
    length = run_length(config.training.length, samples=active.pool, flops=cost.flops)
    estimate = Estimate()

    parameters = estimate.section("parameters")
    counts = {name: count_of(part) for name, part in model.named_children()}
    extra = {"ssl heads": count_of(heads)}
    if discriminator is not None:
        extra["discriminator, trained"] = sum(p.numel() for p in discriminator.parameters() if p.requires_grad)
    parameters |= {name: millions(count, 1) for name, count in (counts | extra).items()}
    encoder = count_of(model.encoder_layers())
    autoencoder = encoder + counts["pixel_decoder"]
    parameters["encoder and decoder"] = millions(autoencoder, 1)
    if isinstance(config.tokenizer, ConvolutionalConfig):
        table_1, how = convolution_flops(config.tokenizer), "convolutions and linear layers"
    else:
        table_1, how = paper_flops(autoencoder), "2 x parameters x 256 tokens"
    parameters["their FLOPs as in table 1"] = Figure(table_1, f"{table_1 / GIGA:,.1f} G ({how})")

    sizes = f"{active.clip:,} clip, {active.ssl:,} ssl, {active.reconstruction:,} reconstruction"
    step = estimate.section(f"FLOPs of a step: {sizes}")
    for item in items(config.architecture, config.data, config.objective, active):
        shares = f"{item.forward:.3e} forward, {item.training:.3e} training ({item.training / cost.flops:.1%})"
        step[item.name] = Figure(item.training, shares)
    if adversary is not None:
        flops = adversary.step_flops(config.tokenizer.image_size) * active.reconstruction
        step["discriminator"] = Figure(flops, f"{flops:.3e} ({flops / cost.flops:.1%})")
    per_sample = cost.flops / active.pool
    step["per sample"] = Figure(per_sample, f"{per_sample / GIGA:,.1f} G training")
    step["run"] = Figure(length.flops, f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} samples seen")

    memory = estimate.section(f"memory per GPU, {options.gpus} GPUs")
    trained = count_of(model) + sum(extra.values())
    teacher = encoder + count_of(heads) if active.ssl else 0
    split = options.gpus if options.fsdp else 1
    moments = kept_moments(
        trained, {matrix for group in groups(model, heads, config.rates) for matrix in group.hidden}, config.optim
    )
    static = {"weights": trained, "gradients": trained, "optimiser": moments, "teacher": teacher}
    memory |= {name: gigabytes(count * FLOAT / split) for name, count in static.items()}
    per_objective = activations(config, model)
    share = 1 / passes / options.gpus  # of the global batch, in one pass
    peak = 0.0
    for name, count in {name: count for name, count in active._asdict().items() if count}.items():
        size = count * share * per_objective[name]
        peak = max(peak, size)
        memory[f"activations, {name}"] = gigabytes(size, f" for {count * share:,.0f} images in one pass")
    memory["largest sum"] = gigabytes(sum(static.values()) * FLOAT / split + peak, " without workspace")
    if passes > 1:
        note = f"{passes} per step and GPU; clip and ssl features are computed twice"
        memory["micro-batches"] = Figure(passes, note)

    state = {"checkpoint": (trained + moments + teacher) * FLOAT, "tokenizer": count_of(model) * FLOAT}
    _add_time_and_disk(estimate.section("time and disk"), options, config, length, state)
    return estimate


def _add_time_and_disk(
    time: dict[str, Figure], options: Namespace, config: Pretrain, length: RunLength, size: Mapping[str, float]
) -> None:
    """`size`: bytes on disk."""
    seconds = add_time(time, options, length.flops, precision=config.training.precision)
    time["step"] = Figure(seconds / length.steps, f"{seconds / length.steps:.3g} s")
    rate = length.samples / seconds
    time["images per second"] = Figure(rate, f"{rate:,.0f} from storage")
    checkpoint = size["checkpoint"]
    kept = f"{checkpoint / GIGA:,.1f} GB, and {options.checkpoints_kept} are kept"
    time["checkpoint"] = Figure(checkpoint, kept)
    artefacts = f"{checkpoint / GIGA:,.1f} GB, {size['tokenizer'] / GIGA:,.1f} GB"
    time["training state, tokenizer"] = Figure(checkpoint + size["tokenizer"], artefacts)


def activations(config: Pretrain, model: TrainableTokenizer) -> dict[str, float]:
    """Bytes that autograd keeps per sample of each objective, without recomputing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    views = config.data.ssl_views
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")

        def clip(count: int) -> list[Tensor]:
            assert isinstance(model, VisualTokenizer)
            assert model.config.text is not None
            tokens = torch.zeros(count, model.config.text.context_length, dtype=torch.int64)
            return [model.encode_image(_images(count, config.data.clip_view.size)), model.encode_text(tokens)]

        def ssl(count: int) -> list[Tensor]:
            assert isinstance(model, VisualTokenizer)
            seen = [*model.trunk(_images(2 * count, views.global_size))]
            if views.local_views:
                seen += model.trunk(_images(views.local_views * count, views.local_size))
            return seen

        def reconstruction(count: int) -> list[Tensor]:
            return [model.decode(model.encode(_images(count, config.tokenizer.image_size), grad=True), grad=True)]

        passes: dict[str, Callable[[int], list[Tensor]]] = {}
        if config.active.reconstruction:
            passes["reconstruction"] = reconstruction
        if config.active.clip:
            passes["clip"] = clip
        if config.active.ssl:
            passes["ssl"] = ssl
        with autocast(config.training.precision):
            return {name: kept_per_sample(forward) for name, forward in passes.items()}


def _images(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size)


def _heads(config: Pretrain) -> nn.Module:
    heads = nn.ModuleList()
    if config.active.ssl:
        ssl = config.objective.ssl
        width = ssl.width(config.vit.vision)
        heads.extend(DinoHead(width, head) for head in (ssl.head, ssl.patch_head) if head is not None)
    return heads
