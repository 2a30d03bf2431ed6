"""Images of a pool, a piece of them at a time: where they lie, their bytes, and their perceptual hashes."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.curation.filter.rules import IMAGE_COLUMNS
from vtp.curation.filter.spill import load_array, pick_rows, save_array
from vtp.curation.places import open_inside, read_piece
from vtp.curation.rows import CAPTION
from vtp.layers.decode import DecodeError, decode_rgb

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

    @property
    def images(self) -> int:
        """How many there are."""
        return self.stop - self.start


def hash_images(job: ImageJob) -> None:
    """Perceptual hashes of 64 bits: signs of the lowest frequencies of the image, in grey (imagehash.phash)."""
    import imagehash

    values = np.zeros((job.images, 2), np.uint64)
    for index, place in enumerate(locate(job)):
        with suppress(DecodeError):
            content = read_image(job.pool, place, outside_links=job.outside_links)
            picture = decode_rgb(content, least=(HASHED_SIDE, HASHED_SIDE))
            bits = np.packbits(imagehash.phash(picture).hash.reshape(-1))
            values[index] = bits.view(">u8")[0], MEASURED
    save_array(job.done, values)


class ImageLocation(NamedTuple):
    """Where an image lies in a pool, as its table says: whatever stands there, it is read or refused."""

    tar: str | bytes | None
    offset: float | None
    size: float | None
    caption: str | None


def read_image(pool: Path, place: ImageLocation, *, outside_links: bool = False) -> bytes:
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


def locate(job: ImageJob) -> list[ImageLocation]:
    """Where the images of the piece lie."""
    chosen = np.flatnonzero(load_array(job.kept))[job.start : job.stop]
    table = pick_rows(job.rows, (*IMAGE_COLUMNS, CAPTION), chosen)
    return [ImageLocation(*row.values()) for row in table.to_pylist()]


def sortable(values: np.ndarray) -> np.ndarray:
    """Floats [n] as uint64 in the same order; -0.0 is 0.0."""
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))
