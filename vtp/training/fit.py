"""The one training loop. It knows steps, gradients, schedules, checkpoints and curves, and nothing of images.

An objective yields the terms of its loss one after the other, and each is back-propagated at once, so that the
activations of only one are alive at a time. Its phases are trained in turn within every step: one for pre-training and
generation, two for adversarial tuning. All ranks run the same loop on their shares of every batch.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtp.config import Config
from vtp.data.loader import load_batches
from vtp.device import Precision, rounded_products
from vtp.distributed import StateMismatchError, fill, ranks
from vtp.finite import NotFiniteError
from vtp.host import Host
from vtp.step import Logs, OptimConfig, ParameterGroup, StepContext, StepCost, Term
from vtp.training.checkpoint import Checkpoints
from vtp.training.garbage import collecting_in_step
from vtp.training.log import Curves, Means
from vtp.training.optim import Optimizers, build_optimizer
from vtp.training.throughput import Throughput
from vtp.training.update import Requests, Update

Batch = TypeVar("Batch", bound=tuple)
Consumed_contra = TypeVar("Consumed_contra", bound=tuple, contravariant=True)


class SamplesLength(Config):
    """The run ends when this many samples have been seen."""

    name: Literal["samples"]
    samples: int = Field(
        ge=1, description="samples of the run; of pre-training, image-text pairs or the largest batch that there is"
    )


class FlopsLength(Config):
    """The run ends when its training FLOPs (forward, backward, teacher and losses) reach this number."""

    name: Literal["flops"]
    flops: float = Field(gt=0, description="training FLOPs of the run, forward and backward")


Length = Annotated[SamplesLength | FlopsLength, Field(discriminator="name")]


class RunLength(NamedTuple):
    """How long a run is."""

    steps: int
    samples: int  # seen in all
    flops: float  # training FLOPs in all


def run_length(length: SamplesLength | FlopsLength, *, samples: int, flops: float) -> RunLength:
    """The steps that come nearest to `length`, at least one, when a step takes so many samples and FLOPs."""
    wanted = length.samples / samples if isinstance(length, SamplesLength) else length.flops / flops
    steps = max(1, round(wanted))
    return RunLength(steps, steps * samples, steps * flops)


class TrainingConfig(Config):
    """What every training run has."""

    length: Length
    precision: Precision = Field(
        description="precision of the forward pass; weights stay float32. tf32: float32 whose products on GPUs round their "
        "inputs to 10 bits, backward too"
    )
    communication: Literal["float32", "bfloat16"] = Field(
        description="precision in which gradients travel between ranks and are added up"
    )
    log_every: int = Field(ge=1, description="steps per row of the curves; a row holds means over them")
    max_skipped: int = Field(ge=0, description="steps with a gradient that is not finite, skipped before the run fails")

    @property
    def travels(self) -> torch.dtype | None:
        """Type of gradients that travel; None: their own."""
        return torch.bfloat16 if self.communication == "bfloat16" else None


class Objective(Protocol[Consumed_contra]):
    """A module that holds models and losses. Its state dict, with the optimisers', is the state of the run."""

    def phases(self) -> Mapping[str, Sequence[ParameterGroup]]:
        """What each phase trains, in the order of the phases within a step."""
        ...

    def shared_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters on which the gradients of the terms are compared; may be empty."""
        ...

    def terms(self, phase: str, micro_batches: Sequence[Consumed_contra], context: StepContext) -> Iterator[Term]:
        """The phase's loss on this rank's micro-batches. Each term is differentiated before the next is computed."""
        ...

    def after_step(self, context: StepContext) -> Logs:
        """Moving averages and limits, when all phases have stepped; scalars that are equal on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Monitor(Protocol):
    """Evaluates the models now and then during the run; all ranks call it together."""

    def due(self, context: StepContext) -> bool:
        """Whether to evaluate after this step."""
        ...

    def evaluate(self, context: StepContext) -> Logs:
        """Scalars for the curves, equal on all ranks; files are the first rank's to write."""
        ...


class Run(NamedTuple):
    """The numbers of a run."""

    steps: int
    training: TrainingConfig
    optim: Mapping[str, OptimConfig]
    cost: StepCost
    micro_batches: int = 1  # per step and rank


