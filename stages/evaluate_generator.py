"""Decode the sampled latents and compare them with real images: gFID, sFID, KID, IS, precision, recall, class accuracy.

Beside the settings stand `noise`, Gaussian noise with the latents' own statistics through the decoder;
`reconstructed`, latents of real images through it, the floor of every distance; `real`, what held-out images score; and
`best`, the setting of the lowest gFID in the first network once more, its guidance beside its figures and not in their
names. Pictures made elsewhere are scored alike. Pixels stream: decoded, looked at, forgotten. Names say which features,
of how many samples, how guided and with which labels, as `gfid_inception_50k_cfg1p5_balanced`; those that end in `_adm`
compare with a reference batch of ADM's evaluation. Precision and recall depend on the number of real features too:
`precision_inception_50k_vs10k_...`.

Samples of prompts are also held against what they were asked (`prompts`), as are reconstructions and real pictures of
held-out captions, which are the ceiling.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from stages.figures.guidance import Guided, draw_guidance
from stages.figures.prompted import FOLDER, write_strip
from stages.runner.run import Input, OptionalInput, OptionalOutput, Output, main
from vtp.artefact import whole_file, write_json
from vtp.config import ConfigError
from vtp.data.latents import LatentDataset
from vtp.data.prompt_files import Prompt
from vtp.data.shards import NO_LABEL
from vtp.data.sized_latents import squares_of
from vtp.distributed import own_rows, ranks
from vtp.evaluation.adm import AdmReference
from vtp.evaluation.class_probe import ClassProbe
from vtp.evaluation.export import ExportConfig, build_writer, check_export
from vtp.evaluation.feature_set import FeatureSets
from vtp.evaluation.features import FeatureExtractor, build_extractors, count_name, extract
from vtp.evaluation.following import JudgePlaces, build_following
from vtp.evaluation.generation import ComparisonConfig, Distance, Judge, Ratio, RealImages
from vtp.evaluation.image_sets import DecodedSamples, ImageSet, Reconstructions, open_given
from vtp.evaluation.prompt_measures import PromptFollowing
from vtp.evaluation.reference import Reference, SplitReference
from vtp.evaluation.samples import Samples
from vtp.evaluation.settings import BEST, REAL, RECONSTRUCTED
from vtp.evaluation.viewing import Viewing, ViewingConfig
from vtp.host import Host
from vtp.inference.grid import grid
from vtp.models.base import Tokenizer
from vtp.models.loading import load_tokenizer
from vtp.texts import write_csv

GIVEN = "given"


class EvaluateGenerator(ComparisonConfig, ViewingConfig):
    """The section `evaluate_generator`."""

    split: str = Field(min_length=1, description="split of the reference that the generator learnt")
    ratio_to: str | None = Field(
        description="split of the reference, held out, whose distances count as 1 in the mean ratio over networks (FDr); "
        "null leaves it out"
    )
    export: ExportConfig = Field(description="form of the decoded samples, where --export asks for them")
    prompts: PromptFollowing | None = Field(description="how far samples show what their prompts say; or null")

    @model_validator(mode="after")
    def _counts_suffice(self) -> Self:
        if min(self.counts) < self.compared:
            raise ValueError(
                f"counts {min(self.counts)} are fewer than the {self.compared} samples that neighbours and "
                "kernel.subset_size need"
            )
        if self.ratio_to == self.split:
            raise ValueError(
                f"ratio_to: {self.split!r} is what is compared with; name a split that is held out, or null"
            )
        return self


class _Scored(NamedTuple):
    """Images that are scored, and what they are called."""

    name: str
    images: ImageSet
    distance: Distance
    drawn: str  # the end of the names of figures
    names: list[str]  # of its labels
    asked: list[Prompt] | None = None  # the prompt of each sample


@torch.inference_mode()
def run(  # noqa: PLR0913 - one flag per path
    config: EvaluateGenerator,
    *,
    tokenizer: Annotated[OptionalInput, "folder of the tokenizer of the sampled latents; not with --given"] = None,
    decoder: Annotated[
        OptionalInput, "folder of a tuned decoder, through which samples are seen; default: the tokenizer's own"
    ] = None,
    samples: Annotated[OptionalInput, "folder of the stage generate; not with --given"] = None,
    latents: Annotated[
        OptionalInput, "folder of cache_latents, whose first images are decoded beside the samples; default: none"
    ] = None,
    given: Annotated[
        OptionalInput, "pictures made elsewhere, in place of samples: a folder, or ADM's npz; default: none"
    ] = None,
    reference: Annotated[Input, "folder of the stage reference, with the features of real images"],
    shards: Annotated[
        OptionalInput, "folder of prepare_data, whose captioned validation pictures are the ceiling of prompts"
    ] = None,
    clip: Annotated[OptionalInput, "folder of the tokenizer whose CLIP prompts.clip_scores may name"] = None,
    detector: Annotated[OptionalInput, "folder of train_detector, which reads composed scenes"] = None,
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
    if given is not None and (tokenizer or decoder or samples or latents):
        raise ConfigError("--given is scored as it is: leave --tokenizer, --decoder, --samples and --latents out")
    known = Reference.load(reference)
    if given is not None:
        opened = open_given(given)
        drawn, side, scored = None, opened.image_size, [_Scored(GIVEN, opened, "gfid", GIVEN, known.classes)]
    elif tokenizer is None or samples is None:
        raise ConfigError("give the command --tokenizer and --samples, or --given with pictures made elsewhere")
    else:
        model = load_tokenizer(tokenizer, decoder).to(host.device)
        model.require_decoder(tokenizer)
        drawn = Samples(samples)
        drawn.require_encoder(model.encoder_digest(), tokenizer)
        scored = _drawn(drawn, model, host)
        side = _side(drawn, model)
        scored += _floor(config, latents, drawn, model, tokenizer, side, host)
    known.require_size(side)
    learnt = known.of(config.split)
    _check(config, known, learnt, scored, drawn)
    _check_export(config, export, scored)
    ratio = None if config.ratio_to is None else Ratio.of(known.of(config.ratio_to).networks, learnt.networks)
    extractors = build_extractors(known.features, weights=host.weights, device=host.device)
    official = None if adm is None else _official(adm, known, extractors, config.batch_size, host)
    judges = {name: _judge(config, extractor, learnt, official) for name, extractor in extractors.items()}
    following = build_following(
        config.prompts,
        drawn,
        [each.images for each in scored],
        JudgePlaces(shards, clip, detector),
        count=max(config.counts),
        side=side,
        host=host,
    )
    if ranks().first:
        pictures.mkdir()
    table = {REAL: _of_real(judges, ratio) | following.of_real(config.batch_size)}
    images = sum(len(each.images) for each in scored)
    with host.progress(total=images, description="decoding", unit="image") as bar:
        for each in scored:
            viewing, writer = Viewing(each.images, config, side=side), None
            if export is not None and each.distance == "gfid":
                writer = build_writer(
                    config.export, export, each.name, image_size=side, scratch=host.folder, prompts=each.asked
                )
            sets = viewing.features(extractors, writer, following.of(each.images), bar.update)
            asked = following.figures(each.images)
            shown = viewing.shown()
            if ranks().first:
                names = [_name(label, each) for label in viewing.pictured]
                what = "Reconstructions" if each.name == RECONSTRUCTED else "Samples"
                kind = "class" if each.asked is None else "prompt"
                grid(shown, names, pictures / f"{each.name}.png", title=f"{what} by {kind}: {each.name}")
                if each.asked is not None:
                    write_strip(shown, names, pictures / FOLDER / each.name)
                table[each.name] = _figures(each, sets, judges, ratio) | asked
    if ranks().first:
        table |= _best(drawn, table, next(iter(judges)), max(config.counts))
        write_json(metrics, {"generation": {name: figures for name, figures in table.items() if figures}})
        draw_guidance(_write_curves(curves, drawn, table), pictures / "guidance.png")
    host.record(samples=images, **following.facts)


def _side(samples: Samples, model: Tokenizer) -> int:
    """Of the pictures that the samples become, in pixels. Raises ConfigError when they are no squares."""
    _, height, width = samples.shape
    if height != width:
        raise ConfigError(
            f"{samples.folder}: latents of {height} x {width}, and squares are compared; set generate.size to one or null"
        )
    return height * model.pixels_per_latent


def _drawn(samples: Samples, model: Tokenizer, host: Host) -> list[_Scored]:
    """Every setting, the baseline among them."""
    scored = []
    for name in samples.settings:
        own = samples.of(name)
        images = DecodedSamples(own, model, host.device)
        drawn = f"{samples.guidance(name)}_{samples.config.labels}"
        scored.append(_Scored(name, images, "gfid", drawn, samples.config.names, own.asked))
    return scored


def _floor(
    config: EvaluateGenerator,
    folder: Path | None,
    drawn: Samples,
    model: Tokenizer,
    tokenizer: Path,
    side: int,
    host: Host,
) -> list[_Scored]:
    """The first of the images that the generator learnt, as the decoder shows them; nothing without their latents.

    Where samples are of prompts, they are the first of the held-out images.
    """
    if folder is None:
        return []
    latents = squares_of(folder) if drawn.config.prompts is None else LatentDataset(folder, "validation")
    latents.require_encoder(model.encoder_digest(), str(tokenizer))
    if latents.config.image_size != side:
        raise ConfigError(
            f"{folder}: latents of squares of {latents.config.image_size} pixels, the samples have {side}; leave --latents "
            "out, or draw at that size"
        )
    images = Reconstructions(latents, max(config.counts), model, host.device)
    return [_Scored(RECONSTRUCTED, images, "rfid", RECONSTRUCTED, latents.classes)]


def _figures(
    scored: _Scored, sets: Sequence[FeatureSets], judges: Mapping[str, Judge], ratio: Ratio | None
) -> dict[str, float]:
    """Of every number of images and every network, by name."""
    table: dict[str, float] = {}
    for networks in sets:
        for name, judge in judges.items():
            table |= judge.figures(networks[name], scored.images.labels, distance=scored.distance, drawn=scored.drawn)
        if ratio is not None:
            table |= ratio.figures(networks, table, scored.distance, scored.drawn)
    return table


def _of_real(judges: Mapping[str, Judge], ratio: Ratio | None) -> dict[str, float]:
    ceilings = {name: value for judge in judges.values() for name, value in judge.ceiling.items()}
    return ceilings | (ratio.real if ratio else {})


def _best(
    drawn: Samples | None, table: Mapping[str, Mapping[str, float]], network: str, count: int
) -> dict[str, dict[str, float]]:
    """The row of the setting whose gFID in that network, of so many samples, is the lowest; names lack its guidance."""
    if drawn is None:
        return {}
    labels = drawn.config.labels
    ends = {name: f"_{sampler.guidance}_{labels}" for name, sampler in drawn.config.settings.items()}
    best = min(ends, key=lambda name: table[name][f"gfid_{network}_{count_name(count)}{ends[name]}"])
    sampler = drawn.config.settings[best]
    figures = {figure.replace(ends[best], f"_{labels}"): value for figure, value in table[best].items()}
    guidance = {"guidance_scale": sampler.guidance_scale, "timestep_shift": sampler.timestep_shift}
    return {BEST: figures | guidance}


def _name(label: int, scored: _Scored) -> str:
    """Of a row of pictures; those made elsewhere may have no labels, or others than the real images."""
    if scored.images.labels is None:
        return GIVEN
    return scored.names[label] if 0 <= label < len(scored.names) else f"class {label}"


def _check(
    config: EvaluateGenerator,
    known: Reference,
    learnt: SplitReference,
    scored: Sequence[_Scored],
    drawn: Samples | None,
) -> None:
    """Raises ConfigError for what a comparison needs and does not have, before anything is decoded."""
    kept = min(len(of.features) for of in learnt.networks.values())
    if kept < config.compared:
        raise ConfigError(
            f"evaluate_generator compares {config.compared} features or more with those of real images, and the "
            f"reference keeps {kept} of {config.split}; raise reference.splits.{config.split}.kept"
        )
    count = min(len(each.images) for each in scored if each.distance == "gfid")
    if count < max(config.counts):
        raise ConfigError(
            f"evaluate_generator.counts asks for {max(config.counts)} samples, there are {count}; raise generate.samples, "
            "or lower it"
        )
    floor = next((len(each.images) for each in scored if each.distance == "rfid"), count)
    if floor < config.compared:
        raise ConfigError(
            f"evaluate_generator compares {config.compared} features or more, and there are {floor} latents of real "
            "images; leave --latents out, or lower neighbours and kernel.subset_size"
        )
    if config.class_probe is not None and drawn is not None and drawn.config.classes != known.classes:
        raise ConfigError(
            f"the classes of the samples are not those of the reference, {len(drawn.config.classes)} and "
            f"{len(known.classes)}; run reference on the data of the latents, or set evaluate_generator.class_probe to null"
        )
    if config.class_probe is not None and (
        kept < 2 or len(known.classes) < 2 or bool((learnt.labels[:kept] == NO_LABEL).any())
    ):
        raise ConfigError(
            f"evaluate_generator.class_probe learns from classes of real images, and the reference keeps none of "
            f"{config.split}; set reference.splits.{config.split}.labelled to true and `kept` to many, or class_probe to "
            "null"
        )


def _check_export(config: EvaluateGenerator, export: Path | None, scored: Sequence[_Scored]) -> None:
    """Raises ConfigError for samples that are not what the form of the files is for."""
    for each in scored if export is not None else ():
        if each.distance == "gfid":
            check_export(config.export, each.asked)


def _judge(
    config: EvaluateGenerator, extractor: FeatureExtractor, learnt: SplitReference, official: RealImages | None
) -> Judge:
    own = learnt.networks[extractor.name]
    reals = [RealImages.of(own)]
    if official is not None and extractor.name == "inception":
        reals.append(official)
    probe = None
    if config.class_probe is not None and ranks().first:
        features = own.features.to(extractor.device)
        probe = ClassProbe.of(features, learnt.labels[: len(features)], config.class_probe)
    return Judge(extractor, reals, probe, config)


def _official(
    path: Path, known: Reference, extractors: Mapping[str, FeatureExtractor], batch_size: int, host: Host
) -> RealImages:
    """A reference batch of ADM's evaluation; its images pass through our network."""
    if "inception" not in extractors:
        raise ConfigError(
            f"--adm {path}: its statistics are those of Inception, reference.features has {', '.join(extractors)}; "
            "add inception there, or leave --adm out"
        )
    batch = AdmReference(path)
    if batch.image_size != known.image_size:
        raise ConfigError(f"--adm {path}: images of {batch.image_size} pixels, the samples have {known.image_size}")
    inception = {"inception": extractors["inception"]}
    networks, numbers = FeatureSets.of(inception), own_rows(-(-batch.count // batch_size))
    with host.progress(total=batch.count, description="ADM's images", unit="image") as bar:
        for images in batch.batches(batch_size, numbers):
            networks.add(extract(inception, images), keep=len(images))
            bar.update(len(images) * ranks().size)
    features = networks.over_ranks()["inception"].features
    return RealImages("_adm", batch.statistics, batch.spatial, features)


def _write_curves(path: Path, samples: Samples | None, table: Mapping[str, Mapping[str, float]]) -> list[Guided]:
    """A row per setting, its guidance beside its figures, whose names need not tell of it here."""
    rows = []
    if samples is not None:
        for name, sampler in samples.config.settings.items():
            end = f"_{sampler.guidance}_{samples.config.labels}"
            figures = {figure.replace(end, ""): value for figure, value in table[name].items()}
            rows.append(Guided(name, sampler, figures))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        names = list(rows[0].cells()) if rows else ["setting", *table[GIVEN]]
        cells = [row.cells() for row in rows] or [{"setting": GIVEN, **table[GIVEN]}]
        write_csv(file, [names, *([row[name] for name in names] for row in cells)])
    return rows


if __name__ == "__main__":
    main(run, distributed=True)
