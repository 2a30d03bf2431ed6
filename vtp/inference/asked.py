"""What samples are drawn for: the classes of a generator, or prompts for one that is told captions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError
from vtp.data.captions import CachedCaptions
from vtp.data.conditions import (
    CachedConditions,
    ClassConditions,
    EncodedConditions,
    SampleConditions,
    captions_among,
)
from vtp.data.latents import LatentDataset
from vtp.data.prompt_files import Prompt, PromptForm, read_prompts
from vtp.layers.captions import Captions
from vtp.models.lightningdit import LightningDiT
from vtp.models.text_encoder import (
    CaptionTokens,
    TextEncoder,
    TextEncoderRecord,
    TokenizerText,
    has_text_tower,
    load_text_encoder,
    require_record,
)


class HeldOutPrompts(Config):
    """The captions of the validation latents, each once, in their order."""

    name: Literal["held_out"]
    most: int | None = Field(ge=1, description="the first so many; null: all")


class PromptFile(Config):
    """The file --prompts."""

    name: Literal["file"]
    form: PromptForm = Field(
        description="lines: a prompt a line, UTF-8; geneval: GenEval's JSON lines; dpg: DPG-Bench's CSV file or folder"
    )


Prompts = Annotated[HeldOutPrompts | PromptFile, Field(discriminator="name")]


class PromptPlaces(NamedTuple):
    """Folders and files of the command."""

    latents: Path | None
    prompts: Path | None
    captions: Path | None
    text_encoder: Path | None


class Asked(NamedTuple):
    """What there is to be asked for. A label is a place in `names`, or in `prompts`."""

    names: list[str]  # of classes
    labels: list[int]  # those that are drawn
    conditions: SampleConditions  # by label
    prompts: list[Prompt] | None = None

    @classmethod
    def of_classes(cls, names: list[str], labels: list[int]) -> "Asked":
        """Classes, of which some may not have been trained."""
        return cls(names, labels, ClassConditions(torch.arange(len(names))))

    @classmethod
    def of_prompts(cls, prompts: list[Prompt], encoder: TextEncoder) -> "Asked":
        """Prompts, encoded as they are asked for."""
        texts = [prompt.text for prompt in prompts]

        def encode(tokens: tuple[torch.Tensor, torch.Tensor]) -> Captions:
            return encoder(CaptionTokens(*tokens))

        return cls(
            [], list(range(len(texts))), EncodedConditions(captions_among(texts), encoder.tokenize, encode), prompts
        )


def prompts_of(
    model: LightningDiT,
    who: Path,
    prompts: HeldOutPrompts | PromptFile,
    given: PromptPlaces,
    *,
    weights: Path,
    device: str,
) -> Asked:
    """The prompts that parameters and command name, with the features that `model` learnt to read.

    Raises ConfigError where the command lacks what they need, ArtefactError for features of another encoder.
    """
    asked = _prompts(prompts, given)
    texts = [prompt.text for prompt in asked]
    record = record_of(model, who)
    if given.captions is not None:
        if given.text_encoder is not None:
            raise ConfigError("--captions and --text-encoder: give one of them, features that are there or an encoder")
        cached = CachedCaptions(given.captions)
        found = TextEncoderRecord.parse(cached.config.text_encoder, where=str(given.captions / "config.json"))
        if found.digest != record.digest:
            raise ArtefactError(f"{who} reads the features of another text encoder than that of {given.captions}")
        cached.numbers(texts)  # all are there, before anything is drawn
        return Asked([], list(range(len(texts))), CachedConditions(cached, captions_among(texts)), asked)
    encoder = load_text_encoder(record.encoder, given.text_encoder, weights=weights).to(device)
    require_record(encoder, record, str(who), given.text_encoder)
    return Asked.of_prompts(asked, encoder)


def record_of(model: LightningDiT, who: Path) -> TextEncoderRecord:
    """The text encoder of a generator that is told captions. Raises ArtefactError where its folder does not say it."""
    if model.text_encoder is None:
        raise ArtefactError(f"{who}: no text_encoder.json says whose captions it reads; train_generator writes one")
    return TextEncoderRecord.parse(model.text_encoder, where=f"{who}/text_encoder.json")


def text_encoder_beside(folder: Path, record: TextEncoderRecord, places: list[Path]) -> Path | None:
    """Of the `places` the first that may hold the encoder of a generator's `folder`; None for one of a file.

    Raises ArtefactError when there is none.
    """
    if record.encoder.name == "open_clip":
        return None
    towers = [place for place in places if not isinstance(record.encoder, TokenizerText) or has_text_tower(place)]
    if not towers:
        raise ArtefactError(f"{folder}: no folder `text_encoder` beside it; name the one whose captions it reads")
    return towers[0]


def plain_prompts(texts: Iterable[str]) -> list[Prompt]:
    """Prompts of nobody's benchmark. Raises ValueError for an empty one."""
    given = list(texts)
    if wrong := [text for text in given if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"no prompt {wrong[0]!r}; a prompt is a text that says something")
    return [Prompt(text=text, name=str(number), metadata={}) for number, text in enumerate(given)]


def _prompts(prompts: HeldOutPrompts | PromptFile, given: PromptPlaces) -> list[Prompt]:
    if isinstance(prompts, PromptFile):
        if given.prompts is None:
            raise ConfigError("prompts is {name: file}: give the file by --prompts FILE, and under the deps")
        return read_prompts(given.prompts, prompts.form)
    if given.prompts is not None:
        raise ConfigError(f"--prompts {given.prompts}: prompts is not {{name: file}}; choose that, or leave it out")
    if given.latents is None:
        raise ConfigError("prompts is {name: held_out}: give --latents FOLDER of cache_latents, and under the deps")
    captions = list(dict.fromkeys(text for text in LatentDataset(given.latents, "validation").captions if text.strip()))
    if not captions:
        raise ArtefactError(f"{given.latents}: no validation picture has a caption; give a file of prompts")
    return plain_prompts(captions[: prompts.most])
