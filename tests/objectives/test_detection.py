"""What a detector learns from: targets, losses against closed forms, and batches that no rank and no order changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detecting import NAMES, arrangement_of, scenes_of

from vtp.curation.ingest.compose import Composer
from vtp.data.batches import RankSlice
from vtp.models.scene_detector import DetectorConfig, SceneDetector
from vtp.objectives.detection import (
    SPLIT,
    DetectionObjective,
    ImperfectionConfig,
    SceneBatch,
    SceneBatches,
    centre_loss,
    class_loss,
    size_loss,
    targets_of,
)
from vtp.step import StepContext

NONE = ImperfectionConfig(shift=0.0, blur=0.0, noise=0.0)
SOME = ImperfectionConfig(shift=0.06, blur=0.03, noise=30.0)
NOW = StepContext(0, 10, log_step=False)


def batches_of(imperfections=SOME, *, ranks=(0, 1), micro_batches=1, batch_size=8, **changes):
    rank_slice = RankSlice(*ranks, micro_batches)
    options = {"stride": 2, "seed": 1, "batch_size": batch_size, "rank_slice": rank_slice}
    return SceneBatches(scenes_of(**changes), imperfections, **options)


def objective_of(batch_size=8):
    torch.manual_seed(0)
    model = SceneDetector(DetectorConfig(width=8, stride=2), classes=NAMES, image_size=32)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return DetectionObjective(model, batch_size=batch_size)


def test_targets_are_gaussians_around_centres():
    near, labels, sizes = targets_of(arrangement_of((1, (9.0, 21.0), 12), (3, (24.0, 6.0), 8), canvas=(32, 48)), 2)
    assert near.shape == labels.shape == sizes.shape == (24, 16)
    assert np.argwhere(near == 1).tolist() == [[3, 12], [10, 4]]
    assert (labels[10, 4], labels[3, 12]) == (1, 3)
    assert (sizes[10, 4], sizes[3, 12]) == (pytest.approx(12 / 32), pytest.approx(8 / 32))
    # The centre of the next cell is one cell away from that of the first picture, whose target is 0.6 cells wide.
    assert near[10, 5] == pytest.approx(np.exp(-1 / (2 * 0.6**2)))
    assert (labels[:10, 8:] == 3).all() or (near[:10, 8:][labels[:10, 8:] != 3] < 1e-6).all()
    nothing = targets_of(arrangement_of(), 2)
    assert not any(each.any() for each in nothing)


def test_losses_are_those_of_closed_forms():
    near = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
    even = torch.zeros(1, 2, 2)
    expected = (0.25 + 0.5**4 * 0.25 + 2 * 0.25) * np.log(2)  # (1 - p)^2, (1 - near)^4 p^2
    assert float(centre_loss(even, near)) == pytest.approx(expected)
    assert float(centre_loss(20 * (2 * (near == 1).float() - 1), near)) == pytest.approx(0, abs=1e-6)
    logits, labels = torch.randn(1, 4, 2, 2), torch.tensor([[[1, 2], [0, 0]]])
    each = F.cross_entropy(logits, labels, reduction="none")[0]
    torch.testing.assert_close(class_loss(logits, labels, near)[0], (each[0, 0] + 0.5 * each[0, 1]) / 1.5)
    sizes = torch.tensor([[[0.5, 9.0], [9.0, 9.0]]])
    assert float(size_loss(even + 0.2, sizes, near)) == pytest.approx(0.3)
    empty = torch.zeros(1, 2, 2)
    assert float(class_loss(logits, labels, empty)) == float(size_loss(even, sizes, empty)) == 0.0
    assert float(centre_loss(even, empty)) == pytest.approx(4 * 0.25 * np.log(2))


def test_pictures_without_imperfections_are_the_composed_ones():
    composer, batch = Composer(scenes_of()), batches_of(NONE)[2]
    for number, image in enumerate(batch.images):
        drawn = composer.draw(composer.plan(SPLIT, 16 + number))
        assert torch.equal(image, torch.from_numpy(np.array(drawn)).permute(2, 0, 1))


def test_no_picture_is_one_of_training_or_validation():
    composer, seen = Composer(scenes_of()), set()
    for split in ("train", "validation"):
        seen |= {composer.draw(composer.plan(split, index)).tobytes() for index in range(60)}
    images = torch.cat([batches_of(NONE)[index].images for index in range(8)])
    assert not any(image.permute(1, 2, 0).numpy().tobytes() in seen for image in images)


def test_what_is_drawn_is_moved_with_its_target():
    plain, moved = (batches_of(each)[0] for each in (NONE, ImperfectionConfig(shift=0.5, blur=0.0, noise=0.0)))
    assert not torch.equal(plain.near, moved.near)
    for images, near in ((plain.images, plain.near), (moved.images, moved.near)):
        corner = images[:, :, :1, :1]
        drawn = F.avg_pool2d((images != corner).any(1, keepdim=True).float(), 2)[:, 0] > 0
        assert (drawn & (near > 0.5)).sum() / (
            near > 0.5
        ).sum() > 0.6  # some drawings are hollow, some corners not plain


def test_half_of_the_pictures_are_blurred_and_half_noisy():
    large = [NONE.model_copy(update=change) for change in ({"blur": 0.05}, {"noise": 60.0})]
    plain = batches_of(NONE, batch_size=64)[0].images
    for imperfections in large:
        changed = batches_of(imperfections, batch_size=64)[0].images
        share = (changed != plain).flatten(1).any(1).float().mean()
        assert 0.25 < share < 0.75


def test_batches_belong_to_no_rank_and_no_order():
    whole = batches_of()
    parts = [batches_of(ranks=(rank, 2), micro_batches=2) for rank in range(2)]
    expected = whole[3]
    pieces = [part[6 + micro] for part in parts for micro in range(2)]
    for ours, theirs in zip(expected, zip(*pieces, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs))
    assert torch.equal(whole[0].images, batches_of()[0].images)
    assert not torch.equal(whole[0].images, whole[1].images)


def test_all_pictures_of_a_step_have_one_shape():
    batches = batches_of(aspect_ratios=[0.5, 1.0, 1.5])
    shapes = {tuple(batches[step].images.shape[2:]) for step in range(12)}
    assert shapes == {(64, 32), (32, 32), (32, 48)}
    batch = next(batch for batch in map(batches.__getitem__, range(12)) if batch.images.shape[3] == 48)
    assert batch.near.shape == batch.labels.shape == batch.sizes.shape == (8, 16, 24)


def test_micro_batches_add_up():
    batch, whole, parts = batches_of()[0], objective_of(), objective_of()
    halves = [SceneBatch(*(each[rows] for each in batch)) for rows in (slice(0, 3), slice(3, 8))]
    logs = []
    for objective, micro_batches in ((whole, [batch]), (parts, halves)):
        terms = list(objective.terms("model", micro_batches, NOW))
        for term in terms:
            term.loss.backward()
        logs.append({name: sum(float(term.parts[name]) for term in terms) for name in terms[0].parts})
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)


def test_a_step_costs_three_forward_passes():
    objective = objective_of(batch_size=4)
    square, wide = objective.step_cost((32, 32)), objective.step_cost((64, 32))
    assert wide.flops == pytest.approx(2 * square.flops)
    stem = 2 * 3 * 8 * 4 * 4 * 16 * 16  # one of its convolutions
    assert square.flops > 4 * 3 * stem
    assert (square.samples, square.tokens) == ({"detection": 4}, 4 * 16 * 16)
