"""Pre-train a visual tokenizer jointly on CLIP, self-supervision and reconstruction (paper 3.3 to 3.6)."""

from typing import Self

import torch
from pydantic import model_validator

from stages._runner import Input, Output, Work, main
from vtp.artefact import write_json
from vtp.config import Config
from vtp.data.batches import ActiveBatch, PretrainBatches, PretrainDataConfig
from vtp.data.shards import ShardDataset
from vtp.draws import address
from vtp.losses.perceptual import build_perceptual
from vtp.models.text import CaptionTokenizer
from vtp.models.tokenizer import TokenizerConfig, VisualTokenizer
from vtp.objectives.pretrain import PretrainObjective, PretrainObjectiveConfig
from vtp.training.fit import TrainingConfig, fit, plan
from vtp.training.optim import OptimConfig


class Pretrain(Config):
    """The section `pretrain`."""

    seed: int
    tokenizer: TokenizerConfig
    data: PretrainDataConfig
    objective: PretrainObjectiveConfig
    optim: OptimConfig
    training: TrainingConfig

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.objective.weights.clip and self.tokenizer.text is None:
            raise ValueError("objective.weights.clip is above 0, so tokenizer.text must not be null")
        patch_size, views = self.tokenizer.vision.patch_size, self.data.ssl_views
        for name, size in (
            ("data.clip_view.size", self.data.clip_view.size),
            ("data.ssl_views.global_size", views.global_size),
            ("data.ssl_views.local_size", views.local_size),
        ):
            if size % patch_size:
                raise ValueError(f"{name} {size} is not a multiple of tokenizer.vision.patch_size {patch_size}")
        if self.data.clip_view.size != self.tokenizer.image_size:
            raise ValueError("data.clip_view.size and tokenizer.image_size differ")
        return self

    @property
    def active(self) -> ActiveBatch:
        """Batch sizes of the objectives with a weight."""
        weights, batch = self.objective.weights, self.data.batch
        return ActiveBatch(batch.clip if weights.clip else 0, batch.ssl if weights.ssl else 0, batch.reconstruction)

    @property
    def architecture(self) -> TokenizerConfig:
        """The tokenizer; without the CLIP objective it has no text tower."""
        return self.tokenizer if self.objective.weights.clip else self.tokenizer.model_copy(update={"text": None})


def run(config: Pretrain, *, shards: Input, tokenizer: Output, metrics: Output, curves: Output, work: Work) -> None:
    text = config.architecture.text
    batches = PretrainBatches(
        ShardDataset(shards, "train"),
        config.data,
        active=config.active,
        patch_size=config.tokenizer.vision.patch_size,
        tokenize=CaptionTokenizer(text) if text else None,
        seed=config.seed,
    )
    torch.manual_seed(address(config.seed, "weights"))
    model = VisualTokenizer(config.architecture)
    perceptual = build_perceptual(config.objective.perceptual, weights=work.weights)
    objective = PretrainObjective(model, config.objective, perceptual=perceptual.to(work.device), seed=config.seed).to(
        work.device
    )
    length = plan(config.training.length, samples=config.active.pool, flops=objective.step_flops(batches[0]))
    work.record(**length._asdict())
    fit(objective, batches, steps=length.steps, training=config.training, optim={"model": config.optim}, host=work)
    model.save_pretrained(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_json(metrics, {"pretrain": length._asdict() | {"parameters": parameters}})
    curves.write_bytes((work.folder / "curves.csv").read_bytes())


if __name__ == "__main__":
    main(run)
