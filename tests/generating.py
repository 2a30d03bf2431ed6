"""What the tests of latents and generators share: cached latents of a tiny tokenizer, and stages run in this process."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tiny import merged, tiny_params, write_shards

from stages.cache_latents import CacheLatents
from stages.cache_latents import run as cache_latents
from stages.generate import Generate
from stages.generate import run as generate
from stages.pretrain import Pretrain
from stages.runner.environment import LocalHost, Runtime
from stages.train_generator import TrainGenerator
from stages.train_generator import run as train_generator
from vtp.models.tokenizer import VisualTokenizer


class QuietHost(LocalHost):
    """Without bars; asked to stop after so many units of progress."""

    workers = processes = property(lambda self: 0)
    stop_after: int | None = None
    done = 0

    @property
    def stop_requested(self):
        return self.stop_after is not None and self.done >= self.stop_after

    stop_seen = stop_requested

    def progress(self, total, description, unit, done=0):
        return nullcontext(self)

    def update(self, count):
        self.done += count

    def set_postfix_str(self, text):
        pass


def work_in(root: Path, *, stop_after: int | None = None) -> QuietHost:
    """A stage's scratch below `root`, which stays for the next start."""
    host = QuietHost(root / "scratch" / "folder", root, Runtime(device="cpu"))
    host.stop_after = stop_after
    host.folder.mkdir(parents=True, exist_ok=True)
    return host


def write_inputs(root: Path) -> None:
    """Shards and a tokenizer with its first weights."""
    write_shards(root / "shards")
    torch.manual_seed(0)
    config = Pretrain.parse(tiny_params()["pretrain"], where="test")
    VisualTokenizer(config.architecture).save_pretrained(root / "tokenizer")


def cache(inputs: Path, root: Path, *, stop_after: int | None = None, **changes: Any) -> Path:
    """The latents of `inputs` as the stage writes them in `root`."""
    config = CacheLatents.parse(merged(tiny_params()["cache_latents"], changes), where="test")
    paths = {"shards": inputs / "shards", "tokenizer": inputs / "tokenizer", "latents": root / "latents"}
    cache_latents(config, **paths, host=work_in(root, stop_after=stop_after))
    return root / "latents"


def train(
    inputs: Path,
    root: Path,
    changes: dict[str, Any],
    *,
    stop_after: int | None = None,
    name: str = "out",
    **given: Path,
) -> Path:
    """A generator trained on the latents of `inputs`; the folder of the outputs."""
    config = TrainGenerator.parse(merged(tiny_params()["train_generator"], changes), where="test")
    out = root / name
    out.mkdir(parents=True, exist_ok=True)
    files = {"metrics": "metrics.json", "curves": "curves.csv", "picture": "picture.png", "generator": "generator"}
    paths = {"latents": inputs / "latents", "tokenizer": inputs / "tokenizer"} | given
    paths |= {flag: out / file for flag, file in files.items()}
    train_generator(config, **paths, host=work_in(root, stop_after=stop_after))
    return out


def draw(
    generator: Path,
    root: Path,
    *,
    given: Mapping[str, Path] | None = None,
    stop_after: int | None = None,
    **changes: Any,
) -> Path:
    """Samples of a generator, with what else the command is `given`."""
    config = Generate.parse(merged(tiny_params()["generate"], changes), where="test")
    paths = {"generator": generator, **(given or {}), "samples": root / "samples"}
    generate(config, **paths, host=work_in(root, stop_after=stop_after))
    return root / "samples"