def fit(  # noqa: C901 - the one loop
    objective: Objective[Batch],
    batches: Dataset[Batch],
    run: Run,
    *,
    host: Host,
    monitors: Sequence[Monitor] = (),
    optimizer_state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Train, from the newest checkpoint in `host.folder` if there is one; the state of the optimisers by name.

    `batches[step * run.micro_batches + i]` is this rank's i-th micro-batch of a step, a named tuple of tensors and a
    function of its number alone, so the order of the data survives a resume. `optimizer_state` is what another run's
    `fit` returned. Curves are in `host.folder / "curves.csv"` from the first interval on, rates in `throughput.csv`. A
    requested stop ends after the current step with a checkpoint. A step whose gradient is not finite is skipped and
    logged; raises NotFiniteError, which names the objectives and ranks, when there are more than `max_skipped`; the last
    checkpoint stays.
    """
    steps, training = run.steps, run.training
    optimizers = {phase: build_optimizer(groups, run.optim[phase]) for phase, groups in objective.phases().items()}
    updates = [
        Update(phase, optimizer, run.optim[phase], objective.shared_parameters(), communication=training.travels)
        for phase, optimizer in optimizers.items()
    ]
    means, skipped, max_skipped = Means(), 0, training.max_skipped
    checkpoints = Checkpoints(host.folder / "checkpoints", kept=host.checkpoints_kept)
    tensors = state_of(objective, optimizers)
    for name, values in (optimizer_state or {}).items():
        if name not in tensors:
            raise StateMismatchError(
                f"the state to begin from keeps {name}, and optim.matrices of this run does not; choose that of the run "
                "that it comes from, or begin from its tokenizer"
            )
        fill(tensors[name], values)
    start = 0
    if (last := checkpoints.newest(tensors)) is not None:
        start, skipped = last.step, last.counters["skipped"]
        means.load(last.counters["means"])
        logging.info("resumed after step %d of %d", start, steps)
    curves = Curves(host.folder / "curves.csv", start=start) if ranks().first else None
    throughput = Throughput(host.folder / "throughput.csv", run.cost, device=host.device, peak=host.peak_flops)
    bar_of_run = host.progress(total=steps, description="training", unit="step", done=start)
    with bar_of_run as bar, rounded_products(training.precision == "tf32"), collecting_in_step() as collect:
        stream = load_batches(batches, range(start * run.micro_batches, steps * run.micro_batches), host)
        for step in range(start, steps):
            log_step = (step + 1) % training.log_every == 0 or step + 1 == steps
            context = StepContext(step, steps, log_step=log_step)
            with throughput.waiting():
                micro_batches = [next(stream) for _ in range(run.micro_batches)]
            due = checkpoints.due(seconds=host.checkpoint_seconds, share=host.checkpoint_share)
            asked = Requests(host.stop_requested, ranks().first and due)
            stepped = _step(objective, updates, micro_batches, context, asked, training=training, device=host.device)
            if stepped.nonfinite is not None:
                skipped += 1
                _report(context, stepped.nonfinite, skipped, max_skipped)
            means.add(stepped.logs)
            for monitor in monitors:
                if monitor.due(context):
                    means.add(monitor.evaluate(context))
            bar.update(1)
            collect(step)
            throughput.step()
            if context.log_step:
                bar.set_postfix_str(_brief(throughput.row(step + 1)))
                values = means.take()
                if curves is not None:
                    curves.write(step + 1, values)
            stop, checkpoint = stepped.requests
            if checkpoint or stop or step + 1 == steps:
                checkpoints.save(step + 1, tensors, {"skipped": skipped, "means": means.state()})
            if stop:
                checkpoints.wait()
                host.stop()
    checkpoints.wait()
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("objective/")}


class _Stepped(NamedTuple):
    logs: Logs
    requests: Requests
    nonfinite: str | None  # where it began, when the step was skipped


def _step(
    objective: Objective[Batch],
    updates: Sequence[Update],
    micro_batches: Sequence[Batch],
    context: StepContext,
    requests: Requests,
    *,
    training: TrainingConfig,
    device: str,
) -> _Stepped:
    """All phases of a step, and what follows them; a phase whose gradient is not finite ends the step."""
    logs: dict[str, Tensor | float] = {}
    agreed = requests
    for update in updates:
        terms = in_precision(objective.terms(update.phase, micro_batches, context), device, training.precision)
        outcome = update.apply(terms, context, requests=requests)
        agreed = outcome.requests
        if not outcome.finite:
            again = in_precision(objective.terms(update.phase, micro_batches, context), device, training.precision)
            return _Stepped({"skipped": 1.0}, agreed, f"phase {update.phase}, from {update.find_nonfinite(again)}")
        logs |= outcome.logs
    return _Stepped({**logs, **objective.after_step(context), "skipped": 0.0}, agreed, None)


def state_of(objective: Objective, optimizers: Mapping[str, Optimizers]) -> dict[str, Tensor]:
    """Every tensor of the run by name, as the tensors that are in use: reading into them restores the run."""
    state = {f"objective/{name}": tensor for name, tensor in objective.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    for phase, optimizer in optimizers.items():
        for parameter, values in optimizer.state.items():
            state |= {f"{phase}/{names[parameter]}/{name}": tensor for name, tensor in values.items()}
    return state


def in_precision(terms: Iterator[Term], device: str, precision: str) -> Iterator[Term]:
    """The same terms, computed in `precision`; what happens between them is not."""
    while True:
        with torch.autocast(device.split(":", maxsplit=1)[0], torch.bfloat16, enabled=precision == "bfloat16"):
            term = next(terms, None)
        if term is None:
            return
        yield term


def _report(context: StepContext, nonfinite: str, skipped: int, largest: int) -> None:
    message = f"step {context.step}: the gradient is not finite, {nonfinite}"
    if skipped > largest:
        raise NotFiniteError(
            f"{message}; {skipped} skipped, training.max_skipped is {largest}; "
            "lower the learning rate or set clip_norm; the last checkpoint is kept"
        )
    logging.warning("%s; the step is skipped (%d so far)", message, skipped)


def _brief(row: Mapping[str, float]) -> str:
    utilisation = row.get("model_flops_utilisation")
    rate = f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s"
    share = f", {utilisation:.0%} of peak" if utilisation is not None else ""
    return f"{rate}{share}, {row['data_wait_share']:.0%} waiting, {row['memory_gigabytes']:.2g} GB"
