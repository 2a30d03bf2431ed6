"""Decoded samples as files for other evaluators: pictures, or one npz in the layout of ADM's sample batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import CHUNK
from vtp.config import Config
from vtp.distributed import barrier, ranks
from vtp.evaluation.adm import write_batch


class NpzExport(Config):
    """A file per setting."""

    name: Literal["npz"]


class PngExport(Config):
    """A folder per setting, a picture per sample."""

    name: Literal["png"]


ExportConfig = Annotated[NpzExport | PngExport, Field(discriminator="name")]


class SampleWriter(Protocol):
    """Takes this rank's images, in order; every rank must finish."""

    def add(self, first: int, images: Tensor) -> None:
        """uint8 images [B, 3, S, S], the samples from `first` on."""
        ...

    def finish(self, labels: Tensor) -> None:
        """All ranks have added all of their images; `labels` [N] are those of all samples."""
        ...


def build_writer(
    config: NpzExport | PngExport, folder: Path, setting: str, *, image_size: int, scratch: Path
) -> SampleWriter:
    """Of one setting; every rank must ask."""
    if isinstance(config, PngExport):
        return _PngWriter(folder / setting)
    return _NpzWriter(folder / f"{setting}.npz", image_size, scratch)


class _PngWriter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, first: int, images: Tensor) -> None:
        from PIL import Image

        for number, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy(), first):
            Image.fromarray(pixels).save(self._folder / f"{number:06d}.png")

    def finish(self, labels: Tensor) -> None:
        barrier()


class _NpzWriter:
    """An npz is written from start to end, so every rank leaves its pixels in a file, and the first joins them."""

    def __init__(self, path: Path, image_size: int, scratch: Path) -> None:
        self._path, self._size = path, image_size
        self._parts = [scratch / f"{path.stem}-{rank:05d}.raw" for rank in range(ranks().size)]
        self._own = self._parts[ranks().rank].open("wb")

    def add(self, first: int, images: Tensor) -> None:
        self._own.write(images.contiguous().cpu().numpy().data)

    def finish(self, labels: Tensor) -> None:
        self._own.close()
        barrier()
        if ranks().first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_batch(self._path, self._joined(), labels, count=len(labels), image_size=self._size)
            for part in self._parts:
                part.unlink()

    def _joined(self) -> Iterator[Tensor]:
        """The images of all ranks in order, some MB at a time."""
        image = 3 * self._size**2
        at_once = image * max(1, CHUNK // image)
        for part in self._parts:
            with part.open("rb") as file:
                while content := file.read(at_once):
                    yield torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3, self._size, self._size)
