"""Statistics of real images, which rFID and gFID compare with: computed once, kept as an artefact.

    config.json             networks with their weights' digests, crop, classes, digest of the data, what each split is
    <split>.safetensors     rows: the images, as indices into the split; labels: those that a generator learns, where
                            only images with one count; of every network, <name>/pooled_* and <name>/spatial_*: count,
                            mean and scatter, and <name>/features: pooled features of the first images

They belong to one data set and one crop; whoever reads them says what they must belong to.
"""

from collections.abc import Mapping, Sequence
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
from vtp.data.shards import NO_LABEL
from vtp.evaluation.feature_set import FeatureSets
from vtp.evaluation.features import AnyFeaturesConfig, FeaturesConfig, features_name

FORMAT_VERSION = 3
REMEDY = "fetch the folder again (dvc checkout), or run the stage reference again"
ROWS, LABELS = "rows", "labels"
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

    format_version: Literal[3]
    features: list[FeaturesConfig] = Field(min_length=1)
    image_size: int  # side of the crops
    crop: Literal["adm_centre"]  # vtp.layers.images.centre_crop
    classes: list[str]  # what a generator of these data learns, in the order of labels
    data: str  # digest of the shards' manifest
    splits: dict[SplitName, SplitFacts]
    files: dict[str, str]  # SHA-256 of the file of every split


@dataclass(frozen=True)
class SplitReference:
    """One split."""

    rows: np.ndarray  # [count] int64: the images, as indices into the split
    labels: Tensor  # [count] int64, NO_LABEL for an image without a class
    networks: FeatureSets  # kept: pooled features of the first images

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
    def features(self) -> Sequence[AnyFeaturesConfig]:
        """The networks; whatever is compared needs the same."""
        return self.config.features

    @property
    def image_size(self) -> int:
        """Side of the crops."""
        return self.config.image_size

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of labels; a single one for data without classes."""
        return self.config.classes

    @property
    def data(self) -> str:
        """Digest of the shards' manifest."""
        return self.config.data

    def require_data(self, images: ShardDataset) -> None:
        """Raises ArtefactError when these are not the statistics of that data."""
        if self.data != _data(images):
            raise ArtefactError(f"{self.folder}: statistics of other data than {images.folder}; run the stage again")

    def require_size(self, size: int) -> None:
        """Raises ArtefactError when these are statistics of another size of images."""
        if self.image_size != size:
            raise ArtefactError(
                f"{self.folder}: statistics of {self.image_size} x {self.image_size} images, those to compare are "
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
        networks = FeatureSets.of_tensors(tensors, map(features_name, self.features), where=str(path))
        rows, labels = (tensors.get(name, torch.empty(0)) for name in (ROWS, LABELS))
        facts = self.config.splits[split]
        for each in networks.values():
            found = (len(rows), len(labels), each.count, len(each.features))
            if found != (facts.count, facts.count, facts.count, facts.kept):
                raise ArtefactError(f"{path} is not what {self.folder / 'config.json'} says; {REMEDY}")
        return SplitReference(rows.numpy(), labels, networks)


class Chosen(NamedTuple):
    """The images of a split that count."""

    images: ShardDataset
    config: SplitConfig
    rows: np.ndarray  # [count] int64, ascending
    labels: np.ndarray  # [count] int64; NO_LABEL where images without a class count too

    @property
    def kept(self) -> int:
        """How many of the first have their features kept."""
        return len(self.rows) if self.config.kept is None else self.config.kept


def choose(images: ShardDataset, config: SplitConfig) -> Chosen:
    """Raises ValueError when there are fewer images than asked for, or than a covariance needs."""
    if config.labelled:
        rows, labels = images.learnt(config.samples)
    else:
        rows = np.arange(len(images))[: config.samples]
        labels = np.full(len(rows), NO_LABEL)
    wanted = max(config.samples or 2, config.kept or 0)
    if len(rows) < wanted:
        kind = "labelled images" if config.labelled else "images"
        raise ValueError(
            f"{images.folder}: {len(rows)} {kind} where reference.splits asks for {wanted}; lower `samples` and `kept`"
        )
    return Chosen(images, config, rows.astype(np.int64), labels.astype(np.int64))


def save_reference(
    folder: Path,
    splits: Mapping[str, tuple[Chosen, FeatureSets]],
    *,
    features: Sequence[AnyFeaturesConfig],
    image_size: int,
) -> None:
    """Write the folder, whole or not at all."""
    some = next(iter(splits.values()))[0]
    with whole_folder(folder) as temporary:
        written = {}
        for name, (chosen, networks) in splits.items():
            path = temporary / f"{name}.safetensors"
            of_images = {ROWS: torch.from_numpy(chosen.rows), LABELS: torch.from_numpy(chosen.labels)}
            save_tensors(path, of_images | networks.tensors())
            written[path.name] = digest(path)
        config = ReferenceArtefact(
            format_version=FORMAT_VERSION,
            features=list(features),
            image_size=image_size,
            crop="adm_centre",
            classes=some.images.manifest.learnt_classes,
            data=_data(some.images),
            splits={
                name: SplitFacts(
                    count=networks.count,
                    labelled=chosen.config.labelled and bool(chosen.images.manifest.classes),
                    kept=chosen.kept,
                )
                for name, (chosen, networks) in splits.items()
            },
            files=written,
        )
        write_json(temporary / "config.json", config.model_dump(mode="json"))


def _data(images: ShardDataset) -> str:
    return digest(images.folder / "manifest.json")
