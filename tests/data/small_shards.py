"""Small folders of shards for tests of reading them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.data.shards import FORMAT_VERSION, Manifest, SampleRecord, describe_split, write_shard


def picture(number: int = 0, side: int | tuple[int, int] = 8, *, pixels: np.ndarray | None = None, **how) -> bytes:
    """A file whose first pixel tells `number`, of a square or of a width and height; or of these `pixels`."""
    if pixels is None:
        width, height = (side, side) if isinstance(side, int) else side
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        pixels[:, :] = (number % 256, number // 256, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | how))
    return buffer.getvalue()


def record(number: int, **changes) -> SampleRecord:
    """Sample `number`; its caption is its number."""
    values = {"key": f"k{number:06d}", "image": picture(number), "extension": "png", "width": 8, "height": 8}
    values |= {"caption": str(number), "label": number % 3, "category": -1, "kind": "image"}
    return SampleRecord(**(values | changes))


def write_shards(folder: Path, sizes, *, first: int = 0, change=lambda number: {}, location: str | None = None) -> Path:
    """A folder of shards with so many samples each, numbered through from `first`; validation holds the first shard's."""
    folder.mkdir(parents=True)
    summaries, start = [], first
    for shard, size in enumerate(sizes):
        records = [record(number, **change(number)) for number in range(start, start + size)]
        summaries.append(write_shard(folder / f"train-{shard:05d}.tar", records, classes=3))
        start += size
    split = describe_split(summaries)
    names = ["a", "b", "c"]
    Manifest(
        format_version=FORMAT_VERSION,
        source="test",
        image_size=8,
        classes=names,
        class_ids=names,
        templates=["{}"],
        categories=[],
        category_of_class=[],
        location=location,
        attribution="",
        splits={"train": split, "validation": split},
    ).save(folder)
    return folder


def fetched(cache, location: str, shard) -> int:
    """Bytes of a shard that a cache opened; here, because a process that starts with it imports this file alone."""
    with cache.open(location, shard) as file:
        return len(file.read())
