"""What every rank of tests/test_distributed.py does: `torchrun tests/ranks.py FOLDER`. One launch covers all cases."""

import itertools
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from objectives.test_pretrain import COMBINATIONS, CONVOLUTIONAL, batch_of, config_of, objective_of
from safetensors.torch import load_file
from torch import nn

import vtp.distributed
from stages.runner.environment import LocalHost, Runtime
from vtp.data.batches import RankSlice
from vtp.distributed import GradientSum, copies, gather, is_sharded, process_group, ranks, shard, whole
from vtp.losses.clip import clip_loss, siglip_loss
from vtp.losses.dino import sinkhorn_potentials
from vtp.losses.koleo import koleo_loss
from vtp.step import ParameterGroup, StepContext, Term, hidden_matrices
from vtp.training.checkpoint import Checkpoints
from vtp.training.fit import state_of
from vtp.training.optim import build_optimizer
from vtp.training.parallelize import parallelize
from vtp.training.update import Update

STEPS, LR = 3, 1e-3
# Stochastic depth, a separate head and centering take part in the last.
CASES = {name: {"objective": {"weights": weights}} for name, weights in COMBINATIONS.items()}
CASES["everything"] = {
    "objective": {
        "contrast": {"name": "sigmoid", "scale": 10.0, "bias": -10.0},
        "ssl": {
            "features": "latent",
            "pooling": "pooled",
            "targets": {"name": "centering", "momentum": 0.9},
            "patch_head": {
                "hidden_dim": 8,
                "bottleneck_dim": 4,
                "prototypes": 24,
                "weight_norm": False,
                "prototype_init": "linear",
            },
        },
        "drop_path": {"ssl": 0.3, "clip": 0.3, "reconstruction": 0.1},
    }
}
CASES["convolutional"] = CONVOLUTIONAL  # a posterior that is sampled: what is drawn does not depend on ranks
OPEN_CLIP = Path(__file__).parent / "golden" / "openclip-losses"
CONTRASTS = {"clip": (clip_loss, 14.2857), "siglip": (siglip_loss, 10.0, -10.0)}  # first scale, first bias
JOINT = ("clip+ssl+ae", "everything")
LAYOUTS = [(parallel, micro_batches) for parallel in ("ddp", "fsdp") for micro_batches in (1, 2)]
PARALLEL = {2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}  # by the number of ranks


def cases_on(size):
    """Two ranks have every objective by itself as well; more of them only those that are trained at once."""
    return list(CASES) if size == 2 else list(JOINT)


def layouts_on(size):
    """Ways to distribute models and batches over ranks."""
    return [*LAYOUTS, ("hsdp", 1)] if size == 4 else LAYOUTS


def distribute(units, parallel, dtype=None):
    """Shard modules over all ranks, or over those of each of two groups; or leave them whole."""
    if parallel != "ddp":
        shard(units, "cpu", groups=2 if parallel == "hsdp" else 1, dtype=dtype)


def config_for(case):
    batch = {"data": {"batch": {"clip": 32, "ssl": 16, "reconstruction": 8}}}
    return config_of(CASES[case] | batch)


def batch_at(config, step, *place):
    """Of a step of the tests: in the pictures of step 0 a residual is so near 0 that rounding decides its sign in L1."""
    return batch_of(config, step + 1, *place)


def gradients_and_weights(case, parallel="ddp", micro_batches=1):
    """Gradient and logged scalars of the first step, weights after some: whole tensors by name."""
    config, rank_slice = config_for(case), RankSlice(*ranks(), micro_batches)
    objective = objective_of(config)
    distribute(objective.sharded_units(), parallel)
    batches = [[batch_at(config, step, rank_slice, micro) for micro in range(micro_batches)] for step in range(STEPS)]
    for term in objective.terms("model", batches[0], StepContext(0, STEPS, log_step=True)):
        if term.loss is not None:
            term.loss.backward()
    GradientSum(objective.parameters()).finish()
    named = list(objective.named_parameters())
    gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
    objective.zero_grad()
    objective = objective_of(config)
    distribute(objective.sharded_units(), parallel)
    optim = config.optim.model_copy(update={"lr": LR, "warmup": 0.0, "schedule": "constant"})
    update = Update("model", build_optimizer(objective.phases()["model"], optim), optim, objective.shared_parameters())
    logs = {}
    for step in range(STEPS):
        context = StepContext(step, STEPS, log_step=step == 0)
        outcome = update.apply(objective.terms("model", batches[step], context), context)
        assert outcome.finite
        logs = logs or {name: float(value) for name, value in outcome.logs.items()}
        objective.after_step(context)
    weights = {name: whole(tensor).clone() for name, tensor in objective.state_dict().items()}
    return {"gradients": gradients, "weights": weights, "logs": logs}


