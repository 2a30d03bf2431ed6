"""Self-distillation losses against DINOv2's own numbers, in chunks of any size, and at extremes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp.losses.dino import (
    CenteringConfig,
    SinkhornConfig,
    TargetDiagnostics,
    build_targets,
    dino_loss,
    ibot_loss,
    sinkhorn_potentials,
    target_of,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2-losses"
SETUP = json.loads((GOLDEN / "config.json").read_text())
STUDENT, TEACHER = SETUP["student_temp"], SETUP["teacher_temp"]


def close(ours, golden):
    torch.testing.assert_close(ours, golden, atol=1e-5, rtol=0)


def in_chunks(logits, rows):
    return lambda: iter(logits.split(rows))


def probabilities(targets, logits, rows=4):
    """Targets of all rows, by a potential that saw them in chunks."""
    return target_of(logits, targets({"rows": in_chunks(logits, rows)}, TEACHER)["rows"], TEACHER)


def sinkhorn(logits, *, temperature, iterations, rows=3):
    (potential,) = sinkhorn_potentials([in_chunks(logits, rows)], temperature=temperature, iterations=iterations)
    return target_of(logits, potential, temperature)


def weights_of(masks):
    """One over the masked patches of the image, for every masked patch."""
    return (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]


def check_step(io, name, cls_probs, patch_probs):
    """Teacher probabilities and the three loss terms of one recorded step."""
    cls_probs = cls_probs.unflatten(0, (2, -1))
    close(cls_probs.flip(0).flatten(0, 1), io[f"{name}.teacher_cls_probs"])  # golden rows are swapped
    close(patch_probs, io[f"{name}.teacher_patch_probs"])
    dino = dino_loss(
        io["student_global_cls_logits"].unflatten(0, (2, -1)).transpose(0, 1),
        io["student_local_cls_logits"].unflatten(0, (SETUP["n_local_crops"], -1)).transpose(0, 1),
        cls_probs.transpose(0, 1),
        temperature=STUDENT,
    )
    close(dino.between_globals / SETUP["batch"], io[f"{name}.dino_global"])
    close(dino.local_to_global / SETUP["batch"], io[f"{name}.dino_local"])
    masks = io["masks"]
    ibot = ibot_loss(io["student_masked_patch_logits"], patch_probs, weights_of(masks), temperature=STUDENT)
    close(ibot / len(masks), io[f"{name}.ibot"])


def test_sinkhorn_matches_official():
    io = load_file(GOLDEN / "io.safetensors")
    targets = build_targets(
        SinkhornConfig(name="sinkhorn", iterations=SETUP["sinkhorn_iterations"]), {"rows": SETUP["prototypes"]}
    )
    cls, patches = io["teacher_cls_logits"], io["teacher_masked_patch_logits"]
    for rows in (1, 3, 1000):
        check_step(io, "sinkhorn_knopp.step0", probabilities(targets, cls, rows), probabilities(targets, patches, rows))


def test_centering_matches_official_over_three_steps():
    io = load_file(GOLDEN / "io.safetensors")
    config = CenteringConfig(name="centering", momentum=SETUP["center_momentum"])
    of_cls, of_patches = (build_targets(config, {"rows": SETUP["prototypes"]}) for _ in range(2))
    cls, patches = io["teacher_cls_logits"], io["teacher_masked_patch_logits"]
    for step in range(3):
        check_step(io, f"centering.step{step}", probabilities(of_cls, cls), probabilities(of_patches, patches))
        of_cls.after_step()
        of_patches.after_step()


def test_a_skipped_step_leaves_the_centre():
    centering = build_targets(CenteringConfig(name="centering", momentum=0.5), {"rows": 3, "others": 2})
    centering({"rows": in_chunks(torch.ones(4, 3), 2)}, 1.0)
    assert centering.rows.eq(0).all()
    centering.after_step()
    torch.testing.assert_close(centering.rows, torch.full((3,), 0.5))
    assert centering.others.eq(0).all()


def test_sinkhorn_is_the_plain_algorithm_in_float64():
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = (logits / 0.5).exp()
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, temperature=0.5, iterations=3).double(), q, atol=1e-6, rtol=0)


def test_sets_are_balanced_each_by_itself():
    """Together or alone, whatever their widths and numbers of rows; logits of one are a hundred times the other's."""
    draws = torch.Generator().manual_seed(3)
    logits = [torch.randn(9, 5, generator=draws), 100 * torch.randn(20, 12, generator=draws)]
    chunks = [in_chunks(of_set, 4) for of_set in logits]
    together = sinkhorn_potentials(chunks, temperature=0.1, iterations=3)
    for potential, of_set in zip(together, chunks, strict=True):
        (alone,) = sinkhorn_potentials([of_set], temperature=0.1, iterations=3)
        torch.testing.assert_close(potential, alone)
        assert torch.isfinite(potential).all()


