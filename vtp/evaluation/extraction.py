"""Features of a frozen encoder: taken once, by all ranks together, and kept in chunks, so that a killed stage goes on.

A rank takes whole chunks, and batches do not cross them: what an image is computed with, and so its rounding, depends on
no number of ranks.
"""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtp.artefact import load_tensors, remove, save_tensors
from vtp.config import ConfigError
from vtp.data.dataset import ShardDataset
from vtp.data.loader import load_batches
from vtp.device import Precision, computing
from vtp.distributed import barrier, gather_objects, ranks, total
from vtp.finite import require_finite
from vtp.host import Host
from vtp.layers.images import normalise
from vtp.layers.preprocess import View
from vtp.models.base import Tokenizer
from vtp.models.tokenizer import VisualTokenizer

CHUNK = 2048  # images of a file


class LabelledSplit(NamedTuple):
    """Images that have a class."""

    images: ShardDataset
    rows: np.ndarray  # [N], which of them
    labels: Tensor  # [N] int64


class Views(NamedTuple):
    """What is made of every image: for the probes, and for zero-shot under the names of its protocols."""

    probe: View
    squash: View | None = None
    centre: View | None = None


class Pixels(NamedTuple):
    """Images [B, 3, S, S] uint8 by view; none where there is no such view, or where it is that of the probes."""

    probe: Tensor
    squash: Tensor
    centre: Tensor


class ViewedImages(Dataset[Pixels]):
    """Batches of views; every picture is decoded once."""

    def __init__(self, images: ShardDataset, batches: list[np.ndarray], views: Views) -> None:
        self.images = images
        self.batches = batches
        self.views = views

    def __getitem__(self, index: int) -> Pixels:
        rows = self.batches[index].tolist()
        pictures = [self.images.image(row) for row in rows]

        def pixels(view: View | None) -> Tensor:
            if view is None:
                return torch.empty(0, dtype=torch.uint8)
            squares = [np.asarray(view.of(picture, row)) for picture, row in zip(pictures, rows, strict=True)]
            return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

        probe, *others = self.views
        return Pixels(pixels(probe), *(pixels(None if view == probe else view) for view in others))


class Extraction:
    """Tables of features of one tokenizer.

    `tokens` [N, (n + 1) D]: class tokens of the last n blocks, the last block's at the end, then its mean patch; so the
    last 2 D columns are class token and mean patch of the last block. `latent` [N, d]: the mean latent. `squash` and
    `centre` [N, E]: CLIP's embeddings of these views. A tokenizer without features has `latent` alone.
    Raises ConfigError when it has fewer than n blocks.
    """

    def __init__(self, model: Tokenizer, *, blocks: int, batch_size: int, precision: Precision, host: Host) -> None:
        self.model = model
        if model.has_features and blocks > model.num_blocks:
            raise ConfigError(
                f"probes.blocks: {blocks}, and the tokenizer has {model.num_blocks}; take so many or fewer"
            )
        self.blocks = blocks
        self._batch_size = batch_size
        self._precision: Precision = precision
        self._host = host

    def table(self, name: str, data: LabelledSplit, views: Views) -> dict[str, Tensor]:
        """Features of all images, on the first rank; the others get nothing. All ranks must ask."""
        folder = self._folder(name)
        chunks = np.split(data.rows, range(CHUNK, len(data.rows), CHUNK))
        paths = [folder / f"{number:05d}.safetensors" for number in range(len(chunks))]
        missing: list[int] = gather_objects([number for number, path in enumerate(paths) if not path.exists()])[0]
        done = len(data.rows) - sum(len(chunks[number]) for number in missing)
        rank, size = ranks()
        own = {number: self._batches(chunks[number]) for number in missing[rank::size]}
        batches = [batch for of_chunk in own.values() for batch in of_chunk]
        stream = load_batches(ViewedImages(data.images, batches, views), range(len(batches)), self._host)
        progress = self._host.progress(total=len(data.rows), description=name, unit="image", done=done)
        with closing(stream), progress as bar:
            for start in range(0, len(missing), size):
                together = missing[start : start + size]  # a chunk for every rank
                for number in together[rank : rank + 1]:
                    parts = [self._features(next(stream), views) for _ in own[number]]
                    save_tensors(paths[number], {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
                bar.update(sum(len(chunks[number]) for number in together))
                if total(torch.tensor(int(self._host.stop_requested))):
                    self._host.stop()
        barrier()
        if not ranks().first:
            return {}
        read = [load_tensors(path) for path in paths]
        return {key: torch.cat([chunk[key] for chunk in read]) for key in read[0]}

    def forget(self, name: str) -> None:
        """Delete a table that is not needed again."""
        remove(self._folder(name))

    def _folder(self, name: str) -> Path:
        return self._host.folder / "features" / name

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows, range(self._batch_size, len(rows), self._batch_size))

    @torch.no_grad()
    def _features(self, pixels: Pixels, views: Views) -> dict[str, Tensor]:
        model, images = self.model, normalise(pixels.probe)
        with computing(self._precision, images.device):
            if not model.has_features:
                return {"latent": self._kept(model.encode(images).float().mean((2, 3)))}
            of_blocks = model.intermediate_features(images, self.blocks)
            last = of_blocks[-1]
            tokens = [*(features.cls for features in of_blocks), last.patches.float().mean(1)]
            read = {"tokens": torch.cat([token.float() for token in tokens], 1), "latent": model.mean_latent(last)}
            for name in ("squash", "centre"):
                if (view := getattr(views, name)) is not None:
                    assert isinstance(model, VisualTokenizer)
                    seen = last if view == views.probe else model.features(normalise(getattr(pixels, name)))
                    read[name] = model.project_image(seen)
        return {name: self._kept(values) for name, values in read.items()}

    def _kept(self, values: Tensor) -> Tensor:
        """On the CPU; of half precision when the encoder's is lower still."""
        values = values.to("cpu", torch.float16 if self._precision == "bfloat16" else torch.float32)
        require_finite(values, f"features of the encoder as {values.dtype}", "is the tokenizer sound?")
        return values
