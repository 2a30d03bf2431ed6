"""What the representation understands: zero-shot classification, linear probes, nearest neighbours (paper 4.2).

Three linear probes, because their confusion is the most asked question about these figures:

    bottleneck    mean of the latents, d channels: the paper's figures 2, 5 and 6
    last          class token and mean patch of the last block
    multi         class tokens of the last blocks with the mean patch, a grid of learning rates: the paper's table 2

Hyper-parameters are chosen on held-out training samples. `linear_probe_multi_best_on_val` is the official way: the best
head and epoch on the validation images that it reports. A decoder is no input: a new one does not redo the probes.
"""

import csv
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from stages._probe_training import AugmentConfig, SgdSolverConfig, augmented_sights, cached_sights
from stages._probing import Extraction, Features, Protocol, View
from stages._runner import Input, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.dataset import ShardDataset, Singles
from vtp.data.shards import Manifest
from vtp.distributed import ranks
from vtp.evaluation.linear_probe import LbfgsConfig, draw_holdout, knn_accuracy, linear_probe, statistics_of
from vtp.evaluation.sgd_probe import SgdConfig, SgdProbe, SgdResult, Split, sgd_probe
from vtp.evaluation.zero_shot import PromptsConfig, build_classifier, prompts_of, top_k_accuracy
from vtp.models.loading import load_tokenizer
from vtp.models.tokenizer import VisualTokenizer


class ProbesConfig(Config):
    """Linear probes on frozen features."""

    seed: int
    holdout: float = Field(gt=0, lt=1, description="share of the training samples that chooses hyper-parameters")
    resize: int = Field(ge=1, description="the short side of an image before its centre is cut; official: 256")
    size: int = Field(ge=1, description="side of that centre, also for k-NN; official: 224")
    single: Annotated[LbfgsConfig | SgdSolverConfig, Field(discriminator="name")] = Field(
        description="how `bottleneck` and `last` are fitted, on standardised features"
    )
    blocks: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1,
        description="of `multi`: class tokens of the last so many blocks, each a feature set; official: 1, 4",
    )
    multi: SgdConfig
    augment: AugmentConfig | None = Field(description="of `multi`: crops anew in every epoch; null: cached features")


class EvaluateUnderstanding(Config):
    """The section `evaluate_understanding`."""

    batch_size: int = Field(ge=1)
    train_samples: int = Field(ge=1, description="labelled training images that the probes see")
    prompts: PromptsConfig
    protocols: list[Protocol] = Field(
        min_length=1, description="what zero-shot sees: squash, the official one; centre, short side and centre crop"
    )
    probes: ProbesConfig
    neighbours: int = Field(ge=1, description="k of the nearest-neighbour classifier")


@torch.inference_mode()
def run(
    config: EvaluateUnderstanding, *, shards: Input, tokenizer: Input, metrics: Output, curves: Output, work: Work
) -> None:
    model = load_tokenizer(tokenizer).to(work.device)
    train, validation = (ShardDataset(shards, split, cache=work.cache) for split in ("train", "validation"))
    prompts = prompts_of(config.prompts, train.manifest)
    seen, held_out = train.singles(config.train_samples), validation.singles()
    probes = config.probes
    view = View(probes.size, probes.resize)
    extraction = Extraction(model, work, batch_size=config.batch_size, blocks=max(probes.blocks), view=view)
    data = _Data(
        extraction.of(train, seen, "train", []),
        extraction.of(validation, held_out, "validation", config.protocols),
        train.manifest,
    )
    multi = _multi(probes, data, extraction, _Source(train, seen), work) if model.has_features else None
    if not ranks().first:
        return
    table: dict[str, float] = {}
    rows: list[_Row] = []
    if extraction.has_text:
        assert isinstance(model, VisualTokenizer)
        classifier = build_classifier(
            lambda texts: model.encode_text(model.tokenize(texts).to(work.device)), prompts.classes, prompts.templates
        ).cpu()
        for protocol in config.protocols:
            of_images = data.validation.tensors[f"clip_{protocol}"]
            accuracy = top_k_accuracy(of_images, classifier, data.validation.labels, ks=(1, 5))
            table |= {f"zero_shot_top{k}_{protocol}": value for k, value in accuracy.items()}
    for variant in ("bottleneck", "last") if model.has_features else ("bottleneck",):
        for suffix, of_label in data.groupings().items():
            name = f"{variant}{suffix}"
            table[f"linear_probe_{name}"], found = _single(probes, data, variant, of_label, work)
            rows += [_Row(name, *row) for row in found]
    if multi is not None:
        table["linear_probe_multi"] = multi.accuracy
        table["linear_probe_multi_best_on_val"] = multi.best_on_test
        rows += [_Row(f"multi, {name}", rate, *values) for (name, rate), values in multi.by_rate.items()]
    space = "last" if model.has_features else "bottleneck"
    table[f"knn{config.neighbours}_{space}"] = knn_accuracy(
        data.train.of(space).to(work.device),
        data.train.labels.to(work.device),
        data.validation.of(space).to(work.device),
        data.validation.labels.to(work.device),
        k=config.neighbours,
    )
    write_json(metrics, {"understanding": table | {"chance": 1 / len(train.manifest.classes)}})
    _write(rows, curves)


