"""Hinge GAN losses, LeCam, and the adaptive weight that balances them with reconstruction (Esser et al. 2021)."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits; 1 for a discriminator that says 0 everywhere."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def lecam_loss(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """How far logits have left those that the other kind had: mean relu(real - a_fake)^2 + mean relu(a_real - fake)^2.

    `anchors` [2] are moving averages of the logits of real and of fake images, without gradient. A discriminator that tells
    few images apart too well is held back (Tseng et al. 2021, as its authors compute it).
    """
    of_real, of_fake = anchors.unbind()
    return F.relu(real.float() - of_fake).square().mean() + F.relu(of_real - fake.float()).square().mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean logit of fakes."""
    return -fake.float().mean()


def balance(of_reconstruction: Tensor, of_adversarial: Tensor, *, ceiling: float, eps: float = 1e-6) -> Tensor:
    """|g_reconstruction| / (|g_adversarial| + eps) of two gradients of one tensor, at most `ceiling`; no graph.

    Of the decoder's last layer it is the adaptive weight, with which the adversarial term pulls as hard as reconstruction.
    """
    return (of_reconstruction.norm() / (of_adversarial.norm() + eps)).clamp(0, ceiling).detach()
