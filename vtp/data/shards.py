"""Shards: WebDataset tars of images, captions and labels, described by a manifest.

    manifest.json        splits, classes, categories, digests
    train-00000.tar      <key>.json, <key>.png, <key>.txt per sample
    train-00000.parquet  one row per sample: where its image lies in the tar, and its caption and labels

Any WebDataset reader streams the tars. `ShardDataset` reads samples in any order through the table.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vtp.artefact import ArtefactError, read_json, whole_file, write_json
from vtp.config import Config, ConfigError
from vtp.draws import numpy_draws

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

FORMAT_VERSION = 1
MAX_PIXELS = 25_000_000  # larger pictures are refused before they are decoded
COLUMNS = ("key", "offset", "size", "caption", "label", "category", "kind")


class DataError(ValueError):
    """A sample cannot be read; the message names its shard and key."""


class Shard(Config):
    """One tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Manifest(Config):
    """What a folder of shards holds."""

    format_version: int
    source: str
    image_size: int
    classes: list[str]
    categories: list[str]
    category_of_class: list[int]
    splits: dict[str, list[Shard]]
    class_counts: dict[str, list[int]]
    attribution: str

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `manifest.json`. Raises ArtefactError when it is missing, damaged or of another format."""
        path = folder / "manifest.json"
        values = read_json(path)
        if values.get("format_version") != FORMAT_VERSION:
            version = values.get("format_version")
            raise ArtefactError(f"{path}: shards of format {version!r}, this code reads {FORMAT_VERSION}")
        try:
            return cls.parse(values, where=str(path))
        except ConfigError as error:
            raise ArtefactError(f"{error}; write the shards again with prepare_data") from None

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_json(folder / "manifest.json", self.model_dump())


class Record(NamedTuple):
    """One sample as it is written."""

    key: str
    png: bytes
    caption: str
    label: int  # -1: none
    category: int  # -1: none
    kind: str


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """One tar and its table, equal bytes for equal records: fixed order, owner, mode and time."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[tuple] = []
    with whole_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                labels = {"key": record.key, "label": record.label, "category": record.category, "kind": record.kind}
                _add(tar, f"{record.key}.json", json.dumps(labels).encode())
                offset = _add(tar, f"{record.key}.png", record.png)
                _add(tar, f"{record.key}.txt", record.caption.encode())
                rows.append((record.key, offset, len(record.png), record.caption, *list(labels.values())[1:]))
        table = pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
        # The table first: a tar that is there is complete.
        with whole_file(path.with_suffix(".parquet")) as beside:
            pq.write_table(table, beside)


class ShardDataset:
    """Random access to the samples of a split. Opening it checks that every shard is whole."""

    def __init__(self, folder: Path, split: str) -> None:
        import pyarrow as pa

        self.folder = folder
        self.manifest = Manifest.load(folder)
        if split not in self.manifest.splits:
            raise ArtefactError(f"{folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}")
        shards = self.manifest.splits[split]
        self._paths = [folder / shard.name for shard in shards]
        tables = [_open_shard(folder, shard) for shard in shards]
        self._shard = np.repeat(np.arange(len(shards)), [len(table) for table in tables])
        table = pa.concat_tables(tables)
        self.keys: list[str] = table["key"].to_pylist()
        self.captions: list[str] = table["caption"].to_pylist()
        self.labels = table["label"].to_numpy()
        self.categories = table["category"].to_numpy()
        self._offsets, self._sizes = table["offset"].to_numpy(), table["size"].to_numpy()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def singles(self) -> np.ndarray:
        """Indices of the samples that have a class."""
        return np.flatnonzero(self.labels >= 0)

    def image(self, index: int) -> "Image":
        """The picture, RGB. Raises DataError naming shard and key when it cannot be decoded."""
        from PIL import Image

        path = self._paths[self._shard[index]]
        with path.open("rb") as file:
            file.seek(self._offsets[index])
            content = file.read(self._sizes[index])
        try:
            picture = Image.open(io.BytesIO(content))
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{path}, {self.keys[index]}: {picture.size} pixels, more than {MAX_PIXELS}")
            return picture.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path}, {self.keys[index]}: not a readable image ({error})") from None

    def images(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Pictures [n, 3, H, W] uint8; they must all be of one size."""
        pixels = [np.asarray(self.image(int(index))) for index in indices]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def sample_indices(start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Samples `start` to `start + count` of an endless stream: epochs of `size`, each in its own order."""
    positions = np.arange(start, start + count)
    epochs = positions // size
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = epoch_order(size, seed, int(epoch))[positions[chosen] % size]
    return indices


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation of range(size). Kept: a step asks for it again and may touch two epochs."""
    return numpy_draws(seed, "epoch", epoch).permutation(size)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member; the offset of its content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(content))
    return offset


def _open_shard(folder: Path, shard: Shard) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / shard.name
    remedy = "fetch the folder again (dvc checkout), or write the shards again with prepare_data"
    if not path.exists():
        raise ArtefactError(f"{path}: this shard is in manifest.json and not in the folder; {remedy}")
    if path.stat().st_size != shard.bytes:
        raise ArtefactError(f"{path}: {path.stat().st_size} bytes, manifest.json says {shard.bytes}; {remedy}")
    try:
        table = pq.read_table(path.with_suffix(".parquet"), columns=list(COLUMNS))
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtefactError(f"{path.with_suffix('.parquet')}: {error}; {remedy}") from None
    if len(table) != shard.samples:
        raise ArtefactError(f"{path}: its table has {len(table)} rows, manifest.json says {shard.samples}; {remedy}")
    return table
