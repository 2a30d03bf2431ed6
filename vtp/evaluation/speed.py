"""How fast a tokenizer encodes and decodes, and in how much memory: measured, so not reproducible."""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vtp.layers.flops import forward_flops
from vtp.models.base import Encoding, Tokenizer


class Rate(NamedTuple):
    """One direction of a tokenizer."""

    images_per_second: float
    flops_per_image: float  # of a forward pass
    peak_device_gigabytes: float | None  # tensors on the GPU, weights included; None on a CPU


class Speed(NamedTuple):
    """Both directions, and what they were measured with."""

    encode: Rate
    decode: Rate
    device: str
    threads: int  # of a CPU
    batch_size: int
    warmup_batches: int
    batches: int
    peak_process_gigabytes: float  # resident memory of the process so far, whatever else it did

    def figures(self) -> dict[str, float | str]:
        """The numbers by name, without those that there are not."""
        rates = {"encode": self.encode, "decode": self.decode}
        measured = {f"{way}_{name}": value for way, rate in rates.items() for name, value in rate._asdict().items()}
        measured |= {name: value for name, value in self._asdict().items() if name not in rates}
        return {name: value for name, value in measured.items() if value is not None}


@torch.inference_mode()
def measure_speed(tokenizer: Tokenizer, images: Tensor, *, warmup: int, batches: int) -> Speed:
    """Encode and decode one batch [B, 3, H, W], on its device, `warmup` times and then `batches` times with the clock.

    The batch lies on the device already: reading and copying are not counted.
    """
    encode = _rate(Encoding(tokenizer), images, warmup, batches)
    decode = _rate(_Decoder(tokenizer), tokenizer.encode(images), warmup, batches)
    name = torch.cuda.get_device_name(images.device) if images.is_cuda else "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Speed(encode, decode, name, torch.get_num_threads(), len(images), warmup, batches, peak)


def _rate(module: nn.Module, given: Tensor, warmup: int, batches: int) -> Rate:
    seconds, peak = _clock(lambda: module(given), given.device, warmup, batches)
    return Rate(len(given) * batches / seconds, forward_flops(module, given[:1]), peak)


def _clock(act: Callable[[], object], device: torch.device, warmup: int, batches: int) -> tuple[float, float | None]:
    """Seconds of `batches` calls, and the peak of the device's memory in GB."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(warmup):
        act()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(batches):
        act()
    wait()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


class _Decoder(nn.Module):
    """The decoder as a module whose operations can be counted, whatever it is made of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, latents: Tensor) -> Tensor:
        return self.tokenizer.decode(latents)
