"""Images per second of training a generator, against a plain loop that follows LightningDiT's, in one run.

    python -m benchmarks.generator                                   # the reference recipe
    VTP_COMPILE=1 python -m benchmarks.generator                     # the same, compiled
    python -m benchmarks.generator --size XL --batch 128             # on a GPU, the share of one of eight; B alike

`ours` is the step as `fit` runs it: LatentBatches through its loader, the objective, the update, the averages, as the
environment says (VTP_COMPILE, VTP_RECOMPUTE, VTP_MICRO_BATCH, VTP_WORKERS). `plain` is benchmarks/_reference_generator.py:
one `safe_open` per sample, nothing fused, the average in a Python loop, `.item()` at every step. Where ours is compiled
there is a third row, the plain loop with its layers compiled, as the reference has it on GPUs. All have the same
architecture, latents, batch, precision (bfloat16 on a GPU, float32 on a CPU) and number of workers.

Every kind has a process of its own, and ours the memory settings of a stage. On a CPU their rounds alternate, so that a
busy machine slows all alike. On a GPU one kind runs after the other, so that each has the memory for itself; a reference
that does not fit is left out with a word. Medians are compared. A round begins with a new loader, and its clock with the
first batch.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks._reference_generator import (
    Caches,
    PlainTraining,
    ReferenceLatents,
    endless,
    reference_precision,
    write_caches,
)
from stages.runner.environment import LocalHost, Runtime, keep_freed_memory
from stages.train_generator import GeneratorConfig, TrainGenerator
from vtp.data.batches import LatentBatch, LatentBatches, RankSlice, count_micro_batches
from vtp.data.conditions import ClassConditions
from vtp.data.latents import LatentDataset
from vtp.data.loader import load_batches
from vtp.device import Precision
from vtp.models.generator_folder import SIZES
from vtp.models.lightningdit import LightningDiT
from vtp.objectives.generation import GenerationObjective
from vtp.params import load
from vtp.step import StepContext
from vtp.training.fit import in_precision
from vtp.training.optim import build_optimizer
from vtp.training.parallelize import parallelize
from vtp.training.throughput import memory_bytes, peak_flops
from vtp.training.update import Update

RUN = 100_000  # steps, for the schedules
OWN_SHAPE, PAPER_SHAPE = (16, 8, 8), (64, 16, 16)
OWN_CLASSES, PAPER_CLASSES = 32, 1000

Round = Callable[[int], float]  # seconds of so many steps


class Bench(NamedTuple):
    """What all kinds of step have in common."""

    config: TrainGenerator
    caches: Caches
    host: LocalHost
    precision: Precision

    def model(self) -> LightningDiT:
        """The generator with its first weights."""
        torch.manual_seed(0)
        data = LatentDataset(self.caches.ours)
        model = LightningDiT(self.config.model.architecture(data.shape, classes=len(data.classes), text=None))
        model.residual = self.config.residual_dtype
        return model


class Measured(NamedTuple):
    """Of one kind of step, in a round or over all."""

    seconds: float
    memory: int  # bytes at its peak


class Kind:
    """One kind of step in a process of its own, which does a round when it is told to."""

    def __init__(self, name: str, bench: Bench, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, bench, options, there))
        self._process.start()
        there.close()
        self._rounds: list[Measured] = []

    def round(self, steps: int) -> None:
        """Raises OutOfMemoryError when it does not fit the device; EOFError when the process died."""
        self._here.send(steps)
        answer = self._here.recv()
        if answer is None:
            raise torch.OutOfMemoryError
        self._rounds.append(answer)

    @property
    def measured(self) -> Measured:
        """The median of all rounds but the first, which warmed up."""
        times = [each.seconds for each in self._rounds[1:]]
        return Measured(statistics.median(times), self._rounds[-1].memory)

    def end(self) -> None:
        """Let the process end."""
        with suppress(BrokenPipeError):  # it has ended by itself
            self._here.send(None)
        self._process.join()


def main() -> None:
    """Measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        host = LocalHost(Path(temporary) / "folder", Path.cwd(), Runtime.of(os.environ))
        bench = prepare(options, host, residual=options.residual)
        names = ["ours"]
        if not options.only_ours:
            names += ["plain", "plain, compiled"] if bench.host.compiles else ["plain"]
        flops = _print_head(bench)
        measured: dict[str, Measured] = {}
        for together in [names] if bench.host.device == "cpu" else [[name] for name in names]:
            try:
                found = measure(together, bench, options)
                measured |= found
                _print(found, measured["ours"], bench, flops)
            except torch.OutOfMemoryError:
                if "ours" in together:
                    raise
                print(f"{', '.join(together)}: does not fit the device's memory at this batch; left out", flush=True)


