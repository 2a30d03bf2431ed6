"""Write the embedded data set as shards, in parallel; a shard is a function of the parameters and its number."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.artefact import digest
from vtp.data.compose import NO_LABEL, Composer, EmbeddedConfig, categories
from vtp.data.openmoji import attribution, catalogue
from vtp.data.shards import FORMAT_VERSION, Manifest, Record, Shard, write_shard

COMPRESSION = 6  # of the PNGs, fixed so that bytes are


class Job(NamedTuple):
    """One shard."""

    path: Path
    split: str
    rows: range


def write_embedded(
    config: EmbeddedConfig, folder: Path, *, workers: int, progress: Callable[[int], object]
) -> Manifest:
    """Fill `folder`; shards that are already there are kept. `workers` processes, or none for 0.

    `progress` is told how many samples each finished shard adds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": config.train_samples, "validation": config.validation_samples}
    jobs = {name: _jobs(config, folder, name, total) for name, total in splits.items()}
    every = [job for split in jobs.values() for job in split]
    for job, _ in zip(every, _run(config, every, workers), strict=True):
        progress(len(job.rows))
    pictures = catalogue(config.classes)
    names = categories(pictures)
    (folder / "ATTRIBUTION.txt").write_text(attribution(), encoding="utf-8")
    composer = Composer(config)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source="openmoji",
        image_size=config.image_size,
        classes=[picture.name for picture in pictures],
        categories=names,
        category_of_class=[names.index(picture.category) for picture in pictures],
        splits={name: [_describe(job) for job in split] for name, split in jobs.items()},
        class_counts={name: _class_counts(composer, total) for name, total in splits.items()},
        attribution=attribution(),
    )
    manifest.save(folder)
    return manifest


def _jobs(config: EmbeddedConfig, folder: Path, split: str, total: int) -> list[Job]:
    size = config.samples_per_shard
    return [
        Job(folder / f"{split}-{number:05d}.tar", split, range(first, min(first + size, total)))
        for number, first in enumerate(range(0, total, size))
    ]


def _run(config: EmbeddedConfig, jobs: list[Job], workers: int) -> Iterator[None]:
    work = partial(_write, config)
    if workers == 0:
        yield from map(work, jobs)
        return
    # Spawned: a fork of a process that has threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, jobs)


def _write(config: EmbeddedConfig, job: Job) -> None:
    if not job.path.exists():
        write_shard(job.path, _records(Composer(config), job))


def _records(composer: Composer, job: Job) -> Iterator[Record]:
    names = categories(composer.pictures)
    for index in job.rows:
        sample = composer.plan(job.split, index)
        png = io.BytesIO()
        composer.draw(sample).save(png, format="PNG", compress_level=COMPRESSION)
        category = NO_LABEL if sample.label == NO_LABEL else names.index(composer.pictures[sample.label].category)
        key = f"{job.split}-{index:09d}"
        yield Record(key, png.getvalue(), sample.caption, sample.label, category, sample.kind)


def _describe(job: Job) -> Shard:
    return Shard(name=job.path.name, samples=len(job.rows), bytes=job.path.stat().st_size, sha256=digest(job.path))


def _class_counts(composer: Composer, total: int) -> list[int]:
    labels = np.array([composer.label(index) for index in range(total)])
    return np.bincount(labels[labels != NO_LABEL], minlength=composer.config.classes).tolist()
