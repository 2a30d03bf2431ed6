"""`python -m stages.pretrain --plan`: what a run takes, before anything is bought or allocated.

Parameters and FLOPs come from shapes. Activation memory is counted by running one sample through the real modules
with tensors that have shapes and no contents, and adding up what autograd would keep.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vtp.models.heads import DinoHead
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import items, paper_flops, pretrain_cost
from vtp.training.fit import plan

if TYPE_CHECKING:
    from stages.pretrain import Pretrain

FLOAT = 4  # bytes
GIGA = 1e9


def print_plan(config: "Pretrain", arguments: list[str]) -> None:
    """Print parameters, FLOPs, memory, time and disk of the run that `config` describes."""
    options = _options(arguments)
    with torch.device("meta"):
        model = VisualTokenizer(config.architecture)
        heads = _heads(config)
    active = config.active
    blocks = active.reconstruction // options.gpus
    if active.reconstruction % options.gpus:
        raise ValueError(f"{active.reconstruction} blocks (batch.reconstruction) do not split over {options.gpus} GPUs")
    cost = pretrain_cost(config.architecture, config.data, config.objective, active)
    length = plan(config.training.length, samples=active.pool, flops=cost.flops)

    _title("parameters")
    counts = {name: _count(part) for name, part in model.named_children()}
    for name, count in (counts | {"ssl heads": _count(heads)}).items():
        _row(name, f"{count / 1e6:,.1f} M")
    autoencoder = counts["trunk"] + counts["pixel_decoder"]
    _row("encoder and decoder", f"{autoencoder / 1e6:,.1f} M")
    _row("their FLOPs as in table 1", f"{paper_flops(autoencoder) / GIGA:,.1f} G (2 x parameters x 256 tokens)")

    _title(f"FLOPs of a step: {active.clip:,} clip, {active.ssl:,} ssl, {active.reconstruction:,} reconstruction")
    for item in items(config.architecture, config.data, config.objective, active):
        _row(item.name, f"{item.forward:.3e} forward, {item.training:.3e} training ({item.training / cost.flops:.1%})")
    _row("per sample", f"{cost.flops / active.pool / GIGA:,.1f} G training")
    _row("run", f"{length.flops:.3e} in {length.steps:,} steps, {length.samples:,} samples seen")

    _title(f"memory per GPU, {options.gpus} GPUs")
    trained = _count(model) + _count(heads)
    teacher = counts["trunk"] + _count(heads) if active.ssl else 0
    split = options.gpus if options.fsdp else 1
    static = {"weights": trained, "gradients": trained, "optimiser": 2 * trained, "teacher": teacher}
    for name, count in static.items():
        _row(name, f"{count * FLOAT / split / GIGA:,.2f} GB")
    micros = max(1, -(-active.pool // options.gpus // (options.micro_batch or active.pool)))
    per_objective = activations(config, model)
    share = blocks / micros / active.reconstruction  # of the global batch, in one pass
    peak = 0.0
    for name, count in {name: count for name, count in active._asdict().items() if count}.items():
        size = count * share * per_objective[name]
        peak = max(peak, size)
        _row(f"activations, {name}", f"{size / GIGA:,.2f} GB for {count * share:,.0f} images in one pass")
    _row("largest sum", f"{(sum(static.values()) * FLOAT / split + peak) / GIGA:,.2f} GB without workspace")
    if micros > 1:
        _row("micro-batches", f"{micros} per step and GPU; clip and ssl features are computed twice")

    _title("time and disk")
    seconds = length.flops / (options.peak * options.utilisation * options.gpus)
    _row("GPU hours", f"{seconds * options.gpus / 3600:,.0f} at {options.utilisation:.0%} of {options.peak:.3g} FLOP/s")
    _row("wall clock", f"{seconds / 3600:,.1f} h, {seconds / length.steps:.2f} s a step")
    _row("images per second", f"{length.samples / seconds:,.0f} from storage")
    checkpoint = (3 * trained + teacher) * FLOAT / GIGA
    _row("checkpoint", f"{checkpoint:,.1f} GB, and {options.checkpoints_kept} are kept")
    _row("training state, tokenizer", f"{checkpoint:,.1f} GB, {_count(model) * FLOAT / GIGA:,.1f} GB")


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
        with torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"):
            # The difference of two counts leaves out what does not grow with the batch, such as cast weights.
            return {name: (_kept(forward, 4) - _kept(forward, 2)) / 2 for name, forward in passes.items()}


def _kept(forward: Callable[[int], list[Tensor]], count: int) -> int:
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward(count)  # alive until the count is done, so that no storage's number is used again
    del outputs
    return sum(sizes.values())


def _images(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size)


def _heads(config: "Pretrain") -> nn.Module:
    heads = nn.ModuleList()
    if config.active.ssl:
        ssl = config.objective.ssl
        width = ssl.width(config.tokenizer.vision)
        heads.extend(DinoHead(width, head) for head in (ssl.head, ssl.patch_head) if head is not None)
    return heads


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m stages.pretrain --plan", description=print_plan.__doc__)
    parser.add_argument("--gpus", type=int, default=1, help="devices in all")
    parser.add_argument("--micro-batch", type=int, help="most images of a GPU in one pass")
    parser.add_argument("--fsdp", action="store_true", help="weights and moments sharded over the GPUs")
    parser.add_argument("--peak", type=float, default=9.89e14, help="FLOP/s of a device; an H100, bfloat16, dense")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--checkpoints-kept", type=int, default=2)
    return parser.parse_args(arguments)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _title(text: str) -> None:
    print(f"\n{text}")


def _row(name: str, value: str) -> None:
    print(f"  {name:36}{value}")
