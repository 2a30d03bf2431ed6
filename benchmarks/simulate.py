"""One rank of many, without the others and without data: does a run of the paper's size start, step, and plan a checkpoint?

    python -m benchmarks.simulate pipelines/overlays/sizes/L.yaml:pretrain --ranks 256 --parallel hsdp

torch's fake process group answers every collective at once with nothing, and tensors have shapes without contents
(FakeTensorMode), so that any size runs on any machine. Real are: the micro-batches of such a rank, models, their sharding,
every collective in its order, all that Python does for a step, and the list of what this rank writes of a checkpoint.
Printed are seconds of Python, bytes that the rank holds, and collectives by kind. Devices and networks take no time.
A loss that reads weights from a file (LPIPS) is one of random weights here.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.pretrain import Pretrain, build_objective, parallelize, slice_of
from stages.runner.environment import LocalHost, Runtime
from vtp.data.masking import draw_masks
from vtp.data.pretrain_batches import PretrainBatch
from vtp.distributed import is_sharded, local
from vtp.draws import numpy_draws
from vtp.losses.perceptual import RandomVggDistanceConfig
from vtp.params import load
from vtp.step import StepContext
from vtp.training.checkpoint import pieces_of_rank
from vtp.training.fit import in_precision, state_of
from vtp.training.optim import build_optimizer
from vtp.training.update import Update

GIGA = 1e9


def main() -> None:
    """Command line."""
    options = _options()
    config = _offline(load(options.address, Pretrain))
    settings = {"VTP_DEVICE": "cpu", "VTP_PARALLEL": options.parallel, "VTP_RECOMPUTE": str(options.recompute)}
    host = LocalHost(Path("work"), Path.cwd(), Runtime.of(settings | _micro_batch(options)))
    with _one_of(options.ranks, options.rank, options.machine):
        rank_slice = slice_of(config, host)
        real = [
            _batch(config, rank_slice.of(config.data.batch.reconstruction, n)[1])
            for n in range(rank_slice.micro_batches)
        ]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            batches = [PretrainBatch(*map(mode.from_tensor, batch)) for batch in real]
            simulate(config, host, batches)


def simulate(config: Pretrain, host: LocalHost, batches: list[PretrainBatch]) -> None:
    """Start, two steps, a checkpoint's plan: each with its figures."""
    start = time.perf_counter()
    objective = build_objective(config, host)
    parallelize(objective, host, communication=config.training.travels)
    optimizer = build_optimizer(objective.phases()["model"], config.optim)
    update = Update(
        "model", optimizer, config.optim, objective.shared_parameters(), communication=config.training.travels
    )
    print(f"{'start':22}{time.perf_counter() - start:10.2f} s")
    parameters = list(objective.tokenizer.parameters())
    sharded = sum(p.numel() for p in parameters if is_sharded(p)) / sum(p.numel() for p in parameters)
    print(f"{'sharded':22}{sharded:10.1%} of {sum(p.numel() for p in parameters) / 1e6:,.1f} M parameters")
    collectives = _Collectives()
    for number in range(2):  # the second is that which counts: what is made once is there
        context, start = StepContext(number, 1000, log_step=False), time.perf_counter()
        terms = in_precision(objective.terms("model", batches, context), host.device, config.training.precision)
        with collectives:
            collectives.seen.clear()
            assert update.apply(terms, context).finite
            objective.after_step(context)
        print(f"{f'step {number}':22}{time.perf_counter() - start:10.2f} s of Python")
    for kind, sizes in sorted(collectives.seen.items()):
        print(f"  {kind:26}{len(sizes):6}{sum(sizes) / GIGA:10.3f} GB")
    start, tensors = time.perf_counter(), state_of(objective, {"model": optimizer})
    pieces = pieces_of_rank(tensors)
    print(f"{'checkpoint, planned':22}{time.perf_counter() - start:10.2f} s")
    held = sum(_bytes(tensor) for tensor in tensors.values())
    written = sum(_bytes(piece.rows) for piece in pieces.values())
    print(
        f"  this rank holds {held / GIGA:.2f} GB of state in {len(tensors)} tensors, and writes {written / GIGA:.3f} GB"
    )


