"""Train a LightningDiT on cached latents by flow matching (paper 4.1)."""

import torch
from pydantic import Field

from stages._runner import Input, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import LatentBatches
from vtp.data.latents import LatentDataset
from vtp.draws import address
from vtp.models.lightningdit import LightningDiT, LightningDiTConfig
from vtp.objectives.generation import GenerationObjective, GenerationObjectiveConfig
from vtp.training.fit import Run, TrainingConfig, fit, plan
from vtp.training.optim import OptimConfig


class GeneratorConfig(Config):
    """LightningDiT; latent size, channels and classes come from the latents."""

    hidden_size: int = Field(ge=1)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(gt=0)
    patch_size: int = Field(ge=1)
    use_qknorm: bool
    use_swiglu: bool
    use_rope: bool
    use_rmsnorm: bool
    wo_shift: bool


class TrainGenerator(Config):
    """The section `train_generator`."""

    seed: int
    batch_size: int = Field(ge=1)
    model: GeneratorConfig
    objective: GenerationObjectiveConfig
    optim: OptimConfig
    training: TrainingConfig


def run(
    config: TrainGenerator, *, latents: Input, generator: Output, metrics: Output, curves: Output, work: Work
) -> None:
    data = LatentDataset(latents)
    channels, side, _ = data.shape
    architecture = LightningDiTConfig(
        input_size=side, in_channels=channels, num_classes=len(data.classes), **config.model.model_dump()
    )
    batches = LatentBatches(data, batch_size=config.batch_size, seed=config.seed)
    torch.manual_seed(address(config.seed, "weights"))
    model = LightningDiT(architecture)
    objective = GenerationObjective(model, config.objective, seed=config.seed).to(work.device)
    cost = objective.step_cost(batches[0])
    length = plan(config.training.length, samples=config.batch_size, flops=cost.flops)
    work.record(**length._asdict())
    fit(objective, batches, Run(length.steps, config.training, {"model": config.optim}, cost), host=work)
    objective.average.save_pretrained(generator)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_json(metrics, {"train_generator": length._asdict() | {"parameters": parameters}})
    curves.write_bytes((work.folder / "curves.csv").read_bytes())


if __name__ == "__main__":
    main(run)
