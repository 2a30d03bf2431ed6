"""What samples are drawn for: the classes of a generator, or prompts for one that is told captions."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError
from vtp.data.captions import CachedCaptions
from vtp.data.conditions import CachedConditions, ClassConditions, Conditions, EncodedConditions
from vtp.data.latents import LatentDataset
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
    form: Literal["lines"] = Field(description="lines: a prompt a line, UTF-8")


Prompts = Annotated[HeldOutPrompts | PromptFile, Field(discriminator="name")]


class PromptPlaces(NamedTuple):
    """Folders and files of the command."""

    latents: Path | None
    prompts: Path | None
    captions: Path | None
    text_encoder: Path | None


class Asked(NamedTuple):
    """What there is to be asked for. A label is a place in `names`."""

    names: list[str]  # of classes, or prompts
    labels: list[int]  # those that are drawn
    conditions: Conditions  # by label

    @classmethod
    def of_classes(cls, names: list[str], labels: list[int]) -> "Asked":
        """Classes, of which some may not have been trained."""
        return cls(names, labels, ClassConditions(torch.arange(len(names))))

    @classmethod
    def of_prompts(cls, prompts: list[str], encoder: TextEncoder) -> "Asked":
        """Prompts, encoded as they are asked for."""

        def encode(tokens: tuple[torch.Tensor, torch.Tensor]) -> Captions:
            return encoder(CaptionTokens(*tokens))

        return cls(prompts, list(range(len(prompts))), EncodedConditions(prompts, encoder.tokenize, encode))


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
    texts = _texts(prompts, given)
    record = record_of(model, who)
    if given.captions is not None:
        if given.text_encoder is not None:
            raise ConfigError("--captions and --text-encoder: give one of them, features that are there or an encoder")
        cached = CachedCaptions(given.captions)
        found = TextEncoderRecord.parse(cached.config.text_encoder, where=str(given.captions / "config.json"))
        if found.digest != record.digest:
            raise ArtefactError(f"{who} reads the features of another text encoder than that of {given.captions}")
        return Asked(texts, list(range(len(texts))), CachedConditions(cached, texts))
    encoder = load_text_encoder(record.encoder, given.text_encoder, weights=weights).to(device)
    require_record(encoder, record, str(who), given.text_encoder)
    return Asked.of_prompts(texts, encoder)


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


def read_lines(path: Path) -> list[str]:
    """A prompt a line; empty lines are none. Raises ArtefactError for a file that is no such text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ArtefactError(f"{path}: no prompts; write one a line")
    return prompts


def _texts(prompts: HeldOutPrompts | PromptFile, given: PromptPlaces) -> list[str]:
    if isinstance(prompts, PromptFile):
        if given.prompts is None:
            raise ConfigError("prompts is {name: file}: give the file by --prompts FILE, and under the deps")
        return read_lines(given.prompts)
    if given.prompts is not None:
        raise ConfigError(f"--prompts {given.prompts}: prompts is not {{name: file}}; choose that, or leave it out")
    if given.latents is None:
        raise ConfigError("prompts is {name: held_out}: give --latents FOLDER of cache_latents, and under the deps")
    captions = list(dict.fromkeys(text for text in LatentDataset(given.latents, "validation").captions if text.strip()))
    if not captions:
        raise ArtefactError(f"{given.latents}: no validation picture has a caption; give a file of prompts")
    return captions[: prompts.most]
