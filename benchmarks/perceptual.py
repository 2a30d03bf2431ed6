"""What a perceptual loss does to an autoencoder: random VGG16 beside EfficientNet-Lite0, each judged by the other.

    python -m benchmarks.perceptual                        # three seeds of each, 4,800 samples
    python -m benchmarks.perceptual --samples 9600 --losses vgg efficientnet --pictures out.png

The autoencoder of the recipe is trained by reconstruction alone, on as many samples of the embedded data with every loss,
L1 by itself among them. Held-out pictures are judged by PSNR, and by distance and rFID in EfficientNet-Lite0 and in a VGG16
with other random weights. A figure of the network that trained stands in brackets: it flatters. At equal weights the
distances do not weigh alike beside L1: EfficientNet-Lite0's is some eight times as large. Differences to the first loss are
paired by seed, with the 95 % interval of Student's t. `--pictures` writes the first held-out pictures over what each loss
of the first seed makes of them.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages import prepare_data, pretrain
from stages.runner.environment import LocalHost, Runtime
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import EfficientNetFeaturesConfig, RandomVggFeaturesConfig, build_features
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.intervals import mean_interval
from vtp.evaluation.reconstruction import quality
from vtp.inference.grid import grid
from vtp.layers.images import normalise, to_uint8
from vtp.losses.perceptual import EfficientNetDistanceConfig, RandomVggDistanceConfig, build_perceptual
from vtp.models.loading import load_tokenizer
from vtp.params import load

VGG, EFFICIENTNET, L1 = "vgg", "efficientnet", "l1"
TRAINING = {  # the recipe's, and the five stages that cost as much
    VGG: RandomVggDistanceConfig(name="random_vgg16", seed=0, stages=2),
    EFFICIENTNET: EfficientNetDistanceConfig(name="efficientnet_lite0", side=64, stages=5),
    L1: RandomVggDistanceConfig(name="random_vgg16", seed=0, stages=1),  # of weight 0
}
JUDGES = {  # by the kind of network: distance and features
    "vgg": (
        RandomVggDistanceConfig(name="random_vgg16", seed=1, stages=3),
        RandomVggFeaturesConfig(name="random_vgg16", seed=1),
    ),
    "eff": (TRAINING[EFFICIENTNET], EfficientNetFeaturesConfig(name="efficientnet_lite0", side=64)),
}
FLATTERED = {VGG: ("lpips_vgg", "rfid_vgg"), EFFICIENTNET: ("lpips_eff", "rfid_eff"), L1: ()}
WHERE, SHOWN, BATCH = Path(), 10, 128


class Trained(NamedTuple):
    """A run."""

    figures: dict[str, float]
    pictures: Tensor  # uint8 [SHOWN, 3, S, S]


def main() -> None:
    """Train, judge, compare, print."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        shards = _shards(options, folder)
        found: dict[str, list[Trained]] = {name: [] for name in options.losses}
        for seed in options.seeds:
            for name, runs in found.items():
                runs.append(run(name, seed, options, shards, folder / f"{name}-{seed}"))
                cells = "  ".join(f"{key} {value:.4g}" for key, value in runs[-1].figures.items())
                print(f"seed {seed}  {name:13} {cells}", flush=True)
        figures = {name: [each.figures for each in runs] for name, runs in found.items()}
        for name, of_runs in figures.items():
            print(_line(name, of_runs, figures[options.losses[0]]))
        if options.pictures:
            data = ShardDataset(shards, "validation")
            rows = [data.images(range(SHOWN), data.image(0).width), *(runs[0].pictures for runs in found.values())]
            title = f"held-out pictures, {options.samples:,} samples, seed {options.seeds[0]}"
            grid(rows, ["original", *found], options.pictures, title=title)


