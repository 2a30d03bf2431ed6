"""What every source of pictures offers to ingest: numbered pictures, and what is true of all of them."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from vtp.data.shards import Learnt, SampleRecord


class Description(NamedTuple):
    """What a manifest says of a source as a whole; see `Manifest`."""

    source: str
    classes: list[str]
    class_ids: list[str]
    templates: list[str]
    categories: list[str]
    category_of_class: list[int]
    attribution: str
    learnt: Learnt = "classes"


class Rejected(NamedTuple):
    """A picture that is left out."""

    key: str
    place: str  # where it lies in the source
    reason: str


class PictureSource(Protocol):
    """Numbered pictures, split by split. Copies of a source work in other processes."""

    @property
    def description(self) -> Description:
        """What is true of all pictures."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        ...

    def records(self, split: str, rows: range) -> Iterable[SampleRecord | Rejected]:
        """The pictures with these numbers, one item per row."""
        ...
