"""Time and memory of the Fréchet distance, precision and recall, against torch-fidelity's route and scipy's sqrtm.

    python -m benchmarks.metrics                    # 10,000 and 50,000 features of 2,048 dimensions
    python -m benchmarks.metrics --count 10000
    python -m benchmarks.metrics --only networks    # what a picture's features cost, in networks that need no download

Features are those of no network: positive, skewed, with a spectrum that falls, as Inception's are. Every route runs in a
process of its own; memory is what that process holds at its peak above what it held before it read a feature. Ours
streams them from a file in batches, as a stage does; the others take all at once, which is their interface.

Networks see the same pictures by turns; their times are those of the CPU, which other programs do not lengthen.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp.evaluation.features import (
    AnyFeaturesConfig,
    EfficientNetFeaturesConfig,
    RandomVggFeaturesConfig,
    build_features,
)
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.manifold import precision_recall

DIM, LATENT = 2048, 256
BATCH = 256  # of features that come out of a network at once
NEIGHBOURS = 3
SETS = {"real": (0, 1.0), "generated": (1, 1.05)}  # seed, spread


NETWORKS: list[AnyFeaturesConfig] = [
    RandomVggFeaturesConfig(name="random_vgg16", seed=0),
    *(EfficientNetFeaturesConfig(name="efficientnet_lite0", side=side) for side in (64, 96, 128)),
]
PICTURES, SIDE, ROUNDS = 64, 32, 5


class Measured(NamedTuple):
    """One route in its own process."""

    values: list[float]
    seconds: dict[str, float]  # by phase
    megabytes: float  # at the peak, above what imports take


def write_features(folder: Path, count: int) -> None:
    """Both sets, float32 [count, DIM], without a header."""
    mix = torch.randn(LATENT, DIM, generator=torch.Generator().manual_seed(2))
    mix *= 0.3 * 0.95 ** torch.arange(LATENT)[:, None]
    for name, (seed, spread) in SETS.items():
        draws = torch.Generator().manual_seed(seed)
        with (folder / f"{name}.f32").open("wb") as file:
            for start in range(0, count, 4096):
                latent = spread * torch.randn(min(4096, count - start), LATENT, generator=draws)
                noise = torch.randn(len(latent), DIM, generator=draws)
                file.write((latent @ mix + 0.05 * noise - 0.1).relu().numpy().tobytes())


def _batches(path: Path) -> Iterator[Tensor]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, np.float32, BATCH * DIM)):
            yield torch.from_numpy(values.reshape(-1, DIM))


def _whole(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.float32).reshape(-1, DIM))


class _Clock:
    """Seconds of phases that follow each other."""

    def __init__(self) -> None:
        self._last, self.seconds = time.perf_counter(), dict[str, float]()

    def phase(self, name: str) -> None:
        """What ran since the last phase was this one."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def frechet_ours(folder: Path, clock: _Clock) -> list[float]:
    """Streamed statistics, symmetric eigenproblems."""
    found = []
    for name in SETS:
        statistics = GaussianStatistics(DIM)
        for batch in _batches(folder / f"{name}.f32"):
            statistics.update(batch)
        found.append(statistics)
    clock.phase("statistics")
    distance = frechet_distance(*found)
    clock.phase("distance")
    return [distance]


def frechet_torch_fidelity(folder: Path, clock: _Clock) -> list[float]:
    """Eigenvalues of a product that is not symmetric."""
    from torch_fidelity import metric_fid as reference

    found = [reference.fid_features_to_statistics(_whole(folder / f"{name}.f32")) for name in SETS]
    clock.phase("statistics")
    distance = reference.fid_statistics_to_metric(*found, verbose=False)[reference.KEY_METRIC_FID]
    clock.phase("distance")
    return [distance]


def frechet_sqrtm(folder: Path, clock: _Clock) -> list[float]:
    """As pytorch-fid and ADM's evaluation do it."""
    from scipy import linalg

    sets = []
    for name in SETS:
        features = np.fromfile(folder / f"{name}.f32", np.float32).reshape(-1, DIM)
        sets.append((features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)))
    clock.phase("statistics")
    (mean_a, covariance_a), (mean_b, covariance_b) = sets
    root = np.real(linalg.sqrtm(covariance_a @ covariance_b))
    between = np.square(mean_a - mean_b).sum()
    distance = float(between + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root))
    clock.phase("distance")
    return [distance]


def manifold_ours(folder: Path, clock: _Clock) -> list[float]:
    """In blocks."""
    real, generated = (_whole(folder / f"{name}.f32") for name in SETS)
    clock.phase("reading")
    found = precision_recall(real, generated, neighbours=NEIGHBOURS)
    clock.phase("neighbours")
    return [found.precision, found.recall]


def manifold_torch_fidelity(folder: Path, clock: _Clock) -> list[float]:
    """With matrices of all distances, its default."""
    return _manifold_torch_fidelity(folder, clock, save_cpu_ram=False)


def manifold_torch_fidelity_in_parts(folder: Path, clock: _Clock) -> list[float]:
    """With its switch that saves memory."""
    return _manifold_torch_fidelity(folder, clock, save_cpu_ram=True)


