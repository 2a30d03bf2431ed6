"""Statistics of real images, which rFID and gFID compare with: computed once, kept as an artefact.

    config.json             features with their weights' digest, crop, digest of the data, and what each split is
    <split>.safetensors     rows: the images, as indices into the split; pooled_*, spatial_*: count, mean and scatter;
                            features: pooled features of the first images

They belong to one data set, one crop and one network; whoever reads them says what they must belong to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import (
    ArtefactError,
    digest,
    load_tensors,
    read_json,
    save_tensors,
    verify_files,
    whole_folder,
    write_json,
)
from vtp.config import Config, ConfigError
from vtp.data.dataset import ShardDataset
from vtp.evaluation.feature_set import FeatureSet
from vtp.evaluation.features import AnyFeaturesConfig, FeaturesConfig
from vtp.evaluation.frechet import GaussianStatistics

FORMAT_VERSION = 2
REMEDY = "fetch the folder again (dvc checkout), or run the stage reference again"
ROWS = "rows"
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names a file


class SplitConfig(Config):
    """Which images of a split count."""

    samples: int | None = Field(ge=2, description="the first so many; null: all")
    labelled: bool = Field(
        description="only images with a class, as a generator learns them; all, where the data have no classes"
    )
    kept: int | None = Field(
        ge=0, description="images whose features are kept, for precision, recall and kernel distance; null: all"
    )


class SplitFacts(Config):
    """What `config.json` says of a split."""

    count: int
    labelled: bool
    kept: int


class ReferenceArtefact(Config):
    """`config.json` of a reference."""

    format_version: Literal[2]
    features: FeaturesConfig
    image_size: int  # side of the crops
    crop: Literal["adm_centre"]  # vtp.layers.images.centre_crop
    data: str  # digest of the shards' manifest
    splits: dict[SplitName, SplitFacts]
    files: dict[str, str]  # SHA-256 of the file of every split


@dataclass(frozen=True)
class SplitReference:
    """One split."""

    rows: np.ndarray  # [count] int64: the images, as indices into the split
    statistics: GaussianStatistics
    spatial: GaussianStatistics | None
    features: Tensor  # [kept, D] pooled features of the first images

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.rows)


class Reference:
    """A folder of reference statistics."""

    def __init__(self, folder: Path, config: ReferenceArtefact) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `config.json`; tensors are read when they are asked for. Raises ArtefactError for another folder."""
        values = read_json(folder / "config.json")
        if values.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"{folder}: reference statistics of format {values.get('format_version')!r}, this code reads "
                f"{FORMAT_VERSION}; is this the right folder? If so, run the stage reference again"
            )
        try:
            return cls(folder, ReferenceArtefact.parse(values, where=str(folder / "config.json")))
        except ConfigError as error:
            raise ArtefactError(f"{error}; {REMEDY}") from None

    @property
    def features(self) -> AnyFeaturesConfig:
        """The network; whatever is compared needs the same."""
        return self.config.features

    @property
    def image_size(self) -> int:
        """Side of the crops."""
        return self.config.image_size

    @property
    def data(self) -> str:
        """Digest of the shards' manifest."""
        return self.config.data

    def require(self, images: ShardDataset, size: int) -> None:
        """Raises ArtefactError when these are not the statistics of that data in crops of that size."""
        if self.data != _data(images):
            raise ArtefactError(f"{self.folder}: statistics of other data than {images.folder}; run the stage again")
        self.require_size(size)

    def require_size(self, size: int) -> None:
        """Raises ArtefactError when these are statistics of another size of images."""
        if self.image_size != size:
            raise ArtefactError(
                f"{self.folder}: statistics of {self.image_size} x {self.image_size} images, the tokenizer makes "
                f"{size} x {size}; set reference.image_size to {size}"
            )

    def of(self, split: str) -> SplitReference:
        """One split. Raises ArtefactError when it is not there or damaged."""
        if split not in self.config.splits:
            raise ArtefactError(
                f"{self.folder}: no split {split!r}, it has {', '.join(self.config.splits)}; add it to reference.splits"
            )
        path = self.folder / f"{split}.safetensors"
        verify_files(self.folder, {path.name: self.config.files.get(path.name, "")}, remedy=REMEDY)
        tensors = load_tensors(path)
        feature_set, rows = FeatureSet.of_tensors(tensors, where=str(path)), tensors.get(ROWS, torch.empty(0))
        facts = self.config.splits[split]
        if (len(rows), feature_set.count, len(feature_set.features)) != (facts.count, facts.count, facts.kept):
            raise ArtefactError(f"{path} is not what {self.folder / 'config.json'} says; {REMEDY}")
        return SplitReference(rows.numpy(), feature_set.statistics, feature_set.spatial, feature_set.features)


class Chosen(NamedTuple):
    """The images of a split that count."""

    images: ShardDataset
    config: SplitConfig
    rows: np.ndarray  # [count] int64, ascending

    @property
    def kept(self) -> int:
        """How many of the first have their features kept."""
        return len(self.rows) if self.config.kept is None else self.config.kept


def choose(images: ShardDataset, config: SplitConfig) -> Chosen:
    """Raises ValueError when there are fewer images than asked for, or than a covariance needs."""
    rows = images.singles(config.samples).rows if config.labelled else np.arange(len(images))[: config.samples]
    wanted = max(config.samples or 2, config.kept or 0)
    if len(rows) < wanted:
        kind = "labelled images" if config.labelled else "images"
        raise ValueError(
            f"{images.folder}: {len(rows)} {kind} where reference.splits asks for {wanted}; lower `samples` and `kept`"
        )
    return Chosen(images, config, rows.astype(np.int64))


def save_reference(
    folder: Path,
    splits: Mapping[str, tuple[Chosen, FeatureSet]],
    *,
    features: AnyFeaturesConfig,
    image_size: int,
) -> None:
    """Write the folder, whole or not at all."""
    some = next(iter(splits.values()))[0]
    with whole_folder(folder) as temporary:
        written = {}
        for name, (chosen, feature_set) in splits.items():
            path = temporary / f"{name}.safetensors"
            save_tensors(path, {ROWS: torch.from_numpy(chosen.rows)} | feature_set.tensors())
            written[path.name] = digest(path)
        config = ReferenceArtefact(
            format_version=FORMAT_VERSION,
            features=features,
            image_size=image_size,
            crop="adm_centre",
            data=_data(some.images),
            splits={
                name: SplitFacts(
                    count=feature_set.count,
                    labelled=chosen.config.labelled and bool(chosen.images.manifest.classes),
                    kept=len(feature_set.features),
                )
                for name, (chosen, feature_set) in splits.items()
            },
            files=written,
        )
        write_json(temporary / "config.json", config.model_dump(mode="json"))


def _data(images: ShardDataset) -> str:
    return digest(images.folder / "manifest.json")
