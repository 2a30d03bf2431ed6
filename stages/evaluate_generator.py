"""Decode the sampled latents and compare them with the training images: gFID, IS, precision, recall.

Beside every setting stands the baseline `noise`: Gaussian noise with the latents' own statistics, through the decoder.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from stages._pictures import grid
from stages._runner import Input, OptionalInput, Output, Work, main
from vtp.artefact import load_tensors, read_json, write_json
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import (
    FeatureExtractor,
    FeaturesConfig,
    InceptionFeaturesConfig,
    build_features,
    count_name,
)
from vtp.evaluation.frechet import GaussianStatistics, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.manifold import precision_recall
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer

SETTINGS = ("unguided", "guided", "noise")


class EvaluateGenerator(Config):
    """The section `evaluate_generator`."""

    features: FeaturesConfig
    batch_size: int = Field(ge=1)
    reference_samples: int = Field(ge=2, description="training images behind the reference statistics")
    neighbours: int = Field(ge=1, description="k of precision and recall")
    pictures_per_class: int = Field(ge=1)
    pictured_classes: int = Field(ge=1)


@torch.inference_mode()
def run(
    config: EvaluateGenerator,
    *,
    shards: Input,
    tokenizer: Input,
    decoder: OptionalInput = None,
    samples: Input,
    metrics: Output,
    pictures: Output,
    work: Work,
) -> None:
    images = ShardDataset(shards, "train", cache=work.cache)
    extractor = build_features(config.features, weights=work.weights, device=work.device)
    model = load_tokenizer(tokenizer, decoder).to(work.device)
    side = model.image_size
    rows = images.singles(config.reference_samples).rows  # class-conditional samples are single pictures
    description = read_json(samples / "config.json")
    pictures.mkdir()
    with work.progress(total=len(rows) + 3 * description["samples"], description="features", unit="image") as bar:
        batches = (images.images(part, side) for part in torch.from_numpy(rows).split(config.batch_size))
        real = _features(extractor, batches, bar.update)
        reference = GaussianStatistics.of(real)
        table: dict[str, dict[str, float]] = {}
        for name in SETTINGS:
            decoded, labels = _decode(model, samples / f"{name}.safetensors", config.batch_size, work.device)
            drawn = _features(extractor, decoded.split(config.batch_size), bar.update)
            table[name] = _compare(config, extractor, drawn, real, reference)
            if isinstance(config.features, InceptionFeaturesConfig):
                score = inception_score(extractor.logits(drawn), splits=config.features.splits)
                table[name][f"is_{extractor.name}_{count_name(len(decoded))}"] = score.mean
            _picture(config, decoded, labels, description["classes"], pictures / f"{name}.png", name)
    write_json(metrics, {"generation": table})


def _features(extractor: FeatureExtractor, batches: Iterable[Tensor], progress: Callable[[int], object]) -> Tensor:
    """Pooled features [N, dim] of all batches, on the CPU."""
    parts = []
    for images in batches:
        parts.append(extractor(images).pooled.cpu())
        progress(len(images))
    return torch.cat(parts)


def _decode(model: Tokenizer, path: Path, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] uint8 and labels [N]."""
    tensors = load_tensors(path)
    parts = [to_uint8(model.decode(part.to(device))).cpu() for part in tensors["latents"].split(batch_size)]
    return torch.cat(parts), tensors["labels"]


def _compare(
    config: EvaluateGenerator,
    extractor: FeatureExtractor,
    drawn: Tensor,
    real: Tensor,
    reference: GaussianStatistics,
) -> dict[str, float]:
    size = f"{extractor.name}_{count_name(len(drawn))}"
    distance = frechet_distance(reference, GaussianStatistics.of(drawn))
    manifold = precision_recall(real[: len(drawn)], drawn, neighbours=config.neighbours)
    return {
        f"gfid_{size}": distance,
        f"precision_{size}": manifold.precision,
        f"recall_{size}": manifold.recall,
    }


def _picture(
    config: EvaluateGenerator, decoded: Tensor, labels: Tensor, classes: list[str], path: Path, name: str
) -> None:
    shown = range(min(config.pictured_classes, len(classes)))
    rows = [decoded[labels == label][: config.pictures_per_class] for label in shown]
    grid(rows, [classes[label] for label in shown], path, title=f"Samples by class: {name}")


if __name__ == "__main__":
    main(run)
