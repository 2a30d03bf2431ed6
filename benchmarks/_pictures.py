"""Shards of noise with the spectrum of photographs: the work of a step does not depend on what pictures show."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.data.dataset import ShardDataset
from vtp.data.shards import FORMAT_VERSION, Manifest, SampleRecord, describe_split, write_shard
from vtp.data.stream import Stream, StreamConfig

DIFFERENT = 16  # pictures; their files are repeated


def write_pictures(folder: Path, *, side: int, count: int, shards: int = 4) -> Path:
    """JPEGs with `side` on their longer side, 4:3, with captions, as shards."""
    folder.mkdir(parents=True)
    files = [_picture(number, side, side * 3 // 4) for number in range(DIFFERENT)]
    summaries = []
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        records = [
            SampleRecord(
                key=f"p{number:06d}",
                image=files[number % DIFFERENT],
                extension="jpg",
                width=side,
                height=side * 3 // 4,
                caption=f"picture number {number} of many",
                label=0,
                category=-1,
                kind="image",
            )
            for number in numbers
        ]
        summaries.append(write_shard(folder / f"train-{shard:05d}.tar", records, classes=1))
    Manifest(
        format_version=FORMAT_VERSION,
        source="noise",
        image_size=None,
        classes=["noise"],
        class_ids=["noise"],
        templates=["{}"],
        categories=[],
        category_of_class=[],
        location=None,
        attribution="",
        splits={"train": describe_split(summaries)},
    ).save(folder)
    return folder


def stream_of(folder: Path, config: StreamConfig) -> Stream:
    """The training stream of a folder of shards."""
    return Stream([ShardDataset(folder, "train")], config, seed=0)


def _picture(number: int, width: int, height: int) -> bytes:
    """Amplitudes fall with the frequency, as in photographs; about 0.3 bytes a pixel."""
    rng = np.random.default_rng(number)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequencies[0, 0] = np.inf
    noise = rng.standard_normal((3, height, width))
    mixed = np.einsum("ij,jhw->ihw", [[1, 0.1, 0], [0.9, 0, 0.2], [0.8, -0.2, 0]], noise)  # mostly grey
    field = np.fft.ifft2(np.fft.fft2(mixed) / frequencies**1.2).real
    pixels = 128 + 50 * field / field.std(axis=(1, 2), keepdims=True)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    picture.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()
