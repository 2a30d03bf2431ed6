"""What a generator is told of the pictures whose latents it learns: their classes, or their captions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp.data.captions import CachedCaptions
from vtp.data.dataset import ShardDataset
from vtp.data.shards import NO_LABEL
from vtp.layers.captions import Captions, Condition

CaptionsOf = Callable[[np.ndarray], Sequence[str]]  # of the samples with these numbers


class Told(NamedTuple):
    """The conditions of a batch, as workers prepare them and as a step reads them: labels, features, or ids to encode."""

    values: Tensor  # [B] labels, [B, L, w] features or [B, L] ids
    mask: Tensor  # [B, L] bool; [B, 0] of labels

    @property
    def condition(self) -> Condition:
        """As a model takes it."""
        return Captions(self.values, self.mask) if self.mask.shape[1] else self.values


class SampleConditions(ABC):
    """Of the samples of a split, by number."""

    @abstractmethod
    def rows(self, rows: np.ndarray) -> Told:
        """Of some samples, on the CPU."""

    def finish(self, told: Told) -> Told:
        """What is left to do on the device."""
        return told

    def of(self, rows: np.ndarray, device: torch.device | str) -> Condition:
        """As a model takes them, on the device."""
        return self.finish(Told(*(each.to(device) for each in self.rows(rows)))).condition


class ClassConditions(SampleConditions):
    """Labels [N]."""

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels

    def rows(self, rows: np.ndarray) -> Told:
        return _told_labels(self._labels[torch.from_numpy(rows)])


class ImageConditions(SampleConditions):
    """The labels that a generator learns of pictures in shards; the number of labels stands for none."""

    def __init__(self, images: ShardDataset) -> None:
        self._images = images

    def rows(self, rows: np.ndarray) -> Told:
        labels = torch.tensor([self._images.learnt_label(int(row)) for row in rows])
        return _told_labels(labels.where(labels != NO_LABEL, len(self._images.manifest.learnt_classes)))


class CachedConditions(SampleConditions):
    """Captions whose features are there already; an empty one is the null caption. `captions`: of some samples."""

    def __init__(self, cached: CachedCaptions, captions: CaptionsOf) -> None:
        self._cached, self._captions = cached, captions

    def rows(self, rows: np.ndarray) -> Told:
        """Raises ArtefactError for a caption that has no features."""
        return Told(*self._cached.features(self._captions(rows)))


class EncodedConditions(SampleConditions):
    """Captions that are encoded when they are asked for: ids by workers, features on the device.

    An empty one is the null caption.
    """

    def __init__(
        self, captions: CaptionsOf, tokenize: Callable[[Sequence[str]], Any], encode: Callable[[Any], Captions]
    ) -> None:
        self._captions, self._tokenize, self._encode = captions, tokenize, encode

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encode": None}  # workers have no device

    def rows(self, rows: np.ndarray) -> Told:
        captions = self._captions(rows)
        ids, mask = self._tokenize(captions)
        return Told(ids, mask & torch.tensor([bool(text.strip()) for text in captions])[:, None])

    def finish(self, told: Told) -> Told:
        return Told(*self._encode(told))


def captions_among(captions: Sequence[str]) -> CaptionsOf:
    """Those of a list."""
    return lambda rows: [captions[int(row)] for row in rows]


def _told_labels(labels: Tensor) -> Told:
    return Told(labels, torch.empty(len(labels), 0, dtype=torch.bool))
