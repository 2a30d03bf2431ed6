"""Images per second and core through decoding, views and masks, and the share of a step that waits for data.

    python -m benchmarks.data                                                           # the reference recipe
    python -m benchmarks.data pipelines/vtp/params.L.yaml:pretrain --divide 256 --side 512

Self-supervised views are compared with the same augmentations by torchvision, one view at a time as DINOv2 makes them.
The last line trains: how much of a step is spent waiting, with as many workers as the environment says.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks._pictures import Pictures
from benchmarks.pretrain import _divided, _move, joint
from stages._runtime import Runtime, Work
from stages.pretrain import Pretrain, build_batches
from vtp.config import load
from vtp.data.batches import Share
from vtp.data.masking import draw_masks
from vtp.data.views import SslViewsConfig, clip_batch, ssl_batch
from vtp.draws import numpy_draws
from vtp.training.fit import micro_batches


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(1)
    config = _divided(load(options.address, Pretrain), options.divide)
    pictures = Pictures(options.side)
    images = [pictures.image(index) for index in range(32)]
    places, views = np.arange(32), config.data.ssl_views
    side = views.global_size // config.tokenizer.vision.patch_size
    reference = TorchvisionViews(views)
    rates = {
        "decode": _rate(lambda: [pictures.image(index) for index in range(32)], 32),
        "clip view": _rate(lambda: clip_batch(images, config.data.clip_view, 0, places), 32),
        "ssl views": _rate(lambda: ssl_batch(images, views, 0, places), 32),
        "ssl views, torchvision": _rate(lambda: [reference(image) for image in images], 32),
        "masks": _rate(lambda: draw_masks(64, side, side, config.data.masks, numpy_draws(0, "masks")), 32),
    }
    batches = build_batches(config, pictures, Share(0, 1, 1))  # pyright: ignore[reportArgumentType]
    rates["whole batch"] = _rate(lambda: batches[0], config.active.pool)
    print(f"one core, pictures of {options.side} px, batch {config.active}, torch {torch.__version__}")
    for name, rate in rates.items():
        print(f"{name:26}{rate:12,.1f} images/s")
    print(f"ssl views are {rates['ssl views'] / rates['ssl views, torchvision']:.2f}x torchvision's")
    _waiting(config, pictures, options.steps)


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

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [view(image) for view in self._views]


def _waiting(config: Pretrain, pictures: Pictures, steps: int) -> None:
    work = Work(Path(tempfile.mkdtemp()) / "folder", Path.cwd(), Runtime.of(os.environ))
    torch.set_num_threads(max(1, work.processes))
    batches = build_batches(config, pictures, Share(0, 1, 1))  # pyright: ignore[reportArgumentType]
    stream = micro_batches(batches, range(steps + 2), work)
    micros = [next(stream)]
    step = joint(config, [_move(micros[0], work.device)], work)
    step()
    next(stream)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - before
        step()
    seconds = time.perf_counter() - start
    rate = steps * config.active.pool / seconds
    print(f"training with {work.workers} workers: {rate:,.1f} images/s, {waited / seconds:.1%} of the time waiting")


def _rate(function: Callable[[], object], images: int, seconds: float = 3.0) -> float:
    function()
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        function()
        count += images
    return count / passed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__)
    parser.add_argument("address", nargs="?", default="params.yaml:pretrain", metavar="FILE:SECTION")
    parser.add_argument("--divide", type=int, default=1, help="take this share of the batch, as one of so many devices")
    parser.add_argument("--side", type=int, default=64, help="of the stored pictures, in pixels")
    parser.add_argument("--steps", type=int, default=10, help="of training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
