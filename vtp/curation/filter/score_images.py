"""Scores of images and captions on this process's device, while worker processes read, decode and crop those that follow.

Of a piece, every `batch_size` images are a batch; those of it that can be read go through the model, the first repeated
where some are missing, so the model sees one shape and a score depends on no rank.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtp.curation.filter.image_rules import (
    MEASURED,
    NO_CAPTION,
    UNREADABLE,
    ImageJob,
    ImageLocation,
    locate,
    read_image,
    sortable,
)
from vtp.curation.filter.spill import save_array
from vtp.layers.decode import DecodeError, decode_rgb, decoding
from vtp.processes import KILLED, WorkerDied

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 32  # images that a worker process prepares at a time
AHEAD = 2  # such chunks of each


class Scorer(Protocol):
    """Gives images and captions a score."""

    @property
    def prepare(self) -> "Callable[[Image], Tensor]":
        """An image as uint8 [3, H, W] of one size; called in worker processes, which have no device."""
        ...

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Captions as ids [B, L]; called there too."""
        ...

    def score(self, images: Tensor, tokens: Tensor) -> Tensor:
        """[B] float64 of images [B, 3, H, W] and tokens [B, L], on the device."""
        ...


class _Chunk(NamedTuple):
    """Images that are asked for: all of one batch."""

    job: ImageJob
    batch: int
    places: list[ImageLocation]


class _PreparedChunk(NamedTuple):
    """The same as the model takes them."""

    job: ImageJob
    batch: int
    states: list[int]  # of all
    images: list[Tensor]  # uint8 [n, 3, H, W] of those that can be measured, if any
    tokens: list[Tensor]  # [n, L]


def score_images(
    jobs: Iterable[ImageJob],
    scorer: Scorer,
    *,
    batch_size: int,
    processes: int,
    report: Callable[[int], object],
) -> None:
    """Write the files of `jobs`, which are taken when there is room for them; `report` gets the images of every batch.

    Raises WorkerDied when a process was killed.
    """
    loader = DataLoader(
        _PoolImages(scorer),
        batch_size=None,
        sampler=_Chunks(jobs, batch_size),
        num_workers=processes,
        prefetch_factor=AHEAD if processes else None,
        worker_init_fn=_leave_stopping_to_parent,
    )
    with _naming_the_killed():
        for job, of_job in groupby(loader, attrgetter("job")):
            states, scores = [], []
            for _, of_batch in groupby(of_job, attrgetter("batch")):
                batch = list(of_batch)
                found = [state for part in batch for state in part.states]
                images = [images for part in batch for images in part.images]
                if images:
                    tokens = [tokens for part in batch for tokens in part.tokens]
                    scores.append(_score(scorer, torch.cat(images), torch.cat(tokens), batch_size))
                states += found
                report(len(found))
            _save(job, np.array(states, np.uint64), scores)


def _score(scorer: Scorer, images: Tensor, tokens: Tensor, batch_size: int) -> Tensor:
    filled = torch.arange(batch_size) % len(images)
    return scorer.score(images[filled], tokens[filled])[: len(images)]


def _save(job: ImageJob, states: np.ndarray, scores: Sequence[Tensor]) -> None:
    """Of the whole piece: only here the device is waited for."""
    values = np.stack([np.zeros_like(states), states], axis=1)
    if scores:
        values[states == MEASURED, 0] = sortable(torch.cat(list(scores)).cpu().numpy())
    save_array(job.done, values)


class _Chunks(Iterable[_Chunk]):
    """What is asked for, in order. The tables are read here: their library does not outlive a fork."""

    def __init__(self, jobs: Iterable[ImageJob], batch_size: int) -> None:
        self._jobs, self._batch_size = jobs, batch_size

    def __iter__(self) -> Iterator[_Chunk]:
        for job in self._jobs:
            places = locate(job)
            for first in range(0, len(places), self._batch_size):
                batch = places[first : first + self._batch_size]
                for start in range(0, len(batch), CHUNK):
                    yield _Chunk(job, first, batch[start : start + CHUNK])


class _PoolImages(Dataset[_PreparedChunk]):
    """Images as they are asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self._prepare, self._tokenize = scorer.prepare, scorer.tokenize

    def __getitem__(self, chunk: _Chunk) -> _PreparedChunk:
        states, images, captions = [], [], []
        for place in chunk.places:
            state = NO_CAPTION if place.caption is None else UNREADABLE
            if place.caption is not None:
                with suppress(DecodeError), decoding("cannot be prepared"):
                    content = read_image(chunk.job.pool, place, outside_links=chunk.job.outside_links)
                    images.append(self._prepare(decode_rgb(content)))
                    captions.append(place.caption)
                    state = MEASURED
            states.append(state)
        tensors = ([torch.stack(images)], [self._tokenize(captions)]) if images else ([], [])
        return _PreparedChunk(chunk.job, chunk.batch, states, *tensors)


def _leave_stopping_to_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _naming_the_killed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise WorkerDied(KILLED) from None
        raise
