"""Losses over more samples than fit into memory, with the exact gradient (GradCache, Gao et al. 2021).

A contrastive loss needs the features of the whole batch at once, but not their graphs. Features of all micro-batches
are computed first and cut from their graphs; the loss is differentiated down to them; then each micro-batch is computed
again, and its cached gradient goes down the rest. One micro-batch keeps its graph, and nothing is computed twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch", bound=tuple)
Represent = Callable[[MicroBatch, int], Sequence[Tensor]]


class GradientCache(Generic[MicroBatch]):
    """The features of a step; `represent(micro_batch, number)` computes some, samples first, and is deterministic."""

    def __init__(self, represent: Represent, micro_batches: Sequence[MicroBatch]) -> None:
        self._represent = represent
        self._micro_batches = micro_batches
        self._graph: list[Sequence[Tensor]] = []
        if len(micro_batches) == 1:
            self._graph = [represent(micro_batches[0], 0)]
            parts = self._graph
        else:
            with torch.no_grad():
                parts = [represent(batch, number) for number, batch in enumerate(micro_batches)]
        self._lengths = [[len(tensor) for tensor in part] for part in parts]
        # Leaves [all micro-batches, ...]: a loss on them collects its gradient here.
        self.features = [torch.cat(tensors).detach().requires_grad_() for tensors in zip(*parts, strict=True)]

    def surrogates(self) -> Iterator[Tensor]:
        """One scalar per micro-batch, whose gradient is that of what was back-propagated into `features`."""
        gradients = [
            feature.grad.split(list(lengths)) if feature.grad is not None else None
            for feature, lengths in zip(self.features, zip(*self._lengths, strict=True), strict=True)
        ]
        for number, batch in enumerate(self._micro_batches):
            outputs = self._graph[0] if self._graph else self._represent(batch, number)
            products = [
                (output.float() * gradient[number]).sum()
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None
            ]
            yield torch.stack(products).sum()
