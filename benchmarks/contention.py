"""Steps per second beside busy processes, for ways in which the threads of OpenMP can wait for each other.

    python -m benchmarks.contention                          # a loop of small layers
    python -m benchmarks.contention params.yaml:pretrain     # the joint step of a recipe

Each way runs in processes of its own (libgomp reads its settings when it is loaded), on a quiet machine and beside
`--busy` processes that compute without an end. Rounds alternate, and medians are printed. CPU only.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A thread of libgomp that waits looks so many times, some 100,000 in a millisecond, before it sleeps.
WAYS = {
    "300,000 (libgomp's own)": {"GOMP_SPINCOUNT": "300000"},
    "100,000": {"GOMP_SPINCOUNT": "100000"},
    "10,000": {"GOMP_SPINCOUNT": "10000"},
    "1,000": {"GOMP_SPINCOUNT": "1000"},
    "none (PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.measure:
        print(_rate(_recipe(options.address) if options.address else _small_layers(), options.seconds))
        return
    rates: dict[tuple[str, int], list[float]] = {(way, busy): [] for way in WAYS for busy in (0, options.busy)}
    for _ in range(options.rounds):
        for (way, busy), values in rates.items():
            with _busy(busy):
                values.append(_measure(WAYS[way], options))
    print(f"{os.cpu_count()} cores, {options.address or 'small layers'}; median steps/s of {options.rounds} rounds")
    print(f"{'spins':26}{'quiet':>10}{f'beside {options.busy} busy':>18}")
    for way in WAYS:
        quiet, contended = (statistics.median(rates[way, busy]) for busy in (0, options.busy))
        print(f"{way:26}{quiet:10.2f}{contended:18.2f}")


def _measure(way: dict[str, str], options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.contention", *([options.address] if options.address else [])]
    command += ["--measure", f"--seconds={options.seconds}"]
    return float(subprocess.run(command, env=os.environ | way, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _rate(step: Callable[[], object], seconds: float) -> float:
    """Steps per second, over at least so many seconds and one step."""
    step()
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return steps / (time.perf_counter() - start)


def _small_layers() -> Callable[[], object]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(192, 192), nn.LayerNorm(192), nn.GELU())))
    inputs = torch.randn(512, 192)

    return lambda: layers(inputs).square().mean().backward()


def _recipe(address: str) -> Callable[[], object]:
    from benchmarks._pictures import stream_of, write_pictures
    from benchmarks.pretrain import joint
    from stages.pretrain import Pretrain, build_batches
    from stages.runner.environment import LocalHost, Runtime
    from vtp.data.batches import RankSlice
    from vtp.params import load

    config, folder = load(address, Pretrain), Path(tempfile.mkdtemp())
    shards = write_pictures(folder / "shards", side=2 * config.tokenizer.image_size, count=config.active.pool)
    batches = build_batches(config, stream_of(shards, config.data.stream), RankSlice(0, 1, 1))
    return joint(config, [batches[0]], LocalHost(folder / "run", Path.cwd(), Runtime.of(os.environ)))


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.contention", description=__doc__)
    parser.add_argument("address", nargs="?", metavar="FILE:SECTION", help="a recipe's joint step, not small layers")
    parser.add_argument("--busy", type=int, default=2, help="processes that compute beside")
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="print the rate in this process, as it is")
    return parser.parse_args()


if __name__ == "__main__":
    main()
