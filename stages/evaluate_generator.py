"""Decode the sampled latents and compare them with real images: gFID, sFID, KID, IS, precision, recall.

Beside the settings stands the baseline `noise`: Gaussian noise with the latents' own statistics, through the decoder.
Pixels stream: decoded, looked at, forgotten. Names say which features, of how many samples, how guided and with which
labels, as `gfid_inception_50k_cfg1p5_balanced`; those that end in `_adm` compare with a reference batch of ADM's
evaluation. Precision and recall depend on the number of real features too, and say it: `precision_inception_50k_vs10k_...`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.figures.guidance import Guided, draw_guidance
from stages.runner.run import Input, OptionalInput, OptionalOutput, Output, main
from vtp.artefact import whole_file, write_json
from vtp.config import Config, ConfigError, Distinct
from vtp.distributed import gather_rows, own_rows, ranks
from vtp.evaluation.adm import AdmReference
from vtp.evaluation.export import ExportConfig, SampleWriter, build_writer
from vtp.evaluation.feature_set import FeatureSet
from vtp.evaluation.features import FeatureExtractor, build_features, count_name
from vtp.evaluation.frechet import Gaussian, frechet_distance
from vtp.evaluation.inception_score import inception_score
from vtp.evaluation.kernel_distance import kernel_distance
from vtp.evaluation.manifold import precision_recall
from vtp.evaluation.reference import Reference
from vtp.evaluation.samples import Samples, SettingSamples
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer
from vtp.texts import write_csv


class KernelConfig(Config):
    """Random subsets behind the kernel distance; 100 of 1000 for published numbers."""

    subsets: int = Field(ge=1, description="number of random subsets that are averaged; published: 100")
    subset_size: int = Field(ge=2, description="images of a subset; published: 1000")
    seed: int = Field(ge=0, lt=2**32, description="seed of the choice of subsets")


class EvaluateGenerator(Config):
    """The section `evaluate_generator`."""

    split: str = Field(min_length=1, description="split of the reference that the generator learnt")
    counts: Annotated[list[Annotated[int, Field(ge=2)]], Distinct] = Field(
        min_length=1, description="how many of the samples are compared, the first so many; published: 10000, 50000"
    )
    batch_size: int = Field(ge=1, description="images of a forward pass")
    neighbours: int = Field(ge=1, description="k of precision and recall")
    kernel: KernelConfig | None = Field(description="subsets of the kernel distance (KID); null leaves it out")
    inception_split_size: int = Field(
        ge=1, description="samples of a split of the inception score, where features have classes; published: 5000"
    )
    export: ExportConfig = Field(description="form of the decoded samples, where --export asks for them")
    pictures_per_class: int = Field(ge=1, description="samples that are shown of every class")
    pictured_classes: int = Field(ge=1, description="classes that are shown, the first so many")

    @model_validator(mode="after")
    def _counts_suffice(self) -> Self:
        if min(self.counts) < self.compared:
            raise ValueError(
                f"counts {min(self.counts)} are fewer than the {self.compared} samples that neighbours and "
                "kernel.subset_size need"
            )
        return self

    @property
    def compared(self) -> int:
        """Features of real images, and of samples, that distances between points need at least."""
        return max(self.neighbours + 1, self.kernel.subset_size if self.kernel else 0)


class _Real(NamedTuple):
    """What samples are compared with."""

    suffix: str  # of metric names
    statistics: Gaussian
    spatial: Gaussian | None
    features: Tensor  # [n, D]


@torch.inference_mode()
def run(  # noqa: PLR0913 - one flag per path
    config: EvaluateGenerator,
    *,
    tokenizer: Annotated[Input, "folder of the tokenizer of these latents"],
    decoder: Annotated[
        OptionalInput, "folder of a tuned decoder, through which samples are seen; default: the tokenizer's own"
    ] = None,
    samples: Annotated[Input, "folder of the stage generate"],
    reference: Annotated[Input, "folder of the stage reference, with the features of real images"],
    adm: Annotated[
        OptionalInput, "ADM's file of reference statistics (.npz), to compare with besides; default: none"
    ] = None,
    metrics: Annotated[Output, "JSON file for gFID and the like, by setting"],
    curves: Annotated[Output, "CSV file with a row per setting: its guidance and its figures"],
    pictures: Annotated[Output, "folder for a grid of samples of each setting"],
    export: Annotated[
        OptionalOutput, "folder for the samples as files, in the form that config.export names; default: none"
    ] = None,
    host: Host,
) -> None:
    torch.backends.cudnn.allow_tf32 = False  # figures are those of float32 convolutions
    model = load_tokenizer(tokenizer, decoder).to(host.device)
    model.require_decoder(tokenizer)
    drawn, known = Samples(samples), Reference.load(reference)
    drawn.require_encoder(model.encoder_digest(), tokenizer)
    known.require_size(model.image_size)
    learnt = known.of(config.split)
    extractor = build_features(known.features, weights=host.weights, device=host.device)
    _check(config, extractor, kept=len(learnt.features), count=len(drawn))
    reals = [_Real("", learnt.statistics, learnt.spatial, learnt.features)]
    if adm is not None:
        reals.append(_official(adm, known, extractor, config.batch_size, host))
    if ranks().first:
        pictures.mkdir()
    table: dict[str, dict[str, float]] = {}
    images = len(drawn.settings) * len(drawn)
    with host.progress(total=images, description="decoding", unit="image") as bar:
        for name in drawn.settings:
            decoding = _Decoding(drawn.of(name), model, config)
            writer = None
            if export is not None:
                writer = build_writer(config.export, export, name, image_size=model.image_size, scratch=host.folder)
            sets = decoding.features(extractor, writer, bar.update)
            shown = decoding.shown()
            if ranks().first:
                title = f"Samples by class: {name}"
                names = [drawn.config.classes[label] for label in decoding.pictured]
                grid(shown, names, pictures / f"{name}.png", title=title)
                end = f"{drawn.guidance(name)}_{drawn.config.labels}"
                table[name] = {
                    figure: value
                    for features in sets
                    for figure, value in _figures(config, extractor, features, reals, end).items()
                }
    if ranks().first:
        write_json(metrics, {"generation": table})
        rows = _write_curves(curves, drawn, table)
        draw_guidance(rows, pictures / "guidance.png")
    host.record(samples=images)


class _Decoding:
    """The samples of one setting; ranks share whole batches of them, so that rounding does not depend on their number."""

    def __init__(self, samples: SettingSamples, model: Tokenizer, config: EvaluateGenerator) -> None:
        self._samples = samples
        self._model = model
        self._config = config
        self.pictured = samples.labels.unique()[: config.pictured_classes].tolist()  # labels; not all need be drawn
        self._wanted = [(samples.labels == label).nonzero()[: config.pictures_per_class, 0] for label in self.pictured]
        self._pictured = torch.cat(self._wanted)  # indices
        self._seen = [(torch.empty(0, dtype=torch.long), torch.empty(0, 3, *[model.image_size] * 2, dtype=torch.uint8))]

    def features(
        self, extractor: FeatureExtractor, writer: SampleWriter | None, report: Callable[[int], object]
    ) -> list[FeatureSet]:
        """Of the first samples, one set per count, on every rank; pixels go to `writer` and to the pictures on their way."""
        sets, reported, labels = [FeatureSet.of(extractor) for _ in self._config.counts], 0, self._samples.labels
        batches = torch.arange(len(labels)).split(self._config.batch_size)
        for number in own_rows(len(batches)):
            indices = batches[number]
            first, latents = int(indices[0]), self._samples.latents(int(indices[0]), len(indices))
            decoded = self._model.decode(latents.to(extractor.device))
            images = to_uint8(decoded, f"images of setting {self._samples.setting} from number {first} on")
            extracted = extractor(images)
            for features, count in zip(sets, self._config.counts, strict=True):
                if first < count:
                    features.update(extracted.first(count - first), keep=count - first)
            if writer is not None:
                writer.add(first, images)
            here = torch.isin(indices, self._pictured)
            self._seen.append((indices[here], images.cpu()[here]))
            report(len(images) * ranks().size)
            reported += len(images) * ranks().size
        report(len(labels) - reported)
        if writer is not None:
            writer.finish(labels)
        return [features.over_ranks() for features in sets]

    def shown(self) -> list[Tensor]:
        """The pictured samples [n, 3, S, S] uint8 of every pictured class."""
        indices, images = (gather_rows(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        return [images[torch.isin(indices, wanted)] for wanted in self._wanted]


def _check(config: EvaluateGenerator, extractor: FeatureExtractor, *, kept: int, count: int) -> None:
    """Raises ConfigError for what a distance needs and does not have, before anything is decoded."""
    if kept < config.compared:
        raise ConfigError(
            f"evaluate_generator compares {config.compared} features or more with those of real images, and the "
            f"reference keeps {kept} of {config.split}; raise reference.splits.{config.split}.kept"
        )
    if count < max(config.counts):
        raise ConfigError(
            f"evaluate_generator.counts asks for {max(config.counts)} samples, there are {count}; raise generate.samples, "
            "or lower it"
        )


def _official(path: Path, known: Reference, extractor: FeatureExtractor, batch_size: int, host: Host) -> _Real:
    """A reference batch of ADM's evaluation; its images pass through our network."""
    if extractor.name != "inception":
        raise ConfigError(
            f"--adm {path}: its statistics are those of Inception, reference.features.name is {known.features.name!r}; "
            "set that to inception, or leave --adm out"
        )
    batch = AdmReference(path)
    if batch.image_size != known.image_size:
        raise ConfigError(f"--adm {path}: images of {batch.image_size} pixels, the samples have {known.image_size}")
    features, numbers = FeatureSet.of(extractor), own_rows(-(-batch.count // batch_size))
    with host.progress(total=batch.count, description="ADM's images", unit="image") as bar:
        for images in batch.images(batch_size, numbers):
            features.update(extractor(images), keep=len(images))
            bar.update(len(images) * ranks().size)
    return _Real("_adm", batch.statistics, batch.spatial, features.over_ranks().features)


def _figures(
    config: EvaluateGenerator, extractor: FeatureExtractor, generated: FeatureSet, reals: list[_Real], drawn: str
) -> dict[str, float]:
    """All figures of a set of samples, by name, which ends with how they were drawn."""
    table: dict[str, float] = {}
    samples = f"{extractor.name}_{count_name(generated.count)}"
    if extractor.has_logits:
        logits = extractor.logits(generated.features)
        table[f"is_{samples}_{drawn}"] = inception_score(logits, split_size=config.inception_split_size).mean
    for real in reals:
        table |= _compare(config, extractor, generated, real, samples, drawn + real.suffix)
    return table


def _compare(
    config: EvaluateGenerator,
    extractor: FeatureExtractor,
    generated: FeatureSet,
    real: _Real,
    samples: str,
    drawn: str,
) -> dict[str, float]:
    fake, features = generated.features.to(extractor.device), real.features[: generated.count].to(extractor.device)
    table = {f"gfid_{samples}_{drawn}": frechet_distance(generated.statistics, real.statistics)}
    if generated.spatial is not None and real.spatial is not None:
        table[f"sfid_{samples}_{drawn}"] = frechet_distance(generated.spatial, real.spatial)
    if (kernel := config.kernel) is not None:
        subsets = {"subsets": kernel.subsets, "subset_size": kernel.subset_size, "seed": kernel.seed}
        table[f"kid_{samples}_{drawn}"] = kernel_distance(fake, features, **subsets).mean
    manifold = precision_recall(features, fake, neighbours=config.neighbours)
    against = f"{samples}_vs{count_name(len(features))}_{drawn}"
    return table | {f"precision_{against}": manifold.precision, f"recall_{against}": manifold.recall}


def _write_curves(path: Path, samples: Samples, table: Mapping[str, Mapping[str, float]]) -> list[Guided]:
    """A row per setting, its guidance beside its figures, whose names need not tell of it here."""
    rows = []
    for name, sampler in samples.config.settings.items():
        end = f"_{sampler.guidance}_{samples.config.labels}"
        rows.append(Guided(name, sampler, {figure.replace(end, ""): value for figure, value in table[name].items()}))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        names = list(rows[0].cells())
        write_csv(file, [names, *([cells[name] for name in names] for cells in map(Guided.cells, rows))])
    return rows


if __name__ == "__main__":
    main(run, distributed=True)
