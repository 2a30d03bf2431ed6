"""What parameters alone show to be wrong between sections that are right by themselves.

Each rule is a function of a `Recipe` that yields problems, a line each; `stages.check` asks them all before anything runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec

from stages.evaluate_generator import EvaluateGenerator
from stages.evaluate_reconstruction import EvaluateReconstruction
from stages.evaluate_understanding import EvaluateUnderstanding
from stages.figures.points import EPOCHS_TO_REACH
from stages.generate import Generate
from stages.plans.recipe import Recipe
from stages.plans.rules_of_sizes import (
    generators_fit_the_latents,
    pictures_to_encode_are_given,
    reference_has_the_size_of_what_is_compared,
)
from stages.prepare_data import PrepareData
from stages.pretrain import Pretrain
from stages.reference import ReferenceStatistics
from stages.runner.pipeline import Use
from stages.summary import Summary
from stages.train_detector import TrainDetector
from stages.train_generator import TrainGenerator
from stages.tune_decoder import TuneDecoder
from vtp.config import Config, number_name
from vtp.curation.ingest.compose import EmbeddedConfig
from vtp.evaluation.convergence import EpochsToReach
from vtp.evaluation.features import AnyFeaturesConfig
from vtp.losses.perceptual import AnyPerceptualConfig
from vtp.models.diffusers_vae import ConvolutionalConfig
from vtp.models.discriminator import FeatureDiscriminatorConfig, PatchDiscriminatorConfig, TokenizerFeaturesConfig
from vtp.models.tokenizer import TokenizerConfig
from vtp.objectives.adversary import AdversaryConfig
from vtp.params import milestone_name
from vtp.training.fit import FlopsLength


def disagreements(configs: Mapping[str, Config], uses: Iterable[Use]) -> list[str]:
    """What is wrong between the sections of a pipeline, and between them and the commands that read them."""
    flags: dict[str, frozenset[str]] = {}
    for use in uses:
        flags[use.section] = flags.get(use.section, frozenset()) | use.flags
    recipe = Recipe(configs, flags)
    return [problem for rule in RULES for problem in rule(recipe)]


def _milestones_are_reached(recipe: Recipe) -> Iterator[str]:
    for name, pretrain in recipe.of(Pretrain):
        if isinstance(length := pretrain.training.length, FlopsLength):
            for milestone in pretrain.monitor.milestones:
                if not isinstance(milestone, str) and milestone > length.flops:
                    yield (
                        f"{name}.monitor.milestones: {milestone_name(milestone)} FLOPs are more than "
                        f"{name}.training.length.flops, {milestone_name(length.flops)}"
                    )


def _pictures_are_not_enlarged(recipe: Recipe) -> Iterator[str]:
    for name, data, own, pretrain in recipe.pairs(PrepareData, Pretrain):
        if (side := data.side) is not None and side < pretrain.tokenizer.image_size:
            yield (
                f"{name}: pictures have image_size {side}, {own}.tokenizer.image_size is "
                f"{pretrain.tokenizer.image_size}: they would be enlarged; write them at that size, or train at theirs"
            )


def _captions_are_there(recipe: Recipe) -> Iterator[str]:
    for name, data, own, pretrain in recipe.pairs(PrepareData, Pretrain):
        missing = getattr(data.source, "caption", "") is None
        if missing and pretrain.objective.weights.clip and pretrain.without_captions == "refuse":
            yield (
                f"{name}.source.caption: null, and {own}.objective.weights.clip is {pretrain.objective.weights.clip:g}; "
                f"give the source captions, or set the weight to 0, or {own}.without_captions to no_clip"
            )


def _probes_have_labels(recipe: Recipe) -> Iterator[str]:
    for name, data, own, pretrain in recipe.pairs(PrepareData, Pretrain):
        if getattr(data.source, "label", "") is None and pretrain.monitor.probe is not None:
            yield (
                f"{name}.source.label: null, and {own}.monitor.probe tells classes apart; set it to null, or name the "
                "column of the classes"
            )


def _samples_have_classes(recipe: Recipe) -> Iterator[str]:
    for name, data, own, evaluation in recipe.pairs(PrepareData, EvaluateGenerator):
        if getattr(data.source, "label", "") is None and evaluation.class_probe is not None:
            yield (
                f"{name}.source.label: null, and {own}.class_probe tells classes apart; set it to null, or name the "
                "column of the classes"
            )


def _prompts_are_for_the_data(recipe: Recipe) -> Iterator[str]:
    for name, understanding, _, data in recipe.pairs(EvaluateUnderstanding, PrepareData):
        if understanding.prompts.name == "openai" and data.source.name == "openmoji":
            yield f"{name}.prompts: openai's are for ImageNet; take {{name: data_set}}"


def _probes_see_whole_patches(recipe: Recipe) -> Iterator[str]:
    for name, understanding, _, pretrain in recipe.pairs(EvaluateUnderstanding, Pretrain):
        side, patch = understanding.probes.size, pretrain.tokenizer.pixels_per_latent
        if side % patch:
            yield f"{name}.probes.size: {side} is no multiple of {patch}, the pixels per latent"


def _probes_read_blocks_that_are_there(recipe: Recipe) -> Iterator[str]:
    for name, understanding, own, pretrain in recipe.pairs(EvaluateUnderstanding, Pretrain):
        if isinstance(pretrain.tokenizer, ConvolutionalConfig):  # latents alone are probed
            continue
        asked, depth = max(understanding.probes.blocks), pretrain.tokenizer.vision.depth
        if asked > depth:
            yield (f"{name}.probes.blocks: {asked}, and {own}.tokenizer.vision.depth is {depth}; take so many or fewer")


def _samples_suffice(recipe: Recipe) -> Iterator[str]:
    for name, evaluation, own, generate in recipe.pairs(EvaluateGenerator, Generate):
        if max(evaluation.counts) > generate.samples:
            yield f"{name}.counts: {max(evaluation.counts)}, {own}.samples is {generate.samples}"


def _reference_has_the_splits(recipe: Recipe) -> Iterator[str]:
    for name, reference in recipe.of(ReferenceStatistics):
        splits = ", ".join(reference.splits)
        readers = [*recipe.of(EvaluateReconstruction), *recipe.of(EvaluateGenerator)]
        asked = [(f"{own}.split", reader.split) for own, reader in readers]
        asked += [(f"{own}.ratio_to", each.ratio_to) for own, each in recipe.of(EvaluateGenerator) if each.ratio_to]
        for place, split in asked:
            if split not in reference.splits:
                yield f"{place}: {split!r} is none of {name}.splits, which has {splits}"


def _reference_keeps_enough(recipe: Recipe) -> Iterator[str]:
    for name, reference, own, evaluation in recipe.pairs(ReferenceStatistics, EvaluateGenerator):
        split = reference.splits.get(evaluation.split)
        if split is not None and split.kept is not None and split.kept < evaluation.compared:
            yield (
                f"{name}.splits.{evaluation.split}.kept: {split.kept}, {own} compares {evaluation.compared} features "
                "or more with those of real images"
            )


def _networks_do_not_score_what_they_trained(recipe: Recipe) -> Iterator[str]:
    training = [each for own, config in recipe.of(Pretrain) for each in _networks_of_pretraining(own, config)]
    training += [each for own, config in recipe.of(TuneDecoder) for each in _networks_of_tuning(own, config)]
    scoring: list[tuple[str, AnyFeaturesConfig | AnyPerceptualConfig]] = [
        (f"{name}.features", each) for name, config in recipe.of(ReferenceStatistics) for each in config.features
    ]
    scoring += [(f"{name}.perceptual", config.perceptual) for name, config in recipe.of(EvaluateReconstruction)]
    for place, network in scoring:
        for own, other in training:
            if _same_network(network, other):
                yield (
                    f"{place}: {network.name} is the network of {own}, and a network is blind to what it trained; "
                    "choose another one, or another seed"
                )


def _networks_of_pretraining(section: str, config: Pretrain) -> Iterator[tuple[str, Config]]:
    """Frozen networks that give gradients, each behind its place."""
    if config.objective.weights.reconstruction:
        objective = config.objective.reconstruction
        if objective.perceptual_weight:
            yield f"{section}.objective.reconstruction.perceptual", objective.perceptual
        yield from _networks_of_adversary(section, config.adversary)


def _networks_of_tuning(section: str, config: TuneDecoder) -> Iterator[tuple[str, Config]]:
    if config.objective.perceptual_weight:
        yield f"{section}.objective.perceptual", config.objective.perceptual
    yield from _networks_of_adversary(section, config.adversary)


def _networks_of_adversary(section: str, adversary: AdversaryConfig | None) -> Iterator[tuple[str, Config]]:
    if adversary is not None and isinstance(adversary.discriminator, FeatureDiscriminatorConfig):
        yield f"{section}.adversary.discriminator.network", adversary.discriminator.network


def _same_network(one: Config, other: Config) -> bool:
    """Whether two records name the same weights; of how many stages, and at which size, does not matter."""
    files = _file_of(one), _file_of(other)
    if any(files):
        return files[0] == files[1]
    return all(getattr(one, key, None) == getattr(other, key, None) for key in ("name", "seed"))


def _file_of(network: Config) -> str | None:
    """What tells a file of weights from others: its digest, or its name where the digest is yet to be filled in."""
    sha256 = getattr(network, "sha256", None)
    return sha256 if sha256 is None or sha256.strip("0") else getattr(network, "weights", None)


def _batches_are_filled(recipe: Recipe) -> Iterator[str]:
    for name, data in recipe.of(PrepareData):
        if not isinstance(source := data.source, EmbeddedConfig):
            continue
        batches = [(f"{own}.data.batch", pretrain.active.pool) for own, pretrain in recipe.of(Pretrain)]
        batches += [(f"{own}.batch_size", tuning.batch_size) for own, tuning in recipe.of(TuneDecoder)]
        for place, size in batches:
            if size > (there := source.samples["train"]):
                yield f"{place}: takes {size} samples, {name}.source has {there} for training; raise train_samples"


def _splits_are_written(recipe: Recipe) -> Iterator[str]:
    for _, data, own, reference in recipe.pairs(PrepareData, ReferenceStatistics):
        for split in reference.splits:
            if isinstance(data.source, EmbeddedConfig) and split not in ("train", "validation"):
                yield f"{own}.splits.{split}: {data.source.name} has train and validation; rename or remove it"


def _detectors_know_the_pictures(recipe: Recipe) -> Iterator[str]:
    for name, data, own, training in recipe.pairs(PrepareData, TrainDetector):
        if any(getattr(data.source, key, None) != getattr(training.source, key) for key in ("classes", "image_size")):
            yield f"{own}.source: has other classes or sizes than {name}.source; write `source: {{base: {name}.source}}`"


def _guided_channels_are_there(recipe: Recipe) -> Iterator[str]:
    for own, pretrain in recipe.of(Pretrain):
        there = pretrain.tokenizer.latent_shape[0]
        of_vit = isinstance(pretrain.tokenizer, TokenizerConfig)
        channels = "vision.feature_bottleneck" if of_vit else "latent_channels"
        for place, sampler in recipe.samplers:
            if isinstance(asked := sampler.guidance_channels, int) and asked > there:
                yield f"{place}.guidance_channels: {asked}, {own}.tokenizer.{channels} is {there}"


def _images_have_patches(recipe: Recipe) -> Iterator[str]:
    for own, pretrain in recipe.of(Pretrain):
        adversaries = [(name, tuning.adversary) for name, tuning in recipe.of(TuneDecoder)]
        for name, adversary in [*adversaries, (own, pretrain.adversary)]:
            record = adversary.discriminator if adversary else None
            side = pretrain.tokenizer.image_size
            if isinstance(record, PatchDiscriminatorConfig) and side < record.least_side:
                yield (
                    f"{name}.adversary.discriminator.depth: {record.depth} layers that halve need {record.least_side} "
                    f"pixels, {own}.tokenizer.image_size is {side}"
                )


def _critics_read_blocks_that_are_there(recipe: Recipe) -> Iterator[str]:
    for name, tuning in recipe.of(TuneDecoder):
        discriminator = tuning.adversary.discriminator if tuning.adversary else None
        if not isinstance(discriminator, FeatureDiscriminatorConfig):
            continue
        if not isinstance(network := discriminator.network, TokenizerFeaturesConfig):
            continue
        place = f"{name}.adversary.discriminator.network"
        for own, pretrain in recipe.of(Pretrain):
            if isinstance(pretrain.tokenizer, ConvolutionalConfig):
                if not recipe.given(name, "--discriminator-features"):
                    yield (
                        f"{place}.name: tokenizer, and {own}.tokenizer is convolutional, which has no features beside its "
                        "latents; choose timm, or a discriminator of patches"
                    )
                continue
            vision = pretrain.tokenizer.vision
            if network.blocks > vision.depth:
                yield f"{place}.blocks: {network.blocks}, {own}.tokenizer.vision.depth is {vision.depth}"
            if (network.image_size or 0) % vision.patch_size:
                yield f"{place}.image_size: {network.image_size} is no multiple of {vision.patch_size}, the patch_size"


def _libraries_are_installed(recipe: Recipe) -> Iterator[str]:
    for name, pretrain in recipe.of(Pretrain):
        if isinstance(pretrain.tokenizer, ConvolutionalConfig) and find_spec("diffusers") is None:
            yield f"{name}.tokenizer.name: convolutional needs the library diffusers: pip install 'vtp[diffusers]'"


def _weaker_generators_are_given(recipe: Recipe) -> Iterator[str]:
    for name, generate in recipe.of(Generate):
        wanted = [setting for setting, sampler in generate.settings.items() if sampler.guide == "generator"]
        if wanted and not recipe.given(name, "--guide"):
            yield (
                f"{name}.settings.{wanted[0]}.guide: generator asks for a weaker one, and the stage's command gives none; "
                "add --guide FOLDER to it, and the folder to its deps, or choose null_class"
            )
        if recipe.given(name, "--guide") and not wanted:
            yield (
                f"{name}.settings: the stage's command gives a --guide, and no setting has `guide: generator`; choose it "
                "for one, or leave --guide out"
            )


def _online_distances_have_a_reference(recipe: Recipe) -> Iterator[str]:
    for name, training in recipe.of(TrainGenerator):
        if training.monitor.fid is not None and not recipe.given(name, "--reference"):
            yield (
                f"{name}.monitor.fid: compares with a reference, and the stage's command gives none; add --reference FOLDER "
                "to it, and the folder to its deps, or set it to null"
            )


def _distances_to_reach_are_asked_for(recipe: Recipe) -> Iterator[str]:
    for own, summary, name, training in recipe.pairs(Summary, TrainGenerator):
        asked = training.monitor.fid.reach if training.monitor.fid else []
        known = [f"{EPOCHS_TO_REACH}{number_name(each)}.{key}" for each in asked for key in EpochsToReach._fields]
        for metric in summary.metrics.values():
            if metric.startswith(EPOCHS_TO_REACH) and metric not in known:
                yield (
                    f"{own}.metrics: {metric!r} is not told by {name}.monitor.fid.reach, which gives "
                    f"{', '.join(known) or 'nothing'}"
                )


RULES = (
    _milestones_are_reached,
    _pictures_are_not_enlarged,
    _captions_are_there,
    _probes_have_labels,
    _samples_have_classes,
    _prompts_are_for_the_data,
    _probes_see_whole_patches,
    _probes_read_blocks_that_are_there,
    _samples_suffice,
    reference_has_the_size_of_what_is_compared,
    _reference_has_the_splits,
    _reference_keeps_enough,
    _networks_do_not_score_what_they_trained,
    _batches_are_filled,
    _splits_are_written,
    _detectors_know_the_pictures,
    generators_fit_the_latents,
    pictures_to_encode_are_given,
    _guided_channels_are_there,
    _images_have_patches,
    _critics_read_blocks_that_are_there,
    _libraries_are_installed,
    _weaker_generators_are_given,
    _online_distances_have_a_reference,
    _distances_to_reach_are_asked_for,
)
