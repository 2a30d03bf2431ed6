"""Images per second of the joint pre-training step, against plain references, in one run on whatever device there is.

    python -m benchmarks.pretrain                                                       # the reference recipe
    python -m benchmarks.pretrain pipelines/overlays/sizes/L.yaml:pretrain --divide 256     # what one of 256 GPUs does

`joint` is our step as the environment says (VTP_COMPILE, VTP_RECOMPUTE, VTP_MICRO_BATCH). `plain` is a step of as much
computing as one would first write it (benchmarks/_plain.py), without stochastic depth. `separate` is the sum of three
steps on the same sizes: open_clip's model and loss, a reconstruction, a DINO-style one. Rounds alternate, so that a
busy machine slows all alike; medians are compared.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks._pictures import stream_of, write_pictures
from benchmarks._plain import PlainSsl, PlainStep, adamw, reconstruct
from stages.pretrain import Pretrain, build_batches, build_objective, parallelize, slice_of
from stages.runner.environment import LocalHost, Runtime
from vtp.data.pretrain_batches import PretrainBatch
from vtp.layers.images import normalise
from vtp.losses.perceptual import build_perceptual
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.cost import pretrain_cost
from vtp.objectives.pretrain import DropPathConfig
from vtp.params import load
from vtp.step import StepContext
from vtp.training.fit import in_precision
from vtp.training.optim import build_optimizer
from vtp.training.throughput import memory_bytes, peak_flops
from vtp.training.update import Update

Step = Callable[[], object]


def main() -> None:
    """Measure and print."""
    options = _options()
    config = _divided(load(options.address, Pretrain), options.divide)
    runtime = Runtime.of(os.environ)
    host = LocalHost(Path(tempfile.mkdtemp()) / "folder", Path.cwd(), runtime)
    rank_slice = slice_of(config, host)
    shards = write_pictures(
        Path(tempfile.mkdtemp()) / "shards", side=2 * config.tokenizer.image_size, count=config.active.pool
    )
    batches = build_batches(config, stream_of(shards, config.data.stream), rank_slice)
    micro_batches = [_move(batches[index], host.device) for index in range(rank_slice.micro_batches)]
    whole = (
        PretrainBatch(*map(torch.cat, zip(*micro_batches, strict=True)))
        if rank_slice.micro_batches > 1
        else micro_batches[0]
    )
    steps = {"joint": joint(config, micro_batches, host)}
    if not options.only_joint:
        steps["plain"] = plain(config, whole, host)
        for name, part in separate(config, whole, host).items():
            steps[name] = part
    seconds = _measure(steps, host.device, options)
    if "plain" in seconds:
        seconds["separate"] = sum(seconds[name] for name in steps if name.startswith("separate:"))
    _print(config, seconds, host)


def joint(config: Pretrain, micro_batches: list[PretrainBatch], host: LocalHost) -> Step:
    """Our step, as `fit` runs it."""
    objective = build_objective(config, host)
    parallelize(objective, host)
    optimizer = build_optimizer(objective.phases()["model"], config.optim)
    update = Update("model", optimizer, config.optim, objective.shared_parameters())
    context = StepContext(1, 2, log_step=False)

    def step() -> None:
        terms = in_precision(objective.terms("model", micro_batches, context), host.device, config.training.precision)
        assert update.apply(terms, context).finite
        objective.after_step(context)

    return step


def plain(config: Pretrain, batch: PretrainBatch, host: LocalHost) -> Step:
    """A step of as much computing, written naively."""
    step = PlainStep(*_models(config, host), config)
    return lambda: step(batch)


def separate(config: Pretrain, batch: PretrainBatch, host: LocalHost) -> dict[str, Step]:
    """Three trainings that share nothing."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = config.vit.vision, config.vit.text
    assert text is not None
    clip = CLIP(
        text.embed_dim,
        CLIPVisionCfg(
            layers=vision.depth,
            width=vision.embed_dim,
            head_width=vision.embed_dim // vision.num_heads,
            patch_size=vision.patch_size,
            image_size=config.data.clip_view.size,
        ),
        CLIPTextCfg(
            text.context_length, text.vocab_size, width=text.embed_dim, heads=text.num_heads, layers=text.depth
        ),
    ).to(host.device)
    contrastive, of_clip = ClipLoss(), adamw([clip], config)
    tokenizer, perceptual = _models(config, host)
    of_autoencoder = adamw([tokenizer.trunk, tokenizer.pixel_decoder], config)
    student, _ = _models(config, host)
    ssl = PlainSsl(student, config).to(host.device)
    of_ssl = adamw([student.trunk, ssl.head], config)

    def clip_step() -> None:
        with _precision(config, host):
            loss = contrastive(*clip(normalise(batch.clip_images), batch.tokens))
        _apply(loss, of_clip)

    def reconstruction_step() -> None:
        with _precision(config, host):
            loss = reconstruct(tokenizer, perceptual, normalise(batch.rec_images))
        _apply(loss, of_autoencoder)

    def ssl_step() -> None:
        with _precision(config, host):
            loss = ssl(student.trunk, batch)
        _apply(loss, of_ssl)
        ssl.follow(student.trunk, 0.99)

    return {
        "separate: open_clip": clip_step,
        "separate: reconstruction": reconstruction_step,
        "separate: DINO": ssl_step,
    }


