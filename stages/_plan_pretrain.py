"""The plan of pre-training: parameters, FLOPs, memory, time and disk."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages._plan import FLOAT, GIGA, add_training_options, count_of, growth, half, options_for, print_time, row, title
from vtp.config import ConfigError, load
from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import items, paper_flops, pretrain_cost
from vtp.training.fit import plan

if TYPE_CHECKING:
    from stages.pretrain import Pretrain


def plan_pretraining(arguments: list[str]) -> None:
    """Print what the run takes that the command line names."""
    from stages.pretrain import Pretrain

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
    length = plan(config.training.length, samples=active.pool, flops=cost.flops)

    title("parameters")
    counts = {name: count_of(part) for name, part in model.named_children()}
    for name, count in (counts | {"ssl heads": count_of(heads)}).items():
        row(name, f"{count / 1e6:,.1f} M")
    autoencoder = counts["trunk"] + counts["pixel_decoder"]
    row("encoder and decoder", f"{autoencoder / 1e6:,.1f} M")
    row("their FLOPs as in table 1", f"{paper_flops(autoencoder) / GIGA:,.1f} G (2 x parameters x 256 tokens)")

    title(f"FLOPs of a step: {active.clip:,} clip, {active.ssl:,} ssl, {active.reconstruction:,} reconstruction")
    for item in items(config.architecture, config.data, config.objective, active):
        row(item.name, f"{item.forward:.3e} forward, {item.training:.3e} training ({item.training / cost.flops:.1%})")
    row("per sample", f"{cost.flops / active.pool / GIGA:,.1f} G training")
    row("run", f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} samples seen")

    title(f"memory per GPU, {options.gpus} GPUs")
    trained = count_of(model) + count_of(heads)
    teacher = counts["trunk"] + count_of(heads) if active.ssl else 0
    split = options.gpus if options.fsdp else 1
    static = {"weights": trained, "gradients": trained, "optimiser": 2 * trained, "teacher": teacher}
    for name, count in static.items():
        row(name, f"{count * FLOAT / split / GIGA:,.2f} GB")
    micros = max(1, -(-active.pool // options.gpus // (options.micro_batch or active.pool)))
    per_objective = activations(config, model)
    share = blocks / micros / active.reconstruction  # of the global batch, in one pass
    peak = 0.0
    for name, count in {name: count for name, count in active._asdict().items() if count}.items():
        size = count * share * per_objective[name]
        peak = max(peak, size)
        row(f"activations, {name}", f"{size / GIGA:,.2f} GB for {count * share:,.0f} images in one pass")
    row("largest sum", f"{(sum(static.values()) * FLOAT / split + peak) / GIGA:,.2f} GB without workspace")
    if micros > 1:
        row("micro-batches", f"{micros} per step and GPU; clip and ssl features are computed twice")

    title("time and disk")
    seconds = print_time(options, length.flops, precision=config.training.precision)
    row("step", f"{seconds / length.steps:.3g} s")
    row("images per second", f"{length.samples / seconds:,.0f} from storage")
    checkpoint = (3 * trained + teacher) * FLOAT / GIGA
    row("checkpoint", f"{checkpoint:,.1f} GB, and {options.checkpoints_kept} are kept")
    row("training state, tokenizer", f"{checkpoint:,.1f} GB, {count_of(model) * FLOAT / GIGA:,.1f} GB")


def activations(config: "Pretrain", model: VisualTokenizer) -> dict[str, float]:
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
        with half(config.training.precision):
            return {name: growth(forward) for name, forward in passes.items()}


def _images(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size)


def _heads(config: "Pretrain") -> nn.Module:
    heads = nn.ModuleList()
    if config.active.ssl:
        ssl = config.objective.ssl
        width = ssl.width(config.tokenizer.vision)
        heads.extend(DinoHead(width, head) for head in (ssl.head, ssl.patch_head) if head is not None)
    return heads
