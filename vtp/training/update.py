"""One update of one phase: gradients of all terms, summed over ranks, guarded, clipped, applied.

Terms are back-propagated one after the other, and each gradient is summed over ranks once, when it is complete: those of
a text tower or a head while the next objective is computed, the rest during the last backward pass.
(DistributedDataParallel goes wrong here silently: with `no_sync` on all passes but the last, gradients of parameters that
the last one does not reach stay unreduced.)

The host waits for the device once: whether the gradient is finite must be known before the step, and comes with all that
is logged.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vtp.device import read, send
from vtp.distributed import GradientSum, copies, gather_objects, is_sharded, local, total
from vtp.step import Logs, OptimConfig, StepContext, Term
from vtp.training.optim import Optimizers, parameters_of, set_rates, squared_norms


class Requests(NamedTuple):
    """What a rank asks of the loop after a step; all ranks do what any of them asks."""

    stop: bool = False
    checkpoint: bool = False


NONE = Requests()


class Outcome(NamedTuple):
    """What a step did; equal on all ranks."""

    logs: dict[str, Tensor | float]
    finite: bool
    requests: Requests  # of any rank


class Update:
    """The optimiser of a phase and its rules."""

    def __init__(
        self,
        phase: str,
        optimizer: Optimizers,
        config: OptimConfig,
        shared: Sequence[nn.Parameter],
        *,
        communication: torch.dtype | None = None,
    ) -> None:
        """`shared`: parameters on which terms are compared; `communication`: type of gradients between ranks, if another."""
        self.phase = phase
        self.optimizer = optimizer
        self.config = config
        self._parameters = parameters_of(optimizer)
        self._clipped = _by(optimizer, "module") if config.clip_by == "module" else {"": self._parameters}
        own = set(self._parameters)
        self._shared = [parameter for parameter in shared if parameter in own]
        self._sums = {
            name: GradientSum(of_name, communication) for name, of_name in _by(optimizer, "last_term").items()
        }

    def apply(self, terms: Iterator[Term], context: StepContext, *, requests: Requests = NONE) -> Outcome:
        """Differentiate `terms` and step, unless the gradient is not finite: then weights and optimiser state stay."""
        similarity = _GradientSimilarity(self._shared) if context.log_step and self._shared else None
        parts = self._differentiate(terms, similarity)
        norms, known, values, agreed = self._summarise(parts, requests)
        norm, *of_modules = known
        finite = math.isfinite(norm)
        logs: dict[str, Tensor | float] = {**values}
        if finite:
            self._clip(norms)
            logs[f"{self.phase}_lr"] = set_rates(self.optimizer, self.config, context)
            logs[f"{self.phase}_gradient_norm"] = norm
            if len(of_modules) > 1:
                logs |= {
                    f"{self.phase}_gradient_norm_{name}": of for name, of in zip(self._clipped, of_modules, strict=True)
                }
            if similarity is not None:
                logs |= similarity.logs()
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(logs, finite, agreed)

    def _differentiate(
        self, terms: Iterator[Term], similarity: "_GradientSimilarity | None"
    ) -> dict[str, Tensor | float]:
        """Gradients summed over terms and ranks; this rank's parts of the scalars, summed over terms."""
        parts: dict[str, Tensor | float] = {}
        passed = None
        # Terms are computed lazily: the loop body runs between two of them.
        for term in terms:
            if term.name != passed and passed in self._sums:
                self._sums[passed].begin()
            passed = term.name
            for name, value in term.parts.items():
                plain = value.detach().float() if isinstance(value, Tensor) else value
                parts[name] = parts[name] + plain if name in parts else plain
            if term.loss is not None:
                if similarity is not None:
                    similarity.begin(term.name)
                with self._at_last(term, similarity):
                    term.loss.backward()
        if similarity is not None:
            similarity.restore()
        for gradients in self._sums.values():
            gradients.finish()
        return parts

    def find_nonfinite(self, terms: Iterator[Term]) -> str:
        """Where it began, by computing the step again: the objectives, and the ranks that hold the samples."""
        signs: list[tuple[int, str, str]] = []
        for term in terms:
            if any(not bool(torch.isfinite(feature).all()) for feature in term.own):
                signs.append((0, term.name, "features"))
            if term.loss is not None:
                if not bool(torch.isfinite(term.loss)):
                    signs.append((1, term.name, "loss"))
                term.loss.backward()
            if any(p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()) for p in self._parameters):
                signs.append((2, term.name, "gradient"))
            self.optimizer.zero_grad()
        of_ranks = gather_objects(signs)
        strongest = min((sign[0] for signs in of_ranks for sign in signs), default=None)
        origins = [
            f"{name} ({what}) on rank {rank}"
            for rank, signs in enumerate(of_ranks)
            for level, name, what in dict.fromkeys(signs)
            if level == strongest
        ]
        return ", ".join(origins) or "only the sum of all objectives"

    def _at_last(self, term: Term, similarity: "_GradientSimilarity | None") -> AbstractContextManager[None]:
        """Around the pass of the last term, where gradients leave as they are made, unless some are set aside."""
        whole = term.last and similarity is None and "" in self._sums
        return self._sums[""].during_backward() if whole else nullcontext()

    def _summarise(self, parts: Mapping[str, Tensor | float], requests: Requests) -> "_Summed":
        """What all ranks must know of each other, in one small reduction, and the one time that the host waits."""
        pairs = [squared_norms(parameters) for parameters in self._clipped.values()]
        replicated, sharded = (torch.stack(squares) for squares in zip(*pairs, strict=True))
        of_device = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
        of_host = {name: value for name, value in parts.items() if name not in of_device}
        numbers = send(torch.tensor([*of_host.values(), *requests], dtype=torch.float32), replicated.device)
        summed = total(torch.cat([sharded.float(), *(value[None] for value in of_device.values()), numbers]))
        squares, others = replicated + summed[: len(sharded)], summed[len(sharded) :]
        norms = torch.cat([squares.sum()[None], squares]).sqrt()
        told = read(torch.cat([norms, others]))
        known, rest = told[: len(norms)], told[len(norms) :]
        values = dict(zip([*of_device, *of_host], rest, strict=False))
        agreed = Requests(*(bool(asked) for asked in rest[len(parts) :]))
        return _Summed(norms[1:].unbind(), known, {name: values[name] for name in parts}, agreed)

    def _clip(self, norms: Sequence[Tensor]) -> None:
        """Shorten what is longer than `clip_norm`: the whole gradient, or those of modules."""
        if self.config.clip_norm is None:
            return
        for parameters, norm in zip(self._clipped.values(), norms, strict=True):
            if gradients := [local(p.grad) for p in parameters if p.grad is not None]:
                torch._foreach_mul_(gradients, (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))


