"""Turn a source of pictures into WebDataset shards and their manifest."""

from typing import Annotated

from stages.runner.run import OptionalInput, Output, main
from vtp.curation.ingest.compose import EmbeddedConfig
from vtp.curation.ingest.encode import CentreCrop, ImageConfig
from vtp.curation.ingest.ingest import Ingest, IngestConfig
from vtp.curation.ingest.shard_workers import Stopped
from vtp.curation.ingest.sources import SourceConfig, SourceFolders, open_pictures
from vtp.host import Host


class PrepareData(IngestConfig):
    """The section `prepare_data`."""

    source: SourceConfig
    image: ImageConfig

    @property
    def side(self) -> int | None:
        """Short edge of all pictures in pixels, when it is known beforehand."""
        if isinstance(self.image, CentreCrop):
            return self.image.size
        return self.source.image_size if isinstance(self.source, EmbeddedConfig) else None


def run(
    config: PrepareData,
    *,
    source: Annotated[OptionalInput, "folder of the pictures; the embedded source and a remote one need none"] = None,
    selection: Annotated[
        OptionalInput, "folder of the stage filter, with the rows of a pool to take; for source pool alone"
    ] = None,
    shards: Annotated[Output, "folder for the shards"],
    host: Host,
) -> None:
    def stop() -> bool:
        return host.stop_requested

    try:
        inputs, room = SourceFolders(source, selection), host.shard_cache_bytes
        opened = open_pictures(config.source, config.image, inputs, host.folder, stop, room=room)
        ingest = Ingest(opened.pictures, config, host.folder / "shards", host.folder / "state")
        with host.progress(total=ingest.total, description="shards", unit="image", done=ingest.done) as bar:
            manifest = ingest.run(processes=host.processes, progress=bar.update, stop=stop)
    except Stopped:
        host.stop()
    (host.folder / "shards").rename(shards)
    samples = {name: split.samples for name, split in manifest.splits.items()}
    host.record(unreadable=ingest.rejected, **samples, **opened.facts)


if __name__ == "__main__":
    main(run)
