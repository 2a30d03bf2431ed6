"""Turn a source of pictures into WebDataset shards and their manifest."""

from stages._runner import OptionalInput, Output, Work, main
from vtp.data.compose import EmbeddedConfig
from vtp.data.ingest.crew import Stopped
from vtp.data.ingest.encode import CentreCrop, ImageConfig
from vtp.data.ingest.ingest import Ingest, IngestConfig
from vtp.data.ingest.sources import Inputs, SourceConfig, open_source


class PrepareData(IngestConfig):
    """The section `prepare_data`."""

    source: SourceConfig
    image: ImageConfig

    @property
    def side(self) -> int | None:
        """Of all pictures in pixels, when it is known beforehand."""
        if isinstance(self.image, CentreCrop):
            return self.image.size
        return self.source.image_size if isinstance(self.source, EmbeddedConfig) else None


def run(
    config: PrepareData, *, source: OptionalInput = None, selection: OptionalInput = None, shards: Output, work: Work
) -> None:
    """`source`: folder of the pictures. `selection`: rows of a pool, sorted by the hashes of their keys."""

    def stop() -> bool:
        return work.stop_requested

    try:
        opened = open_source(config.source, config.image, Inputs(source, selection), work.folder, stop)
        ingest = Ingest(opened.pictures, config, work.folder / "shards", work.folder / "state")
        with work.progress(total=ingest.total, description="shards", unit="image", done=ingest.done) as bar:
            manifest = ingest.run(processes=work.processes, progress=bar.update, stop=stop)
    except Stopped:
        work.stop()
    (work.folder / "shards").rename(shards)
    samples = {name: split.samples for name, split in manifest.splits.items()}
    work.record(unreadable=ingest.rejected, **samples, **opened.facts)


if __name__ == "__main__":
    main(run)
