"""Losses over more samples than fit into memory, with the exact gradient (GradCache, Gao et al. 2021).

A contrastive loss needs the features of the whole batch at once, but not their graphs. Features of all micro-batches
are computed first and cut from their graphs; the loss is differentiated down to them; then each micro-batch is computed
again, and its cached gradient goes down the rest. One micro-batch keeps its graph, and nothing is computed twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Micro = TypeVar("Micro", bound=tuple)
Represent = Callable[[Micro, int], Sequence[Tensor]]


class GradientCache(Generic[Micro]):
    """The features of a step; `represent(micro_batch, number)` computes some, samples first, and is deterministic."""

    def __init__(self, represent: Represent, micros: Sequence[Micro]) -> None:
        self._represent = represent
        self._micros = micros
        self._graph: list[Sequence[Tensor]] = []
        if len(micros) == 1:
            self._graph = [represent(micros[0], 0)]
            parts = self._graph
        else:
            with torch.no_grad():
                parts = [represent(micro, number) for number, micro in enumerate(micros)]
        self._lengths = [[len(tensor) for tensor in part] for part in parts]
        # Leaves [all micro-batches, ...]: a loss on them collects its gradient here.
        self.features = [torch.cat(tensors).detach().requires_grad_() for tensors in zip(*parts, strict=True)]

    def surrogates(self) -> Iterator[Tensor]:
        """One scalar per micro-batch, whose gradient is that of what was back-propagated into `features`."""
        gradients = [
            feature.grad.split(list(lengths)) if feature.grad is not None else None
            for feature, lengths in zip(self.features, zip(*self._lengths, strict=True), strict=True)
        ]
        for number, micro in enumerate(self._micros):
            outputs = self._graph[0] if self._graph else self._represent(micro, number)
            products = [
                (output.float() * gradient[number]).sum()
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None
            ]
            yield torch.stack(products).sum()
