"""The choice of a source: which one the parameters name, what it needs, and its pictures."""

from collections import Counter
from collections.abc import Callable, Iterator
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
from vtp.curation.ingest.webdataset import AGAIN, WebDatasetSource, read_tars
from vtp.data.imagenet import synset_names

SourceConfig = Annotated[
    EmbeddedConfig | ImageNetSource | FolderSource | TableSource | ParquetSource | WebDatasetSource | PoolSource,
    Field(discriminator="name"),
]


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
    if isinstance(config, WebDatasetSource):
        return _open_tars(config, image, inputs.source, scratch, stop, room)
    assert inputs.source is not None
    if isinstance(config, PoolSource):
        assert inputs.selection is not None
        return Opened(pooled_pictures(config, inputs.source, inputs.selection, image), {})
    ignored: Counter[str] = Counter()
    unpacked = isinstance(config, ParquetSource) or (config.name == "imagenet" and config.layout == "parquet")
    root = scratch / "unpacked" if unpacked else inputs.source
    if isinstance(config, ImageNetSource):
        entries, name = _list_imagenet(config, inputs.source, root, ignored, stop), synset_names().__getitem__
        naming, held_out = Naming(config.caption, name), None
    else:
        entries, naming = _list_own(config, inputs.source, root, ignored, stop)
        held_out = config.validation.share if isinstance(config.validation, HeldOut) else None
    rows = scratch / "rows"
    listing = list_pictures(entries, rows, naming=naming, held_out=held_out, ignored=ignored, stop=stop)
    roots = config.roots if isinstance(config, TableSource) else ()
    pictures = ListedPictures.of_folder(
        root,
        rows,
        listing,
        _describe(config, listing, naming),
        image,
        outside_links=config.outside_links,
        roots=roots,
    )
    captions = listing.ignored.pop(OTHER_CAPTIONS, 0)
    return Opened(pictures, _facts(listing) | ({"other_captions": captions} if isinstance(config, TableSource) else {}))


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


def _open_tars(
    config: WebDatasetSource,
    image: ImageConfig,
    source: Path | None,
    scratch: Path,
    stop: Callable[[], bool],
    room: float,
) -> Opened:
    tars, ignored, rows = read_tars(config, source, scratch, room=room, stop=stop), Counter[str](), scratch / "rows"
    listing = list_pictures(tars.entries(ignored), rows, naming=tars.naming, held_out=None, ignored=ignored, stop=stop)
    pictures = ListedPictures.of_folder(
        tars.place.root,
        rows,
        listing,
        _describe(config, listing, tars.naming),
        image,
        outside_links=config.outside_links,
        elsewhere=tars.elsewhere,
    )
    return Opened(pictures, _facts(listing) | ({} if tars.sha256 is None else {"source_sha256": tars.sha256}))


def _facts(listing: Listing) -> dict[str, int | str]:
    again = listing.ignored.get(AGAIN, 0)
    return {"duplicates": listing.duplicates + again, "ignored_files": sum(listing.ignored.values()) - again}


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


def _list_own(
    config: FolderSource | TableSource | ParquetSource,
    source: Path,
    unpacked: Path,
    ignored: Counter[str],
    stop: Callable[[], bool],
) -> tuple[Iterator[Entry], Naming]:
    if isinstance(config, FolderSource):
        return list_folder(config, source, ignored), Naming(config.caption, class_name)
    if isinstance(config, ParquetSource):
        listing = list_parquet(config, source, unpacked, stop)
        return listing.entries, Naming(config.class_caption, listing.name)
    return list_table(config, source, ignored, stop), Naming(None, class_name)


def _describe(
    config: ImageNetSource | FolderSource | TableSource | ParquetSource | WebDatasetSource,
    listing: Listing,
    naming: Naming,
) -> Description:
    ids = listing.class_ids
    if isinstance(config, ImageNetSource):
        return describe_imagenet(ids)
    return Description(config.name, list(map(naming.name, ids)), ids, config.templates, [], [], "")
