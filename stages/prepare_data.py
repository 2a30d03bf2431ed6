"""Write the embedded data set: WebDataset shards of captioned pictures, and their manifest."""

from stages._runner import Output, Work, main
from vtp.artefact import files
from vtp.data.compose import EmbeddedConfig
from vtp.data.embedded import write_embedded


def run(config: EmbeddedConfig, *, shards: Output, work: Work) -> None:
    total = config.train_samples + config.validation_samples
    with work.progress(total=total, description="composing", unit="image") as bar:
        write_embedded(config, work.folder / "shards", workers=work.processes, progress=bar.update)
    (work.folder / "shards").rename(shards)
    work.record(samples=total, files=len(files(shards)))


if __name__ == "__main__":
    main(run)