def run(name: str, seed: int, options: argparse.Namespace, shards: Path, folder: Path) -> Trained:
    """Train the recipe's autoencoder with one loss, and judge it."""
    folder.mkdir()
    values: dict[str, Any] = load(options.address, pretrain.Pretrain).model_dump()
    values["seed"], values["tokenizer"]["text"] = seed, None
    values["objective"]["weights"] = {"reconstruction": 1.0, "clip": 0.0, "ssl": 0.0}
    loss = {"perceptual": TRAINING[name].model_dump(), "perceptual_weight": options.weight.get(name, float(name != L1))}
    values["objective"]["reconstruction"] |= loss
    values["training"]["length"] = {"name": "samples", "samples": options.samples}
    values["monitor"] |= {"evaluations": 1, "probe": None, "milestones": []}
    config = pretrain.Pretrain.parse(values, where=options.address)
    outputs = ("tokenizer", "state", "milestones", "metrics", "curves", "picture")
    start = time.process_time()  # of the CPU, which other programs do not lengthen
    pretrain.run(config, shards=[shards], **{each: folder / each for each in outputs}, host=_host(folder))
    seconds = time.process_time() - start
    steps = math.ceil(options.samples / config.active.pool)
    return _judged(load_tokenizer(folder / "tokenizer"), shards, {"cpu_ms": 1e3 * seconds / steps})


@torch.inference_mode()
def _judged(model: Any, shards: Path, figures: dict[str, float]) -> Trained:  # noqa: ANN401 - any tokenizer
    data = ShardDataset(shards, "validation")
    originals = data.images(range(len(data)), model.image_size)
    written = torch.cat([to_uint8(model.decode(model.encode(normalise(part)))) for part in originals.split(BATCH)])
    for judge, (distance, features) in JUDGES.items():
        network, extractor = (
            build_perceptual(distance, weights=WHERE),
            build_features(features, weights=WHERE, device="cpu"),
        )
        pairs = zip(originals.split(BATCH), written.split(BATCH), strict=True)
        parts = [quality(*pair, network) for pair in pairs]
        figures |= {
            "psnr": float(torch.cat([part.psnr for part in parts]).mean()),
            f"lpips_{judge}": float(torch.cat([part.perceptual for part in parts]).mean()),
        }
        sets = [GaussianStatistics(extractor.dim), GaussianStatistics(extractor.dim)]
        for statistics_, images in zip(sets, (originals, written), strict=True):
            for part in images.split(BATCH):
                statistics_.update(extractor(part).pooled)
        figures[f"rfid_{judge}"] = frechet_distance(*sets)
    return Trained(figures, written[:SHOWN].clone())


def _line(name: str, runs: Sequence[dict[str, float]], beside: Sequence[dict[str, float]]) -> str:
    cells = []
    for key in runs[0]:
        value = f"{statistics.mean(figures[key] for figures in runs):.4g}"
        if runs is not beside and len(runs) > 1:
            differences = [ours[key] - theirs[key] for ours, theirs in zip(runs, beside, strict=True)]
            of = mean_interval(differences)
            value += f" ({of.estimate:+.3g} +- {(of.high - of.low) / 2:.2g})"
        cells.append(f"{key} [{value}]" if key in FLATTERED[name] else f"{key} {value}")
    return f"{name:13} {'  '.join(cells)}"


def _shards(options: argparse.Namespace, folder: Path) -> Path:
    values: dict[str, Any] = load(options.data, prepare_data.PrepareData).model_dump()
    values["source"] |= {"train_samples": options.different, "validation_samples": options.held_out}
    config = prepare_data.PrepareData.parse(values, where=options.data)
    prepare_data.run(config, shards=folder / "shards", host=_host(folder / "data"))
    return folder / "shards"


def _host(folder: Path) -> LocalHost:
    host = LocalHost(folder / "scratch" / "folder", Path.cwd(), Runtime.of(os.environ))
    host.folder.mkdir(parents=True)
    return host


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="params.yaml:pretrain", help="FILE:SECTION of a pre-training")
    parser.add_argument("--data", default="params.yaml:prepare_data", help="FILE:SECTION of its data")
    parser.add_argument(
        "--losses", nargs="+", choices=TRAINING, default=list(TRAINING), help="the first is held against"
    )
    parser.add_argument(
        "--weight", type=_weight, nargs="+", default=[], help="such as efficientnet=0.1; default: 1, of l1 0"
    )
    parser.add_argument("--samples", type=int, default=4800, help="that each run sees")
    parser.add_argument("--different", type=int, default=4096, help="training pictures")
    parser.add_argument("--held-out", type=int, default=512, help="pictures that are judged")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=Path, help="PNG file for held-out pictures and their reconstructions")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    options = parser.parse_args()
    options.weight = dict(options.weight)
    return options


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


if __name__ == "__main__":
    main()
