"""A small convolutional detector of drawings: where the centre of each is, which class it has, and how large it is.

It reads composed scenes and samples of generators, and takes the place of the object detector of GenEval (Ghosh et al.
2023), which knows photographs. Centres are peaks of heatmaps as in CenterNet (Zhou et al. 2019). The heatmap of a class is
that of all centres times the class's probability, which is learnt in a fraction of the steps that one map for each takes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp.artefact import (
    ArtefactError,
    digest,
    load_module,
    load_tensors,
    read_json,
    save_tensors,
    verify_files,
    whole_folder,
    write_json,
)
from vtp.config import Config

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
REMEDY = "fetch the folder again (dvc checkout), or run the stage train_detector again"
THRESHOLD = 0.3  # of a peak
APART = 0.5  # least distance of two centres along one axis, in sizes of the larger picture: pictures do not overlap
GROUPS = 8  # of channels that are normalised together
RARE = -4.0  # logit of a centre at first: few cells have one


class DetectorConfig(Config):
    """Its network."""

    width: int = Field(ge=GROUPS, le=1024, multiple_of=GROUPS, description="channels at the resolution of the heatmaps")
    stride: Literal[2, 4] = Field(description="pixels along the side of a cell of the heatmaps")


class DetectorArtefact(Config):
    """`config.json` of a detector's folder."""

    format_version: Literal[1]
    detector: DetectorConfig
    image_size: int = Field(ge=8)  # short edge of the pictures that it learnt, pixels
    classes: list[str] = Field(min_length=1)
    files: dict[str, str]  # SHA-256 by name


class Heatmaps(NamedTuple):
    """What the network says of every cell of an image."""

    centres: Tensor  # [B, h, w] logits
    classes: Tensor  # [B, C, h, w] logits
    sizes: Tensor  # [B, h, w] of the picture whose centre is there, in shares of the short edge


class Detection(NamedTuple):
    """A picture that was found."""

    label: int
    score: float  # in (0, 1)
    centre: tuple[float, float]  # in shares of width and height
    size: float  # longest side in shares of the short edge


