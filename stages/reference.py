"""Features of real images, once: what rFID and gFID compare reconstructions and samples with (paper 4.1).

rFID's are the centre-cropped images of the split that is reconstructed, gFID's those that the generator learnt. Ranks
share whole batches: what an image is computed with, and so its rounding, depends on no number of ranks.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field

from stages.runner.run import Input, Output, main
from vtp.artefact import load_tensors, save_tensors
from vtp.config import Config
from vtp.data.crops import cropped
from vtp.data.dataset import ShardDataset
from vtp.data.imagenet import is_imagenet
from vtp.data.remote import ShardCache
from vtp.distributed import own_rows, ranks, total
from vtp.evaluation.feature_set import FeatureSets
from vtp.evaluation.features import FeatureExtractor, FeaturesConfig, build_extractors, distinct_networks, extract
from vtp.evaluation.reference import Chosen, SplitConfig, SplitName, choose, save_reference
from vtp.host import Host

BATCHES = 16  # of a rank, between two looks at what all ranks have: a stop and a checkpoint are possible there


class ReferenceStatistics(Config):
    """The section `reference`."""

    features: Annotated[list[FeaturesConfig], AfterValidator(distinct_networks)] = Field(
        min_length=1,
        description="networks whose features are taken, each named in metrics; the first is the headline's",
    )
    image_size: int = Field(ge=1, description="side of the crops, that of the tokenizer")
    batch_size: int = Field(ge=1, description="images of a forward pass")
    splits: dict[SplitName, SplitConfig] = Field(
        min_length=1, description="splits of the shards that are measured, by name"
    )


class _ReferenceSplit(NamedTuple):
    chosen: Chosen
    networks: FeatureSets  # of the first images, all ranks together
    state: Path  # where `networks` is kept while it grows


@torch.inference_mode()
def run(
    config: ReferenceStatistics,
    *,
    shards: Annotated[Input, "folder of prepare_data, with the real images"],
    reference: Annotated[Output, "folder for their features and statistics"],
    host: Host,
) -> None:
    torch.backends.cudnn.allow_tf32 = False  # features are those of float32 convolutions
    extractors = build_extractors(config.features, weights=host.weights, device=host.device)
    splits: dict[str, _ReferenceSplit] = {}
    for name, wanted in config.splits.items():
        chosen, state = (
            choose(ShardDataset(shards, name, cache=ShardCache.of(host)), wanted),
            host.folder / f"{name}.partial",
        )
        networks = FeatureSets.of(extractors)
        if state.exists():
            networks = FeatureSets.of_tensors(load_tensors(state), extractors, where=str(state))
        splits[name] = _ReferenceSplit(chosen, networks, state)
    images = sum(len(split.chosen.rows) for split in splits.values())
    done = sum(split.networks.count for split in splits.values())
    with host.progress(total=images, description="features", unit="image", done=done) as bar:
        for split in splits.values():
            _grow(split, extractors, config, host, bar.update)
    if ranks().first:
        collected = {name: (split.chosen, split.networks) for name, split in splits.items()}
        save_reference(reference, collected, features=config.features, image_size=config.image_size)
    data = next(iter(splits.values())).chosen.images.manifest
    words = "; ".join(data.summary(name) for name in splits)
    host.record(images=images, data=words, imagenet=is_imagenet(data.class_ids))


def _grow(
    split: _ReferenceSplit,
    extractors: Mapping[str, FeatureExtractor],
    config: ReferenceStatistics,
    host: Host,
    report: Callable[[int], object],
) -> None:
    """Add the images that are missing to `split.networks`, some batches of every rank at a time."""
    rows, saved = split.chosen.rows, time.monotonic()
    batches = np.split(rows, range(config.batch_size, len(rows), config.batch_size))[
        -(-split.networks.count // config.batch_size) :
    ]
    at_once = BATCHES * ranks().size
    chunks = [batches[start : start + at_once] for start in range(0, len(batches), at_once)]
    own = [chunk[number] for chunk in chunks for number in own_rows(len(chunk))]
    with closing(cropped(split.chosen.images, own, config.image_size, host)) as stream:
        for chunk in chunks:
            first = split.networks.count + int(sum(map(len, chunk[: own_rows(len(chunk)).start])))
            part, reported = FeatureSets.of(extractors), 0
            for pixels in islice(stream, len(own_rows(len(chunk)))):
                part.add(extract(extractors, pixels), keep=split.chosen.kept - first)
                first += len(pixels)
                report(len(pixels) * ranks().size)
                reported += len(pixels) * ranks().size
            report(sum(map(len, chunk)) - reported)
            split.networks.merge(part.over_ranks())
            stop = bool(total(torch.tensor(int(host.stop_requested))))
            over = split.networks.count == len(rows)
            if ranks().first and (stop or over or time.monotonic() - saved > host.checkpoint_seconds):
                save_tensors(split.state, split.networks.tensors())
                saved = time.monotonic()
            if stop:
                host.stop()


if __name__ == "__main__":
    main(run, distributed=True)
