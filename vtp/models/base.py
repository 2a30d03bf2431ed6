"""What every tokenizer offers, whoever trained it: latents and back, and features when its encoder has some.

The stages behind the tokenizer know no more than this, so that tokenizers which were not trained here are tuned, cached,
probed and compared in the same way.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp.artefact import ArtefactError
from vtp.layers.images import from_pil, to_pil
from vtp.models.vit import Features

if TYPE_CHECKING:
    from PIL.Image import Image


LARGEST_SIDE = 16_384  # of images, in pixels: no weights tell of it


class LatentDecoder(nn.Module, ABC):
    """Latents [B, d, h, w] to images [B, 3, H, W] in ImageNet-normalised space, not clamped."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Module:
        """The layer whose gradient balances losses (`weight`)."""

    @property
    @abstractmethod
    def upscale(self) -> int:
        """Side in pixels of what it makes of a latent."""

    @abstractmethod
    def architecture(self) -> Mapping[str, Any]:
        """What it is built from, as JSON: the `name` of its kind and its arguments (`vtp.models.loading`)."""


class MissingDecoder(LatentDecoder):
    """In the place of a decoder that was not published; whoever asks anything of it gets an ArtefactError."""

    @property
    def last_layer(self) -> nn.Module:
        raise self._error()

    @property
    def upscale(self) -> int:
        raise self._error()

    def architecture(self) -> Mapping[str, Any]:
        raise self._error()

    def forward(self, latents: Tensor) -> Tensor:
        raise self._error()

    @staticmethod
    def _error() -> ArtefactError:
        return ArtefactError(
            "this tokenizer was published without a pixel decoder (train_reconstruction: false); pre-train from it with "
            "--init-from, which makes one. Its latents and features need none"
        )


class Tokenizer(nn.Module, ABC):
    """Images [B, 3, H, W] in ImageNet-normalised space to latents [B, d, h, w] and back."""

    pixel_decoder: Any  # a LatentDecoder: the part that decoder tuning trains
    has_features: bool  # whether `features` and `intermediate_features` can be asked for

    @property
    def num_blocks(self) -> int:
        """Blocks of the encoder that have features; 0 when it has none."""
        return 0

    @property
    def feature_dim(self) -> int:
        """Channels of the features; 0 when there are none."""
        return 0

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the images that it was made for, in pixels."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) at that size."""

    @property
    def last_layer(self) -> nn.Module:
        """The layer of the pixel decoder whose gradient balances losses (`weight`)."""
        return self.pixel_decoder.last_layer

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, d, h, w], deterministic."""

    @abstractmethod
    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """All that decides what the latents are: settings, and tensors by name."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in ImageNet-normalised space, not clamped."""
        return self.pixel_decoder(latents)

    def require_decoder(self, where: str | Path) -> None:
        """See that images come back in their own size. Raises ArtefactError, which names `where` the tokenizer lies."""
        try:
            upscale = self.pixel_decoder.upscale
        except ArtefactError as error:
            raise ArtefactError(f"{where}: {error}") from None
        if (side := self.latent_shape[1] * upscale) != self.image_size:
            raise ArtefactError(
                f"{where}: images of {self.image_size} pixels come back with {side}, for the decoder makes "
                f"{upscale}x{upscale} pixels of a latent; only stages that read latents or features can use this tokenizer"
            )

    def features(self, images: Tensor, masks: Tensor | None = None) -> Features:
        """Class token [B, D] and patch tokens [B, N, D]. Raises ValueError when the encoder has none."""
        raise ValueError(f"{type(self).__name__} has no features beside its latents")

    def intermediate_features(self, images: Tensor, n: int) -> list[Features]:
        """Features after each of the last `n` blocks, the last block last. Raises ValueError when there are none."""
        raise ValueError(f"{type(self).__name__} has no features beside its latents")

    def mean_latent(self, features: Features) -> Tensor:
        """The mean over positions of the latents [B, d] that belong to `features`, without another pass."""
        raise ValueError(f"{type(self).__name__} has no features beside its latents")

    def preprocess(self, image: "Image") -> Tensor:
        """A PIL image, centre-cropped to the training size (as ADM does), as one normalised batch [1, 3, S, S]."""
        return from_pil(image, self.image_size)[None]

    @staticmethod
    def to_pil(images: Tensor) -> "list[Image]":
        """PIL images of a batch in ImageNet-normalised space, clamped and rounded to 8 bits."""
        return to_pil(images)

    def encoder_digest(self) -> str:
        """SHA-256 of `encoder_state`: equal digests, equal latents. A decoder fits latents of its own digest alone."""
        settings, tensors = self.encoder_state()
        state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(tensors):
            values = tensors[name].detach().cpu().contiguous()
            state.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
            state.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()


class Encoding(nn.Module):
    """A tokenizer's encoder as a module of its own, whose operations can be counted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)
