"""What every tokenizer offers, whoever trained it: latents and back, and features when its encoder has some.

The stages behind the tokenizer know no more than this, so that tokenizers which were not trained here are tuned, cached,
probed and compared in the same way.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vtp.artefact import ArtefactError
from vtp.layers.images import PICTURE, from_pil, rgb, to_pil
from vtp.models.vit import Features

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtp.layers.images import Picture


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
    """Images [B, 3, H, W] in ImageNet-normalised space to latents [B, d, h, w] and back.

    `encode` and `decode` record no operations for a backward pass, unless `grad=True` asks for it where gradients are on.
    `train()` and `eval()` change neither beyond rounding: no part draws dropout or keeps statistics of batches. What is
    loaded is in eval mode.
    """

    pixel_decoder: Any  # a LatentDecoder: the part that decoder tuning trains
    has_features: bool  # whether `features` and `intermediate_features` can be asked for
    any_size = True  # whether images of all sides that are multiples of `pixels_per_latent` are encoded

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

    @property
    def pixels_per_latent(self) -> int:
        """Along a side: sides of images are multiples of it."""
        return self.image_size // self.latent_shape[1]

    def require_sizes(self, sizes: Iterable[tuple[int, int]], patch_size: int = 1) -> None:
        """Raises ValueError when images of a (height, width) cannot be encoded, or their latents are no whole patches."""
        unit = self.pixels_per_latent * patch_size
        for height, width in sizes:
            if height % unit or width % unit:
                raise ValueError(
                    f"pictures of {width}x{height} pixels: sides must be multiples of {unit}, the pixels per latent, "
                    f"{self.pixels_per_latent}, times patch_size, {patch_size}"
                )
            if not self.any_size and (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"pictures of {width}x{height} pixels: this tokenizer encodes squares of {self.image_size}"
                )

    def encode(self, images: Tensor, *, grad: bool = False) -> Tensor:
        """Latents [B, d, h, w] of images [B, 3, H, W] in ImageNet-normalised space, deterministic.

        `grad`: record it for a backward pass, as a training does. Raises ValueError for what is no such batch.
        """
        with gradients(grad):
            return self._encode(images)

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """What `encode` gives."""

    @abstractmethod
    def encoder_state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """All that decides what the latents are: settings, and tensors by name."""

    def decode(self, latents: Tensor, *, grad: bool = False) -> Tensor:
        """Images [B, 3, H, W] in ImageNet-normalised space, not clamped, of latents [B, d, h, w].

        `grad`: record it for a backward pass, as `pixel_decoder(latents)` does too. Raises ValueError for what is no such
        batch.
        """
        require_batch(latents, self.latent_shape[0], "latents", "encode")
        with gradients(grad):
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

    def preprocess(self, pictures: "Picture | Sequence[Picture]", size: int | None = None) -> Tensor:
        """One picture, or a list, as training sees them: a normalised batch [N, 3, S, S] on the CPU.

        A picture is a path, the bytes of a file, a PIL image of any mode, or uint8 [H, W, 3] as a numpy array or tensor. It
        is turned upright, made 8-bit RGB (transparency lies on white), and centre-cropped to a square of S pixels as ADM
        does: the short side is scaled to S. S is `size`, or that of the training.

        Raises ValueError for a size that is no multiple of `pixels_per_latent`, for no pictures, and for arrays of other
        types and shapes, DecodeError (a ValueError) for what is no readable picture, TypeError for other things, OSError.
        """
        side = self.image_size if size is None else size
        if side < 1 or side % self.pixels_per_latent:
            raise ValueError(
                f"size is {size}; it must be a multiple of {self.pixels_per_latent}, the pixels per latent"
            )
        given: Sequence[Any] = pictures if isinstance(pictures, list | tuple) else [pictures]
        if not given:
            raise ValueError(f"no picture is given; a picture is {PICTURE}")
        return torch.stack([from_pil(rgb(picture), side) for picture in given])

    @staticmethod
    def to_pil(images: Tensor) -> "list[Image]":
        """PIL images of a batch in ImageNet-normalised space, clamped and rounded to 8 bits."""
        return to_pil(images)

    def encoder_digest(self) -> str:
        """SHA-256 of `encoder_state`: equal digests, equal latents. A decoder fits latents of its own digest alone."""
        return state_digest(*self.encoder_state())


class EncoderLayers(NamedTuple):
    """An encoder's parameters by depth: some learn slower the nearer they are to the pixels."""

    embed: nn.Module  # reads the pixels
    tokens: Sequence[nn.Parameter]  # learnt ones, beside the pixels' first features
    mask_tokens: Sequence[nn.Parameter]  # learnt ones in place of features that are hidden
    blocks: Sequence[nn.Module]
    top: nn.Module  # all behind the blocks

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""
        yield from self.embed.parameters()
        yield from (*self.tokens, *self.mask_tokens)
        for module in (*self.blocks, self.top):
            yield from module.parameters()


class TrainableTokenizer(Tokenizer):
    """A tokenizer that pre-training makes of fresh weights: what that asks beside latents and back."""

    @abstractmethod
    def encoder_layers(self) -> EncoderLayers:
        """The encoder by depth."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """Blocks of encoder and decoder, which are compiled one by one."""

    @abstractmethod
    def sharded_units(self) -> Iterator[Sequence[nn.Module]]:
        """What FSDP gathers together, parts first; the rest is small and stays replicated."""

    @abstractmethod
    def recompute(self) -> None:
        """Keep no activations inside of blocks; the backward pass computes them again."""

    @abstractmethod
    def architecture(self) -> Mapping[str, Any]:
        """`config.json` of its folder."""

    @abstractmethod
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """By part: what two of equal shapes must have in common for the weights of one to mean the same in the other."""

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that `load_tokenizer` reads, with the weights of a state dict; equal weights give equal bytes."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises ArtefactError naming what is missing or does not fit."""


def state_digest(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of settings and of tensors by name."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        state.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def gradients(grad: bool) -> torch.set_grad_enabled:
    """Operations are recorded if `grad` asks for it, where they are recorded around it."""
    return torch.set_grad_enabled(grad and torch.is_grad_enabled())


def require_batch(batch: Tensor, channels: int, what: str, source: str) -> None:
    """Raises ValueError when `batch` is not floating-point [B, channels, H, W]; `source` is the method that gives such."""
    if batch.ndim != 4 or batch.shape[1] != channels or not batch.is_floating_point():
        kind = str(batch.dtype).removeprefix("torch.")
        raise ValueError(
            f"{what} are {kind} {list(batch.shape)}; they must be floating-point [B, {channels}, H, W], as `{source}` gives"
        )


class Encoding(nn.Module):
    """A tokenizer's encoder as a module of its own, whose operations can be counted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)
