"""Self-distillation losses against DINOv2's own numbers, and at extremes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp.losses.dino import (
    CenteringConfig,
    SinkhornConfig,
    build_targets,
    dino_loss,
    ibot_loss,
    sinkhorn,
    target_diagnostics,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2-losses"
SETUP = json.loads((GOLDEN / "config.json").read_text())
STUDENT, TEACHER = SETUP["student_temp"], SETUP["teacher_temp"]


def close(ours, golden):
    torch.testing.assert_close(ours, golden, atol=1e-5, rtol=0)


def check_step(io, name, cls_probs, patch_probs):
    """Teacher probabilities and the three loss terms of one recorded step."""
    cls_probs = cls_probs.unflatten(0, (2, -1))
    close(cls_probs.flip(0).flatten(0, 1), io[f"{name}.teacher_cls_probs"])  # golden rows are swapped
    close(patch_probs, io[f"{name}.teacher_patch_probs"])
    dino = dino_loss(
        io["student_global_cls_logits"].unflatten(0, (2, -1)),
        io["student_local_cls_logits"].unflatten(0, (SETUP["n_local_crops"], -1)),
        cls_probs,
        temperature=STUDENT,
    )
    close(dino.between_globals, io[f"{name}.dino_global"])
    close(dino.local_to_global, io[f"{name}.dino_local"])
    close(
        ibot_loss(io["student_masked_patch_logits"], patch_probs, io["masks"], temperature=STUDENT), io[f"{name}.ibot"]
    )


def test_sinkhorn_matches_official():
    io = load_file(GOLDEN / "io.safetensors")
    targets = build_targets(
        SinkhornConfig(name="sinkhorn", iterations=SETUP["sinkhorn_iterations"]), SETUP["prototypes"]
    )
    cls, patches = io["teacher_cls_logits"], io["teacher_masked_patch_logits"]
    check_step(io, "sinkhorn_knopp.step0", targets(cls, TEACHER), targets(patches, TEACHER))


def test_centering_matches_official_over_three_steps():
    io = load_file(GOLDEN / "io.safetensors")
    config = CenteringConfig(name="centering", momentum=SETUP["center_momentum"])
    of_cls, of_patches = (build_targets(config, SETUP["prototypes"]) for _ in range(2))
    cls, patches = io["teacher_cls_logits"], io["teacher_masked_patch_logits"]
    for step in range(3):
        check_step(io, f"centering.step{step}", of_cls(cls, TEACHER), of_patches(patches, TEACHER))


def test_sinkhorn_is_the_plain_algorithm_in_float64():
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = (logits / 0.5).exp()
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, temperature=0.5, iterations=3).double(), q, atol=1e-6, rtol=0)


def test_sinkhorn_balances():
    q = sinkhorn(torch.randn(64, 8), temperature=0.3, iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "targets", [SinkhornConfig(name="sinkhorn", iterations=3), CenteringConfig(name="centering", momentum=0.9)]
)
def test_finite_at_huge_logits(targets):
    signs = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).sign()
    teacher = build_targets(targets, 16)(200 * signs.flatten(0, 1), 0.04)
    student = (200 * signs.flip(2)).requires_grad_()
    masks = torch.ones(4, 3, dtype=torch.bool)
    dino = dino_loss(student, student[:, :, :], teacher.unflatten(0, (2, -1)), temperature=0.1)
    loss = dino.between_globals + dino.local_to_global
    loss = loss + ibot_loss(student.flatten(0, 1), teacher, masks, temperature=0.1)
    loss.backward()
    assert torch.isfinite(teacher).all()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_agreement_is_the_entropy_of_the_target():
    """A student that equals the target reaches its entropy, and no view is compared with itself."""
    first, second = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    targets = torch.stack([first, second])[:, None]  # [2, 1, 3]
    student = targets.flip(0).log()  # view 0 says what the target of view 1 says
    loss = dino_loss(student, torch.empty(0, 1, 3), targets, temperature=1.0)
    entropy = [-(p * p.log()).sum() for p in (first, second)]
    torch.testing.assert_close(loss.between_globals, (entropy[0] + entropy[1]) / 2)
    assert loss.local_to_global == 0


def test_ibot_weighs_images_equally():
    """One masked patch in the first image counts as much as two in the second; the third has none."""
    masks = torch.tensor([[True, False], [True, True], [False, False]])
    targets = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    student = torch.tensor([[0.0, 0], [5, 0], [5, 0]])
    costs = -torch.log_softmax(student, -1)[:, 0]
    expected = (costs[0] + (costs[1] + costs[2]) / 2) / 3
    torch.testing.assert_close(ibot_loss(student, targets, masks, temperature=1.0), expected)


def test_diagnostics_tell_collapse():
    one_hot = torch.eye(8)
    spread, collapsed = target_diagnostics(one_hot), target_diagnostics(one_hot[[0] * 8])
    assert spread.entropy == collapsed.entropy == 0
    assert float(spread.kl_to_uniform) == pytest.approx(0, abs=1e-6)
    assert float(collapsed.kl_to_uniform) == pytest.approx(math.log(8))
