"""Train a detector of composed scenes, which holds pictures of a generator to their prompts.

It composes its scenes itself, from the parameters of the data, and is then measured on their validation pictures: what it
finds right there is the most that a generator can reach (`vtp.evaluation.scene_measure`).
"""

from collections import defaultdict
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from stages.runner.run import Output, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.curation.ingest.compose import Composer, EmbeddedConfig
from vtp.data.batches import RankSlice, count_micro_batches
from vtp.distributed import own_rows, ranks
from vtp.draws import address
from vtp.evaluation.scene_measure import SceneMeasure
from vtp.host import Host
from vtp.models.scene_detector import DetectorConfig, SceneDetector
from vtp.objectives.detection import SPLIT, DetectionObjective, ImperfectionConfig, SceneBatches
from vtp.step import OptimConfig
from vtp.training.fit import Run, TrainingConfig, fit, run_length
from vtp.training.parallelize import parallelize


class TrainDetector(Config):
    """The section `train_detector`."""

    seed: int = Field(description="seed of weights and of imperfections; scenes are those of the source's seed")
    source: EmbeddedConfig = Field(description="scenes of the data, as prepare_data.source has them")
    batch_size: int = Field(ge=1, description="scenes of a step over all devices")
    model: DetectorConfig
    imperfections: ImperfectionConfig
    optim: OptimConfig
    training: TrainingConfig
    validation_samples: int = Field(ge=1, description="first validation compositions on which it is measured")


def run(
    config: TrainDetector,
    *,
    detector: Annotated[Output, "folder for the detector"],
    metrics: Annotated[Output, "JSON file for what it finds right on real pictures"],
    curves: Annotated[Output, "CSV file for losses by step"],
    host: Host,
) -> None:
    largest = host.micro_batch or config.batch_size
    passes = count_micro_batches(config.batch_size, ranks().size, largest, named="train_detector.batch_size")
    rank_slice = RankSlice(*ranks(), passes)
    batches = SceneBatches(
        config.source,
        config.imperfections,
        stride=config.model.stride,
        seed=config.seed,
        batch_size=config.batch_size,
        rank_slice=rank_slice,
    )
    composer = Composer(config.source)
    torch.manual_seed(address(config.seed, "weights"))
    names = [picture.name for picture in composer.pictures]
    model = SceneDetector(config.model, classes=names, image_size=config.source.image_size)
    objective = DetectionObjective(model, batch_size=config.batch_size)
    cost = objective.step_cost(composer.canvas(SPLIT, 0))
    parallelize(objective, host, communication=config.training.travels)
    length = run_length(config.training.length, samples=config.batch_size, flops=cost.flops)
    host.record(**length._asdict())
    fit(objective, batches, Run(length.steps, config.training, {"model": config.optim}, cost, passes), host=host)

    figures = measure(model.eval(), composer, config, host)
    if not ranks().first:
        return
    model.save(detector)
    write_json(metrics, {"train_detector": length._asdict() | figures})
    curves.write_bytes((host.folder / "curves.csv").read_bytes())


def measure(model: SceneDetector, composer: Composer, config: TrainDetector, host: Host) -> dict[str, float]:
    """What a detector finds right on real validation pictures; ranks share them."""
    scenes = SceneMeasure(model)
    samples = defaultdict(list)
    for index in own_rows(config.validation_samples):
        sample = composer.plan("validation", index)
        samples[sample.arrangement.canvas].append(sample)
    with host.progress(total=config.validation_samples, description="real pictures", unit="image") as bar:
        for alike in samples.values():
            for first in range(0, len(alike), config.batch_size):
                some = alike[first : first + config.batch_size]
                pixels = np.stack([np.asarray(composer.draw(sample)) for sample in some])
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
                scenes.add(images.to(host.device), [sample.captions[0] for sample in some])
                bar.update(len(some) * ranks().size)
    return scenes.figures()


if __name__ == "__main__":
    main(run, distributed=True)