def test_sinkhorn_balances():
    q = sinkhorn(torch.randn(64, 8), temperature=0.3, iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), atol=1e-3, rtol=0)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"no patch is masked"):
        sinkhorn_potentials([lambda: iter([])], temperature=1.0, iterations=3)


@pytest.mark.parametrize(
    "config", [SinkhornConfig(name="sinkhorn", iterations=3), CenteringConfig(name="centering", momentum=0.9)]
)
def test_finite_at_huge_logits(config):
    signs = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1)).sign()
    logits = 200 * signs
    potentials = build_targets(config, {"rows": 16})({"rows": in_chunks(logits.flatten(0, 1), 5)}, 0.04)
    teacher = target_of(logits, potentials["rows"], 0.04)
    student = (200 * signs.flip(2)).requires_grad_()
    dino = dino_loss(student, student, teacher, temperature=0.1)
    loss = dino.between_globals + dino.local_to_global
    loss = loss + ibot_loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(12), temperature=0.1)
    loss.backward()
    assert torch.isfinite(teacher).all()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_agreement_is_the_entropy_of_the_target():
    """A student that equals the target reaches its entropy, and no view is compared with itself."""
    first, second = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    targets = torch.stack([first, second])[None]  # [1, 2, 3]
    student = targets.flip(1).log()  # view 0 says what the target of view 1 says
    loss = dino_loss(student, torch.empty(1, 0, 3), targets, temperature=1.0)
    entropy = [-(p * p.log()).sum() for p in (first, second)]
    torch.testing.assert_close(loss.between_globals, (entropy[0] + entropy[1]) / 2)
    assert loss.local_to_global == 0


def test_dino_is_the_mean_over_pairs():
    """Against the definition, with explicit log-softmax and loops over pairs."""
    targets, seen, local = (torch.randn(5, views, 7) for views in (2, 2, 3))
    targets = targets.softmax(-1)
    parts = dino_loss(seen, local, targets, temperature=0.2)
    cost = lambda target, view: -(target * torch.log_softmax(view / 0.2, -1)).sum(-1).sum()  # noqa: E731
    crossed = cost(targets[:, 0], seen[:, 1]) + cost(targets[:, 1], seen[:, 0])
    of_local = sum(cost(targets[:, t], local[:, v]) for t in range(2) for v in range(3))
    torch.testing.assert_close(parts.between_globals, crossed / 8)
    torch.testing.assert_close(parts.local_to_global, of_local / 8)


def test_ibot_weighs_images_equally():
    """One masked patch in the first image counts as much as two in the second; the third has none."""
    masks = torch.tensor([[True, False], [True, True], [False, False]])
    targets = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    student = torch.tensor([[0.0, 0], [5, 0], [5, 0]])
    costs = -torch.log_softmax(student, -1)[:, 0]
    expected = costs[0] + (costs[1] + costs[2]) / 2
    torch.testing.assert_close(ibot_loss(student, targets, weights_of(masks), temperature=1.0), expected)


def test_diagnostics_tell_collapse():
    def of(targets):
        diagnostics = TargetDiagnostics(8, torch.device("cpu"))
        for chunk in targets.split(3):
            diagnostics.add(chunk)
        return {name: float(value) for name, value in diagnostics.parts().items()}

    one_hot = torch.eye(8)
    spread, collapsed = of(one_hot), of(one_hot[[0] * 8])
    assert spread["teacher_entropy"] == collapsed["teacher_entropy"] == 0
    assert spread["teacher_kl_to_uniform"] == pytest.approx(0, abs=1e-6)
    assert collapsed["teacher_kl_to_uniform"] == pytest.approx(math.log(8))
    assert (spread["prototypes_used"], collapsed["prototypes_used"]) == (1.0, 0.125)
    assert of(torch.full((4, 8), 1 / 8))["teacher_entropy"] == pytest.approx(math.log(8))