@contextmanager
def _one_of(ranks: int, rank: int, machine: int) -> Iterator[None]:
    """This process as one of `ranks`, of which `machine` share a machine; numbers of the device are 1."""
    environment = {"LOCAL_WORLD_SIZE": str(machine), "LOCAL_RANK": str(rank % machine)}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        read = patch("vtp.training.update.read", lambda values: [1.0] * len(values))
        draw = patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor)  # it looks at what it draws
        move = patch("torch.nn.Module.to", lambda module, *_: module)  # to the CPU, where all is
        mesh = patch.object(dist, "init_device_mesh", _outside(dist.init_device_mesh))
        with patch.dict("os.environ", environment), read, draw, move, mesh:
            yield
    finally:
        dist.destroy_process_group()


def _outside(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same with real tensors: a mesh reads the numbers of its ranks."""

    def calling(*arguments: Any, **settings: Any) -> Any:  # noqa: ANN401 - as the call has it
        with unset_fake_temporarily():
            return call(*arguments, **settings)

    return calling


class _Collectives(TorchDispatchMode):
    """Bytes that each call inside gives or gets, whichever are more, by the name of the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:  # noqa: ANN401 - torch's
        if function.namespace == "c10d":
            tensors = [value for value in tree_leaves((arguments, settings)) if isinstance(value, Tensor)]
            self.seen[function._opname.strip("_")].append(max(map(_bytes, tensors), default=0))
        return function(*arguments, **(settings or {}))


def _batch(config: Pretrain, blocks: range) -> PretrainBatch:
    """Black pictures, empty captions, and real masks, of so many blocks."""
    clip, ssl, shown = (count // config.data.batch.reconstruction * len(blocks) for count in config.active)
    views, patch_size = config.data.ssl_views, config.tokenizer.pixels_per_latent
    grid = views.global_size // patch_size
    of_block = 2 * ssl // len(blocks)
    masks = [draw_masks(of_block, grid, grid, config.data.masks, numpy_draws(0, "masks", block)) for block in blocks]
    masks = torch.cat(masks).unflatten(0, (ssl, 2)) if ssl else torch.zeros(0, 2, grid**2, dtype=torch.bool)
    weights = (1 / masks.sum(2, keepdim=True).clamp_min(1)).expand_as(masks)
    text = config.vit.text

    def pictures(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.uint8)

    return PretrainBatch(
        clip_images=pictures(clip, 3, config.data.clip_view.size, config.data.clip_view.size),
        tokens=torch.zeros(clip, text.context_length if text else 1, dtype=torch.int64),
        global_views=pictures(ssl, 2, 3, views.global_size, views.global_size),
        local_views=pictures(ssl, views.local_views, 3, views.local_size, views.local_size),
        masks=masks,
        masked=masks.flatten().nonzero()[:, 0],
        mask_weights=weights[masks],
        rec_images=pictures(shown, 3, config.tokenizer.image_size, config.tokenizer.image_size),
        colours=torch.empty(0, 2 + views.local_views, 10),
        replaced=torch.zeros(len(blocks), config.active.pool // config.data.batch.reconstruction, dtype=torch.bool),
    )


def _bytes(tensor: Tensor) -> int:
    piece = local(tensor)
    return piece.numel() * piece.element_size()


def _offline(config: Pretrain) -> Pretrain:
    loss = config.objective.reconstruction
    perceptual = RandomVggDistanceConfig(name="random_vgg16", seed=0, stages=5)
    objective = config.objective.model_copy(
        update={"reconstruction": loss.model_copy(update={"perceptual": perceptual})}
    )
    return config.model_copy(update={"objective": objective})


def _micro_batch(options: argparse.Namespace) -> dict[str, str]:
    return {"VTP_MICRO_BATCH": str(options.micro_batch)} if options.micro_batch else {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.simulate", description=(__doc__ or "").splitlines()[0])
    default = "pipelines/overlays/sizes/L.yaml:pretrain"
    parser.add_argument("address", nargs="?", default=default, metavar="FILE:SECTION", help=f"default: {default}")
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--machine", type=int, default=8, help="ranks of a machine")
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "hsdp"), default="ddp")
    parser.add_argument("--micro-batch", type=int, help="most images of a rank in one pass")
    parser.add_argument("--recompute", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
