"""Samples per second of our sampler against a loop that follows LightningDiT's, with one network, in one run.

    python -m benchmarks.sampling                                    # the reference recipe's generator
    VTP_COMPILE=1 python -m benchmarks.sampling                      # the same, compiled
    python -m benchmarks.sampling --size XL --steps 249 --shift 0.3 --scale 10 --interval 0.1    # on a GPU, as published

Ours is `vtp.flow.sample` with a large constant batch, in bfloat16 on a GPU, without the null branch outside of the
interval. The reference computes both branches at every step, in float32 (TF32 on a GPU), 4 samples at a time. Solver
(Euler), steps, shift, scale, interval and the guided channels (the first three) are the same for both. Where ours is
compiled, as the environment says (VTP_COMPILE), so is the reference, which has it by decorators.

Weights are random; none is zero, as it is in a new generator. Both start from the same noise at first, and the largest
deviation is printed: in float32 it is rounding. Rounds alternate in one process, with the memory settings of a stage;
medians are compared. Decoding is no part of it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from benchmarks._reference_generator import (
    CHANNELS_GUIDED,
    SAMPLED_AT_ONCE,
    PlainGuidance,
    plain_sample,
    reference_precision,
)
from benchmarks.generator import prepare
from stages.runner.environment import LocalHost, Runtime, keep_freed_memory
from vtp.device import Precision, computing
from vtp.flow import sample
from vtp.layers.flops import forward_flops
from vtp.models.generator_folder import SIZES
from vtp.models.lightningdit import LightningDiT
from vtp.training.throughput import memory_bytes, peak_flops


class Start(NamedTuple):
    """What samples begin from."""

    noise: Tensor  # [B, C, H, W]
    labels: Tensor  # [B]

    def first(self, count: int) -> "Start":
        """The first so many."""
        return Start(self.noise[:count], self.labels[:count])


def main() -> None:
    """Measure and print."""
    options, runtime = _options(), Runtime.of(os.environ)
    keep_freed_memory(runtime)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        host = LocalHost(Path(temporary) / "folder", Path.cwd(), runtime)
        bench = prepare(options, host)
        precision = options.precision or bench.precision
        model = _trained(bench.model()).to(host.device).eval()
        if host.compiles:
            torch._dynamo.config.recompile_limit = 64  # three shapes, under autocast and not
            for unit in model.compiled_units:
                unit.compile(dynamic=False)
        torch.manual_seed(1)
        shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
        labels = torch.arange(options.batch) % model.config.num_classes
        start = Start(torch.randn(options.batch, *shape).to(host.device), labels.to(host.device))
        few = start.first(options.reference_samples)
        samplers = {
            "ours": lambda: ours(model, start, options, precision=precision),
            "reference": lambda: reference(model, few, options),
        }
        counts = {"ours": len(start.labels), "reference": len(few.labels)}
        first = {name: _peak(draw, host.device) for name, draw in samplers.items()}
        exact = ours(model, few, options, precision="float32")
        times: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(options.rounds):
            for name, draw in samplers.items():
                begun = time.perf_counter()
                draw()
                _wait(host.device)
                times[name].append((time.perf_counter() - begun) / counts[name])
        print(f"{_device(host)}, torch {torch.__version__}, {'compiled' if host.compiles else 'not compiled'}")
        _print({name: statistics.median(values) for name, values in times.items()}, first, model, options)
        drawn = first["reference"].samples
        off = {"float32": exact, precision: first["ours"].samples[: len(drawn)]}
        deviations = ", ".join(f"{(value - drawn).abs().max():.1e} in {name}" for name, value in off.items())
        print(f"largest deviation from the reference's samples: {deviations}; their spread is {drawn.std():.2f}")


@torch.inference_mode()
def ours(model: LightningDiT, start: Start, options: argparse.Namespace, *, precision: Precision) -> Tensor:
    """One batch."""
    with computing(precision, start.noise.device):
        return sample(
            model,
            start.noise,
            start.labels,
            solver="euler",
            steps=options.steps,
            timestep_shift=options.shift,
            guidance_scale=options.scale,
            guidance_interval=(options.interval, 1.0),
            guidance_channels=CHANNELS_GUIDED,
        )


@torch.no_grad()
def reference(model: LightningDiT, start: Start, options: argparse.Namespace) -> Tensor:
    """As many, a few at a time."""
    guidance = PlainGuidance(options.steps, options.shift, options.scale, options.interval)
    with reference_precision():
        parts = [
            plain_sample(model, noise, labels, guidance, null=model.null_label)
            for noise, labels in zip(
                start.noise.split(SAMPLED_AT_ONCE), start.labels.split(SAMPLED_AT_ONCE), strict=True
            )
        ]
    return torch.cat(parts)


def _trained(model: LightningDiT) -> LightningDiT:
    """Weights that are zero in a new generator become small: it would sample noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.05)
    return model


class Peak(NamedTuple):
    """What a round that is not timed gave."""

    samples: Tensor
    memory: int


def _peak(draw: Callable[[], Tensor], device: str) -> Peak:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return Peak(draw(), memory_bytes(device))


def _print(seconds: dict[str, float], first: dict[str, Peak], model: LightningDiT, options: argparse.Namespace) -> None:
    device = first["ours"].samples.device.type
    on = sum(t >= options.interval for t in _times(options))
    one = (first["ours"].samples[:1], torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    flops, peak = forward_flops(model, *one) * (options.steps + on), peak_flops(device)
    print(
        f"{options.steps} Euler steps, shift {options.shift:g}, scale {options.scale:g}, guided in {on} of them: "
        f"{flops / 1e9:,.1f} GFLOP a sample of ours"
    )
    for name, value in seconds.items():
        size = options.batch if name == "ours" else SAMPLED_AT_ONCE
        line = f"{name:12}{1 / value:10.2f} images/s, {size} at once"
        line += f", {flops / value / peak:.1%} of peak" if peak and name == "ours" else ""
        line += f", {first[name].memory / 1e9:.2f} GB" if device == "cuda" else ""
        print(line if name == "ours" else f"{line}   ours is {value / seconds['ours']:.2f}x")


def _times(options: argparse.Namespace) -> list[float]:
    from vtp.flow.sampler import time_grid

    return time_grid(options.steps, options.shift)[:-1].tolist()


def _device(host: LocalHost) -> str:
    return torch.cuda.get_device_name() if host.device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", default="params.yaml:train_generator", metavar="FILE:SECTION")
    parser.add_argument("--size", default="own", choices=("own", *SIZES), help="own: the section's, on small latents")
    parser.add_argument("--batch", type=int, default=256, help="samples that ours draws at once")
    parser.add_argument("--reference-samples", type=int, default=32, help="that the reference draws in a round")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--shift", type=float, default=0.5)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--interval", type=float, default=0.1, help="time from which guidance acts")
    parser.add_argument("--precision", choices=get_args(Precision), help="of ours; default: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.set_defaults(latents=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
