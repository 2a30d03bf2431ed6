"""Hinge GAN losses and the adaptive weight that balances them with reconstruction (Esser et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits; 1 for a critic that says 0 everywhere."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean logit of fakes."""
    return -fake.float().mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, ceiling: float, eps: float = 1e-6
) -> Tensor:
    """|d reconstruction / d last_layer| / |d adversarial / d last_layer|, at most `ceiling`; a constant for autograd.

    With it the adversarial term pulls the decoder's last layer as hard as reconstruction does.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + eps)).clamp(0, ceiling).detach()
