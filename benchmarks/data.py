"""Images per second and core from shards to batches, against a plain loader, and the share of a step that waits for data.

    python -m benchmarks.data                                                           # the reference recipe
    python -m benchmarks.data pipelines/overlays/sizes/L.yaml:pretrain --divide 256 --side 512

The plain loader is what one would first write: webdataset reads the same shards, torchvision makes the same views, one
PIL image at a time as DINOv2 does, of the same share of the samples. `colours on the device` is what is left for a worker
when a GPU changes the colours. The parts say what bounds the loader. The training says how much of a step is spent
waiting, with as many workers as the environment says. Then the files alone, without decoding: ours beside webdataset and
litdata, on local files and as two machines on a slow store (`--machines` for these alone; benchmarks/_machines.py).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks._machines import compare
from benchmarks._pictures import stream_of, write_pictures
from benchmarks.pretrain import _divided, _move, joint
from stages.pretrain import Pretrain, build_batches
from stages.runner.environment import LocalHost, Runtime
from vtp.data.batches import RankSlice
from vtp.data.loader import load_batches
from vtp.data.masking import draw_masks
from vtp.data.stream import Stream
from vtp.data.views import SslViewsConfig, clip_batch, recolour, ssl_views
from vtp.draws import numpy_draws
from vtp.layers.decode import decode_rgb
from vtp.models.text import CaptionTokenizer
from vtp.params import load

COUNT = 32  # images in the measurement of a part


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(1)
    if not options.machines:
        _pictures(options)
    with tempfile.TemporaryDirectory() as folder:
        for line in compare(Path(folder)):
            print(line, flush=True)


def _pictures(options: argparse.Namespace) -> None:
    config = _divided(load(options.address, Pretrain), options.divide)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_pictures(Path(folder) / "shards", side=options.side, count=max(2048, 2 * config.active.pool))
        stream = stream_of(shards, config.data.stream)
        print(f"one core, JPEGs of {options.side} px, batch {config.active}, torch {torch.__version__}")
        _loaders(config, stream, shards, options.seconds)
        _parts(config, stream, options.seconds)
        if options.steps:
            _waiting(config, stream, options.steps)


def _loaders(config: Pretrain, stream: Stream, shards: Path, seconds: float) -> None:
    pool, alone = config.active.pool, RankSlice(0, 1, 1)
    ours, later = (build_batches(config, stream, alone, colour_later=flag) for flag in (False, True))
    steps, theirs = iter(range(10**9)), PlainLoader(config, shards)
    rates = _rates(
        {
            "plain loader": lambda: next(theirs),
            "ours": lambda: ours[next(steps)],
            "ours, colours on the device": lambda: later[next(steps)],
        },
        pool,
        seconds,
    )
    for name, rate in rates.items():
        print(f"{name:30}{rate:10,.1f} images/s   {rate / rates['plain loader']:.2f}x")


def _parts(config: Pretrain, stream: Stream, seconds: float) -> None:
    """What one batch takes, part by part, and which part is the largest."""
    source, places, views = stream.sources[0], np.arange(COUNT), config.data.ssl_views
    contents = [source.content(index) for index in range(COUNT)]
    images = [decode_rgb(content) for content in contents]
    crops = ssl_views(images, views, 0, places)
    side = views.global_size // config.vit.vision.patch_size
    side = config.data.clip_view.size
    least = (side, side)
    tokenize = CaptionTokenizer(config.vit.text) if config.vit.text else None
    active = config.active
    parts: dict[str, tuple[float, Callable[[], object]]] = {
        "read": (1, lambda: [source.content(index) for index in range(COUNT)]),
        "decode": (1, lambda: [decode_rgb(content) for content in contents]),
        "clip view": (active.clip / active.pool, lambda: clip_batch(images, config.data.clip_view, 0, places)),
        "ssl crops": (active.ssl / active.pool, lambda: ssl_views(images, views, 0, places)),
        "ssl colours": (active.ssl / active.pool, lambda: recolour(crops, views)),
        "masks": (
            active.ssl / active.pool,
            lambda: draw_masks(2 * COUNT, side, side, config.data.masks, numpy_draws(0, "masks")),
        ),
    }
    if tokenize is not None:
        captions = [source.caption(index) for index in range(COUNT)]
        parts["tokens"] = (active.clip / active.pool, lambda: tokenize(captions))
    rates = _rates({name: run for name, (_, run) in parts.items()}, COUNT, seconds / 3)
    times = {name: share / rates[name] for name, (share, _) in parts.items()}
    for name, rate in rates.items():
        print(f"  {name:28}{rate:10,.1f} images/s   {times[name] / sum(times.values()):.0%} of a batch")
    draft = _rates({"": lambda: [decode_rgb(content, least=least) for content in contents]}, COUNT, seconds / 3)[""]
    print(f"  decode to {least[0]} px at least   {draft:10,.1f} images/s")
    print(f"bound by: {max(times, key=lambda name: times[name])}")


class PlainLoader:
    """webdataset and torchvision, one image at a time; batches of the joint objective without end."""

    def __init__(self, config: Pretrain, shards: Path) -> None:
        self.config = config
        self._views = TorchvisionViews(config.data.ssl_views)
        self._clip = v2.Compose(
            [
                v2.RandomResizedCrop(
                    config.data.clip_view.size,
                    scale=(config.data.clip_view.scale_min, 1.0),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.PILToTensor(),
            ]
        )
        self._tokenize = CaptionTokenizer(config.vit.text) if config.vit.text else None
        urls = [str(path) for path in sorted(shards.glob("*.tar"))]
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(512).decode("pil").repeat()
        self._samples: Iterator[tuple[Image.Image, str]] = iter(dataset.to_tuple("jpg", "txt"))

    def __next__(self) -> tuple[Tensor, Tensor, list[list[Tensor]], Tensor]:
        active, data = self.config.active, self.config.data
        side = data.ssl_views.global_size // self.config.vit.vision.patch_size
        images, captions, views = [], [], []
        for parallelize in range(active.pool):
            image, caption = next(self._samples)
            images.append(self._clip(image))
            captions.append(caption)
            if parallelize < active.ssl:
                views.append(self._views(image))
        stacked = [torch.stack(view) for view in zip(*views, strict=True)]
        masks = draw_masks(2 * active.ssl, side, side, data.masks, numpy_draws(0, "masks"))
        tokens = self._tokenize(captions) if self._tokenize else torch.empty(0)
        return torch.stack(images), tokens, [stacked], masks


class TorchvisionViews:
    """DINOv2's multi-crop, one PIL image at a time."""

    def __init__(self, config: SslViewsConfig) -> None:
        jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)

        def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
            kernel = 2 * round(2 * config.blur_sigma_max) + 1
            return v2.Compose(
                [
                    v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
                    v2.RandomHorizontalFlip(config.flip),
                    v2.RandomApply([jitter], config.jitter),
                    v2.RandomGrayscale(config.grey),
                    v2.RandomApply([v2.GaussianBlur(kernel, (0.1, config.blur_sigma_max))], blur),
                    v2.RandomSolarize(128, solarize),
                    v2.PILToTensor(),
                ]
            )

        whole, part = (config.global_scale_min, 1.0), (config.local_scale_min, config.local_scale_max)
        self._views = [
            view(config.global_size, whole, config.blur.first, 0.0),
            view(config.global_size, whole, config.blur.second, config.solarize),
            *(view(config.local_size, part, config.blur.local, 0.0) for _ in range(config.local_views)),
        ]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self._views]


