"""DiffAug."""

import torch

from vtp.layers.augment import Augmentation, AugmentationConfig, augment, draw_augmentation

POLICY = AugmentationConfig(translation=0.125, brightness=0.5, saturation=0.5, contrast=0.5)


def test_identity_draws_change_nothing():
    x = torch.rand(3, 3, 8, 8)
    one = torch.ones(3, 1, 1, 1)
    out = augment(x, Augmentation(0 * one, one, one, torch.zeros(3, 2, dtype=torch.int64)))
    torch.testing.assert_close(out, x)


def test_translation_moves_down_and_right():
    x = torch.zeros(2, 3, 4, 4)
    x[:, :, 1, 1] = 1
    one = torch.ones(2, 1, 1, 1)
    out = augment(x, Augmentation(0 * one, one, one, torch.tensor([[2, 1], [-1, 0]])))
    assert out[0, 0, 3, 2] == out[1, 0, 0, 1] == 1
    assert out.sum() == 6
    gone = augment(x, Augmentation(0 * one, one, one, torch.tensor([[4, 0], [0, -9]])))
    assert gone.sum() == 0


def draws(index):
    return torch.Generator().manual_seed(index)


def test_draws_belong_to_an_index_are_differentiable_and_bounded():
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    whole = draw_augmentation((16, 16), POLICY, range(4), draws)
    half = draw_augmentation((16, 16), POLICY, range(2, 4), draws)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, half, strict=True))
    assert whole.shift.abs().max() <= 2
    assert (whole.contrast - 1).abs().max() <= 0.5
    augment(x, whole).sum().backward()
    assert x.grad.abs().max() > 0
