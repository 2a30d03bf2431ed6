"""Hinge losses and the adaptive weight."""

import pytest
import torch

from vtp.losses.gan import adaptive_weight, discriminator_loss, generator_loss


def test_hinge():
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)) == 1
    assert discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0
    assert discriminator_loss(torch.tensor([-1.0]), torch.tensor([1.0])) == 2
    assert generator_loss(torch.tensor([1.0, 3.0])) == -2


def test_adaptive_weight_equalises_gradients():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = 6 * weight[0], 2 * weight[1]
    factor = adaptive_weight(reconstruction, adversarial, weight, ceiling=1e4)
    assert float(factor) == pytest.approx(3, rel=1e-4)
    assert not factor.requires_grad
    assert adaptive_weight(reconstruction, 0 * adversarial, weight, ceiling=50.0) == 50
