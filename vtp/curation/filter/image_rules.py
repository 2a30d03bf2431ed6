"""Image rules of a filter: a number for each image of a pool, measured in pieces that survive an interruption."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vtp.curation.filter.rules import IMAGE_COLUMNS
from vtp.curation.filter.spill import load_array, pick_rows, save_array
from vtp.curation.places import open_inside, read_piece
from vtp.curation.rows import CAPTION
from vtp.layers.decode import DecodeError, decode_rgb, decoding

if TYPE_CHECKING:
    from PIL.Image import Image

PIECE = 1024  # images between two savings
UNREADABLE, MEASURED, NO_CAPTION = 0, 1, 2
HASHED_SIDE = 256  # a JPEG is decoded no larger than a hash of 32 x 32 pixels needs


class ImageJob(NamedTuple):
    """Some of the rows that are left in a part."""

    done: Path  # (value, state) [n, 2] uint64
    rows: Path
    kept: Path
    start: int  # among the rows that are left
    stop: int
    pool: Path
    outside_links: bool  # whether links may lead out of the pool


class Scorer(Protocol):
    """Gives images and captions a score."""

    def prepare(self, image: "Image") -> Any:  # noqa: ANN401 - whatever the model takes
        """An image as the model takes it; called in threads."""
        ...

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> np.ndarray:
        """[B] float64."""
        ...


def hash_images(job: ImageJob) -> None:
    """Perceptual hashes of 64 bits: signs of the lowest frequencies of the image, in grey (imagehash.phash)."""
    import imagehash

    values = np.zeros((job.stop - job.start, 2), np.uint64)
    for index, place in enumerate(_places(job)):
        with suppress(DecodeError):
            content = read_image(job.pool, place, outside_links=job.outside_links)
            picture = decode_rgb(content, least=(HASHED_SIDE, HASHED_SIDE))
            bits = np.packbits(imagehash.phash(picture).hash.reshape(-1))
            values[index] = bits.view(">u8")[0], MEASURED
    save_array(job.done, values)


def score_images(
    jobs: Sequence[ImageJob],
    scorer: Scorer,
    *,
    batch_size: int,
    threads: int,
    progress: Callable[[int], object],
    stop_if_requested: Callable[[], None],
) -> None:
    """Scores, on this process's device; images are decoded in threads. The batches are those of the whole piece."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for job in jobs:
            stop_if_requested()
            _score_piece(job, scorer, batch_size, pool)
            progress(job.stop - job.start)


def _score_piece(job: ImageJob, scorer: Scorer, batch_size: int, pool: ThreadPoolExecutor) -> None:
    def prepared(place: "_ImageLocation") -> Any:  # noqa: ANN401
        if place.caption is None:
            return None
        with suppress(DecodeError), decoding("cannot be prepared"):
            return scorer.prepare(decode_rgb(read_image(job.pool, place, outside_links=job.outside_links)))

    places = _places(job)
    values = np.zeros((len(places), 2), np.uint64)
    values[[place.caption is None for place in places], 1] = NO_CAPTION
    for start in range(0, len(places), batch_size):
        batch = list(enumerate(places[start : start + batch_size], start))
        images = list(pool.map(prepared, [place for _, place in batch]))
        good = [(index, place, image) for (index, place), image in zip(batch, images, strict=True) if image is not None]
        if good:
            scores = scorer.score([image for *_, image in good], [place.caption or "" for _, place, _ in good])
            values[[index for index, *_ in good]] = np.stack([sortable(scores), np.full(len(good), MEASURED)], axis=1)
    save_array(job.done, values)


class _ImageLocation(NamedTuple):
    """Where an image lies in a pool, as its table says: whatever stands there, it is read or refused."""

    tar: str | bytes | None
    offset: float | None
    size: float | None
    caption: str | None


def read_image(pool: Path, place: _ImageLocation, *, outside_links: bool = False) -> bytes:
    """The bytes of an image file. Raises DecodeError when there is none, or less than there should be."""
    if place.tar is None or place.offset is None or place.size is None:
        raise DecodeError("not downloaded")
    try:
        file = open_inside(pool, os.fsdecode(place.tar), "the pool", outside_links=outside_links)
    except OSError as error:
        raise DecodeError(f"its tar cannot be opened ({error.strerror})") from None
    try:
        return read_piece(file, place.offset, place.size)
    finally:
        os.close(file)


def _places(job: ImageJob) -> list[_ImageLocation]:
    chosen = np.flatnonzero(load_array(job.kept))[job.start : job.stop]
    table = pick_rows(job.rows, (*IMAGE_COLUMNS, CAPTION), chosen)
    return [_ImageLocation(*row.values()) for row in table.to_pylist()]


def sortable(values: np.ndarray) -> np.ndarray:
    """Floats [n] as uint64 in the same order; -0.0 is 0.0."""
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))
