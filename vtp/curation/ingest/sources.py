"""The choice of a source: which one the parameters name, what it needs, and its pictures."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from vtp.curation.ingest.archives import list_imagenet_parquet, list_imagenet_tars
from vtp.curation.ingest.compose import EmbeddedConfig
from vtp.curation.ingest.embedded import ComposedPictures
from vtp.curation.ingest.encode import ImageConfig
from vtp.curation.ingest.folders import FolderSource, HeldOut, class_name, list_folder
from vtp.curation.ingest.imagenet import ImageNetSource, describe_imagenet, list_imagenet_folders
from vtp.curation.ingest.listed import ListedPictures
from vtp.curation.ingest.listing import Entry, Listing, Naming, list_pictures
from vtp.curation.ingest.parquet import ParquetSource, list_parquet
from vtp.curation.ingest.pool import PoolSource, pooled_pictures
from vtp.curation.ingest.shard_workers import IngestError
from vtp.curation.ingest.source import Description, PictureSource
from vtp.curation.ingest.tables import OTHER_CAPTIONS, TableSource, list_table
from vtp.curation.ingest.tar_places import RemotePieces
from vtp.curation.ingest.webdataset import AGAIN, WebDatasetSource, read_tars
from vtp.data.imagenet import synset_names

ListedSource = ImageNetSource | FolderSource | TableSource | ParquetSource | WebDatasetSource
SourceConfig = Annotated[EmbeddedConfig | ListedSource | PoolSource, Field(discriminator="name")]


class SourceFolders(NamedTuple):
    """Folders that a source may read."""

    source: Path | None
    selection: Path | None


class Opened(NamedTuple):
    """A source, and what was seen while its pictures were listed."""

    pictures: PictureSource
    facts: dict[str, int | str]


def open_pictures(
    config: SourceConfig,
    image: ImageConfig,
    inputs: SourceFolders,
    scratch: Path,
    stop: Callable[[], bool],
    *,
    room: float,
) -> Opened:
    """The pictures of a source; those in files are listed first, in `scratch`, and up to `room` bytes fetched to it.

    Raises IngestError when inputs are missing, superfluous or hold something else, and Stopped when asked to stop.
    """
    _check_inputs(config, inputs)
    if isinstance(config, EmbeddedConfig):
        return Opened(ComposedPictures(config, image), {})
    if isinstance(config, PoolSource):
        assert inputs.source is not None
        assert inputs.selection is not None
        return Opened(pooled_pictures(config, inputs.source, inputs.selection, image), {})
    ignored: Counter[str] = Counter()
    found, rows = _find(config, inputs.source, scratch, ignored, stop, room), scratch / "rows"
    listing = list_pictures(
        found.entries, rows, naming=found.naming, held_out=found.held_out, ignored=ignored, stop=stop
    )
    pictures = ListedPictures.of_folder(
        found.root,
        rows,
        listing,
        _describe(config, listing, found.naming),
        image,
        outside_links=config.outside_links,
        roots=found.roots,
        elsewhere=found.elsewhere,
    )
    again, captions = (listing.ignored.get(name, 0) for name in (AGAIN, OTHER_CAPTIONS))
    facts: dict[str, int | str] = {
        "duplicates": listing.duplicates + again,
        "ignored_files": sum(listing.ignored.values()) - again - captions,
    }
    if isinstance(config, TableSource):
        facts["other_captions"] = captions
    if found.sha256 is not None:
        facts["source_sha256"] = found.sha256
    return Opened(pictures, facts)


class _FoundEntries(NamedTuple):
    """Pictures in files before they are listed."""

    entries: Iterator[Entry]
    naming: Naming
    root: Path  # of their files
    held_out: float | None = None
    roots: Sequence[str] = ()
    elsewhere: RemotePieces | None = None
    sha256: str | None = None  # of files elsewhere


def _check_inputs(config: SourceConfig, inputs: SourceFolders) -> None:
    name = config.name
    needed = {"openmoji": (), "pool": ("source", "selection")}.get(name, ("source",))
    if isinstance(config, WebDatasetSource) and config.remote is not None:
        name, needed = f"{name} with remote", ()
    for flag, path in inputs._asdict().items():
        if flag in needed and path is None:
            raise IngestError(f"prepare_data.source is {name}, which reads --{flag}: add it to the command in dvc.yaml")
        if flag not in needed and path is not None:
            raise IngestError(f"prepare_data.source is {name}, which reads no --{flag}: remove it from dvc.yaml")
        if path is not None and not path.is_dir():
            raise IngestError(f"--{flag} {path}: expected a folder")


def _find(
    config: ListedSource,
    source: Path | None,
    scratch: Path,
    ignored: Counter[str],
    stop: Callable[[], bool],
    room: float,
) -> _FoundEntries:
    if isinstance(config, WebDatasetSource):  # whose splits are made as its tars are read
        tars = read_tars(config, source, scratch, room=room, stop=stop)
        found = _FoundEntries(tars.entries(ignored), tars.naming, tars.place.root)
        return found._replace(elsewhere=tars.elsewhere, sha256=tars.sha256)
    assert source is not None
    unpacked = scratch / "unpacked"
    if isinstance(config, ImageNetSource):
        root = unpacked if config.layout == "parquet" else source
        entries = _list_imagenet(config, source, unpacked, ignored, stop)
        return _FoundEntries(entries, Naming(config.caption, synset_names().__getitem__), root)
    held_out = config.validation.share if isinstance(config.validation, HeldOut) else None
    if isinstance(config, ParquetSource):
        listing = list_parquet(config, source, unpacked, stop)
        return _FoundEntries(listing.entries, Naming(config.class_caption, listing.name), unpacked, held_out)
    if isinstance(config, FolderSource):
        return _FoundEntries(list_folder(config, source, ignored), Naming(config.caption, class_name), source, held_out)
    entries = list_table(config, source, ignored, stop)
    return _FoundEntries(entries, Naming(None, class_name), source, held_out, roots=config.roots)


def _list_imagenet(
    config: ImageNetSource, source: Path, unpacked: Path, ignored: Counter[str], stop: Callable[[], bool]
) -> Iterator[Entry]:
    root = None if config.outside_links else source
    match config.layout:
        case "tars":
            return list_imagenet_tars(config, source, ignored, root=root)
        case "parquet":
            return list_imagenet_parquet(config, source, unpacked, ignored, stop, root=root)
        case _:
            return list_imagenet_folders(config, source, ignored, root=root)


def _describe(config: ListedSource, listing: Listing, naming: Naming) -> Description:
    ids = listing.class_ids
    if isinstance(config, ImageNetSource):
        return describe_imagenet(ids)
    return Description(config.name, list(map(naming.name, ids)), ids, config.templates, [], [], "")
