"""Turn a source of pictures into WebDataset shards and their manifest."""

from stages._runner import Output, Work, main
from vtp.data.compose import EmbeddedConfig
from vtp.data.embedded import ComposedPictures
from vtp.data.encode import CentreCrop, ImageConfig
from vtp.data.ingest import Ingest, IngestConfig


class PrepareData(IngestConfig):
    """The section `prepare_data`."""

    source: EmbeddedConfig
    image: ImageConfig

    @property
    def side(self) -> int | None:
        """Of all pictures in pixels, when it is known beforehand."""
        if isinstance(self.image, CentreCrop):
            return self.image.size
        return self.source.image_size if isinstance(self.source, EmbeddedConfig) else None


def run(config: PrepareData, *, shards: Output, work: Work) -> None:
    source = ComposedPictures(config.source, config.image)
    ingest = Ingest(source, config, work.folder / "shards", work.folder / "state")
    with work.progress(total=ingest.total, description="shards", unit="image", done=ingest.done) as bar:
        manifest = ingest.run(processes=work.processes, progress=bar.update, stop=lambda: work.stop_requested)
    if manifest is None:
        work.stop()
    (work.folder / "shards").rename(shards)
    work.record(unreadable=ingest.rejected, **{name: split.samples for name, split in manifest.splits.items()})


if __name__ == "__main__":
    main(run)
