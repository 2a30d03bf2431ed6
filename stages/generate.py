"""Draw latent samples of classes or prompts, with and without guidance; `evaluate_generator` decodes them.

A sample is a function of (seed, index): its noise and its label do not depend on ranks, batches or order. Batches are
shared by ranks, and a killed run goes on with those that are missing. (dopri5 chooses its steps for a whole
batch, so its samples agree within its tolerance only.) Classes without a training picture are not drawn.
"""

import logging
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError, Distinct, Keys, number_name
from vtp.data.latents import LatentShard
from vtp.data.shared_parts import SharedParts
from vtp.data.sized_latents import space_of
from vtp.device import Precision, computing
from vtp.distributed import ranks
from vtp.evaluation.samples import FORMAT_VERSION, Labels, SamplesArtefact, SettingName, draw_labels
from vtp.evaluation.settings import NOISE, RESERVED
from vtp.finite import require_finite
from vtp.flow import SamplerConfig, draw_noise, sample
from vtp.flow.sampler import Interval
from vtp.host import Host
from vtp.inference.asked import Asked, PromptPlaces, Prompts, prompts_of
from vtp.layers.latent_space import LatentSpace
from vtp.models.lightningdit import LightningDiT
from vtp.texts import listed, shown
from vtp.training.parallelize import compile_units


class Sweep(Config):
    """One setting at many strengths of guidance: all combinations, each a setting of its own.

    A scale of 1, at which no interval matters, is drawn once for each shift.
    """

    setting: SettingName = Field(description="the setting whose scale, interval and shift are replaced")
    scales: Annotated[list[float], Distinct] = Field(min_length=1, description="guidance scales of the sweep")
    intervals: Annotated[list[Interval], Distinct] = Field(min_length=1, description="guidance intervals of the sweep")
    shifts: Annotated[list[float], Distinct] = Field(min_length=1, description="timestep shifts of the sweep")

    def settings(self, base: SamplerConfig) -> dict[str, SamplerConfig]:
        """By names that say what varies."""
        settings = {}
        for scale, (start, end), shift in product(self.scales, self.intervals, self.shifts):
            of_scale, of_start, of_end, of_shift = map(number_name, (scale, start, end, shift))
            when = "" if scale == 1 else f"t{of_start}-{of_end}_"
            name = f"w{of_scale}_{when}s{of_shift}".replace(".", "p")
            interval = self.intervals[0] if scale == 1 else (start, end)
            changed = {"guidance_scale": scale, "guidance_interval": interval, "timestep_shift": shift}
            settings[name] = SamplerConfig.parse(base.model_dump() | changed, where=_place_in_sweep)
        return settings


def _place_in_sweep(keys: Keys) -> str:
    lists = {"guidance_scale": "scales", "guidance_interval": "intervals", "timestep_shift": "shifts"}
    return ".".join(["sweep", *(lists.get(str(key), str(key)) for key in keys)])


class DrawnSize(Config):
    """Of the pictures that the samples become."""

    height: int = Field(ge=1, description="height of the pictures in pixels")
    width: int = Field(ge=1, description="width of the pictures in pixels")


class Generate(Config):
    """The section `generate`."""

    seed: int = Field(description="seed of noise and random labels")
    samples: int = Field(ge=1, description="number of samples per setting")
    labels: Labels = Field(description="balanced: classes, or prompts, in turn; random: each by chance")
    size: DrawnSize | None = Field(
        description="size of the pictures; null: the smallest squares among those that the generator learnt"
    )
    prompts: Prompts | None = Field(description="what a generator is asked for that is told captions; null: classes")
    batch_size: int = Field(ge=1, description="samples of every forward pass; a short batch is filled up")
    shard_size: int = Field(ge=1, description="samples per file")
    precision: Precision = Field(description="precision of the generator; states are float32")
    settings: dict[SettingName, SamplerConfig] = Field(min_length=1, description="ways to draw, by name")
    sweep: Sweep | None = Field(description="one of the settings at many strengths; or null")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if taken := sorted(self.settings.keys() & set(RESERVED)):
            raise ValueError(f"settings: {taken[0]!r} is the name of other rows of figures; choose another")
        if self.sweep is not None:
            if self.sweep.setting not in self.settings:
                raise ValueError(
                    f"sweep.setting: {self.sweep.setting!r} is none of settings: {', '.join(self.settings)}"
                )
            swept = self.sweep.settings(self.settings[self.sweep.setting])
            if twice := sorted(swept.keys() & self.settings.keys()):
                raise ValueError(f"settings: {twice[0]!r} is what the sweep calls one of its own; choose another name")
        return self

    @property
    def all_settings(self) -> dict[str, SamplerConfig]:
        """Those of the sweep too."""
        swept = self.sweep.settings(self.settings[self.sweep.setting]) if self.sweep else {}
        return self.settings | swept


