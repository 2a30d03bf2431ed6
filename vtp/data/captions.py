"""Cached captions: token features of a frozen text encoder, once for every distinct caption.

    config.json                  the text encoder and its digest, sizes, digests of all files
    captions.parquet             the captions, in the order of their features
    captions-00000.safetensors   features [tokens, w] bfloat16 of some captions, one behind the other, and their ends [n]

Files are memory-mapped: a batch touches its own rows alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtp.artefact import ArtefactError, digest, load_tensors, read_json, verify_files, whole_file, write_json
from vtp.config import Config, ConfigError
from vtp.data.latents import FileName, LatentShard

if TYPE_CHECKING:
    from vtp.data.dataset import ShardDataset

FORMAT_VERSION = 1
TABLE = "captions.parquet"
REMEDY = "fetch the folder again (dvc checkout), or run cache_captions again"


class CaptionsArtefact(Config):
    """`config.json` of a folder of captions."""

    format_version: Literal[1]
    text_encoder: dict[str, Any]  # a vtp.models.text_encoder.TextEncoderRecord
    captions: int = Field(ge=1)
    width: int = Field(ge=1)  # numbers of a token
    length: int = Field(ge=1)  # tokens of a caption at most
    shards: list[FileName] = Field(min_length=1)
    files: dict[FileName, str]  # SHA-256 of every other file


def distinct_captions(splits: Iterable["ShardDataset"]) -> list[str]:
    """Every caption once, sorted; empty ones are none."""
    found: set[str] = set()
    for images in splits:
        for captions in images.captions():
            found.update(caption for caption in captions if caption.strip())
    return sorted(found)


def ragged(features: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a file holds of features [n, L, w], of whose captions the tokens come first."""
    return {"features": features[mask].bfloat16().cpu(), "ends": mask.sum(1).cumsum(0).cpu()}


def finish_captions(
    folder: Path, shards: Sequence[LatentShard], captions: Sequence[str], values: Mapping[str, Any]
) -> None:
    """Write the table of the captions and `config.json`, which ends the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole_file(folder / TABLE) as temporary:
        pq.write_table(pa.table({"caption": list(captions)}), temporary, compression="zstd")
    names = [shard.name for shard in shards]
    known = {"format_version": FORMAT_VERSION, "captions": len(captions), "shards": names}
    files = {name: digest(folder / name) for name in (*names, TABLE)}
    config = CaptionsArtefact.parse(known | {"files": files} | dict(values), where="config.json")
    write_json(folder / "config.json", config.model_dump())


class CachedCaptions:
    """Features by caption. Raises ArtefactError when a file is not the one that was written."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self.folder = folder
        values = read_json(folder / "config.json")
        if values.get("format_version") != FORMAT_VERSION or "text_encoder" not in values:
            raise ArtefactError(f"{folder}: no captions of format {FORMAT_VERSION}; is this the right folder? {REMEDY}")
        try:
            self.config = CaptionsArtefact.parse(values, where=str(folder / "config.json"))
        except ConfigError as error:
            raise ArtefactError(f"{error}; {REMEDY}") from None
        if {*self.config.shards, TABLE} != self.config.files.keys():
            raise ArtefactError(f"{folder / 'config.json'}: its files are not those of its captions; {REMEDY}")
        verify_files(folder, self.config.files, remedy=REMEDY)
        shards = [load_tensors(folder / name) for name in self.config.shards]
        self._features = [shard["features"] for shard in shards]
        self._ends = [np.concatenate([[0], shard["ends"].numpy()]) for shard in shards]
        self._first = np.cumsum([0, *(len(shard["ends"]) for shard in shards)])
        texts = pq.read_table(folder / TABLE, columns=["caption"])["caption"].to_pylist()
        if len(texts) != self.config.captions or len(texts) != self._first[-1]:
            raise ArtefactError(f"{folder}: {len(texts)} captions and features of {self._first[-1]}; {REMEDY}")
        self._numbers = {text: number for number, text in enumerate(texts)}

    def __len__(self) -> int:
        return self.config.captions

    def numbers(self, captions: Iterable[str]) -> np.ndarray:
        """Where captions stand [n]. Raises ArtefactError for one that is not there."""
        try:
            return np.array([self._numbers[caption] for caption in captions], dtype=np.int64)
        except KeyError as error:
            raise ArtefactError(
                f"{self.folder}: no features of the caption {error.args[0]!r}; run cache_captions on the shards of these "
                "pictures"
            ) from None

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `rows`, of captions; an empty one has no token. Raises ArtefactError for one that is not there."""
        said = np.array([bool(text.strip()) for text in captions])
        features = torch.zeros(len(captions), self.config.length, self.config.width)
        mask = torch.zeros(len(captions), self.config.length, dtype=torch.bool)
        if said.any():
            numbers = self.numbers(text for text in captions if text.strip())
            places = torch.from_numpy(said)
            features[places], mask[places] = self.rows(numbers)
        return features, mask

    def rows(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features [n, L, w] float32, zero behind a caption's end, and which tokens there are [n, L]."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        parts = []
        for shard, place in zip(shards.tolist(), (numbers - self._first[shards]).tolist(), strict=True):
            start, stop = self._ends[shard][place : place + 2].tolist()
            parts.append(self._features[shard][start:stop].float())
        features = pad_sequence([*parts, torch.empty(self.config.length, self.config.width)], batch_first=True)[:-1]
        lengths = torch.tensor([len(part) for part in parts])
        return features, torch.arange(self.config.length) < lengths[:, None]