class SceneDetector(nn.Module):
    """Heatmaps of images of any size; `classes` are names, `image_size` the short edge of what it learns."""

    def __init__(self, config: DetectorConfig, *, classes: Sequence[str], image_size: int) -> None:
        super().__init__()
        self.config, self.classes, self.image_size = config, list(classes), image_size
        width = config.width
        self.stem = nn.Conv2d(3, width, config.stride + 2, config.stride, padding=1)
        self.fine, self.middle = _ResidualBlock(width), _ResidualBlock(2 * width)
        self.coarse = nn.Sequential(_ResidualBlock(3 * width), _ResidualBlock(3 * width))
        self.to_middle, self.to_coarse = nn.Conv2d(width, 2 * width, 2, 2), nn.Conv2d(2 * width, 3 * width, 2, 2)
        self.beside, self.from_middle = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)
        self.from_coarse = nn.Conv2d(3 * width, 2 * width, 1)
        self.merged_middle, self.merged_fine = _ResidualBlock(2 * width), _ResidualBlock(2 * width)
        self.norm = nn.GroupNorm(GROUPS, 2 * width)
        self.head = nn.Conv2d(2 * width, 2 + len(self.classes), 1)
        nn.init.zeros_(self.head.weight)
        self.head.bias = nn.Parameter(torch.tensor([RARE, 0.0, *[0.0] * len(self.classes)]))

    def forward(self, images: Tensor) -> Heatmaps:
        """Of images [B, 3, H, W] in [-1, 1]; h and w are H and W over the stride."""
        fine = self.fine(self.stem(images))
        middle = self.middle(self.to_middle(fine))
        coarse = self.coarse(self.to_coarse(middle))
        middle = self.merged_middle(middle + _enlarged(self.from_coarse(coarse), middle))
        fine = self.merged_fine(self.beside(fine) + _enlarged(self.from_middle(middle), fine))
        maps = self.head(self.norm(fine))
        return Heatmaps(maps[:, 0], maps[:, 2:], maps[:, 1])

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Pictures in each of uint8 images [B, 3, H, W], which are resized to the short edge that was learnt.

        The surest come first. Raises TypeError for images of another type, whose range would be a guess.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"scenes are read in uint8 images, given {images.dtype}; see vtp.layers.images.to_uint8")
        pixels = scaled(images.to(self.head.weight.device))
        if (edge := min(pixels.shape[2:])) != self.image_size:
            sides = [max(1, round(side * self.image_size / edge)) for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels, sides, mode="bilinear", antialias=True, align_corners=False)
        maps = Heatmaps(*(values.float() for values in self(pixels)))
        scores = maps.centres.sigmoid()
        at, scores, labels, sizes = _peaks(scores), scores.cpu(), maps.classes.argmax(1).cpu(), maps.sizes.cpu()
        found: list[list[Detection]] = [[] for _ in images]
        for image, row, column in at.tolist():
            x, y = _refined(scores[image], row, column)
            centre = (x * self.config.stride / pixels.shape[3], y * self.config.stride / pixels.shape[2])
            place = (image, row, column)
            found[image].append(Detection(int(labels[place]), float(scores[place]), centre, float(sizes[place])))
        return [_without_repetitions(each, height=pixels.shape[2], width=pixels.shape[3]) for each in found]

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` reads; equal weights give equal bytes."""
        with whole_folder(folder) as temporary:
            save_tensors(temporary / WEIGHTS, self.state_dict())
            artefact = DetectorArtefact(
                format_version=FORMAT_VERSION,
                detector=self.config,
                image_size=self.image_size,
                classes=self.classes,
                files={WEIGHTS: digest(temporary / WEIGHTS)},
            )
            write_json(temporary / "config.json", artefact.model_dump(mode="json"))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read what `save` wrote, in eval mode. Raises ArtefactError for another folder and for a damaged one."""
        values = read_json(folder / "config.json")
        if values.get("format_version") != FORMAT_VERSION or "detector" not in values:
            raise ArtefactError(f"{folder}: no detector of format {FORMAT_VERSION}; name a folder of train_detector")
        artefact = DetectorArtefact.parse(values, where=str(folder / "config.json"))
        verify_files(folder, artefact.files | {WEIGHTS: artefact.files.get(WEIGHTS, "")}, remedy=REMEDY)

        def build() -> Self:
            return cls(artefact.detector, classes=artefact.classes, image_size=artefact.image_size)

        return load_module(build, load_tensors(folder / WEIGHTS), where=folder / WEIGHTS).eval()


class _ResidualBlock(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(self.norm(x))))


def scaled(images: Tensor) -> Tensor:
    """uint8 images as the network takes them."""
    return images.float().div_(127.5).sub_(1)


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:])


def _peaks(scores: Tensor) -> Tensor:
    """Image, row and column [N, 3] of cells above the threshold that no neighbour exceeds, on the CPU."""
    highest = F.max_pool2d(scores[:, None], 3, stride=1, padding=1)[:, 0]
    return ((scores == highest) & (scores > THRESHOLD)).nonzero().cpu()


def _refined(scores: Tensor, row: int, column: int) -> tuple[float, float]:
    """x and y in cells: the mean over a cell and its neighbours, weighted by scores [h, w]."""
    around = scores[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].double()
    weights = around / around.sum()
    rows, columns = (torch.arange(size, dtype=torch.double) + 0.5 for size in around.shape)
    x, y = float(weights.sum(0) @ columns), float(weights.sum(1) @ rows)
    return x + max(0, column - 1), y + max(0, row - 1)


def _without_repetitions(found: list[Detection], *, height: int, width: int) -> list[Detection]:
    """The surest of those that would overlap."""
    edge, kept = min(height, width), list[Detection]()
    for each in sorted(found, key=lambda detection: -detection.score):
        gaps = (
            (abs(each.centre[0] - other.centre[0]) * width, abs(each.centre[1] - other.centre[1]) * height, other.size)
            for other in kept
        )
        if all(max(x, y) >= APART * edge * max(each.size, size) for x, y, size in gaps):
            kept.append(each)
    return kept
