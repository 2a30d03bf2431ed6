"""Decoded samples as files for other evaluators: pictures, one npz in the layout of ADM's sample batches, or what the
scorers of GenEval and DPG-Bench read, for samples of their prompts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import CHUNK
from vtp.config import Config, ConfigError
from vtp.data.prompt_files import Prompt
from vtp.distributed import barrier, own_rows, ranks
from vtp.evaluation.adm import write_batch

if TYPE_CHECKING:
    from PIL.Image import Image

GRID = 2  # samples along a side of DPG-Bench's pictures


class NpzExport(Config):
    """A file per setting."""

    name: Literal["npz"]


class PngExport(Config):
    """A folder per setting, a picture per sample."""

    name: Literal["png"]


class GenevalExport(Config):
    """A folder per setting, in it a numbered folder per prompt of GenEval, with its metadata and its samples."""

    name: Literal["geneval"]


class DpgExport(Config):
    """A folder per setting, a picture per prompt of DPG-Bench: a grid of its four samples."""

    name: Literal["dpg"]


AnyExportConfig = NpzExport | PngExport | GenevalExport | DpgExport
ExportConfig = Annotated[AnyExportConfig, Field(discriminator="name")]


class SampleWriter(Protocol):
    """Takes this rank's images, in order; every rank must finish."""

    def add(self, first: int, images: Tensor) -> None:
        """uint8 images [B, 3, S, S], the samples from `first` on."""
        ...

    def finish(self, labels: Tensor) -> None:
        """All ranks have added all of their images; `labels` [N] are those of all samples."""
        ...


def check_export(config: AnyExportConfig, prompts: Sequence[Prompt] | None) -> None:
    """Raises ConfigError where samples of `prompts`, one for each, are not what the scorer of this form reads."""
    if isinstance(config, NpzExport | PngExport):
        return
    what, keys = ("GenEval", ("tag", "prompt")) if isinstance(config, GenevalExport) else ("DPG-Bench", ())
    if prompts is None or not all(key in prompt.metadata for prompt in prompts for key in keys):
        raise ConfigError(
            f"export {{name: {config.name}}} is of samples of {what}'s prompts; draw some, or choose {{name: png}}"
        )
    if isinstance(config, DpgExport):
        for name, count in Counter(prompt.name for prompt in prompts).items():
            if count != GRID**2:
                raise ConfigError(
                    f"export {{name: dpg}} is of {GRID**2} samples of every prompt, and {name} has {count}; draw as "
                    "many, or choose {name: png}"
                )


def build_writer(
    config: AnyExportConfig,
    folder: Path,
    setting: str,
    *,
    image_size: int,
    scratch: Path,
    prompts: Sequence[Prompt] | None = None,
) -> SampleWriter:
    """Of one setting; every rank must ask. `prompts`: that of every sample, in their order. Raises as `check_export`."""
    check_export(config, prompts)
    if isinstance(config, PngExport):
        return _PngWriter(folder / setting)
    if isinstance(config, NpzExport):
        return _NpzWriter(folder / f"{setting}.npz", image_size, scratch)
    assert prompts is not None
    if isinstance(config, GenevalExport):
        return _GenevalWriter(folder / setting, prompts)
    return _DpgWriter(folder / setting, prompts, scratch)


class _PngWriter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, first: int, images: Tensor) -> None:
        for number, image in enumerate(_pictures(images), first):
            image.save(self._folder / f"{number:06d}.png")

    def finish(self, labels: Tensor) -> None:
        barrier()


class _GenevalWriter:
    """`00000/metadata.jsonl`, the prompt's line of the file, beside `00000/samples/0000.png`, `0001.png`, ..."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self._folder, self._prompts, self._takes = folder, prompts, _takes(prompts)
        for name in {prompt.name for prompt in prompts}:
            (folder / name / "samples").mkdir(parents=True, exist_ok=True)

    def add(self, first: int, images: Tensor) -> None:
        for number, image in enumerate(_pictures(images), first):
            name = self._prompts[number].name
            image.save(self._folder / name / "samples" / f"{self._takes[number]:04d}.png")

    def finish(self, labels: Tensor) -> None:
        if ranks().first:
            for prompt in {prompt.name: prompt for prompt in self._prompts}.values():
                text = json.dumps(prompt.metadata) + "\n"
                (self._folder / prompt.name / "metadata.jsonl").write_text(text, encoding="utf-8")
        barrier()


class _DpgWriter:
    """`<item_id>.png`, its samples row by row. Those of one prompt may be of several ranks, so they wait in scratch.

    The scorer is told the side of a sample (`--resolution`) and their number (`--pic-num 4`).
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt], scratch: Path) -> None:
        self._folder, self._prompts, self._takes = folder, prompts, _takes(prompts)
        self._scratch = scratch / f"dpg-{folder.name}"
        for each in (folder, self._scratch):
            each.mkdir(parents=True, exist_ok=True)

    def add(self, first: int, images: Tensor) -> None:
        for number, image in enumerate(_pictures(images), first):
            image.save(self._waiting(self._prompts[number].name, self._takes[number]))

    def finish(self, labels: Tensor) -> None:
        import PIL.Image

        barrier()
        names = list(dict.fromkeys(prompt.name for prompt in self._prompts))
        for name in (names[number] for number in own_rows(len(names))):
            paths = [self._waiting(name, take) for take in range(GRID**2)]
            samples = [PIL.Image.open(path) for path in paths]
            width, height = samples[0].size
            grid = PIL.Image.new("RGB", (GRID * width, GRID * height))
            for place, sample in enumerate(samples):
                grid.paste(sample, (place % GRID * width, place // GRID * height))
            grid.save(self._folder / f"{name}.png")
            for path in paths:
                path.unlink()
        barrier()

    def _waiting(self, name: str, take: int) -> Path:
        return self._scratch / f"{name}-{take}.png"


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


def _pictures(images: Tensor) -> "Iterator[Image]":
    from PIL.Image import fromarray

    return map(fromarray, images.permute(0, 2, 3, 1).cpu().numpy())


def _takes(prompts: Sequence[Prompt]) -> list[int]:
    """Of every sample, how many of its prompt come before it."""
    seen: Counter[str] = Counter()
    takes = []
    for prompt in prompts:
        takes.append(seen[prompt.name])
        seen[prompt.name] += 1
    return takes
