"""Statistics of real images, which rFID and gFID compare with: computed once, kept as an artefact.

    config.json             features, size of the crops, digest of the data, and what each split is
    <split>.safetensors     mean and covariance of pooled and spatial features, and some features as they are

They belong to one data set, one crop and one network; whoever reads them says what they must belong to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from vtp.artefact import ArtefactError, digest, load_tensors, read_json, save_tensors, whole_folder, write_json
from vtp.config import Config
from vtp.data.dataset import ShardDataset
from vtp.evaluation.features import AnyFeaturesConfig, FeaturesConfig
from vtp.evaluation.frechet import GaussianStatistics

FORMAT_VERSION = 1
CROP = "adm_centre"  # vtp.layers.images.centre_crop


class SplitConfig(Config):
    """Which images of a split count."""

    samples: int | None = Field(ge=2, description="the first so many; null: all")
    labelled: bool = Field(description="only images with a class, as a class-conditional generator learns them")
    kept: int = Field(ge=0, description="images whose features are kept, for precision, recall and kernel distances")


@dataclass(frozen=True)
class SplitReference:
    """One split."""

    rows: np.ndarray  # [count] the images, as indices into the split
    statistics: GaussianStatistics
    spatial: GaussianStatistics | None
    features: Tensor  # [kept, D] pooled features of the first images

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.rows)


class Reference:
    """A folder of reference statistics. Raises ArtefactError when it is damaged or of another format."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.features: AnyFeaturesConfig = TypeAdapter(FeaturesConfig).validate_python(config["features"])
        self.image_size: int = config["image_size"]
        self.data: str = config["data"]
        self._splits: dict[str, dict[str, Any]] = config["splits"]

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read `config.json`; tensors are read when they are asked for."""
        config = read_json(folder / "config.json")
        if config.get("kind") != "reference" or config.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"{folder}: no reference statistics of format {FORMAT_VERSION}; run the stage reference"
            )
        return cls(folder, config)

    def require(self, images: ShardDataset, size: int) -> None:
        """Raises ArtefactError when these are not the statistics of that data in crops of that size."""
        if self.data != digest(images.folder / "manifest.json"):
            raise ArtefactError(
                f"{self.folder} belongs to other data than {images.folder}; run the stage reference again"
            )
        if self.image_size != size:
            raise ArtefactError(
                f"{self.folder} holds crops of {self.image_size} pixels, the tokenizer's are {size}; "
                "set reference.image_size to that"
            )

    def of(self, split: str) -> SplitReference:
        """One split. Raises ArtefactError when it is not there."""
        if split not in self._splits:
            raise ArtefactError(
                f"{self.folder}: no split {split!r}, it has {', '.join(self._splits)}; add it to reference.splits"
            )
        tensors = load_tensors(self.folder / f"{split}.safetensors")
        statistics = {
            name: GaussianStatistics.of_tensors({key: tensors[f"{name}_{key}"] for key in ("count", "mean", "scatter")})
            for name in ("pooled", "spatial")
            if f"{name}_mean" in tensors
        }
        return SplitReference(
            tensors["rows"].numpy(), statistics["pooled"], statistics.get("spatial"), tensors["features"]
        )


def save_reference(
    folder: Path,
    images: Mapping[str, ShardDataset],
    splits: Mapping[str, SplitReference],
    description: Mapping[str, Any],
) -> None:
    """Write the folder; `description` has the features and the image size."""
    with whole_folder(folder) as temporary:
        for name, split in splits.items():
            tensors = {"rows": torch.from_numpy(split.rows), "features": split.features}
            for kind, statistics in (("pooled", split.statistics), ("spatial", split.spatial)):
                if statistics is not None:
                    tensors |= {f"{kind}_{key}": value for key, value in statistics.tensors().items()}
            save_tensors(temporary / f"{name}.safetensors", tensors)
        data = digest(next(iter(images.values())).folder / "manifest.json")
        counts = {name: {"images": split.count} for name, split in splits.items()}
        write_json(
            temporary / "config.json",
            {
                "kind": "reference",
                "format_version": FORMAT_VERSION,
                **description,
                "crop": CROP,
                "data": data,
                "splits": counts,
            },
        )


def rows_of(images: ShardDataset, config: SplitConfig) -> np.ndarray:
    """The images that count. Raises ValueError when there are fewer than asked for, or than two."""
    rows = images.singles(config.samples).rows if config.labelled else np.arange(len(images))[: config.samples]
    wanted = config.samples or 2
    if len(rows) < wanted:
        kind = "labelled images" if config.labelled else "images"
        raise ValueError(
            f"{images.folder}: {len(rows)} {kind} where reference.splits asks for {wanted}; lower `samples`"
        )
    return rows.astype(np.int64)
