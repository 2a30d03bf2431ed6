"""Evaluate representation quality: zero-shot classification, linear probes, k-NN (paper 4.2).

Three linear probes, `bottleneck`, `last` and `multi` (`vtp.evaluation.probes`), because their confusion is the most
asked question about these figures. All are chosen on held-out training samples; `linear_probe_multi_best_on_val` is the
official way: the best head and epoch on the validation images that it reports. `_category` marks probes of categories.
A tokenizer has the figures that its kind can have: without text tower, or with one that does not pool, no zero-shot;
without features those of the bottleneck alone. Of data without two classes there is nothing to tell, and the figures say so:
what follows needs none of them. A decoder is no input: a new one redoes none of this.
"""

import logging
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.runner.run import Input, Output, main
from vtp.artefact import write_json
from vtp.config import Config, Distinct, number_name
from vtp.data.dataset import ShardDataset
from vtp.data.imagenet import is_imagenet
from vtp.data.remote import ShardCache
from vtp.data.shards import Manifest
from vtp.device import Precision, computing
from vtp.distributed import ranks
from vtp.evaluation.extraction import Extraction, LabelledSplit, Views
from vtp.evaluation.probes import ProbesConfig, Probing, Row, Tables
from vtp.evaluation.zero_shot import Prompts, PromptsConfig, build_classifier, prompts_of, top_k_accuracy
from vtp.host import Host
from vtp.layers.preprocess import CentreView, Squash
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import VisualTokenizer
from vtp.texts import write_csv


class EvaluateUnderstanding(Config):
    """The section `evaluate_understanding`."""

    batch_size: int = Field(ge=1, description="images of a forward pass")
    precision: Precision = Field(
        description="precision of the forward pass; official: bfloat16. Features are kept in float32, or float16"
    )
    train_samples: int = Field(ge=1, description="labelled training images that the probes see")
    prompts: PromptsConfig
    protocols: Annotated[list[Literal["squash", "centre"]], Distinct] = Field(
        min_length=1, description="what zero-shot sees: squash, the official one; centre, short side and centre crop"
    )
    probes: ProbesConfig
    neighbours: int = Field(ge=1, description="k of the nearest-neighbour classifier")

    @model_validator(mode="after")
    def _neighbours_are_there(self) -> Self:
        if self.neighbours > self.train_samples:
            raise ValueError(f"neighbours {self.neighbours} are more than train_samples {self.train_samples}")
        return self


@torch.no_grad()
def run(
    config: EvaluateUnderstanding,
    *,
    shards: Annotated[Input, "folder of prepare_data; of its pictures those with a class are told apart"],
    tokenizer: Annotated[Input, "folder of the tokenizer"],
    metrics: Annotated[Output, "JSON file for zero-shot, probes and nearest neighbours"],
    curves: Annotated[Output, "CSV file with a row per candidate of every probe"],
    host: Host,
) -> None:
    torch.backends.cudnn.allow_tf32 = False  # figures are those of float32 convolutions
    images = ShardDataset(shards, "train", cache=ShardCache.of(host))
    if (reason := images.manifest.unprobed) is not None:
        if ranks().first:
            logging.warning("%s: nothing is measured; give the source labels to have figures", reason)
            write_json(metrics, {"understanding": {"not_measured": reason}})
            _write([], curves)
        host.record(train_samples=0, validation_samples=0, imagenet=False)
        return
    model = load_tokenizer(tokenizer).to(host.device)
    prompts = _prompts(config, model, images.manifest)  # refused before anything is computed
    train = _labelled(images, config.train_samples)
    validation = _labelled(ShardDataset(shards, "validation", cache=ShardCache.of(host)))
    blocks, view = max(config.probes.blocks), config.probes.view
    extraction = Extraction(model, blocks=blocks, batch_size=config.batch_size, precision=config.precision, host=host)
    size, asked = model.image_size, config.protocols if prompts else ()
    views = Views(
        view, Squash(size) if "squash" in asked else None, CentreView(size, size) if "centre" in asked else None
    )
    of_train = extraction.table("train", train, Views(view))
    tables = Tables(of_train, extraction.table("validation", validation, views))
    groupings = _groupings(images.manifest)
    probing = Probing(config.probes, extraction, train=train, validation=validation, groupings=groupings, host=host)
    multi = probing.multi(tables)
    results = [
        probing.single(tables),
        multi,
    ]  # what the first rank does alone comes last: nobody waits for it in between
    if not ranks().first:
        return
    table = {} if prompts is None else _zero_shot(config, model, prompts, tables, validation.labels)
    for probes in results:
        table |= probes.accuracies
        host.record(**probes.chosen)
    table |= probing.neighbours(tables, config.neighbours)
    write_json(metrics, {"understanding": table | {"chance": 1 / len(images.manifest.classes)}})
    _write([row for probes in results for row in probes.rows], curves)
    counts = {"train_samples": len(train.rows), "validation_samples": len(validation.rows)}
    host.record(**counts, imagenet=is_imagenet(images.manifest.class_ids))


def _labelled(images: ShardDataset, most: int | None = None) -> LabelledSplit:
    singles = images.singles(most)
    return LabelledSplit(images, singles.rows, torch.from_numpy(singles.labels))


def _groupings(manifest: Manifest) -> dict[str, Tensor]:
    """Label of every class, by the suffix of a metric: the class itself, and its category where there are some."""
    labels = {"": torch.arange(len(manifest.classes))}
    if manifest.categories:
        labels["_category"] = torch.tensor(manifest.category_of_class)
    return labels


def _prompts(config: EvaluateUnderstanding, model: Tokenizer, manifest: Manifest) -> Prompts | None:
    """None where nothing can be asked: no text tower makes a vector of a caption."""
    if not isinstance(model, VisualTokenizer) or not model.config.compares_captions:
        return None
    model.tokenize([""])  # refuses another vocabulary
    return prompts_of(config.prompts, manifest)


def _zero_shot(
    config: EvaluateUnderstanding, model: Tokenizer, prompts: Prompts, tables: Tables, labels: Tensor
) -> dict[str, float]:
    """Top 1 and top 5 by protocol."""
    assert isinstance(model, VisualTokenizer)
    device = model.logit_scale.device
    with computing(config.precision, device):
        classifier = build_classifier(
            lambda texts: model.encode_text(model.tokenize(texts).to(device)), prompts.classes, prompts.templates
        )
    accuracies: dict[str, float] = {}
    for protocol in config.protocols:
        accuracy = top_k_accuracy(tables.validation[protocol], classifier.cpu(), labels, ks=(1, 5))
        accuracies |= {f"zero_shot_top{k}_{protocol}": value for k, value in accuracy.items()}
    return accuracies


def _write(rows: list[Row], path: Path) -> None:
    """The candidates of every probe as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(file, [Row._fields])
        for row in rows:
            accuracies = ("" if value is None else f"{value:.6g}" for value in (row.holdout, row.validation))
            write_csv(file, [[row.probe, number_name(row.candidate), *accuracies]])


if __name__ == "__main__":
    main(run, distributed=True)