def _apply(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()


def _models(config: Pretrain, host: LocalHost) -> tuple[VisualTokenizer, nn.Module]:
    perceptual = build_perceptual(config.objective.reconstruction.perceptual, weights=host.weights)
    return VisualTokenizer(config.vit).to(host.device), perceptual.to(host.device)


def _precision(config: Pretrain, host: LocalHost) -> torch.autocast:
    return torch.autocast(host.device, torch.bfloat16, enabled=config.training.precision == "bfloat16")


def _measure(steps: dict[str, Step], device: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each kind of step."""
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            _wait(device)
            times[name].append((time.perf_counter() - start) / options.steps)
    return {name: statistics.median(values) for name, values in times.items()}


def _print(config: Pretrain, seconds: dict[str, float], host: LocalHost) -> None:
    everything = DropPathConfig(clip=0, ssl=0, reconstruction=0)
    whole_objective = config.objective.model_copy(update={"drop_path": everything})
    cost, whole = (
        pretrain_cost(config.architecture, config.data, objective, config.active)
        for objective in (config.objective, whole_objective)
    )
    flops = {"joint": cost.flops, "plain": whole.flops}  # stochastic depth leaves out nothing of the plain step
    device = torch.cuda.get_device_name() if host.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = host.peak_flops or peak_flops(host.device)
    print(f"{device}, torch {torch.__version__}, {config.training.precision}, batch {config.active}")
    print(f"{cost.flops / 1e9:,.1f} GFLOP a step; peak memory {memory_bytes(host.device) / 1e9:.2f} GB")
    for name, value in seconds.items():
        line = f"{name:26}{value * 1e3:10.1f} ms {config.active.pool / value:10.1f} images/s"
        if name in flops:
            line += f" {flops[name] / value / 1e12:8.3f} TFLOP/s"
            line += f", {flops[name] / value / peak:.1%} of peak" if peak else ""
        if name != "joint":
            line += f"   joint is {value / seconds['joint']:.2f}x"
        print(line)


def _divided(config: Pretrain, by: int) -> Pretrain:
    """The share of one of `by` devices as a batch of its own."""
    batch = {name: size // by for name, size in config.data.batch.model_dump().items()}
    values = config.model_dump()
    values["data"]["batch"] = batch
    return Pretrain.parse(values, where=f"--divide {by}")


def _move(batch: PretrainBatch, device: str) -> PretrainBatch:
    return PretrainBatch(*(value.to(device) for value in batch))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.pretrain", description=__doc__)
    parser.add_argument("address", nargs="?", default="params.yaml:pretrain", metavar="FILE:SECTION")
    parser.add_argument("--divide", type=int, default=1, help="take this share of the batch, as one of so many devices")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round and kind")
    parser.add_argument("--only-joint", action="store_true", help="skip the references")
    return parser.parse_args()


if __name__ == "__main__":
    main()
