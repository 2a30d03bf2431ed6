"""What the representation understands: zero-shot classification, linear probes, nearest neighbours (paper 4.2)."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stages._runner import Input, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.evaluation.linear_probe import LinearProbeConfig, knn_accuracy, linear_probe
from vtp.evaluation.zero_shot import build_classifier, top_k_accuracy
from vtp.layers.images import normalise
from vtp.models.tokenizer import VisualTokenizer


class EvaluateUnderstanding(Config):
    """The section `evaluate_understanding`."""

    batch_size: int = Field(ge=1)
    train_samples: int = Field(ge=1, description="labelled training images that the probes see")
    templates: Annotated[list[str], Field(min_length=1)] | None = Field(
        description="prompts, {} stands for the class; null: those of the data set"
    )
    probe: LinearProbeConfig
    neighbours: int = Field(ge=1, description="k of the nearest-neighbour classifier")


def run(config: EvaluateUnderstanding, *, shards: Input, tokenizer: Input, metrics: Output, work: Work) -> None:
    model = VisualTokenizer.from_pretrained(tokenizer).to(work.device)
    train, validation = (ShardDataset(shards, split, cache=work.cache) for split in ("train", "validation"))
    seen, held_out = train.singles(config.train_samples), validation.singles()
    with work.progress(total=len(seen.rows) + len(held_out.rows), description="features", unit="image") as bar:
        of_train = _features(model, train, seen.rows, config.batch_size, bar.update)
        of_validation = _features(model, validation, held_out.rows, config.batch_size, bar.update)
    manifest = train.manifest
    labels = torch.from_numpy(seen.labels)
    truth = torch.from_numpy(held_out.labels)
    groupings = {"": torch.arange(len(manifest.classes))}
    if manifest.categories:
        groupings["_category"] = torch.tensor(manifest.category_of_class)
    table: dict[str, float] = {}
    if model.config.text is not None:
        with torch.no_grad():
            classifier = build_classifier(
                lambda texts: model.encode_text(model.tokenize(texts).to(work.device)),
                manifest.classes,
                config.templates or manifest.templates or ["{}"],
            )
        accuracy = top_k_accuracy(of_validation["clip"], classifier.cpu(), truth, ks=(1, 5))
        table |= {f"zero_shot_top{k}": value for k, value in accuracy.items()}
    for name in ("bottleneck", "last"):
        for suffix, of_label in groupings.items():
            result = linear_probe(
                of_train[name], of_label[labels], of_validation[name], of_label[truth], config=config.probe
            )
            table[f"linear_probe_{name}{suffix}"] = result.accuracy
    neighbours = knn_accuracy(of_train["last"], labels, of_validation["last"], truth, k=config.neighbours)
    table[f"knn{config.neighbours}_last"] = neighbours
    write_json(metrics, {"understanding": table | {"chance": 1 / len(manifest.classes)}})


@torch.no_grad()
def _features(
    model: VisualTokenizer, images: ShardDataset, rows: np.ndarray, batch_size: int, progress: Callable[[int], object]
) -> dict[str, Tensor]:
    """On the CPU: `last` [N, 2D], class token and mean patch; `bottleneck` [N, d], mean latent; `clip` [N, E]."""
    parts: dict[str, list[Tensor]] = {"last": [], "bottleneck": [], "clip": []}
    for indices in np.split(rows, range(batch_size, len(rows), batch_size)):
        pixels = images.images(indices, model.config.image_size).to(next(model.parameters()).device)
        features = model.features(normalise(pixels))
        mean = features.patches.mean(1)
        parts["last"].append(torch.cat([features.cls, mean], dim=1).cpu())
        parts["bottleneck"].append(model.trunk.feature_bottleneck(mean).cpu())
        if model.config.text is not None:
            parts["clip"].append(model.project_image(features).cpu())
        progress(len(indices))
    return {name: torch.cat(values) for name, values in parts.items() if values}


if __name__ == "__main__":
    main(run)
