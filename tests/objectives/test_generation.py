"""The objective on the official numbers: parts add up, dropped labels are the null class, averages follow."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import merged, tiny_params

from stages.runner.environment import LocalHost, Runtime
from vtp import LightningDiT
from vtp.data.batches import LatentBatch
from vtp.objectives.generation import GenerationObjective, GenerationObjectiveConfig
from vtp.step import StepContext
from vtp.training.fit import in_precision
from vtp.training.parallelize import parallelize

GOLDEN = Path(__file__).parents[1] / "golden" / "lightningdit-tiny"
NOW = StepContext(0, 100, log_step=False)


def objective_of(**changes):
    config = merged(tiny_params()["train_generator"]["objective"], {"condition_dropout": 0.0} | changes)
    model = LightningDiT.from_pretrained(GOLDEN).train()
    return GenerationObjective(model, GenerationObjectiveConfig.parse(config, where="test"))


def batch_of(rows=slice(None), uniform=0.5):
    io = load_file(GOLDEN / "io.safetensors")
    count = len(io["loss.x1"])
    normal = (torch.logit(io["loss.t"]) + 0.5) / 1.25  # that the times are the official ones
    draws = torch.full((count, 2), uniform)
    of_labels = torch.empty(count, 0, dtype=torch.bool)
    batch = LatentBatch(io["loss.x1"], io["y"], of_labels, io["loss.x0"], normal, draws, torch.zeros(0))
    return LatentBatch(*(tensor[rows] if len(tensor) else tensor for tensor in batch))


def test_loss_is_the_official_one():
    io = load_file(GOLDEN / "io.safetensors")
    (term,) = objective_of().terms("model", [batch_of()], NOW)
    torch.testing.assert_close(term.loss, io["loss.mse"].mean() + io["loss.cos"].mean(), atol=1e-4, rtol=0)
    assert {name: float(value) for name, value in term.parts.items()} == pytest.approx(
        {"mse": float(io["loss.mse"].mean()), "cosine": float(io["loss.cos"].mean())}, abs=1e-4
    )


def test_micro_batches_add_up():
    whole, parts = objective_of(), objective_of()
    for objective, micro_batches in ((whole, [batch_of()]), (parts, [batch_of(slice(0, 2)), batch_of(slice(2, 4))])):
        for term in objective.terms("model", micro_batches, NOW):
            term.loss.backward()
    for (name, ours), theirs in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_dropped_labels_train_the_null_class():
    seen = []

    class Recorder(LightningDiT):
        def forward(self, x, t, labels):
            seen.append(labels)
            return super().forward(x, t, labels)

    objective = objective_of(condition_dropout=0.25)
    objective.model.__class__ = Recorder
    batch = batch_of()._replace(uniform=torch.tensor([[0.9, 0.1], [0.9, 0.3], [0.1, 0.24], [0.1, 0.26]]))
    list(objective.terms("model", [batch], NOW))
    null = objective.model.null_label
    assert torch.equal(seen[0], torch.where(torch.tensor([True, False, True, False]), null, batch.condition))


def test_averages_follow_at_their_own_pace():
    objective = objective_of(ema=[0.5, 0.9])
    with torch.no_grad():
        objective.model.final_layer.linear.bias.fill_(1.0)
    before = [float(average.final_layer.linear.bias[0]) for average in objective.averages]
    objective.after_step(StepContext(1000, 2000, log_step=False))
    after = [float(average.final_layer.linear.bias[0]) for average in objective.averages]
    for momentum, old, new in zip((0.5, 0.9), before, after, strict=True):
        assert new == pytest.approx(momentum * old + (1 - momentum))
    assert objective.averaged(1)["final_layer.linear.bias"][0] == after[1]


@pytest.mark.parametrize(("warmup", "momentum"), [(True, 3 / 12), (False, 0.99)])
def test_averages_follow_faster_at_first_where_they_are_told_to(warmup, momentum):
    """(1 + 2) / (10 + 2) in the third step; LightningDiT's have their one momentum from the first."""
    objective = objective_of(ema=[0.99], ema_warmup=warmup)
    with torch.no_grad():
        objective.model.final_layer.linear.bias.fill_(1.0)
    before = float(objective.averages[0].final_layer.linear.bias[0])
    objective.after_step(StepContext(2, 2000, log_step=False))
    after = float(objective.averages[0].final_layer.linear.bias[0])
    assert after == pytest.approx(momentum * before + (1 - momentum))


def test_a_residual_of_bfloat16_learns_alike():
    """Blocks add to bfloat16; the losses of a short training stay within its rounding of those of float32."""
    widths, losses = {}, {}

    def look(residual, layer, given):
        widths[residual] = given[0].dtype

    for residual in (None, torch.bfloat16):
        objective = objective_of()
        objective.model.residual = residual
        objective.model.final_layer.register_forward_pre_hook(partial(look, residual))
        optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-3)
        losses[residual] = []
        for _ in range(30):
            for term in in_precision(objective.terms("model", [batch_of()], NOW), "cpu", "bfloat16"):
                term.loss.backward()
                losses[residual].append(float(term.loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    assert widths == {None: torch.float32, torch.bfloat16: torch.bfloat16}
    assert losses[torch.bfloat16] != losses[None]
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.02)
    assert losses[None][-1] < 0.9 * losses[None][0]


def test_recomputed_gradients_are_the_same():
    plain, placed = objective_of(), objective_of()
    parallelize(placed, LocalHost(Path(), Path(), Runtime.of({"VTP_DEVICE": "cpu", "VTP_RECOMPUTE": "true"})))
    assert placed.model.recompute
    for objective in (plain, placed):
        for term in objective.terms("model", [batch_of()], NOW):
            term.loss.backward()
    for (name, ours), theirs in zip(plain.model.named_parameters(), placed.model.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=0, rtol=0, msg=name)
