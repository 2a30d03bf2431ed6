"""The plan of pre-training: parameters, FLOPs, memory, time and disk."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    kept_per_sample,
    millions,
    options_for,
)
from stages.pretrain import Pretrain
from vtp.config import ConfigError
from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import items, paper_flops, pretrain_cost
from vtp.params import load
from vtp.training.fit import run_length


def plan(arguments: list[str]) -> Estimate:
    """What the run takes that the command line names."""
    parser = options_for("pretrain")
    add_training_options(parser)
    options = parser.parse_args(arguments)
    config = load(options.address, Pretrain)
    with torch.device("meta"):
        model = VisualTokenizer(config.architecture)
        heads = _heads(config)
    active = config.active
    blocks = active.reconstruction // options.gpus
    if active.reconstruction % options.gpus:
        raise ConfigError(
            f"{active.reconstruction} blocks (batch.reconstruction) do not split over {options.gpus} GPUs"
        )
    cost = pretrain_cost(config.architecture, config.data, config.objective, active)
    length = run_length(config.training.length, samples=active.pool, flops=cost.flops)
    estimate = Estimate()

    parameters = estimate.section("parameters")
    counts = {name: count_of(part) for name, part in model.named_children()}
    parameters |= {name: millions(count, 1) for name, count in (counts | {"ssl heads": count_of(heads)}).items()}
    autoencoder = counts["trunk"] + counts["pixel_decoder"]
    parameters["encoder and decoder"] = millions(autoencoder, 1)
    flops = paper_flops(autoencoder)
    parameters["their FLOPs as in table 1"] = Figure(flops, f"{flops / GIGA:,.1f} G (2 x parameters x 256 tokens)")

    sizes = f"{active.clip:,} clip, {active.ssl:,} ssl, {active.reconstruction:,} reconstruction"
    step = estimate.section(f"FLOPs of a step: {sizes}")
    for item in items(config.architecture, config.data, config.objective, active):
        shares = f"{item.forward:.3e} forward, {item.training:.3e} training ({item.training / cost.flops:.1%})"
        step[item.name] = Figure(item.training, shares)
    per_sample = cost.flops / active.pool
    step["per sample"] = Figure(per_sample, f"{per_sample / GIGA:,.1f} G training")
    step["run"] = Figure(length.flops, f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} samples seen")

    memory = estimate.section(f"memory per GPU, {options.gpus} GPUs")
    trained = count_of(model) + count_of(heads)
    teacher = counts["trunk"] + count_of(heads) if active.ssl else 0
    split = options.gpus if options.fsdp else 1
    static = {"weights": trained, "gradients": trained, "optimiser": 2 * trained, "teacher": teacher}
    memory |= {name: gigabytes(count * FLOAT / split) for name, count in static.items()}
    passes = max(1, -(-active.pool // options.gpus // (options.micro_batch or active.pool)))
    per_objective = activations(config, model)
    share = blocks / passes / active.reconstruction  # of the global batch, in one pass
    peak = 0.0
    for name, count in {name: count for name, count in active._asdict().items() if count}.items():
        size = count * share * per_objective[name]
        peak = max(peak, size)
        memory[f"activations, {name}"] = gigabytes(size, f" for {count * share:,.0f} images in one pass")
    memory["largest sum"] = gigabytes(sum(static.values()) * FLOAT / split + peak, " without workspace")
    if passes > 1:
        note = f"{passes} per step and GPU; clip and ssl features are computed twice"
        memory["micro-batches"] = Figure(passes, note)

    time = estimate.section("time and disk")
    seconds = add_time(time, options, length.flops, precision=config.training.precision)
    time["step"] = Figure(seconds / length.steps, f"{seconds / length.steps:.3g} s")
    rate = length.samples / seconds
    time["images per second"] = Figure(rate, f"{rate:,.0f} from storage")
    checkpoint = (3 * trained + teacher) * FLOAT
    kept = f"{checkpoint / GIGA:,.1f} GB, and {options.checkpoints_kept} are kept"
    time["checkpoint"] = Figure(checkpoint, kept)
    tokenizer = count_of(model) * FLOAT
    artefacts = f"{checkpoint / GIGA:,.1f} GB, {tokenizer / GIGA:,.1f} GB"
    time["training state, tokenizer"] = Figure(checkpoint + tokenizer, artefacts)
    return estimate


def activations(config: Pretrain, model: VisualTokenizer) -> dict[str, float]:
    """Bytes that autograd keeps per sample of each objective, without recomputing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    views = config.data.ssl_views
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")

        def clip(count: int) -> list[Tensor]:
            assert config.architecture.text is not None
            tokens = torch.zeros(count, config.architecture.text.context_length, dtype=torch.int64)
            return [model.encode_image(_images(count, config.data.clip_view.size)), model.encode_text(tokens)]

        def ssl(count: int) -> list[Tensor]:
            seen = model.trunk(_images(2 * count, views.global_size))
            return [*seen, *model.trunk(_images(views.local_views * count, views.local_size))]

        def reconstruction(count: int) -> list[Tensor]:
            return [model.decode(model.encode(_images(count, config.tokenizer.image_size)))]

        passes: dict[str, Callable[[int], list[Tensor]]] = {"reconstruction": reconstruction}
        if config.active.clip:
            passes["clip"] = clip
        if config.active.ssl and views.local_views:
            passes["ssl"] = ssl
        with autocast(config.training.precision):
            return {name: kept_per_sample(forward) for name, forward in passes.items()}


def _images(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size)


def _heads(config: Pretrain) -> nn.Module:
    heads = nn.ModuleList()
    if config.active.ssl:
        ssl = config.objective.ssl
        width = ssl.width(config.tokenizer.vision)
        heads.extend(DinoHead(width, head) for head in (ssl.head, ssl.patch_head) if head is not None)
    return heads
