"""What being told captions costs a generator: a training step and a forward pass beside those of classes, in one run.

    python -m benchmarks.text_to_image                          # the reference recipe's generator on 8 x 8 latents
    python -m benchmarks.text_to_image --size B --side 16 --channels 64 --patch 1 --tokens 77 --width 768 --batch 64

Kinds alternate from round to round, so that a busy machine slows all alike; medians are compared. Features are there
already, as the stage has them with cached captions. On a GPU steps are in bfloat16, and compiled with VTP_COMPILE=1.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stages.runner.environment import LocalHost, Runtime
from stages.train_generator import GeneratorConfig, OwnSize, TrainGenerator
from vtp.data.batches import LatentBatch
from vtp.data.conditions import Told
from vtp.layers.captions import Captions
from vtp.layers.flops import forward_flops
from vtp.models.captions import TextCondition
from vtp.models.generator_folder import SIZES
from vtp.models.lightningdit import LightningDiT
from vtp.objectives.generation import GenerationObjective
from vtp.params import load
from vtp.step import StepContext
from vtp.training.fit import in_precision
from vtp.training.optim import build_optimizer
from vtp.training.parallelize import parallelize
from vtp.training.update import Update

KINDS = ("classes", "cross_attention", "joint")
CLASSES = 32


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.text_to_image", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, help="a size of LightningDiT; default: that of params.yaml")
    parser.add_argument("--side", type=int, default=8, help="of the latents; default: 8")
    parser.add_argument("--channels", type=int, default=16, help="of the latents; default: 16")
    parser.add_argument("--patch", type=int, help="latents to a token, each way; default: that of params.yaml")
    parser.add_argument("--tokens", type=int, default=40, help="of a caption; default: 40")
    parser.add_argument("--width", type=int, default=128, help="numbers of a token; default: 128")
    parser.add_argument("--batch", type=int, default=32, help="latents of a step; default: 32")
    parser.add_argument("--rounds", type=int, default=5, help="of every kind; default: 5")
    parser.add_argument("--steps", type=int, default=20, help="of a round; default: 20")
    options = parser.parse_args()
    host = LocalHost(Path(), Path.cwd(), Runtime.of(os.environ))
    device = host.device
    config = load("params.yaml:train_generator", TrainGenerator)
    steps = {kind: _steps(kind, config, options, host) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, (step, _) in steps.items():
            began = time.perf_counter()
            for _ in range(options.steps):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first compiles and warms up
                seconds[kind].append((time.perf_counter() - began) / options.steps)
    threads = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{threads}, torch {torch.__version__}, batch {options.batch}, {options.tokens} tokens of {options.width}")
    print(f"{'':16} {'parameters':>12} {'GFLOP forward':>14} {'ms a step':>10} {'beside classes':>15}")
    base = statistics.median(seconds["classes"])
    for kind, (_, model) in steps.items():
        numbers = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        shape = torch.zeros(1, *model.latent_shape)
        flops = forward_flops(model, shape, torch.zeros(1), model.shape_of_condition(1)) / 1e9
        took = statistics.median(seconds[kind])
        print(f"{kind:16} {numbers:10.2f} M {flops:14.3f} {1e3 * took:10.1f} {took / base:14.2f}x")


def _steps(
    kind: str, config: TrainGenerator, options: argparse.Namespace, host: LocalHost
) -> tuple[Callable[[], object], LightningDiT]:
    """One step of training as `fit` makes it, and the model that it trains."""
    torch.manual_seed(0)
    text = None
    if kind != "classes":
        text = TextCondition(width=options.width, length=options.tokens, reading=kind)  # pyright: ignore[reportArgumentType]
    shape = (options.channels, options.side, options.side)
    model = LightningDiT(_model(config.model, options).architecture(shape, classes=CLASSES, text=text))
    objective = GenerationObjective(model, config.objective)
    parallelize(objective, host)
    update = Update("model", build_optimizer(objective.phases()["model"], config.optim), config.optim, ())
    batch = _batch(options, shape, text, host.device)
    precision = "bfloat16" if host.device == "cuda" else "float32"

    def step() -> None:
        context = StepContext(0, 1000, log_step=False)
        terms = in_precision(objective.terms("model", [batch], context), host.device, precision)
        assert update.apply(terms, context).finite
        objective.after_step(context)

    return step, model


def _model(config: GeneratorConfig, options: argparse.Namespace) -> GeneratorConfig:
    changes: dict[str, object] = {} if options.patch is None else {"patch_size": options.patch}
    if options.size is not None:
        changes["size"] = OwnSize(name="own", **SIZES[options.size]._asdict())
    return config.model_copy(update=changes)


def _batch(
    options: argparse.Namespace, shape: tuple[int, int, int], text: TextCondition | None, device: str
) -> LatentBatch:
    """Draws, with captions of half the length on average."""
    draws, count = torch.Generator().manual_seed(1), options.batch
    labels = torch.randint(CLASSES, (count,), generator=draws)
    told = Told(labels, torch.empty(count, 0, dtype=torch.bool))
    if text is not None:
        lengths = torch.randint(1, text.length + 1, (count, 1), generator=draws)
        features = torch.randn(count, text.length, text.width, generator=draws)
        told = Told(*Captions(features, torch.arange(text.length) < lengths))
    latents, noise = (torch.randn(count, *shape, generator=draws) for _ in range(2))
    normal, uniform = torch.randn(count, generator=draws), torch.rand(count, 2, generator=draws)
    return LatentBatch(*(each.to(device) for each in (latents, *told, noise, normal, uniform, torch.zeros(0))))


if __name__ == "__main__":
    main()
