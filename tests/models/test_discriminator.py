"""The critic and its augmentation."""

import torch

from vtp.losses.gan import discriminator_loss
from vtp.models.discriminator import (
    Augmentation,
    AugmentationConfig,
    DiscriminatorConfig,
    PatchDiscriminator,
    augment,
    draw_augmentation,
)

POLICY = AugmentationConfig(translation=0.125, brightness=0.5, saturation=0.5, contrast=0.5)


def test_separates_two_distributions():
    torch.manual_seed(0)
    critic = PatchDiscriminator(DiscriminatorConfig(width=8, depth=2))
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    stripes = torch.linspace(-1, 1, 16).sign().expand(8, 3, 16, 16)
    for _ in range(60):
        real, fake = stripes + 0.3 * torch.randn(8, 3, 16, 16), 0.3 * torch.randn(8, 3, 16, 16)
        loss = discriminator_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_depth_sets_the_patch_grid():
    for depth, side in ((2, 6), (3, 2)):
        assert PatchDiscriminator(DiscriminatorConfig(width=4, depth=depth))(torch.zeros(1, 3, 32, 32)).shape == (
            1,
            1,
            side,
            side,
        )


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


def test_draws_are_addressed_differentiable_and_bounded():
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    draws = [draw_augmentation(x.shape, POLICY, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert draws[0].shift.abs().max() <= 2
    augment(x, draws[0]).sum().backward()
    assert x.grad.abs().max() > 0