def measure(names: list[str], bench: Bench, options: argparse.Namespace) -> dict[str, Measured]:
    """Rounds of several kinds, in turn."""
    kinds = {name: Kind(name, bench, options) for name in names}
    try:
        for steps in (options.warmup, *[options.steps] * options.rounds):
            for kind in kinds.values():
                kind.round(steps)
        return {name: kind.measured for name, kind in kinds.items()}
    finally:
        for kind in kinds.values():
            kind.end()


def _serve(name: str, bench: Bench, options: argparse.Namespace, orders: Connection) -> None:
    """What the process of a kind does: seconds of a step, and its memory, for every round that is asked for."""
    if name == "ours":
        keep_freed_memory(bench.host.runtime)
    run: Round | None = None
    try:
        for steps in iter(orders.recv, None):
            run = run or (ours(bench) if name == "ours" else plain(bench, compiled=name == "plain, compiled"))
            orders.send(Measured(run(steps) / steps, memory_bytes(bench.host.device)))
    except torch.OutOfMemoryError:
        orders.send(None)
        return
    if run is not None and options.profile and name == "ours":
        _profile(run)


def prepare(options: argparse.Namespace, host: LocalHost, *, residual: str | None = None) -> Bench:
    """The section with what the command changes, and random latents of the size's shape."""
    config = load(options.address, TrainGenerator)
    model, batch = config.model.model_dump(mode="json"), options.batch or config.batch_size
    if options.size != "own":
        model["size"] = {"name": options.size}
    config = config.model_copy(
        update={
            "model": GeneratorConfig.parse(model, where=f"--size {options.size}"),
            "batch_size": batch,
            "residual": residual or config.residual,
        }
    )
    shape, classes = (OWN_SHAPE, OWN_CLASSES) if options.size == "own" else (PAPER_SHAPE, PAPER_CLASSES)
    precision: Precision = "bfloat16" if host.device == "cuda" else "float32"
    caches = write_caches(
        host.folder / "latents", shape, count=options.latents, classes=classes, dtype=precision, files=8
    )
    return Bench(config, caches, host, precision)


def ours(bench: Bench) -> Round:
    """Our step, as `fit` runs it."""
    config, host = bench.config, bench.host
    objective = GenerationObjective(bench.model(), config.objective)
    parallelize(objective, host)
    optimizer = build_optimizer(objective.phases()["model"], config.optim)
    update = Update("model", optimizer, config.optim, objective.shared_parameters())
    largest = host.micro_batch or config.batch_size
    rank_slice = RankSlice(0, 1, count_micro_batches(config.batch_size, 1, largest, named="batch_size"))
    batches = batches_of(LatentDataset(bench.caches.ours), config.batch_size, rank_slice)
    numbers = count()

    def step(micro_batches: list[LatentBatch]) -> None:
        context = StepContext(next(numbers), RUN, log_step=False)
        terms = in_precision(objective.terms("model", micro_batches, context), host.device, bench.precision)
        assert update.apply(terms, context).finite
        objective.after_step(context)

    def run(steps: int) -> float:
        stream = load_batches(batches, range((steps + 1) * rank_slice.micro_batches), host)
        grouped = ([next(stream) for _ in range(rank_slice.micro_batches)] for _ in range(steps + 1))
        seconds = _clocked(grouped, step, steps, host.device)
        stream.close()
        return seconds

    return run


