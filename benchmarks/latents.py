"""Caching of latents, and reading of random minibatches, against the reference's procedures, in one run.

    python -m benchmarks.latents                                     # the reference recipe's tokenizer
    python -m benchmarks.latents --count 4000 --only caching
    python -m benchmarks.latents pipelines/overlays/sizes/L.yaml:pretrain --count 20000 --batch-size 256    # on a GPU

Caching: ours is the stage `cache_latents` as it is. The reference passes over a folder of images twice at once, upright
and mirrored, so that every file is decoded twice; it encodes in float32, 50 images at a time, and waits while files of
10,000 are written. Both have the same number of workers in all, and take statistics over the share of images that 10,000
is of ImageNet. Ours is in bfloat16 on a GPU, in float32 on a CPU, where bfloat16 is slower.

Pictures have the usual size of ImageNet's, 500 x 375. Either procedure encodes every image both ways round, so the ratio
comes near 2 as decoding takes more of the time than the encoder. A CPU spends it in the encoder, whatever its size in
the recipe; a GPU waits for pictures. That case is `thin`: 256 pixels, as published tokenizers have them, and an encoder
of one narrow block. What one picture costs to decode and to encode is printed beside.

Reading: shuffled minibatches of cached latents of a 256-pixel tokenizer (64 x 16 x 16), both from the page cache: rows
of memory-mapped shards, against one `safe_open` per sample.

Rounds alternate, so that a busy machine slows both alike; medians are compared.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from benchmarks._pictures import write_pictures
from benchmarks._reference_generator import ReferenceLatents, reference_precision, write_caches, write_reference_file
from stages import cache_latents
from stages.pretrain import Pretrain
from stages.runner.environment import LocalHost, Runtime, keep_freed_memory
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.data.shards import Manifest
from vtp.layers.images import IMAGENET_MEAN, IMAGENET_STD, centre_crop, normalise
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer
from vtp.params import load

SPLITS = ("train", "validation")
SHARDS = 16  # of pictures; the last is the validation split
WARMUP = 64  # pictures
IMAGENET, MEASURED = 1_281_167, 10_000  # images, and those of the statistics
REFERENCE_BATCH, REFERENCE_FILE = 50, 10_000
SHAPE = (64, 16, 16)  # of latents that are read


class Pictures(NamedTuple):
    """The same files as shards and as a folder."""

    shards: Path
    folder: Path
    number: int


def main() -> None:
    """Measure and print."""
    options = _options()
    runtime = Runtime.of(os.environ)
    keep_freed_memory(runtime)
    workers = max(2, runtime.cores if runtime.workers is None else runtime.workers)
    runtime = runtime.model_copy(update={"workers": workers})
    host = LocalHost(Path(tempfile.mkdtemp()) / "folder", Path.cwd(), runtime)
    device = torch.cuda.get_device_name() if host.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, {host.workers} workers, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        if options.only != "reading":
            caching(Path(temporary), host, options)
        if options.only != "caching":
            reading(Path(temporary), options)


def caching(folder: Path, host: LocalHost, options: argparse.Namespace) -> None:
    """Images per second of both procedures, for each tokenizer."""
    pictures, few = (_pictures(folder / f"pictures-{count}", options.side, count) for count in (options.count, WARMUP))
    recipe = load(options.address, Pretrain).vit
    print(f"caching {pictures.number:,} JPEGs of {options.side} x {options.side * 3 // 4}, both ways round")
    for name in options.tokenizers:
        model = VisualTokenizer(recipe if name == "recipe" else _thin(recipe))
        here = folder / name
        model.save_pretrained(here / "tokenizer")
        ours = partial(_ours, dtype=options.dtype, batch_size=options.batch_size)
        procedures = {"ours": ours, "reference": _reference}
        for procedure in procedures.values():
            procedure(few, here / "tokenizer", here / "warmup", host)
        times: dict[str, list[float]] = {name: [] for name in procedures}
        for number in range(options.rounds):
            for of, procedure in procedures.items():
                start = time.perf_counter()
                procedure(pictures, here / "tokenizer", here / f"{of}-{number}", host)
                times[of].append(time.perf_counter() - start)
                shutil.rmtree(here / f"{of}-{number}")
        print(f" {name}: {model.image_size} px to {model.latent_shape}")
        told = f"encoder in {_precision(host)}, latents in {options.dtype}"
        _print(times, pictures.number, told, "encoder and latents in float32")
        decoding, encoding = _parts(pictures, model.to(host.device), host.device)
        print(
            f"  {decoding * 1e3:.2f} ms to decode and crop a picture in one process, {encoding * 1e3:.2f} ms to encode it "
            f"both ways round in float32: to decode once saves at most {1 + decoding / (decoding + encoding):.2f}x",
            flush=True,
        )


def _thin(recipe: TokenizerConfig) -> TokenizerConfig:
    """An encoder that takes little beside the decoding of pictures."""
    size = {"embed_dim": 32, "depth": 1, "num_heads": 1}
    vision = recipe.vision.model_copy(update={**size, "patch_size": 16, "feature_bottleneck": SHAPE[0]})
    assert recipe.decoder is not None  # of a recipe that trains
    decoder = recipe.decoder.model_copy(update=size)
    return recipe.model_copy(update={"image_size": 256, "vision": vision, "decoder": decoder, "text": None})


def _precision(host: LocalHost) -> str:
    return "bfloat16" if host.device == "cuda" else "float32"


def _ours(pictures: Pictures, tokenizer: Path, target: Path, host: LocalHost, *, dtype: str, batch_size: int) -> None:
    """The stage."""
    values = {"dtype": dtype, "precision": _precision(host), "horizontal_flips": True}
    values |= {"batch_size": batch_size, "shard_size": 10_000}
    values |= {"statistics": {"images": _measured(pictures.number), "seed": 0}}
    config = cache_latents.CacheLatents.parse(values, where="benchmarks.latents")
    target.mkdir(exist_ok=True)
    own = LocalHost(target / "folder", Path.cwd(), host.runtime)
    cache_latents.run(config, shards=pictures.shards, tokenizer=tokenizer, latents=target / "latents", host=own)


@torch.no_grad()
def _reference(pictures: Pictures, tokenizer: Path, target: Path, host: LocalHost) -> None:
    """Two loaders side by side, each with half as many workers as ours has."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, ToTensor

    target = target / "reference"
    target.mkdir(parents=True)
    model = load_tokenizer(tokenizer).to(host.device)
    loaders = []
    for probability in (0.0, 1.0):
        square, mirror = partial(centre_crop, size=model.image_size), RandomHorizontalFlip(probability)
        transform = Compose([square, mirror, ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        loaders.append(
            DataLoader(
                ImageFolder(str(pictures.folder), transform),
                batch_size=REFERENCE_BATCH,
                num_workers=host.workers // 2,
                pin_memory=host.device != "cpu",
            )
        )
    held: dict[str, list[Tensor]] = {"latents": [], "latents_flip": [], "labels": []}
    number = 0

    def write() -> None:
        nonlocal number
        whole = {name: torch.cat(parts) for name, parts in held.items()}
        write_reference_file(target, number, whole, whole.pop("labels"))
        number += 1
        for parts in held.values():
            parts.clear()

    for batches in zip(*loaders, strict=True):
        for name, (images, _) in zip(("latents", "latents_flip"), batches, strict=True):
            with reference_precision():
                held[name].append(model.encode(images.to(host.device)).cpu())
        held["labels"].append(batches[0][1])
        if len(held["labels"]) == REFERENCE_FILE // REFERENCE_BATCH:
            write()
    if held["labels"]:
        write()
    ReferenceLatents(target).measure(_measured(pictures.number))


def _measured(count: int) -> int:
    return max(2, count * MEASURED // IMAGENET)


def _pictures(folder: Path, side: int, count: int) -> Pictures:
    """Shards, the last of them as the other split, and what is in them as files."""
    shards = write_pictures(folder / "shards", side=side, count=count, shards=SHARDS)
    manifest = Manifest.load(shards)
    whole = ShardDataset(shards, "train")
    files = folder / "files" / "noise"
    files.mkdir(parents=True)
    for index in range(len(whole)):
        (files / f"{whole.key(index)}.jpg").write_bytes(whole.content(index))
    of_split = [manifest.splits["train"].shards[:-1], manifest.splits["train"].shards[-1:]]
    splits = {}
    for name, part in zip(SPLITS, of_split, strict=True):
        samples = sum(shard.samples for shard in part)
        told = {"shards": part, "samples": samples, "class_counts": [samples]}
        splits[name] = manifest.splits["train"].model_copy(update=told)
    manifest.model_copy(update={"splits": splits}).save(shards)
    return Pictures(shards, folder / "files", count)


@torch.inference_mode()
def _parts(pictures: Pictures, model: VisualTokenizer, device: str) -> tuple[float, float]:
    """Seconds per picture of decoding and cropping, and of encoding both ways round."""
    images, count = ShardDataset(pictures.shards, "train"), min(WARMUP, pictures.number // 2)
    decoding, encoding = [], []
    for _ in range(5):
        start = time.perf_counter()
        batch = images.images(range(count), model.image_size)
        decoding.append((time.perf_counter() - start) / count)
        moved = normalise(batch.to(device))
        _wait(device)
        start = time.perf_counter()
        for turned in (moved, moved.flip(3)):
            model.encode(turned)
        _wait(device)
        encoding.append((time.perf_counter() - start) / count)
    return statistics.median(decoding), statistics.median(encoding)


def reading(folder: Path, options: argparse.Namespace) -> None:
    """Latents per second of both readers, in this process."""
    caches = write_caches(
        folder / "latents", SHAPE, count=options.latents, classes=1000, dtype=options.dtype, files=SHARDS
    )
    ours, reference = LatentDataset(caches.ours), ReferenceLatents(caches.reference)
    draws, total = np.random.default_rng(0), options.batches * options.batch

    def read_ours(batches: Sequence[np.ndarray]) -> None:
        for indices in batches:
            _ = ours.rows(indices, draws.random(len(indices)) < 0.5), ours.labels[torch.from_numpy(indices)]

    def read_reference(batches: Sequence[np.ndarray]) -> None:
        for indices in batches:
            default_collate([reference[index] for index in indices.tolist()])

    readers: dict[str, Callable[[Sequence[np.ndarray]], None]] = {"ours": read_ours, "reference": read_reference}
    for read in readers.values():
        read(np.array_split(draws.permutation(len(ours)), -(-len(ours) // options.batch)))  # into the page cache
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds):
        shuffled = [*draws.permutation(len(ours))[:total].reshape(-1, options.batch)]
        for name, read in readers.items():
            start = time.perf_counter()
            read(shuffled)
            times[name].append(time.perf_counter() - start)
    print(f"reading minibatches of {options.batch} among {len(ours):,} latents of {SHAPE}, with labels")
    _print(times, total, f"{options.dtype} to float32, memory-mapped", "float32, one safe_open per sample")


def _print(times: dict[str, list[float]], count: int, ours: str, reference: str) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    for (name, seconds), what in zip(medians.items(), (ours, reference), strict=True):
        line = f"  {name:10}{count / seconds:10,.1f} images/s   {what}"
        if name == "reference":
            line += f"   ours is {seconds / medians['ours']:.2f}x"
        print(line, flush=True)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.latents", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", default="params.yaml:pretrain", metavar="FILE:SECTION")
    parser.add_argument("--count", type=int, default=2000, help="pictures")
    parser.add_argument("--side", type=int, default=500, help="longer side of the pictures")
    parser.add_argument("--tokenizers", nargs="+", choices=("recipe", "thin"), default=("recipe", "thin"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of ours")
    parser.add_argument("--batch-size", type=int, default=64, help="images that ours encodes at once; 256 for a GPU")
    parser.add_argument("--latents", type=int, default=8192, help="images whose latents are read, 200 kB each")
    parser.add_argument("--batch", type=int, default=256, help="latents that are read at once")
    parser.add_argument("--batches", type=int, default=8, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("caching", "reading"), help="one of both")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
