"""The probe that tells whether samples show their class: what it must tell, and what it cannot."""

import pytest
import torch

from vtp.evaluation.class_probe import ClassProbe, ClassProbeConfig

CONFIG = ClassProbeConfig(seed=0, holdout=0.25, l2=1e-3, max_iterations=60)
CLASSES, DIM = 5, 16


def drawn(count, seed, *, spread=0.3):
    """Features around the mean of their class, and the classes."""
    draws = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % CLASSES
    return means[labels] + spread * torch.randn(count, DIM, generator=draws), labels


def test_classes_that_are_apart_are_told():
    real, labels = drawn(200, 0)
    probe = ClassProbe.of(real, labels, CONFIG)
    assert (probe.held, probe.ceiling) == (50, 1.0)
    samples, asked = drawn(100, 1)
    assert probe.accuracy(samples, asked) == 1.0
    assert probe.accuracy(samples, (asked + 1) % CLASSES) == 0.0
    half = torch.where(torch.arange(100) < 50, asked, (asked + 1) % CLASSES)
    assert probe.accuracy(samples, half) == 0.5


def test_a_shuffled_labelling_is_told_by_chance():
    """Labels that say nothing of the features: within four standard errors of one in five."""
    real, labels = drawn(2000, 0)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    probe = ClassProbe.of(real, shuffled, CONFIG)
    error = (0.2 * 0.8 / probe.held) ** 0.5
    assert probe.ceiling == pytest.approx(0.2, abs=4 * error)
    samples, asked = drawn(1000, 1)
    # Where every feature says one class, as many samples are right as show it.
    assert probe.accuracy(samples, asked) == pytest.approx(0.2, abs=0.2)


def test_held_out_images_are_not_learnt():
    """Noise of as many dimensions as images is learnt by heart, and no held-out image is told by it."""
    draws = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(400, 400, generator=draws), torch.randint(CLASSES, (400,), generator=draws)
    probe = ClassProbe.of(noise, labels, CONFIG)
    assert probe.accuracy(noise, labels) > 0.75
    assert probe.ceiling < 0.4


def test_none_left_to_fit():
    with pytest.raises(ValueError, match="holdout 0.9 of 2 training samples leaves none to fit"):
        ClassProbe.of(torch.randn(2, DIM), torch.tensor([0, 1]), CONFIG.model_copy(update={"holdout": 0.9}))