def _waiting(config: Pretrain, stream: Stream, steps: int) -> None:
    host = LocalHost(Path(tempfile.mkdtemp()) / "folder", Path.cwd(), Runtime.of(os.environ))
    torch.set_num_threads(max(1, host.processes))
    batches = build_batches(config, stream, RankSlice(0, 1, 1), colour_later=host.device != "cpu")
    loaded = load_batches(batches, range(steps + 2), host)
    micro_batches = [next(loaded)]
    step = joint(config, [_move(micro_batches[0], host.device)], host)
    step()
    next(loaded)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(loaded)
        waited += time.perf_counter() - before
        step()
    seconds = time.perf_counter() - start
    rate = steps * config.active.pool / seconds
    print(f"training with {host.workers} workers: {rate:,.1f} images/s, {waited / seconds:.1%} of the time waiting")


def _rates(functions: dict[str, Callable[[], object]], images: int, seconds: float) -> dict[str, float]:
    """Images per second of each, in turns, so that a busy moment meets all of them."""
    spent, counts = dict.fromkeys(functions, 0.0), dict.fromkeys(functions, 0)
    for function in functions.values():
        function()
    while left := [name for name in functions if spent[name] < seconds]:
        for name in left:
            function, start = functions[name], time.process_time()
            function()
            spent[name] += time.process_time() - start
            counts[name] += images
    return {name: counts[name] / spent[name] for name in functions}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__)
    parser.add_argument("address", nargs="?", default="params.yaml:pretrain", metavar="FILE:SECTION")
    parser.add_argument("--divide", type=int, default=1, help="take this share of the batch, as one of so many devices")
    parser.add_argument("--side", type=int, default=64, help="longer side of the stored pictures, in pixels")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring each loader")
    parser.add_argument(
        "--machines", action="store_true", help="only files without decoding, local and of a slow store"
    )
    parser.add_argument("--steps", type=int, default=10, help="of training; 0: none")
    return parser.parse_args()


if __name__ == "__main__":
    main()
