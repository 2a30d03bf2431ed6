"""Ranks: the process group, collectives with exact gradients, sharded parameters, and state that outlives rank counts.

The only file that imports torch.distributed. Without a process group there is one rank, and every collective is the
identity. Losses are parts: a rank back-propagates its share of the global loss, and gradients are summed over ranks.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vtp.artefact import StateError

BUCKET = 1 << 26  # bytes that one reduction carries
T = TypeVar("T")
_of_background: list[dist.ProcessGroup] = []
_stores: list[dist.Store] = []


class StateMismatchError(StateError):
    """A saved state is that of other tensors: names or shapes differ."""


class Ranks(NamedTuple):
    """Which process this is, and of how many."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def ranks() -> Ranks:
    """This process among all; (0, 1) without a process group."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks(0, 1)


def is_first_of_machine() -> bool:
    """Whether this process does what one of a machine has to do."""
    return not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def ranks_of_machine() -> int:
    """How many ranks run on this machine, and on each other."""
    return min(ranks().size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if dist.is_initialized() else 1


def machines() -> int:
    """On how many machines the ranks run."""
    return ranks().size // ranks_of_machine()


@contextmanager
def process_group(device: str, *, timeout: float) -> Iterator[None]:
    """Join the ranks that torchrun started; a collective that takes longer than `timeout` seconds fails.

    Does nothing outside of torchrun. Gloo carries CPU tensors and checkpoints, NCCL those of GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    _stores.append(store)
    # Checkpoints are written by a thread; on a group of their own its messages cannot meet those of the training.
    group = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    _of_background.append(group)
    try:
        yield
        dist.barrier()
    finally:
        _of_background.clear()
        _stores.clear()
        dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """Sum over ranks, in place, without gradient."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place, without gradient."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks [ranks * B, ...] in the order of ranks. The gradient is exact: that of the sum over ranks."""
    return cast(Tensor, _Gather.apply(x)) if dist.is_initialized() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        rows = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        (gradient,) = gradients
        own = gradient.new_empty(gradient.shape[0] // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def gather_objects(value: T, *, background: bool = False) -> list[T]:
    """One small picklable value from every rank, in the order of ranks; in the background beside what the training does."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_of_background[0] if background and _of_background else None)
    return values


def own_rows(count: int) -> range:
    """This rank's share of `count` items: consecutive, without overlap, and without padding."""
    rank, size = ranks()
    return range(count * rank // size, count * (rank + 1) // size)


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, which may hold different numbers of them, in the order of ranks; on the CPU, no gradient."""
    x = x.detach().cpu()
    if not dist.is_initialized():
        return x
    counts = gather_objects(len(x))
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    everybody = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everybody, padded)
    return torch.cat([rows[:count] for rows, count in zip(everybody, counts, strict=True)])


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


class Board:
    """What ranks tell each other without a collective: whoever waits looks again, and so may wait for days.

    Each rank makes one in a process group, and without one there is one rank.
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("board", _stores[0]) if _stores else dist.HashStore()

    def add(self, name: str, count: int) -> int:
        """Add to a number of all ranks, at first 0; what it is then, so that with 1 each is answered to one rank alone."""
        return self._store.add(name, count)

    def post(self, name: str, text: str) -> None:
        """Write a text that is there for good."""
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """The text that was posted; None as long as there is none."""
        return self._store.get(name).decode() if self._store.check([name]) else None


class GradientSum:
    """The sum over ranks of the gradients of some parameters, by buckets that travel while others are computed.

    A bucket holds the same parameters in every step and on every rank. Sharded parameters are left to FSDP, which sums
    them within the backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype | None = None) -> None:
        """`dtype`: of what travels, by default that of the gradients."""
        # The backward pass reaches first what is used last. Vectors are small, and of many layers together.
        own = [p for p in parameters if not is_sharded(p)][::-1] if dist.is_initialized() else []
        self._buckets = list(_buckets(sorted(own, key=lambda parameter: parameter.ndim < 2)))
        self._dtype = dtype
        self._begun = 0  # buckets
        self._travelling: list[tuple[dist.Work, Tensor, list[Tensor]]] = []

    def begin(self) -> None:
        """Send what has not been sent: these gradients are complete. Does not wait."""
        self._send(len(self._buckets))

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Send each bucket as soon as the backward pass inside has reached all of it: the last pass of these parameters."""
        missing = [sum(1 for p in bucket if p.requires_grad) for bucket in self._buckets]

        def reached(number: int) -> None:
            missing[number] -= 1
            # In the same order on every rank, whatever is complete first.
            complete = self._begun
            while complete < len(missing) and missing[complete] <= 0:
                complete += 1
            self._send(complete)

        def hook(number: int) -> Callable[[Tensor], None]:
            return lambda _: reached(number)

        hooks = [
            parameter.register_post_accumulate_grad_hook(hook(number))
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
        self.begin()

    def finish(self) -> None:
        """Send what is left, and put the sums where the gradients are."""
        self.begin()
        for work, flat, gradients in self._travelling:
            work.wait()
            pieces = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
        self._begun, self._travelling = 0, []

    def _send(self, end: int) -> None:
        for bucket in self._buckets[self._begun : end]:
            if gradients := [p.grad for p in bucket if p.grad is not None]:
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                flat = flat if self._dtype is None else flat.to(self._dtype)
                work = dist.all_reduce(flat, async_op=True)
                assert work is not None
                self._travelling.append((work, flat, gradients))
        self._begun = max(self._begun, end)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.nbytes > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def shard(
    units: Iterable[Sequence[nn.Module]], device: str, *, groups: int = 1, dtype: torch.dtype | None = None
) -> None:
    """Shard parameters over all ranks (FSDP2): each unit is a module preceded by its parts, which are gathered apart.

    Over `groups` of consecutive ranks each, which hold the same (HSDP): weights are gathered within a group, and of
    gradients the shards alone travel between groups. Gradients are summed, not averaged. `dtype`: of gradients that travel,
    by default their own. A parameter becomes a DTensor; modules keep their names and methods.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # Features are views of the encoder's output; nothing writes into them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view", UserWarning)
    shape, names = (dist.get_world_size(),), ("shard",)
    if groups > 1:
        shape, names = (groups, shape[0] // groups), ("copy", "shard")
    mesh = dist.init_device_mesh(device.split(":", maxsplit=1)[0], shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    for unit in units:
        for module in unit:
            # Also what gets no backward pass, the teacher, must let go of its gathered weights.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a piece of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def copies(tensor: Tensor) -> int:
    """On how many ranks each number of a sharded tensor lies; 1 for one that is not sharded."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this rank holds; the tensor itself when it is replicated. Shares its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StatePiece(NamedTuple):
    """The rows of a tensor that a rank holds; a tensor without dimensions is one row."""

    rows: Tensor  # in the tensor's memory
    first: int  # number of the first of them
    foremost: bool  # whether no rank before this one holds the same


def piece_of(tensor: Tensor) -> StatePiece:
    """What this rank holds of a tensor: all of it, or the rows of its shard."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return StatePiece(tensor, 0, ranks().first)
    (dimension,) = (number for number, placement in enumerate(tensor.placements) if placement.is_shard(0))
    place, rows = tensor.device_mesh.get_coordinate(), tensor.to_local()
    assert place is not None
    most = -(-len(tensor) // tensor.device_mesh.size(dimension))  # as torch.chunk cuts
    first = min(place[dimension] * most, len(tensor))
    return StatePiece(rows, first, not any(place[:dimension]) and not any(place[dimension + 1 :]))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its pieces; every rank must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole `values` into a tensor, sharded or not."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements).to_local()
    local(tensor).copy_(values)