def _by(optimizer: Optimizers, key: str) -> dict[str, list[nn.Parameter]]:
    """All parameters, by what their groups have under `key`."""
    found: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group[key], []).extend(group["params"])
    return found


class _Summed(NamedTuple):
    norms: Sequence[Tensor]  # of what is clipped by itself
    known: list[float]  # of the whole gradient and of those, on the host
    values: Mapping[str, float]  # sums over ranks of all scalars
    requests: Requests  # of any rank


class _GradientSimilarity:
    """Norms and pairwise cosines of the objectives' gradients on shared parameters.

    Each objective's gradient is set aside and all are added up in the end: a difference of sums would lose a small one
    beside a large one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._gradients: dict[str, list[Tensor | None]] = {}
        self._name: str | None = None

    def begin(self, name: str | None) -> None:
        """What is back-propagated from now on belongs to the objective `name`."""
        if name != self._name and self._name is not None:
            self._gradients[self._name] = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
        self._name = name

    def restore(self) -> None:
        """Put the sum of all gradients where one step expects it."""
        self.begin(None)
        for index, parameter in enumerate(self._parameters):
            parts = [gradients[index] for gradients in self._gradients.values()]
            present = [part for part in parts if part is not None]
            parameter.grad = sum(present[1:], start=present[0].clone()) if present else None

    def logs(self) -> Logs:
        """`trunk_gradient_<name>` and `gradient_cosine_<a>_<b>`, of the sums over ranks."""
        names = list(self._gradients)
        sharded = is_sharded(self._parameters[0])
        flat = torch.stack([self._flat(self._gradients[name]) for name in names])
        if not sharded:
            total(flat)
        gram = flat.double() @ flat.double().T
        if sharded:
            total(gram.div_(copies(self._parameters[0])))
        norms = gram.diagonal().sqrt()
        logs: dict[str, Tensor | float] = {
            f"trunk_gradient_{name}": norm for name, norm in zip(names, norms, strict=True)
        }
        for second, other in enumerate(names):
            for first, one in enumerate(names[:second]):
                cosine = gram[first, second] / (norms[first] * norms[second]).clamp_min(1e-30)
                logs[f"gradient_cosine_{one}_{other}"] = cosine
        return logs

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(gradients, self._parameters, strict=True)
        pieces = [torch.zeros_like(local(p)) if gradient is None else local(gradient) for gradient, p in pairs]
        return torch.cat([piece.reshape(-1) for piece in pieces])
