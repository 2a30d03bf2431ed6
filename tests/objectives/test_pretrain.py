"""The joint objective: who trains whom, what a weight of zero saves, and that it learns."""

from pathlib import Path

import pytest
import torch
from tiny import merged, tiny_params

from stages.pretrain import Pretrain
from vtp.data.batches import PretrainBatch
from vtp.data.masking import draw_masks
from vtp.draws import numpy_draws
from vtp.losses.perceptual import build_perceptual
from vtp.models.tokenizer import VisualTokenizer
from vtp.objectives.pretrain import PretrainObjective


def config_of(changes=None) -> Pretrain:
    return Pretrain.parse(merged(tiny_params()["pretrain"], changes or {}), where="test")


def objective_of(config: Pretrain) -> PretrainObjective:
    torch.manual_seed(0)
    perceptual = build_perceptual(config.objective.perceptual, weights=Path())
    return PretrainObjective(VisualTokenizer(config.architecture), config.objective, perceptual=perceptual, seed=0)


def batch_of(config: Pretrain) -> PretrainBatch:
    torch.manual_seed(1)
    clip, ssl, rec = config.active
    return PretrainBatch(
        clip_images=torch.randn(clip, 3, 16, 16),
        tokens=torch.randint(1, 100, (clip, 40)),
        global_views=torch.randn(2, ssl, 3, 16, 16),
        local_views=torch.randn(2, ssl, 3, 8, 8),
        masks=draw_masks(2 * ssl, 2, 2, config.data.masks.model_copy(update={"ratio_max": 0.8}), numpy_draws(0, "m")),
        rec_images=torch.randn(rec, 3, 16, 16),
    )


def gradients(objective, batch, term):
    """Names of the tokenizer's parameters that one term moves."""
    objective.zero_grad()
    loss, _ = objective._terms[term](batch, 0, 0.0)
    loss.backward()
    named = objective.tokenizer.named_parameters()
    return {name for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


def test_each_term_trains_its_part():
    config = config_of()
    objective, batch = objective_of(config), batch_of(config)
    clip, ssl, rec = (gradients(objective, batch, term) for term in ("clip", "ssl", "reconstruction"))
    shared = "trunk.blocks.0.attn.qkv.weight"
    assert shared in clip & ssl & rec
    assert any(name.startswith("text.") for name in clip)
    assert not any(name.startswith(("text.", "pixel_decoder.")) for name in ssl)
    assert "trunk.mask_token" in ssl - clip - rec
    # bottleneck_ae_only: only reconstruction shapes the latents
    assert "trunk.feature_bottleneck.weight" in rec - clip - ssl
    through = config_of({"tokenizer": {"vision": {"bottleneck_ae_only": False}}})
    assert "trunk.feature_bottleneck.weight" in gradients(objective_of(through), batch, "clip")
    assert "trunk.feature_bottleneck.weight" in gradients(objective_of(through), batch, "ssl")


def test_teacher_starts_as_the_student_and_follows_it():
    objective = objective_of(config_of({"objective": {"ssl": {"momentum": 0.99}}}))
    for teacher, student in ((objective.teacher, objective.tokenizer.trunk), (objective.teacher_head, objective.head)):
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
        assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        objective.head.scales.fill_(2.0)
    objective.after_step(0)
    torch.testing.assert_close(objective.teacher_head.scales, torch.full((16,), 1.01))


def test_logit_scale_is_clamped():
    objective = objective_of(config_of())
    objective.tokenizer.logit_scale.data.fill_(9.0)
    objective.after_step(0)
    assert objective.tokenizer.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)


def test_zero_weights_cost_nothing():
    joint, autoencoder = config_of(), config_of({"objective": {"weights": {"clip": 0.0, "ssl": 0.0}}})
    objective = objective_of(autoencoder)
    assert list(objective._terms) == ["reconstruction"]
    assert not any("text" in name or "teacher" in name or "head" in name for name, _ in objective.named_parameters())
    assert autoencoder.active == (0, 0, 4)
    flops = [objective_of(c).step_flops(batch_of(c)) for c in (joint, autoencoder)]
    assert flops[1] < flops[0]


def test_flops_are_those_of_the_step():
    """The sum of its parts equals what torch counts while a step runs, less the small products of the losses."""
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of()
    objective, batch = objective_of(config), batch_of(config)
    with FlopCounterMode(display=False) as counter:
        for loss, _ in objective.losses("model", batch, 0, 0.0):
            loss.backward()
    assert objective.step_flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_learns_one_batch():
    config = config_of()
    objective, batch = objective_of(config), batch_of(config)
    optimizer = torch.optim.AdamW([p for m in objective.phases()["model"] for p in m.parameters()], 3e-3)
    history = []
    for step in range(60):
        logs = {}
        for loss, scalars in objective.losses("model", batch, step, step / 60):
            loss.backward()
            logs |= scalars
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
        history.append({name: float(value) for name, value in logs.items()})
    assert history[-1]["clip_loss"] < 0.5 * history[0]["clip_loss"]
    assert history[-1]["l1"] < 0.8 * history[0]["l1"]
    assert history[-1]["ibot_loss"] < history[0]["ibot_loss"]


def test_drop_path_draws_by_step():
    config = config_of({"objective": {"drop_path": {"ssl": 0.5}}})
    objective = objective_of(config)
    first, again, other = objective._keep("ssl", 8, 0), objective._keep("ssl", 8, 0), objective._keep("ssl", 8, 1)
    assert first.shape == (2, 2, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert objective._keep("clip", 8, 0) is None


def test_temperature_rises_then_stays():
    warmup = {"start": 0.04, "end": 0.07, "warmup": 0.3}
    ssl = {f"teacher_temperature_{key}": value for key, value in warmup.items()}
    objective = objective_of(config_of({"objective": {"ssl": ssl}}))
    values = [objective.teacher_temperature(progress) for progress in (0.0, 0.15, 0.3, 0.9)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_impossible_configurations_are_refused():
    for changes, said in (
        ({"objective": {"weights": {"reconstruction": 0.0}}}, "reconstruction must be above 0"),
        ({"tokenizer": {"text": None}}, "text must not be null"),
        ({"data": {"batch": {"ssl": 9}}}, "clip 8 >= ssl 9"),
        ({"data": {"ssl_views": {"local_size": 9}}}, "local_size 9 is not a multiple"),
        ({"tokenizer": {"vision": {"num_heads": 3}}}, "must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=said):
            config_of(changes)
