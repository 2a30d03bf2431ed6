"""Hinge GAN losses and the adaptive weight that balances them with reconstruction (Esser et al. 2021)."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits; 1 for a discriminator that says 0 everywhere."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean logit of fakes."""
    return -fake.float().mean()


def balance(of_reconstruction: Tensor, of_adversarial: Tensor, *, ceiling: float, eps: float = 1e-6) -> Tensor:
    """|g_reconstruction| / (|g_adversarial| + eps) of two gradients of one tensor, at most `ceiling`; no graph.

    Of the decoder's last layer it is the adaptive weight, with which the adversarial term pulls as hard as reconstruction.
    """
    return (of_reconstruction.norm() / (of_adversarial.norm() + eps)).clamp(0, ceiling).detach()
