"""What a generator is told, by its record: classes, or captions through a frozen text encoder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from vtp.config import Config, ConfigError
from vtp.data.captions import CachedCaptions
from vtp.data.conditions import (
    CachedConditions,
    CaptionsOf,
    ClassConditions,
    EncodedConditions,
    ImageConditions,
    SampleConditions,
)
from vtp.data.dataset import ShardDataset
from vtp.data.latents import HeldLatents, LatentDataset
from vtp.host import Host
from vtp.layers.captions import Captions, Condition
from vtp.layers.latent_space import LatentSpace
from vtp.models.captions import Reading, TextCondition
from vtp.models.text_encoder import (
    CaptionTokens,
    TextEncoder,
    TextEncoderConfig,
    TextEncoderRecord,
    load_text_encoder,
)

Drawn = Callable[[Sequence[int]], Condition]  # numbers of samples -> what a model is told of them


class ClassCondition(Config):
    """Classes, by a vector for each."""

    name: Literal["classes"]


class CaptionCondition(Config):
    """Captions, as features of the tokens that a frozen text encoder sees."""

    name: Literal["captions"]
    encoder: TextEncoderConfig
    features: Literal["cached", "encoded"] = Field(
        description="cached: those of the folder --captions; encoded: by the encoder of --text-encoder, step by step"
    )
    reading: Reading = Field(
        description="cross_attention: by an attention of its own in every block; joint: as tokens beside the picture's"
    )


AnyCondition = Annotated[ClassCondition | CaptionCondition, Field(discriminator="name")]


class Conditioning(ABC):
    """What all splits of the latents are told alike."""

    text: TextCondition | None = None  # of the model
    record: dict[str, Any] | None = None  # of the text encoder, for the generator's folder

    @abstractmethod
    def of(self, latents: LatentDataset | HeldLatents) -> SampleConditions:
        """Of every sample of a split."""

    @abstractmethod
    def of_images(self, images: ShardDataset) -> SampleConditions:
        """The same of pictures."""

    @abstractmethod
    def drawn(self, space: LatentSpace, validation: LatentDataset | HeldLatents, device: str) -> Drawn:
        """What samples along a training are drawn for."""


class ByClass(Conditioning):
    """Labels. Samples go through the classes that had training pictures."""

    def of(self, latents: LatentDataset | HeldLatents) -> SampleConditions:
        return ClassConditions(latents.labels)

    def of_images(self, images: ShardDataset) -> SampleConditions:
        return ImageConditions(images)

    def drawn(self, space: LatentSpace, validation: LatentDataset | HeldLatents, device: str) -> Drawn:
        labels = space.labels
        return lambda indices: torch.tensor([labels[index % len(labels)] for index in indices], device=device)


class _ByCaption(Conditioning):
    def __init__(self, condition: CaptionCondition, record: dict[str, Any], *, length: int, width: int) -> None:
        self.record = record
        self.text = TextCondition(width=width, length=length, reading=condition.reading)

    @abstractmethod
    def _conditions(self, captions: CaptionsOf) -> SampleConditions: ...

    def of(self, latents: LatentDataset | HeldLatents) -> SampleConditions:
        return self._conditions(latents.captions_of)

    def of_images(self, images: ShardDataset) -> SampleConditions:
        return self._conditions(images.captions_of)

    def drawn(self, space: LatentSpace, validation: LatentDataset | HeldLatents, device: str) -> Drawn:
        """Held-out captions in turn."""
        held_out = self.of(validation)
        return lambda indices: held_out.of(np.asarray(indices) % len(validation), device)


class ByCachedCaption(_ByCaption):
    """Features of a folder of cache_captions. Raises ConfigError when they are of another encoder than the record's."""

    def __init__(self, condition: CaptionCondition, folder: Path) -> None:
        self._cached = CachedCaptions(folder)
        values = self._cached.config
        record = TextEncoderRecord.parse(values.text_encoder, where=str(folder / "config.json"))
        if record.encoder != condition.encoder:
            raise ConfigError(
                f"{folder}: features of the text encoder {record.encoder.model_dump_json()}, and train_generator.model."
                f"condition.encoder is {condition.encoder.model_dump_json()}; run cache_captions with the same"
            )
        super().__init__(condition, values.text_encoder, length=values.length, width=values.width)

    def of(self, latents: LatentDataset | HeldLatents) -> SampleConditions:
        """Raises ArtefactError for a caption without features, before anything is trained."""
        self._cached.numbers(text for text in latents.captions if text.strip())
        return super().of(latents)

    def _conditions(self, captions: CaptionsOf) -> SampleConditions:
        return CachedConditions(self._cached, captions)


class ByEncodedCaption(_ByCaption):
    """Features that are made step by step."""

    def __init__(self, condition: CaptionCondition, encoder: TextEncoder) -> None:
        self._encoder = encoder
        record = encoder.record.model_dump(mode="json")
        super().__init__(condition, record, length=encoder.length, width=encoder.width)

    def _conditions(self, captions: CaptionsOf) -> SampleConditions:
        return EncodedConditions(captions, self._encoder.tokenize, self._encode)

    def _encode(self, told: tuple[torch.Tensor, torch.Tensor]) -> Captions:
        return self._encoder(CaptionTokens(*told))


def build_conditioning(
    condition: ClassCondition | CaptionCondition, *, captions: Path | None, text_encoder: Path | None, host: Host
) -> Conditioning:
    """By the record and the folders of the command. Raises ConfigError when they do not go together."""
    cached = isinstance(condition, CaptionCondition) and condition.features == "cached"
    encoded = isinstance(condition, CaptionCondition) and condition.features == "encoded"
    if captions is not None and not cached:
        raise ConfigError(f"--captions {captions}: condition.features is not `cached`; choose that, or leave it out")
    if text_encoder is not None and not encoded:
        raise ConfigError(
            f"--text-encoder {text_encoder}: condition.features is not `encoded`; choose that, or leave it out"
        )
    if isinstance(condition, ClassCondition):
        return ByClass()
    if encoded:
        encoder = load_text_encoder(condition.encoder, text_encoder, weights=host.weights)
        return ByEncodedCaption(condition, encoder.to(host.device))
    if captions is None:
        raise ConfigError(
            "condition.features is `cached`: give --captions FOLDER of cache_captions, and under the deps"
        )
    return ByCachedCaption(condition, captions)
