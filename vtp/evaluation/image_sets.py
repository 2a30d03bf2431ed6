"""Images that are scored, batch by batch: samples and latents through a decoder, or pictures made elsewhere."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import ArtefactError
from vtp.data.dataset import ShardDataset
from vtp.data.latents import LatentDataset
from vtp.evaluation.adm import SampleBatch
from vtp.evaluation.samples import SettingSamples
from vtp.layers.decode import DecodeError, read_rgb
from vtp.layers.images import to_uint8
from vtp.models.base import Tokenizer
from vtp.texts import shown

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


class ImageSet(Protocol):
    """Images of one size, by number."""

    @property
    def labels(self) -> Tensor | None:
        """Classes [N] int64 that the images should show; None where nobody says."""
        ...

    @property
    def prompts(self) -> list[str] | None:
        """What each image was asked to show; None where nobody says."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The batches with these `numbers`, ascending, of `size` images: [B, 3, S, S] uint8."""
        ...


class DecodedSamples:
    """The samples of one setting, through the decoder of `model`."""

    def __init__(self, samples: SettingSamples, model: Tokenizer, device: torch.device | str) -> None:
        self._samples, self._model, self._device = samples, model, device

    @property
    def labels(self) -> Tensor:
        return self._samples.labels

    @property
    def prompts(self) -> list[str] | None:
        asked = self._samples.asked
        return None if asked is None else [prompt.text for prompt in asked]

    def __len__(self) -> int:
        return len(self._samples.labels)

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        for number in numbers:
            first = number * size
            latents = self._samples.latents(first, min(size, len(self) - first))
            images = self._model.decode(latents.to(self._device))
            yield to_uint8(images, f"images of setting {self._samples.setting} from number {first} on")


class Reconstructions:
    """The first images of the latents that a generator learns, through the decoder: what no sample can surpass.

    They are `count`, or all where there are fewer.
    """

    def __init__(self, latents: LatentDataset, count: int, model: Tokenizer, device: torch.device | str) -> None:
        self._latents, self._count, self._model, self._device = latents, min(count, len(latents)), model, device

    @property
    def labels(self) -> Tensor:
        return self._latents.labels[: self._count]

    @property
    def prompts(self) -> list[str]:
        return self._latents.captions[: self._count]

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        for number in numbers:
            rows = np.arange(number * size, min((number + 1) * size, self._count))
            images = self._model.decode(self._latents.rows(rows).to(self._device))
            yield to_uint8(images, f"reconstructions from number {number * size} on")


class CaptionedPictures:
    """The first pictures of a split that have a caption, centre-cropped: what no sample of their captions can surpass."""

    labels = None

    def __init__(self, images: ShardDataset, count: int, *, size: int) -> None:
        self._images, self._rows, self._size = images, images.captioned().rows[:count], size

    @property
    def prompts(self) -> list[str]:
        return [self._images.caption(int(row)) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        for number in numbers:
            yield self._images.images(self._rows[number * size : (number + 1) * size], self._size)


class PictureFolder:
    """Pictures in a folder, in the order of their names. Raises ArtefactError when there are none."""

    labels = prompts = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not self._paths:
            raise ArtefactError(f"{folder}: no pictures; expected files that end in {', '.join(sorted(PICTURES))}")
        self.image_size = self._picture(self._paths[0]).shape[-1]

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, size: int, numbers: Iterable[int]) -> Iterator[Tensor]:
        for number in numbers:
            yield torch.stack([self._picture(path) for path in self._paths[number * size : (number + 1) * size]])

    def _picture(self, path: Path) -> Tensor:
        try:
            pixels = torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1)
        except DecodeError as error:
            raise ArtefactError(f"{shown(str(path))}: {error}; take it out, or make it again") from None
        side = getattr(self, "image_size", pixels.shape[1])
        if pixels.shape[1:] != (side, side):
            raise ArtefactError(
                f"{shown(str(path))}: {pixels.shape[2]} x {pixels.shape[1]} pixels among squares of {side}; "
                "distances compare images of one size"
            )
        return pixels


def open_given(path: Path) -> PictureFolder | SampleBatch:
    """Pictures made elsewhere: a folder, or an npz in the layout of ADM's sample batches.

    Raises ArtefactError for what is neither.
    """
    return PictureFolder(path) if path.is_dir() else SampleBatch(path)