def placed_gradients(case):
    """Of blocks that are sharded, recomputed and compiled at once; on four ranks within two machines, and not compiled."""
    config, rank_slice = config_for(case), RankSlice(*ranks(), 1)
    objective = objective_of(config)
    settings = {"VTP_DEVICE": "cpu", "VTP_PARALLEL": "fsdp", "VTP_COMPILE": "true", "VTP_RECOMPUTE": "true"}
    if ranks().size == 4:
        settings |= {"VTP_PARALLEL": "hsdp", "VTP_COMPILE": "false"}
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        parallelize(objective, LocalHost(Path(), Path(), Runtime.of(settings)))
    assert {copies(p) for p in objective.parameters() if is_sharded(p)} == {ranks().size // 2}
    for term in objective.terms("model", [batch_at(config, 0, rank_slice)], StepContext(0, STEPS, log_step=True)):
        if term.loss is not None:
            term.loss.backward()
    GradientSum(objective.parameters()).finish()
    return {name: whole(p.grad) for name, p in objective.named_parameters() if p.grad is not None}


def rounded_gradients(parallel="ddp"):
    """Of a pass whose gradients travel in bfloat16."""
    config, rank_slice = config_for("clip+ssl+ae"), RankSlice(*ranks(), 1)
    objective = objective_of(config)
    distribute(objective.sharded_units(), parallel, torch.bfloat16)
    terms = objective.terms("model", [batch_at(config, 0, rank_slice)], StepContext(0, STEPS, log_step=False))
    for term in terms:
        if term.loss is not None:
            term.loss.backward()
    GradientSum(objective.parameters(), torch.bfloat16).finish()
    return {name: whole(p.grad) for name, p in objective.named_parameters() if p.grad is not None}


def overlap():
    """How many buckets have left when each objective begins, when the last pass is at its end, and in all."""
    begun, objectives, at_the_end, config = [], {}, [], config_for("clip+ssl+ae")
    objective = objective_of(config)
    bucket, send = vtp.distributed.BUCKET, dist.all_reduce

    def counted(tensor, *arguments, **settings):
        if settings.get("async_op"):
            begun.append(tensor.numel())
        return send(tensor, *arguments, **settings)

    def watched(terms):
        for term in terms:
            objectives.setdefault(term.name, len(begun))
            yield term

    vtp.distributed.BUCKET = 1 << 10
    update = Update("model", build_optimizer(objective.phases()["model"], config.optim), config.optim, ())
    dist.all_reduce = counted
    # The pixels' own layer is the last that a backward pass reaches.
    first, *_ = objective.tokenizer.encoder_layers().embed.parameters()
    first.register_post_accumulate_grad_hook(lambda _: at_the_end.append(len(begun)))
    batch, context = batch_at(config, 0, RankSlice(*ranks(), 1)), StepContext(0, STEPS, log_step=False)
    try:
        assert update.apply(watched(objective.terms("model", [batch], context)), context).finite
    finally:
        vtp.distributed.BUCKET, dist.all_reduce = bucket, send
    return {**objectives, "the end": at_the_end[-1], "all": len(begun)}


def reductions():
    """Losses and feature gradients of fixed global batches, each rank holding its rows."""
    rank, size = ranks()
    draws = torch.Generator().manual_seed(5)
    first, second = (F.normalize(torch.randn(16, 6, generator=draws), dim=-1) for _ in range(2))
    logits = 5 * torch.randn(24, 12, generator=draws)
    rows = slice(rank * 16 // size, (rank + 1) * 16 // size)
    results = {}
    for name, loss in {
        "clip": clip_loss,
        "siglip": lambda x, y, scale: siglip_loss(x, y, scale, -scale),
        "koleo": lambda x, y, scale: koleo_loss(x).loss + 0 * y.sum() * scale,
        "koleo in groups": lambda x, y, scale: koleo_loss(x, group=8).loss + 0 * y.sum() * scale,
        "koleo of copies": lambda x, y, scale: koleo_loss(_with_copies(x)).loss + 0 * y.sum() * scale,
    }.items():
        leaves = [first[rows].clone().requires_grad_(), second[rows].clone().requires_grad_()]
        scale = torch.tensor(7.0, requires_grad=True)
        part = loss(*leaves, scale)
        part.backward()
        results[name] = [part.detach(), scale.grad, *(leaf.grad for leaf in leaves)]
    results["duplicates"] = [koleo_loss(_with_copies(first[rows])).duplicates]
    mine = logits[rank * 24 // size : (rank + 1) * 24 // size]
    sets = [lambda: iter(mine.split(2)), lambda: iter((90 * mine[:, :5]).split(3))]
    results["sinkhorn"] = sinkhorn_potentials(sets, temperature=0.1, iterations=3)
    return results


def _with_copies(rows):
    """The global batch's rows 3, 4, 9 and 13 are one, but for 14, which is near; they are of several ranks."""
    rank, _ = ranks()
    copied = gather(rows)[3].expand_as(rows)
    numbers = torch.arange(len(rows)) + rank * len(rows)
    of_one = torch.isin(numbers, torch.tensor([3, 4, 9, 13, 14]))[:, None]
    return torch.where(of_one, copied + 0.01 * (numbers == 14)[:, None], rows)


def contrast(name, dtype, *, autocast, leaves=torch.float32):
    """Part and gradients of this rank of `golden/openclip-losses`, whose rows were rounded to `dtype`.

    `leaves`: of what precision the features are that collect the gradient.
    """
    rank, size = ranks()
    golden, (loss, *numbers) = load_file(OPEN_CLIP / "io.safetensors"), CONTRASTS[name]
    rows = slice(rank * 8 // size, (rank + 1) * 8 // size)
    given = {what: golden[what][rows].to(dtype).to(leaves).requires_grad_() for what in ("image", "text")}
    given |= {what: torch.tensor(n, requires_grad=True) for what, n in zip(("scale", "bias"), numbers, strict=False)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        part = loss(*given.values())
    part.backward()
    return {"loss": part.detach()} | {f"grad_{what}": leaf.grad for what, leaf in given.items()}


def contrasts():
    """In float32, and of rounded rows under autocast."""
    return {
        (name, dtype): contrast(name, getattr(torch, dtype), autocast=dtype == "bfloat16")
        for name, dtype in itertools.product(CONTRASTS, ("float32", "bfloat16"))
    }


def poisoned(parallel):
    """The last rank's samples of one objective are not finite: what is said of it, and whether weights moved."""
    rank, size = ranks()
    config, rank_slice = config_for("clip+ssl+ae"), RankSlice(rank, size, 1)
    found = {}
    for field in ("clip_images", "global_views", "rec_images"):
        objective = objective_of(config)
        distribute(objective.sharded_units(), parallel)
        update = Update("model", build_optimizer(objective.phases()["model"], config.optim), config.optim, ())
        batch, context = batch_at(config, 0, rank_slice), StepContext(0, STEPS, log_step=False)
        if rank == size - 1:
            pictures = getattr(batch, field).float() / 255
            batch = batch._replace(**{field: pictures * float("nan")})
        before = {name: whole(p).clone() for name, p in objective.named_parameters()}
        outcome = update.apply(objective.terms("model", [batch], context), context)
        origin = update.find_nonfinite(objective.terms("model", [batch], context))
        unmoved = all(torch.equal(whole(p), before[name]) for name, p in objective.named_parameters())
        found[field] = (outcome.finite, origin, unmoved)
    return found


def checkpointed(case, folder, start, stop, parallel="ddp"):
    """Train from the checkpoint in `folder`, if there is one, up to step `stop`; losses by step, and the weights."""
    config, rank_slice = config_for(case), RankSlice(*ranks(), 1)
    objective = objective_of(config)
    distribute(objective.sharded_units(), parallel)
    optim = config.optim.model_copy(update={"lr": LR})
    optimizer = build_optimizer(objective.phases()["model"], optim)
    update, tensors = Update("model", optimizer, optim, ()), state_of(objective, {"model": optimizer})
    checkpoints = Checkpoints(folder, kept=2)
    if start:
        with torch.no_grad():
            for tensor in objective.parameters():
                tensor.add_(1)  # whatever is not restored will show
        assert checkpoints.newest(tensors).step == start
    losses = []
    for step in range(start, stop):
        context = StepContext(step, 8, log_step=False)
        outcome = update.apply(objective.terms("model", [batch_at(config, step, rank_slice)], context), context)
        objective.after_step(context)
        losses.append({name: float(value) for name, value in outcome.logs.items()})
    checkpoints.save(stop, tensors, {})
    checkpoints.wait()
    weights = {name: whole(tensor).clone() for name, tensor in objective.state_dict().items()}
    return {"losses": losses, "weights": weights}


def moved_by_muon(parallel="ddp"):
    """Weights after steps of Muon and AdamW on a network whose gradients have full rank, clipped by module."""
    rank, size = ranks()
    torch.manual_seed(0)
    blocks = [nn.Linear(24, 24) for _ in range(2)]
    objective = nn.Sequential(*blocks, nn.Linear(24, 8))
    distribute([[*objective, objective]], parallel)
    matrices = {"name": "muon", "lr": 1.0, "momentum": 0.95, "nesterov": True, "adjust_lr": "match_rms_adamw"}
    optim = config_of({"optim": {"matrices": matrices, "lr": LR, "clip_norm": 0.1, "clip_by": "module"}}).optim
    groups = [
        ParameterGroup(list(layer.parameters()), module=name, hidden=hidden_matrices(blocks))
        for name, layer in objective.named_children()
    ]
    optimizer = build_optimizer(groups, optim)
    update, tensors = Update("model", optimizer, optim, ()), {}
    for step in range(STEPS):
        draws = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(64, width, generator=draws)[64 * rank // size : 64 * (rank + 1) // size] for width in (24, 8)
        )
        loss = (objective(x) - y).square().sum() / 64
        outcome = update.apply(iter([Term("square", loss, {})]), StepContext(step, STEPS, log_step=False))
        tensors |= {f"{step} {name}": torch.as_tensor(value) for name, value in outcome.logs.items()}
    return tensors | {name: whole(value).clone() for name, value in objective.state_dict().items()}


def main(folder):
    with process_group("cpu", timeout=600):
        rank, size = ranks()
        results = {
            (case, *layout): gradients_and_weights(case, *layout)
            for case, layout in itertools.product(cases_on(size), layouts_on(size))
        }
        results["overlap"] = overlap()
        results["reductions"] = reductions()
        results["contrasts"] = contrasts()
        results["placed"] = placed_gradients("clip+ssl+ae")
        for parallel in PARALLEL[size]:
            results["rounded", parallel] = rounded_gradients(parallel)
            results["poisoned", parallel] = poisoned(parallel)
            results["muon", parallel] = moved_by_muon(parallel)
            place = folder / f"checkpoints-{parallel}-{size}"
            results["saved", parallel] = checkpointed("everything", place, 0, 3, parallel)
            results["resumed", parallel] = checkpointed("everything", place, 3, 5, parallel)
            results["through", parallel] = checkpointed(
                "everything", folder / f"through-{parallel}-{size}", 0, 5, parallel
            )
            if size == 4 and parallel != "hsdp":  # what two ranks saved
                results["from two", parallel] = checkpointed(
                    "everything", folder / f"copied-{parallel}", 3, 5, parallel
                )
        torch.save(results, folder / f"results-{size}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
