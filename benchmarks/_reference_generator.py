"""What LightningDiT's and VTP's scripts do between tokenizer and samples: the reference of three benchmarks.

Latents are read one by one, each by opening its file; the training loop averages weights parameter by parameter in
Python, draws its times with scipy on the CPU, and asks for the loss at every step; the sampler computes both branches
whatever the interval, few samples at a time. The network is ours without compilation: its modules are written plainly,
one operation after the other, as those of the reference are. (On a GPU the reference compiles its layers by decorators;
benchmarks/generator.py shows that as a row of its own.)
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stages.train_generator import TrainGenerator
from vtp.artefact import save_tensors
from vtp.data.latents import LatentStatistics, finish_cache, plan_shards
from vtp.flow.sampler import time_grid
from vtp.models.lightningdit import LightningDiT

CHANNELS_GUIDED = 3  # of however many there are
SAMPLED_AT_ONCE = 4
Shape = tuple[int, int, int]


class Caches(NamedTuple):
    """The same random latents in both layouts."""

    ours: Path
    reference: Path


def write_caches(folder: Path, shape: Shape, *, count: int, classes: int, dtype: str, files: int) -> Caches:
    """Latents of `count` images, both ways round, in `files` files: ours in `dtype`, the reference's in float32."""
    caches = Caches(folder / "ours", folder / "reference")
    for cache in caches:
        cache.mkdir(parents=True)
    shards = plan_shards({"train": count}, -(-count // files))
    draws = torch.Generator().manual_seed(0)
    for shard in shards:
        size = len(shard.rows)
        plain, flipped = torch.randn(2, size, *shape, generator=draws).unbind()
        labels = torch.randint(classes, (size,), generator=draws)
        stored = {"latents": plain, "flipped": flipped}
        stored = {name: latents.to(getattr(torch, dtype)) for name, latents in stored.items()}
        save_tensors(shard.path(caches.ours), {**stored, "labels": labels})
        write_reference_file(caches.reference, shard.number, {"latents": plain, "latents_flip": flipped}, labels)
    names = [f"class {number}" for number in range(classes)]
    description = {"dtype": dtype, "classes": names, "image_size": 16 * shape[1], "encoder": "none: random latents"}
    finish_cache(caches.ours, shards, description, most=min(count, 1024), seed=0)
    return caches


def write_reference_file(folder: Path, number: int, latents: dict[str, Tensor], labels: Tensor) -> None:
    """A file of the reference's cache; the next image waits for it."""
    from safetensors.torch import save_file

    about = {"total_size": str(len(labels)), "dtype": "torch.float32", "device": "cpu"}
    tensors = {name: values.contiguous() for name, values in latents.items()}
    save_file({**tensors, "labels": labels}, folder / f"latents_rank00_shard{number:03d}.safetensors", about)


class ReferenceLatents(Dataset[tuple[Tensor, Tensor]]):
    """One sample at a time: its file is opened, and three slices are read."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._places: dict[int, tuple[str, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), "pt") as file:
                size = file.get_slice("labels").get_shape()[0]
            self._places |= {len(self._places) + row: (str(path), row) for row in range(size)}
        self.statistics: LatentStatistics | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        path, row = self._places[index]
        with safe_open(path, "pt") as file:
            name = "latents" if np.random.uniform() > 0.5 else "latents_flip"
            latent = file.get_slice(name)[row : row + 1]
            label = file.get_slice("labels")[row : row + 1]
        if self.statistics is not None:
            latent = self.statistics.normalise(latent)
        return latent[0], label[0]

    def measure(self, most: int) -> LatentStatistics:
        """Statistics of `most` random images, not mirrored, read like any other sample."""
        from safetensors import safe_open

        found = []
        for index in np.random.permutation(len(self))[:most].tolist():
            path, row = self._places[index]
            with safe_open(path, "pt") as file:
                found.append(file.get_slice("latents")[row : row + 1])
        latents = torch.cat(found)
        return LatentStatistics(
            latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True, correction=0)
        )


class PlainTraining:
    """The training loop; a call is a step."""

    def __init__(self, model: LightningDiT, config: TrainGenerator, *, device: str, precision: str) -> None:
        optim, momenta = config.optim, config.objective.ema
        self.model, self.config, self.momentum = model, config, momenta[0]
        self.device, self.precision = device, precision
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.losses = 0.0

    def __call__(self, latents: Tensor, labels: Tensor) -> None:
        latents, labels = latents.to(self.device), labels.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            mse, cosine = self._losses(latents, labels)
        self.optimizer.zero_grad()
        (mse + self.config.objective.cosine_weight * cosine).backward()
        if (most := self.config.optim.clip_norm) is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), most)
        self.optimizer.step()
        self._follow()
        self.losses += mse.item()

    def _losses(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from scipy.stats import norm

        times = self.config.objective.timesteps
        mu, sigma = (times.mu, times.sigma) if times.name == "logit_normal" else (0.0, 1.0)
        drawn = norm.rvs(loc=mu, scale=sigma, size=len(latents))
        t = torch.tensor(1 / (1 + np.exp(-drawn)), dtype=torch.float32, device=self.device)
        noise = torch.randn_like(latents)
        dropped = torch.rand(len(labels), device=self.device) < self.config.objective.condition_dropout
        labels = torch.where(dropped, self.model.null_label, labels)
        wide = t[:, None, None, None]
        predicted = self.model(wide * latents + (1 - wide) * noise, t, labels)
        velocity = latents - noise
        squares = ((predicted - velocity) ** 2).mean((1, 2, 3))
        cosine = (1 - F.cosine_similarity(predicted, velocity, dim=1)).mean()
        return squares.mean(), cosine

    @torch.no_grad()
    def _follow(self) -> None:
        kept = dict(self.average.named_parameters())
        for name, parameter in self.model.named_parameters():
            kept[name].mul_(self.momentum).add_(parameter.data, alpha=1 - self.momentum)


def endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


class PlainGuidance(NamedTuple):
    """How the reference samples: scale, the time from which guidance acts, guided channels."""

    steps: int
    timestep_shift: float
    scale: float
    start: float
    channels: int = CHANNELS_GUIDED


def plain_sample(model: nn.Module, noise: Tensor, labels: Tensor, guidance: PlainGuidance, *, null: int) -> Tensor:
    """Euler's method on the doubled batch. Where guidance is off, the null branch is computed and thrown away."""
    x = torch.cat([noise, noise])
    labels = torch.cat([labels, torch.full_like(labels, null)])
    grid = time_grid(guidance.steps, guidance.timestep_shift).float().to(noise.device)
    for t, following in pairwise(grid):
        half = x[: len(x) // 2]
        times = torch.ones(len(x), device=x.device) * t
        velocity = model(torch.cat([half, half]), times, labels)
        guided, rest = velocity[:, : guidance.channels], velocity[:, guidance.channels :]
        strong, weak = guided.chunk(2)
        mixed = weak + guidance.scale * (strong - weak) if times[0] >= guidance.start else strong
        x = x + (following - t) * torch.cat([torch.cat([mixed, mixed]), rest], dim=1)
    return x.chunk(2)[0]


@contextmanager
def reference_precision() -> Iterator[None]:
    """Float32 products by the tensor cores of a GPU, in TF32, which the reference's scripts switch on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