@torch.no_grad()
def run(  # noqa: PLR0913 - one flag per path
    config: Generate,
    *,
    generator: Annotated[Input, "folder of train_generator, or one in the official layout"],
    guide: Annotated[
        OptionalInput, "folder of a weaker generator, for settings with guide: generator; default: none"
    ] = None,
    latents: Annotated[
        OptionalInput,
        "folder of cache_latents, for a generator that does not say whose latents it learnt, and for held-out prompts",
    ] = None,
    prompts: Annotated[OptionalInput, "file of prompts, where prompts is {name: file}"] = None,
    captions: Annotated[OptionalInput, "folder of cache_captions, with the features of all prompts"] = None,
    text_encoder: Annotated[OptionalInput, "folder of the text encoder, where no --captions are given"] = None,
    samples: Annotated[Output, "folder for the samples"],
    host: Host,
) -> None:
    """`latents` are those that a generator from elsewhere learnt, whose folder does not say what they mean."""
    model = _load(generator, host)
    space = _space(model, generator, latents if model.config.text is None else None)
    asked = _asked(config, model, space, generator, PromptPlaces(latents, prompts, captions, text_encoder), host)
    if space.untrained and ranks().first:
        names = listed([shown(space.classes[label]) for label in space.untrained])
        logging.warning("%d classes had no training picture and are not drawn: %s", len(space.untrained), names)
    weak, shape = _guide(config, guide, space, host), _shape(config, model, space)
    drawing = _Drawing(config, config.all_settings, space, asked, model, weak, shape, host.device)
    artefact = SamplesArtefact(
        format_version=FORMAT_VERSION,
        encoder=space.encoder,
        classes=asked.names,
        prompts=asked.prompts,
        text_encoder=None if model.text_encoder is None else dict(model.text_encoder),
        samples=config.samples,
        shard_size=config.shard_size,
        labels=config.labels,
        settings=drawing.settings,
    )
    shared = SharedParts(host.folder / "samples", artefact.shards, config.batch_size)
    with host.progress(total=shared.total, description="sampling", unit="sample", done=shared.done) as bar:
        for part in shared.own:
            shared.write(part, drawing.draw(part.shard.split, part.rows))
            bar.update(len(part.rows) * ranks().size)
            if host.stop_seen:
                break

    def finish(shard: LatentShard, latents: Tensor) -> dict[str, Tensor]:
        labels = draw_labels(config.labels, config.seed, shard.rows, asked.labels)
        return {"latents": latents, "labels": labels}

    shared.end(host, finish)
    if ranks().first:
        artefact.write(shared.folder)
        shared.folder.rename(samples)
        host.record(samples=shared.total, classes=len(asked.labels), classes_without_training=len(space.untrained))