class _Data(NamedTuple):
    """Features and labels of both splits."""

    train: Features
    validation: Features
    manifest: Manifest

    def groupings(self) -> dict[str, Tensor]:
        """Label of every class, by the suffix of a metric: the class itself, and its category where there are some."""
        found = {"": torch.arange(len(self.manifest.classes))}
        if self.manifest.categories:
            found["_category"] = torch.tensor(self.manifest.category_of_class)
        return found


class _Source(NamedTuple):
    """Where training images come from when they are cropped anew."""

    images: ShardDataset
    singles: Singles


class _Row(NamedTuple):
    """Of the curves: one candidate of one probe."""

    probe: str
    candidate: float
    holdout: float
    validation: float | None  # None: not computed


def _single(
    config: ProbesConfig, data: _Data, variant: str, of_label: Tensor, work: Work
) -> tuple[float, list[tuple[float, float, float | None]]]:
    """Validation accuracy of a probe on one feature set; candidate, held-out and validation accuracy of all."""
    labels, truth = of_label[data.train.labels], of_label[data.validation.labels]
    train, test = data.train.of(variant), data.validation.of(variant)
    if isinstance(config.single, LbfgsConfig):
        result = linear_probe(
            train.to(work.device),
            labels,
            test.to(work.device),
            truth,
            config=config.single,
            holdout=config.holdout,
            seed=config.seed,
        )
        return result.accuracy, [(l2, accuracy, None) for l2, accuracy in result.holdout_accuracy.items()]
    mean, std = statistics_of(train)
    train, test = (((x - mean) / std).float() for x in (train, test))
    held = draw_holdout(len(train), config.holdout, config.seed)
    probe = SgdProbe(
        {variant: train.shape[1]}, int(of_label.max()) + 1, config.single, seed=config.seed, device=work.device
    )
    sights = cached_sights({variant: train}, labels, held, config.single, seed=config.seed)
    judged, others = Split({variant: train[held]}, labels[held]), Split({variant: test}, truth)
    found = sgd_probe(sights, judged, others, probe=probe, samples=len(labels))
    return found.accuracy, [(rate, *values) for (_, rate), values in found.by_rate.items()]


def _multi(config: ProbesConfig, data: _Data, extraction: Extraction, source: _Source, work: Work) -> SgdResult | None:
    """The grid of heads; on every rank when images are encoded anew, else on the first alone."""
    if config.augment is None and not ranks().first:
        return None
    sets = {f"last {blocks}": blocks for blocks in sorted({min(n, extraction.blocks) for n in config.blocks})}

    def of(features: Features) -> dict[str, Tensor]:
        return {name: features.multi(blocks) for name, blocks in sets.items()}

    train, test = of(data.train), Split(of(data.validation), data.validation.labels)
    held = draw_holdout(len(data.train.labels), config.holdout, config.seed)
    judged = Split({name: x[held] for name, x in train.items()}, data.train.labels[held])
    dims = {name: x.shape[1] for name, x in train.items()}
    probe = SgdProbe(dims, len(data.manifest.classes), config.multi, seed=config.seed, device=work.device)
    if config.augment is None:
        sights = cached_sights(train, data.train.labels, held, config.multi, seed=config.seed)
    else:

        def encode(images: Tensor) -> dict[str, Tensor]:
            return of(Features(torch.empty(0), extraction.encode(images)))

        sights = augmented_sights(
            source.images,
            source.singles,
            held,
            encode,
            solver=config.multi,
            augment=config.augment,
            size=config.size,
            seed=config.seed,
            work=work,
        )
    return sgd_probe(sights, judged, test, probe=probe, samples=len(held))


def _write(rows: list[_Row], path: Path) -> None:
    """The candidates of every probe as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_Row._fields)
        for row in rows:
            writer.writerow(
                ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in row]
            )


if __name__ == "__main__":
    main(run, distributed=True)
