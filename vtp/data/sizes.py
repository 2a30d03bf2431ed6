"""Sizes of pictures in a training of several: short edges and ratios, and which of them a picture is for.

A picture has the ratio of width to height that is nearest to its own by their logarithms, so that tall and wide ones are
treated alike. It is for every short edge up to its own shorter side, and for the smallest one in any case: pictures are
enlarged there, and elsewhere only by as much as their ratio differs from the nearest.
"""

from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from vtp.config import Config, Distinct

MOST_RATIO = 8.0  # of the longer to the shorter side; less than a long line (vtp.layers.decode)


class PictureSize(NamedTuple):
    """In pixels. As a text it is WIDTHxHEIGHT, as people write it."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class SizesConfig(Config):
    """Sizes of pictures: every short edge at every ratio, the long side rounded."""

    short_edges: Annotated[list[Annotated[int, Field(ge=1)]], Distinct] = Field(
        min_length=1, description="shorter sides in pixels, multiples of `multiple`"
    )
    ratios: Annotated[list[Annotated[float, Field(ge=1 / MOST_RATIO, le=MOST_RATIO)]], Distinct] = Field(
        min_length=1, description="width over height; 1.0 is among them, for evaluations look at squares"
    )
    multiple: int = Field(
        ge=1, description="pixels that sides are multiples of: those of a latent, times the generator's patch_size"
    )

    @model_validator(mode="after")
    def _sizes_are_distinct(self) -> Self:
        if 1.0 not in self.ratios:
            raise ValueError("ratios lack 1.0: evaluations look at squares, which then would not be trained")
        if uneven := [edge for edge in self.short_edges if edge % self.multiple]:
            raise ValueError(f"short_edges {uneven[0]} is not a multiple of {self.multiple}; see `multiple`")
        for number, edge in enumerate(self.edges):
            seen: dict[PictureSize, float] = {}
            for ratio, sizes in zip(self.ratios, self.sizes, strict=True):
                if (other := seen.setdefault(sizes[number], ratio)) != ratio:
                    raise ValueError(
                        f"ratios {other} and {ratio} are both {sizes[number]} at the short edge {edge}; leave one out"
                    )
        return self

    @property
    def edges(self) -> list[int]:
        """Short edges, ascending."""
        return sorted(self.short_edges)

    @property
    def sizes(self) -> list[list[PictureSize]]:
        """By ratio, and by short edge, ascending."""
        return [[self._size(edge, ratio) for edge in self.edges] for ratio in self.ratios]

    @property
    def all(self) -> list[PictureSize]:
        """All of them."""
        return [size for of_ratio in self.sizes for size in of_ratio]

    @property
    def square(self) -> PictureSize:
        """The smallest one: what evaluations look at, and whose positions a generator stores."""
        return PictureSize(self.edges[0], self.edges[0])

    def _size(self, edge: int, ratio: float) -> PictureSize:
        long = round(edge * max(ratio, 1 / ratio) / self.multiple) * self.multiple
        return PictureSize(edge, long) if ratio >= 1 else PictureSize(long, edge)

    def bucket_of(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """The bucket [N] of pictures of these sides [N]: place of the ratio * number of edges + number of its edges - 1."""
        own, known = np.log(widths / heights), np.log(self.ratios)
        ratio = np.abs(own[:, None] - known).argmin(axis=1)
        edges = np.searchsorted(self.edges, np.minimum(widths, heights), side="right").clip(min=1)
        return ratio * len(self.short_edges) + edges - 1
