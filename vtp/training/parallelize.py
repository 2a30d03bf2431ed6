"""Models on the device, as the environment says: recomputed, compiled, sharded."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from vtp.distributed import machines, ranks, shard
from vtp.host import Host


class Parallelizable(Protocol):
    """What an objective says of its models."""

    def to(self, device: str) -> object: ...

    def compiled_units(self) -> Iterator[nn.Module]:
        """What is compiled, one by one."""
        ...

    def recompute(self) -> None:
        """Keep no activations inside of blocks."""
        ...

    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """What FSDP gathers together, parts first; nothing for models that stay whole on every rank."""
        ...


def parallelize(
    objective: Parallelizable, host: Host, *, shapes: int = 1, communication: torch.dtype | None = None
) -> None:
    """Put the models on the device; recompute, compile and shard them, in this order.

    `shapes`: those of their inputs; `communication`: type of gradients that travel, if not their own.
    """
    objective.to(host.device)
    if host.recomputes:
        objective.recompute()
    compile_units(objective.compiled_units(), host, shapes)
    if host.parallel != "ddp" and ranks().size > 1:
        units = list(objective.sharded_units())
        if not units:
            logging.info(
                "these models stay whole on every rank: they are small, and one layer's gradient is needed apart"
            )
        shard(units, host.device, groups=machines() if host.parallel == "hsdp" else 1, dtype=communication)


def compile_units(modules: Iterable[nn.Module], host: Host, shapes: int = 1) -> None:
    """Compile modules one by one, where the environment says so, for inputs of so many `shapes`."""
    if host.compiles:
        # Each comes in a few sizes of batches, with gradient and without; beyond its limits torch would compile no more.
        limit = 64 + 8 * shapes
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.config.accumulated_recompile_limit = max(256, limit)
        for module in modules:
            module.compile(dynamic=False)