class _Drawing(NamedTuple):
    """What draws samples."""

    config: Generate
    settings: dict[str, SamplerConfig]
    space: LatentSpace
    asked: Asked
    model: LightningDiT
    guide: LightningDiT | None
    shape: tuple[int, int, int]  # (d, h, w)
    device: str

    def draw(self, setting: str, rows: range) -> Tensor:
        """The latents [n, d, h, w] of these samples, in the tokenizer's own scale, on the CPU."""
        noise = draw_noise(self.config.seed, rows, self.shape)
        if setting == NOISE:
            return self.space.statistics.denormalise(noise)
        labels = draw_labels(self.config.labels, self.config.seed, rows, self.asked.labels)
        # Always full batches: nothing is compiled for a second size, and a sample is computed alike in all of them.
        filled = torch.arange(self.config.batch_size) % len(rows)
        sampler = self.settings[setting]
        guide = self.guide if sampler.guide == "generator" else None
        condition = self.asked.conditions.of(labels[filled].numpy(), self.device)
        with self._precision():
            drawn = sample(
                self.model,
                noise[filled].to(self.device),
                condition,
                guide_model=guide,
                **sampler.arguments(),
            )
        latents = self.space.statistics.denormalise(drawn[: len(rows)].float()).cpu()
        require_finite(
            latents,
            f"samples of setting {setting} from number {rows.start} on",
            f"see the generator's weights and lower its guidance scale of {sampler.guidance_scale:g}",
        )
        return latents

    def _precision(self) -> AbstractContextManager[object]:
        return computing(self.config.precision, self.device)


def _load(folder: Input, host: Host) -> LightningDiT:
    model = LightningDiT.from_pretrained(folder)
    compile_units(model.compiled_units, host)
    return model.to(host.device).eval()


def _space(model: LightningDiT, folder: Input, latents: OptionalInput) -> LatentSpace:
    """Raises ConfigError when two folders say what the latents mean, or none does."""
    if model.space is None:
        if latents is None:
            raise ConfigError(
                f"{folder}: a generator from elsewhere, whose folder does not say which latents it learnt; give them by "
                "--latents FOLDER on the command, and under its deps"
            )
        return space_of(latents)
    if latents is not None:
        raise ConfigError(f"--latents {latents}: {folder} says itself which latents it learnt; leave --latents out")
    return model.space


def _asked(
    config: Generate, model: LightningDiT, space: LatentSpace, generator: Path, given: PromptPlaces, host: Host
) -> Asked:
    """Raises ConfigError when a generator of classes is given prompts, or one that is told captions is given none."""
    if model.config.text is None:
        others = given._replace(latents=None)
        if config.prompts is not None or any(others):
            raise ConfigError(
                f"{generator} is told classes: set generate.prompts to null, and leave --prompts, --captions and "
                "--text-encoder out"
            )
        return Asked.of_classes(space.classes, space.labels)
    if config.prompts is None:
        raise ConfigError(f"{generator} is told captions: set generate.prompts, such as {{name: held_out, most: null}}")
    return prompts_of(model, generator, config.prompts, given, weights=host.weights, device=host.device)


def _shape(config: Generate, model: LightningDiT, space: LatentSpace) -> tuple[int, int, int]:
    """Of the latents. Raises ConfigError for a size that the generator cannot draw."""
    if config.size is None:
        return model.latent_shape
    if space.pixels_per_latent is None:
        raise ConfigError(
            "generate.size: the generator's folder does not say how many pixels a latent has; train it again, or set null"
        )
    try:
        return model.latents_of((config.size.height, config.size.width), space.pixels_per_latent)
    except ValueError as error:
        raise ConfigError(f"generate.size: {error}") from None


def _guide(config: Generate, folder: OptionalInput, space: LatentSpace, host: Host) -> LightningDiT | None:
    """The weaker generator. Raises ConfigError when one is asked for and not given, or the other way round.

    Raises ArtefactError when it learnt other latents.
    """
    wanted = [name for name, sampler in config.all_settings.items() if sampler.guide == "generator"]
    if wanted and folder is None:
        raise ConfigError(
            f"generate.settings.{wanted[0]}.guide is `generator`: give the weaker one by --guide FOLDER on the command, "
            "and under its deps"
        )
    if folder is None:
        return None
    if not wanted:
        raise ConfigError(
            f"--guide {folder}: no setting has `guide: generator`; choose it for one, or leave --guide out"
        )
    guide = _load(folder, host)
    if guide.space is not None and guide.space.encoder != space.encoder:
        raise ArtefactError(
            f"--guide {folder} learnt the latents of another encoder; give an earlier or smaller generator"
        )
    return guide


if __name__ == "__main__":
    main(run, distributed=True)
