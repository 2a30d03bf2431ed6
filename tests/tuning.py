"""Decoder tuning at tiny size: objectives and batches of its tests, and what two ranks do (`tuning.py FOLDER`).

`joint` is pre-training with an adversary from the start.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from objectives import test_pretrain as pretraining
from tiny import merged, tiny_params

from stages.pretrain import Pretrain
from stages.runner.environment import LocalHost, Runtime
from stages.tune_decoder import TuneDecoder
from vtp.data.batches import ImageBatch, RankSlice
from vtp.distributed import GradientSum, process_group, ranks
from vtp.losses.perceptual import build_perceptual
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.adversary import build_adversary
from vtp.objectives.decoder import DecoderObjective
from vtp.objectives.pretrain import PretrainObjective
from vtp.step import OptimConfig, StepContext
from vtp.training.optim import build_optimizer
from vtp.training.update import Update

ALONE = RankSlice(0, 1, 1)
STEPS = 3
WORK = LocalHost(Path(), Path(), Runtime(device="cpu"))
FEATURES = {"name": "features", "network": {"name": "tokenizer", "image_size": None, "blocks": 2}, "kernel": 3}
CASES = {
    "patch": {},
    "features": {"adversary": {"discriminator": FEATURES}},
    "noise": {"objective": {"noise": {"std": 0.8}}},
    "lecam": {"adversary": {"lecam": {"weight": 0.5, "momentum": 0.75}}},
    "plain": {"adversary": None},
}


def config_of(changes=None) -> TuneDecoder:
    return TuneDecoder.parse(merged(tiny_params()["tune_decoder"], changes or {}), where="test")


def tokenizer_of() -> VisualTokenizer:
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(Pretrain.parse(tiny_params()["pretrain"], where="test").tokenizer).eval()
    tokenizer.trunk.requires_grad_(False)
    return tokenizer


def objective_of(config: TuneDecoder) -> DecoderObjective:
    tokenizer, adversary = tokenizer_of(), None
    if config.adversary is not None:
        adversary = build_adversary(config.adversary, WORK, seed=0, tokenizer=tokenizer, features=None)
    perceptual = build_perceptual(config.objective.perceptual, weights=Path())
    std = torch.linspace(0.5, 2, 8) if config.objective.noise.std else None
    return DecoderObjective(tokenizer, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=0)


def batches_of(step: int, rank_slice: RankSlice = ALONE, size: int = 8) -> list[ImageBatch]:
    """A rank's micro-batches of a step."""
    images = torch.randint(0, 256, (size, 3, 16, 16), generator=torch.Generator().manual_seed(step)).to(torch.uint8)
    found = []
    for micro in range(rank_slice.micro_batches):
        _, rows = rank_slice.of(size, step * rank_slice.micro_batches + micro)
        found.append(ImageBatch(images[rows.start : rows.stop], torch.zeros(len(rows), dtype=torch.bool)))
    return found


class Case(NamedTuple):
    """What is trained, on what."""

    build: Callable[[], Any]  # an objective with its first weights
    batches: Callable[[int, RankSlice], list[Any]]  # a rank's micro-batches of a step
    optim: Mapping[str, OptimConfig]


def case_of(name: str) -> Case:
    if name == "joint":
        batch = {"data": {"batch": {"clip": 16, "ssl": 8, "reconstruction": 4}}}
        joint = pretraining.config_of(batch | {"adversary": pretraining.from_the_start()})
        return Case(
            lambda: joint_objective(joint),
            lambda step, rank_slice: [
                pretraining.batch_of(joint, step, rank_slice, micro) for micro in range(rank_slice.micro_batches)
            ],
            {"model": joint.optim, "discriminator": joint.adversary.optim},
        )
    config = config_of(CASES[name])
    optim = {"decoder": config.optim} | ({"discriminator": config.adversary.optim} if config.adversary else {})
    return Case(lambda: objective_of(config), batches_of, optim)


def joint_objective(config: Pretrain) -> PretrainObjective:
    objective = pretraining.objective_of(config)
    objective.adversary = build_adversary(config.adversary, WORK, seed=0, tokenizer=objective.tokenizer, features=None)
    return objective


def gradients(
    objective: Any, micro_batches: list[Any], context: StepContext, in_context=iter
) -> dict[str, torch.Tensor]:
    """Of all phases, summed over ranks; `in_context` wraps the terms."""
    found = {}
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for phase, groups in objective.phases().items():
        objective.zero_grad()
        for term in in_context(objective.terms(phase, micro_batches, context)):
            if term.loss is not None:
                term.loss.backward()
        own = [parameter for group in groups for parameter in group.parameters]
        GradientSum(own).finish()
        found |= {names[p]: p.grad.clone() for p in own if p.grad is not None}
    return found


def trained(name: str, rank_slice: RankSlice) -> dict[str, object]:
    """Gradients of a late step, and weights and scalars after some steps, the first of them watched."""
    case, late = case_of(name), StepContext(90, 100, log_step=False)
    result = {"gradients": gradients(case.build(), case.batches(0, rank_slice), late)}
    objective, logs = case.build(), {}
    updates = [
        Update(phase, build_optimizer(groups, case.optim[phase]), case.optim[phase], objective.shared_parameters())
        for phase, groups in objective.phases().items()
    ]
    for step in range(STEPS):
        context = StepContext(90 + step, 100, log_step=step == 0)
        for update in updates:
            outcome = update.apply(objective.terms(update.phase, case.batches(step, rank_slice), context), context)
            logs |= {f"{step} {name}": float(value) for name, value in outcome.logs.items()}
        objective.after_step(context)
    weights = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    return result | {"weights": weights, "logs": logs}


def main(folder: Path) -> None:
    with process_group("cpu", timeout=600):
        rank, size = ranks()
        results = {
            f"{case} {micro_batches}": trained(case, RankSlice(rank, size, micro_batches))
            for case in (*CASES, "joint")
            for micro_batches in (1, 2)
        }
        torch.save(results, folder / f"results-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
