"""Decoder tuning at tiny size: objectives and batches of its tests, and what two ranks do (`tuning.py FOLDER`)."""

import os
import sys
from pathlib import Path

import torch
from tiny import merged, tiny_params

from stages._adversary import build_adversary
from stages._runtime import Runtime, Work
from stages.pretrain import Pretrain
from stages.tune_decoder import TuneDecoder
from vtp.data.batches import ImageBatch, Share
from vtp.distributed import process_group, ranks, sum_gradients
from vtp.losses.perceptual import build_perceptual
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.decoder import DecoderObjective
from vtp.step import Moment
from vtp.training.optim import build_optimizer
from vtp.training.update import Update

ALONE = Share(0, 1, 1)
STEPS = 3
FEATURES = {"name": "features", "network": {"name": "tokenizer", "image_size": None, "blocks": 2}, "kernel": 3}
CASES = {
    "patch": {},
    "features": {"adversary": {"discriminator": FEATURES}},
    "noise": {"objective": {"noise": {"std": 0.8}}},
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
        work = Work(Path(), Path(), Runtime(device="cpu"))
        adversary = build_adversary(config.adversary, work, seed=0, tokenizer=tokenizer, features=None)
    perceptual = build_perceptual(config.objective.perceptual, weights=Path())
    std = torch.linspace(0.5, 2, 8) if config.objective.noise.std else None
    return DecoderObjective(tokenizer, adversary, config.objective, perceptual=perceptual, channel_std=std, seed=0)


def batches_of(step: int, share: Share = ALONE, size: int = 8) -> list[ImageBatch]:
    """A rank's micro-batches of a step."""
    images = torch.randint(0, 256, (size, 3, 16, 16), generator=torch.Generator().manual_seed(step)).to(torch.uint8)
    found = []
    for micro in range(share.micros):
        _, rows = share.of(size, step * share.micros + micro)
        found.append(ImageBatch(images[rows.start : rows.stop], torch.zeros(len(rows), dtype=torch.bool)))
    return found


def gradients(objective: DecoderObjective, micros: list[ImageBatch], moment: Moment) -> dict[str, torch.Tensor]:
    """Of both phases, summed over ranks."""
    found = {}
    for phase, (group,) in objective.phases().items():
        objective.zero_grad()
        for term in objective.terms(phase, micros, moment):
            term.loss.backward()
        sum_gradients(group.parameters)
        names = {parameter: name for name, parameter in objective.named_parameters()}
        found |= {names[p]: p.grad.clone() for p in group.parameters if p.grad is not None}
    return found


def trained(config: TuneDecoder, share: Share) -> dict[str, object]:
    """Gradients of a late step, and weights and scalars after some steps."""
    late = Moment(90, 100, watched=False)
    result = {"gradients": gradients(objective_of(config), batches_of(0, share), late)}
    objective, logs = objective_of(config), {}
    optim = {"decoder": config.optim} | ({"critic": config.adversary.optim} if config.adversary else {})
    updates = [Update(n, build_optimizer(g, optim[n]), optim[n], ()) for n, g in objective.phases().items()]
    for step in range(STEPS):
        moment = Moment(90 + step, 100, watched=False)
        for update in updates:
            outcome = update.apply(objective.terms(update.phase, batches_of(step, share), moment), moment)
            logs |= {f"{step} {name}": float(value) for name, value in outcome.logs.items()}
        objective.after_step(moment)
    weights = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    return result | {"weights": weights, "logs": logs}


def main(folder: Path) -> None:
    with process_group("cpu", timeout=120):
        rank, size = ranks()
        results = {
            f"{case} {micros}": trained(config_of(changes), Share(rank, size, micros))
            for case, changes in CASES.items()
            for micros in (1, 2)
        }
        torch.save(results, folder / f"results-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
