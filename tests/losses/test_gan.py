"""Hinge losses and the balance of gradients."""

import pytest
import torch

from vtp.losses.gan import balance, discriminator_loss, generator_loss


def test_hinge():
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)) == 1
    assert discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0
    assert discriminator_loss(torch.tensor([-1.0]), torch.tensor([1.0])) == 2
    assert generator_loss(torch.tensor([1.0, 3.0])) == -2


def test_balance_equalises_gradients():
    strong, weak = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 2.0], requires_grad=True)
    factor = balance(strong, weak, ceiling=1e4)
    assert float(factor) == pytest.approx(3, rel=1e-4)
    assert not factor.requires_grad
    assert balance(strong, 0 * weak, ceiling=50.0) == 50