def _manifold_torch_fidelity(folder: Path, clock: _Clock, *, save_cpu_ram: bool) -> list[float]:
    from torch_fidelity import metric_prc as reference

    real, generated = (_whole(folder / f"{name}.f32") for name in SETS)
    clock.phase("reading")
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 10_000, "save_cpu_ram": save_cpu_ram, "verbose": False}
    found = reference.prc_features_to_metric(generated, real, **options)
    clock.phase("neighbours")
    return [found[reference.KEY_METRIC_PRECISION], found[reference.KEY_METRIC_RECALL]]


class Route(NamedTuple):
    """A way to a metric."""

    metric: str
    name: str
    run: Callable[[Path, _Clock], list[float]]


ROUTES = {
    route.run.__name__: route
    for route in (
        Route("Fréchet distance", "ours", frechet_ours),
        Route("Fréchet distance", "torch-fidelity", frechet_torch_fidelity),
        Route("Fréchet distance", "scipy's sqrtm", frechet_sqrtm),
        Route("precision, recall", "ours", manifold_ours),
        Route("precision, recall", "torch-fidelity", manifold_torch_fidelity),
        Route("precision, recall", "torch-fidelity, save_cpu_ram", manifold_torch_fidelity_in_parts),
    )
}


def child(which: str, folder: Path) -> Measured:
    """Run a route here."""
    # Linear algebra allocates and starts its threads at the first call, and libraries are loaded: no part of a route.
    import scipy.linalg  # noqa: F401
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_prc  # noqa: F401

    torch.linalg.eigvalsh(torch.eye(64, dtype=torch.float64))
    np.linalg.eigvals(np.eye(64))
    before, clock = _peak(), _Clock()
    values = ROUTES[which].run(folder, clock)
    return Measured(values, clock.seconds, _peak() - before)


def _peak() -> float:
    """MB that this process has held at most. `getrusage` would count its parent's before the start."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(which: str, folder: Path) -> Measured | None:
    """Start this file again; None when the kernel ended it, as it does when memory is short."""
    command = [sys.executable, "-m", "benchmarks.metrics", "--run", which, str(folder)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode == -9:
        return None
    if process.returncode:
        raise SystemExit(f"{which} ended with {process.returncode}")
    return Measured(**json.loads(process.stdout.splitlines()[-1]))


def main() -> None:
    """Generate, measure, compare, print."""
    options = _options()
    if options.run:
        which, folder = options.run
        print(json.dumps(child(which, Path(folder))._asdict()))
        return
    if options.only != "distances":
        networks()
    for count in options.count if options.only != "networks" else ():
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            write_features(folder, count)
            print(f"{count:,} + {count:,} features of {DIM:,}, {torch.get_num_threads()} threads", flush=True)
            found: dict[str, Measured] = {}  # ours by metric
            for which, route in ROUTES.items():
                if route.name == "torch-fidelity" and route.metric != "Fréchet distance" and count > options.most_whole:
                    print(f"{route.metric:18}{route.name:29}left out: {3 * 4 * count**2 / 1e9:.0f} GB of distances")
                    continue
                measured = measure(which, folder)
                print(_line(route, measured, found.get(route.metric)), flush=True)
                if measured and route.name == "ours":
                    found[route.metric] = measured


def networks() -> None:
    """CPU milliseconds of a picture's features."""
    pictures = torch.randint(256, (PICTURES, 3, SIDE, SIDE), dtype=torch.uint8)
    extractors = [build_features(config, weights=Path(), device="cpu") for config in NETWORKS]
    times: dict[str, list[float]] = {extractor.name: [] for extractor in extractors}
    for _ in range(ROUNDS + 1):
        for extractor in extractors:
            start = time.process_time()
            extractor(pictures)
            times[extractor.name].append(time.process_time() - start)
    print(f"features of pictures of {SIDE} px, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        print(f"{name:24}{1e3 * statistics.median(seconds[1:]) / PICTURES:7.2f} CPU ms a picture", flush=True)


def _line(route: Route, measured: Measured | None, ours: Measured | None) -> str:
    start = f"{route.metric:18}{route.name:29}"
    if measured is None:
        return f"{start}ended by the kernel: not enough memory"
    seconds, values = sum(measured.seconds.values()), ", ".join(f"{value:.10g}" for value in measured.values)
    phases = ", ".join(f"{name} {value:.1f}" for name, value in measured.seconds.items())
    line = f"{start}{seconds:7.1f} s ({phases})  {measured.megabytes:8,.0f} MB   {values}"
    if ours is None:
        return line
    off = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours.values, measured.values, strict=True))
    return (
        f"{line}   ours: {seconds / sum(ours.seconds.values()):.2f}x the speed, "
        f"{ours.megabytes / measured.megabytes:.2f} of the memory, {off:.1e} off"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[10_000, 50_000], help="features of each set")
    parser.add_argument("--only", choices=("networks", "distances"), help="a part; default: both")
    parser.add_argument("--most-whole", type=int, default=20_000, help="above, no matrix of all distances is made")
    parser.add_argument("--folder", type=Path, help="for temporary files; 1 GB")
    parser.add_argument("--run", nargs=2, metavar=("ROUTE", "FEATURES"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
