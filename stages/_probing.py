"""Features of labelled images, extracted once over all ranks and kept in scratch: what `evaluate_understanding` judges.

A file holds the features of a stretch of images. Ranks share whole files, and a killed run goes on with those that are
missing. What an image is computed with is its batch within the file, which depends on no number of ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages._runner import Work
from vtp.artefact import load_tensors, save_tensors
from vtp.data.dataset import ShardDataset, Singles
from vtp.distributed import gather_objects, own_rows
from vtp.layers.images import normalise, shortest_side_crop, squash
from vtp.models.base import Tokenizer
from vtp.models.tokenizer import VisualTokenizer

FILE = 16  # batches per file
Protocol = Literal["squash", "centre"]


class View(NamedTuple):
    """How images are cut: the short side to `resize`, then a centre of `size`; or squashed to `size`."""

    size: int
    resize: int
    squashed: bool = False


class Features(NamedTuple):
    """Of the labelled images of a split; what a tokenizer does not have is missing."""

    labels: Tensor  # [N]
    tensors: Mapping[str, Tensor]  # cls [N, blocks, D], mean [N, D], bottleneck [N, d], clip_<protocol> [N, E]

    @property
    def last(self) -> Tensor:
        """Class token and mean patch of the last block [N, 2 D]."""
        return torch.cat([self.tensors["cls"][:, -1], self.tensors["mean"]], dim=1)

    def of(self, variant: str) -> Tensor:
        """`bottleneck` [N, d], or `last` [N, 2 D]."""
        return self.last if variant == "last" else self.tensors[variant]

    def multi(self, blocks: int) -> Tensor:
        """Class tokens of the last `blocks` blocks and the mean patch of the last [N, (blocks + 1) D]."""
        return torch.cat([self.tensors["cls"][:, -blocks:].flatten(1), self.tensors["mean"]], dim=1)


class Extraction:
    """Runs a tokenizer over images."""

    def __init__(self, model: Tokenizer, work: Work, *, batch_size: int, blocks: int, view: View) -> None:
        self.model = model
        self.view = view
        self.blocks = min(blocks, model.num_blocks)
        self._work = work
        self._batch_size = batch_size

    @property
    def has_text(self) -> bool:
        """Whether zero-shot classification is possible."""
        return isinstance(self.model, VisualTokenizer) and self.model.config.text is not None

    def of(self, images: ShardDataset, singles: Singles, name: str, protocols: Sequence[Protocol]) -> Features:
        """Features of all images on every rank; CLIP's embedding under each of `protocols`."""
        folder = self._work.folder / "features"
        step = FILE * self._batch_size
        files = [(folder / f"{name}-{first:09d}.safetensors", first) for first in range(0, len(singles.rows), step)]
        own = [files[index] for index in own_rows(len(files))]
        missing = [(path, singles.rows[first : first + step]) for path, first in own if not path.exists()]
        total = sum(len(singles.rows[first : first + step]) for _, first in own)
        done = total - sum(len(rows) for _, rows in missing)
        stopped = False
        with self._work.progress(total=total, description=f"features, {name}", unit="image", done=done) as bar:
            for path, rows in missing:
                parts = []
                for batch in self._batches(images, rows, protocols if self.has_text else ()):
                    parts.append(self._extract(batch))
                    bar.update(len(batch["view"]))
                save_tensors(path, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
                if stopped := self._work.stop_seen:
                    break
        if any(gather_objects(stopped)):
            self._work.stop()
        loaded = [load_tensors(path) for path, _ in files]
        tensors = {key: torch.cat([part[key] for part in loaded]) for key in loaded[0]}
        return Features(torch.from_numpy(singles.labels), tensors)

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Probe features of uint8 images [B, 3, S, S], float32 on the CPU."""
        pixels = normalise(images.to(self._work.device))
        if not self.model.has_features:
            return {"bottleneck": self.model.encode(pixels).mean((2, 3)).float().cpu()}
        of_blocks = self.model.intermediate_features(pixels, self.blocks)
        last = of_blocks[-1]
        found = {
            "cls": torch.stack([features.cls for features in of_blocks], dim=1),
            "mean": last.patches.mean(1),
            "bottleneck": self.model.mean_latent(last),
        }
        return {name: value.float().cpu() for name, value in found.items()}

    @torch.no_grad()
    def _extract(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.encode(batch["view"])
        for name, images in batch.items():
            if name != "view":
                assert isinstance(self.model, VisualTokenizer)
                found[f"clip_{name}"] = self.model.encode_image(normalise(images.to(self._work.device))).float().cpu()
        return found

    def _batches(
        self, images: ShardDataset, rows: np.ndarray, protocols: Sequence[Protocol]
    ) -> Iterator[dict[str, Tensor]]:
        size = self.model.image_size
        views = {"view": self.view} | {name: View(size, size, squashed=name == "squash") for name in protocols}
        parts = np.split(rows, range(self._batch_size, len(rows), self._batch_size))
        pictures = _Pictures(images, parts, views)
        loader = DataLoader(pictures, batch_size=None, sampler=range(len(parts)), num_workers=self._work.workers)
        yield from loader


class _Pictures(Dataset[dict[str, Tensor]]):
    """Uint8 images [B, 3, S, S] under several views; each is decoded once, where it is asked for."""

    def __init__(self, images: ShardDataset, parts: Sequence[np.ndarray], views: Mapping[str, View]) -> None:
        self.images = images
        self.parts = parts
        self.views = views

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pictures = [self.images.image(int(row)) for row in self.parts[index]]
        cuts = {
            name: partial(squash, size=view.size)
            if view.squashed
            else partial(shortest_side_crop, size=view.size, resize=view.resize)
            for name, view in self.views.items()
        }
        return {
            name: torch.from_numpy(np.stack([np.asarray(cut(picture)) for picture in pictures])).permute(0, 3, 1, 2)
            for name, cut in cuts.items()
        }