def plain(bench: Bench, *, compiled: bool) -> Round:
    """The reference's loop."""
    config, host = bench.config, bench.host
    model = bench.model().to(host.device)
    training = PlainTraining(model, config, device=host.device, precision=bench.precision)
    if compiled:
        for unit in model.compiled_units:
            unit.compile(dynamic=False)
    latents = ReferenceLatents(bench.caches.reference)
    latents.statistics = LatentDataset(bench.caches.ours).statistics

    def step(batch: tuple[Tensor, Tensor]) -> None:
        training(*batch)

    def run(steps: int) -> float:
        loader = DataLoader(
            latents,
            config.batch_size,
            shuffle=True,
            num_workers=host.workers,
            drop_last=True,
            pin_memory=host.device != "cpu",
        )
        with reference_precision():
            return _clocked(endless(loader), step, steps, host.device)

    return run


def _clocked(batches: Iterator, step: Callable, steps: int, device: str) -> float:
    """Seconds of the steps after the first, with the reading of their batches."""
    step(next(batches))
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step(next(batches))
    _wait(device)
    return time.perf_counter() - start


def batches_of(data: LatentDataset, size: int, rank_slice: RankSlice) -> LatentBatches:
    """Micro-batches of latents with their classes."""
    return LatentBatches(data, ClassConditions(data.labels), batch_size=size, seed=0, rank_slice=rank_slice)


def _print_head(bench: Bench) -> float:
    """What is measured; returns the FLOPs of a step."""
    host, batch, model = bench.host, bench.config.batch_size, bench.model()
    cost = GenerationObjective(model, bench.config.objective).step_cost({model.latent_shape: 1.0}, batch_size=batch)
    device = torch.cuda.get_device_name() if host.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{device}, {host.workers} workers, torch {torch.__version__}, {bench.precision}", end=", ")
    print("compiled" if host.compiles else "not compiled")
    print(
        f"{parameters / 1e6:.1f} M parameters, latents {model.config.in_channels} x {model.config.input_size}², "
        f"batch {batch}, {cost.flops / 1e9:,.1f} GFLOP a step",
        flush=True,
    )
    return cost.flops


def _print(measured: dict[str, Measured], ours: Measured, bench: Bench, flops: float) -> None:
    host, batch = bench.host, bench.config.batch_size
    peak = host.peak_flops or peak_flops(host.device)
    for name, (value, memory) in measured.items():
        line = f"{name:24}{value * 1e3:9.1f} ms {batch / value:9.1f} images/s {flops / value / 1e12:8.3f} TFLOP/s"
        line += f", {flops / value / peak:.1%} of peak" if peak else ""
        line += f", {memory / 1e9:.2f} GB" if host.device == "cuda" else ""  # the kernel counts the parent's before
        print(line if name == "ours" else f"{line}   ours is {value / ours.seconds:.2f}x", flush=True)


def _profile(run: Round) -> None:
    """Where a step of ours spends its time."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        run(3)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.generator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", default="params.yaml:train_generator", metavar="FILE:SECTION")
    parser.add_argument("--size", default="own", choices=("own", *SIZES), help="own: the section's, on small latents")
    parser.add_argument("--batch", type=int, help="latents of a step; the section's, if not given")
    parser.add_argument("--latents", type=int, default=4096, help="images of the cache; 0.2 MB each for a named size")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="per round and kind")
    parser.add_argument("--residual", choices=("float32", "bfloat16"), help="of ours; the section's, if not given")
    parser.add_argument("--only-ours", action="store_true", help="skip the reference")
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
