"""How fast a run is: rates, waiting, utilisation, memory. Measured, so not reproducible, and no part of a result."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vtp.distributed import ranks
from vtp.step import StepCost
from vtp.texts import write_csv

# Dense bfloat16 FLOPs per second, by what torch calls the device (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA H200": 9.89e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA H800": 9.89e14,
    "NVIDIA H20": 1.48e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA A100": 3.12e14,
    "NVIDIA A800": 3.12e14,
    "NVIDIA GeForce RTX 4090": 1.65e14,
}


def peak_flops(device: str) -> float | None:
    """FLOPs per second that a device can do at most, from its data sheet; None when unknown."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((flops for prefix, flops in PEAK_FLOPS.items() if name.startswith(prefix)), None)


def memory_bytes(device: str) -> int:
    """Largest memory so far: of the device's tensors, or of this process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Rows of `throughput.csv`, one per interval of a process; a new file begins with every start."""

    def __init__(self, path: Path, cost: StepCost, *, device: str, peak: float | None) -> None:
        self._path = path
        self._cost = cost
        self._device = device
        self._peak = peak or peak_flops(device)
        self._waited = 0.0
        self._steps = 0
        self._since = time.monotonic()
        self._header = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def step(self) -> None:
        """Count one step."""
        self._steps += 1

    def row(self, step: int) -> dict[str, float]:
        """Rates since the last row, over all ranks, as they are also written to the file."""
        seconds = max(1e-9, time.monotonic() - self._since)
        rate = self._steps / seconds
        row = {f"{name}_images_per_second": count * rate for name, count in self._cost.samples.items() if count}
        row |= {
            "tokens_per_second": self._cost.tokens * rate,
            "seconds_per_step": 1 / rate if rate else 0.0,
            "data_wait_share": self._waited / seconds,
            "flops_so_far": self._cost.flops * step,
            "flops_per_second": self._cost.flops * rate,
            "memory_gigabytes": memory_bytes(self._device) / 1e9,
        }
        if self._peak:
            row["model_flops_utilisation"] = self._cost.flops * rate / (self._peak * ranks().size)
        self._waited, self._steps, self._since = 0.0, 0, time.monotonic()
        if ranks().first:
            with self._path.open("w" if self._header else "a", newline="", encoding="utf-8") as file:
                write_csv(file, [["step", *row]] if self._header else [])
                write_csv(file, [[step, *(f"{value:.6g}" for value in row.values())]])
        self._header = False
        return row
