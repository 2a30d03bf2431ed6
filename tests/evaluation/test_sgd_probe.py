"""Heads of the grid: trained together as if alone, chosen without a look at the validation images."""

import pytest
import torch
import torch.nn.functional as F
from evaluation.test_linear_probe import blobs

from vtp.evaluation.linear_probe import draw_holdout
from vtp.evaluation.scale import Scale
from vtp.evaluation.sgd_probe import ProbeFeatures, SgdConfig, SgdProbe

CONFIG = SgdConfig(learning_rates=[0.01, 0.1, 1.0, 300.0], epochs=3, batch_size=16)
CLASSES = torch.arange(3)
WIDE, NARROW = (ProbeFeatures(f"last {width}", "multi", "x", width, CLASSES, None) for width in (6, 4))
COARSE = ProbeFeatures("coarse", "multi_category", "x", 6, torch.tensor([0, 0, 1]), None)
TRAIN, TEST = blobs(0, 100, spread=0.6), blobs(1, 60, spread=0.6)
HELD = draw_holdout(100, 0.25, 0)


def trained(sets, config=CONFIG, truth=TEST[1], epochs=None):
    probe = SgdProbe(sets, config, seed=0, device="cpu")
    go_on(probe, truth, epochs or config.epochs)
    return probe


def go_on(probe, truth, epochs):
    (features, labels), tables = TRAIN, {"x": TEST[0]}
    for _ in range(epochs):
        probe.train({"x": features}, labels, HELD)
        probe.end_epoch(holdout=probe.judge({"x": features[HELD]}, labels[HELD]), validation=probe.judge(tables, truth))


def test_heads_trained_together_are_those_trained_alone():
    """Whatever else is in the grid: other rates, other features, other labels."""
    together, count = trained([WIDE, NARROW, COARSE]), len(CONFIG.learning_rates)
    for number, one in enumerate((WIDE, NARROW, COARSE)):
        for place, rate in enumerate(CONFIG.learning_rates):
            alone = trained([one], CONFIG.model_copy(update={"learning_rates": [rate]}))
            assert alone.candidates(one.probe)[0] in together.candidates(one.probe)
            both = together._weights[number][:, [place, place + count]]
            torch.testing.assert_close(alone._weights[0], both, rtol=1e-4, atol=1e-5 * max(1, rate))


def test_a_head_is_torchs_sgd():
    """The one that sees all, against torch.optim.SGD and autograd; the one that does not, on the rest of each batch."""
    features, labels = TRAIN
    config = SgdConfig(learning_rates=[0.5], epochs=2, batch_size=16)
    probe, start = trained([WIDE], config), SgdProbe([WIDE], config, seed=0, device="cpu")
    for number, seen in enumerate((~HELD, torch.ones_like(HELD))):
        weight, bias = (x[..., number, :].clone().requires_grad_() for x in (start._weights[0], start._biases[0]))
        assert weight.detach().std().item() == pytest.approx(0.01, rel=0.4)
        optimizer = torch.optim.SGD([weight, bias], lr=0.5 * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * 6)
        for epoch in range(2):
            place = SgdProbe([WIDE], config, seed=0, device="cpu")
            for _ in range(epoch):
                place.end_epoch(holdout=torch.zeros(1, 2), validation=torch.zeros(1, 2))
            for batch in place.batches(100):
                rows = batch[seen[batch]]
                optimizer.zero_grad()
                F.cross_entropy(features[rows] @ weight + bias, labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(probe._weights[0][:, number], weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(probe._biases[0][number], bias.detach(), rtol=1e-4, atol=1e-6)


def test_the_choice_does_not_see_the_validation_labels():
    truth = TEST[1]
    right, wrong = trained([NARROW, WIDE]), trained([NARROW, WIDE], truth=(truth + 1) % 3)
    ours, theirs = right.chosen("multi"), wrong.chosen("multi")
    assert (ours.features, ours.learning_rate, ours.epoch) == (theirs.features, theirs.learning_rate, 3)
    assert ours.accuracy > 0.7
    assert theirs.accuracy < 0.4
    best = max(right.candidates("multi"), key=lambda candidate: candidate.holdout)
    assert (ours.features, ours.learning_rate, ours.accuracy) == (best.features, best.learning_rate, best.validation)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_best_on_validation_is_not_below_the_chosen(shift):
    probe = trained([NARROW, WIDE], truth=(TEST[1] + shift) % 3)
    best = probe.best_on_val("multi")
    assert best.accuracy >= probe.chosen("multi").accuracy
    assert best.accuracy >= max(candidate.validation for candidate in probe.candidates("multi"))
    assert (
        best.accuracy
        == trained([NARROW, WIDE], truth=(TEST[1] + shift) % 3, epochs=best.epoch).best_on_val("multi").accuracy
    )  # of the epoch that it names, under the same schedule


def test_held_out_samples_are_held_out():
    """Their labels change the head that is reported, and not the one that chooses."""
    probe, other = (SgdProbe([WIDE], CONFIG, seed=0, device="cpu") for _ in range(2))
    features, labels = TRAIN
    probe.train({"x": features}, labels, HELD)
    other.train({"x": features}, torch.where(HELD, (labels + 1) % 3, labels), HELD)
    count = len(CONFIG.learning_rates)
    assert torch.equal(probe._weights[0][:, :count], other._weights[0][:, :count])
    assert not torch.allclose(probe._weights[0][:, count:], other._weights[0][:, count:])


def test_goes_on_from_its_state():
    """With the same bits, also from a file."""
    whole, first = trained([WIDE, COARSE]), trained([WIDE, COARSE], epochs=1)
    second = SgdProbe([WIDE, COARSE], CONFIG, seed=0, device="cpu")
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert second.epochs_done == 1
    go_on(second, TEST[1], 2)
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor), name


def test_batches_hold_every_sample_once():
    probe = SgdProbe([WIDE], CONFIG, seed=3, device="cpu")
    batches = probe.batches(50)
    assert [len(batch) for batch in batches] == [17, 17, 16]
    assert torch.cat(batches).sort().values.tolist() == list(range(50))
    assert [len(batch) for batch in probe.batches(5)] == [5]
    probe.end_epoch(holdout=torch.zeros(1, 8), validation=torch.zeros(1, 8))
    assert not torch.equal(probe.batches(50)[0], batches[0])


def test_standardised_features_have_no_scale():
    """A set with a scale is the set of standardised features."""
    (features, labels), (test, truth) = TRAIN, TEST
    scaled = ProbeFeatures("scaled", "last", "x", 6, CLASSES, Scale.of(features))
    plain = ProbeFeatures("plain", "last", "x", 6, CLASSES, None)
    found = [trained([scaled])]
    probe = SgdProbe([plain], CONFIG, seed=0, device="cpu")
    standardised, others = (Scale.of(features).standardise(x).float() for x in (features, test))
    for _ in range(CONFIG.epochs):
        probe.train({"x": standardised}, labels, HELD)
        probe.end_epoch(
            holdout=probe.judge({"x": standardised[HELD]}, labels[HELD]), validation=probe.judge({"x": others}, truth)
        )
    found.append(probe)
    assert found[0].chosen("last").accuracy == found[1].chosen("last").accuracy
    torch.testing.assert_close(found[0]._weights, found[1]._weights)
