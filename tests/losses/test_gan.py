"""Hinge losses and the balance of gradients, against RAE's (`golden/rae-decoder-losses`)."""

import json

import pytest
import torch
from foreign import GOLDEN
from safetensors.torch import load_file

from vtp.losses.gan import balance, discriminator_loss, generator_loss, lecam_loss

OFFICIAL = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")
CEILINGS = json.loads((GOLDEN / "rae-decoder-losses" / "config.json").read_text())["adaptive_ceilings"]


def close(ours, name):
    torch.testing.assert_close(ours, OFFICIAL[name], rtol=0, atol=1e-5 * float(OFFICIAL[name].abs().max()))


def test_hinge_loss_of_the_discriminator():
    real, fake = (OFFICIAL[f"gan.logits_{name}"].requires_grad_() for name in ("real", "fake"))
    loss = discriminator_loss(real, fake)
    loss.backward()
    close(loss.detach(), "gan.hinge_d")
    close(real.grad, "gan.hinge_d.grad_real")
    close(fake.grad, "gan.hinge_d.grad_fake")


def test_lecam_holds_logits_near_those_of_the_other_kind():
    """relu(2 + 1)^2 = 9 and relu(-4 + 1)^2 = 0 of real ones, relu(3 - 1)^2 = 4 and relu(3 - 5)^2 = 0 of fakes."""
    real, fake = torch.tensor([2.0, -4.0], requires_grad=True), torch.tensor([1.0, 5.0], requires_grad=True)
    loss = lecam_loss(real, fake, torch.tensor([3.0, -1.0]))
    assert float(loss.detach()) == pytest.approx((9 + 0) / 2 + (4 + 0) / 2)
    loss.backward()
    assert real.grad.tolist() == [3.0, 0.0]
    assert fake.grad.tolist() == [-2.0, 0.0]


def test_loss_of_the_generator():
    fake = OFFICIAL["gan.logits_fake"].detach().requires_grad_()
    loss = generator_loss(fake)
    loss.backward()
    close(loss.detach(), "gan.vanilla_g")
    close(fake.grad, "gan.vanilla_g.grad_fake")


@pytest.mark.parametrize(("number", "ceiling"), list(enumerate(CEILINGS)))
def test_balance_of_gradients(number, ceiling):
    """Among them one above its ceiling, and one over no gradient at all."""
    gradients = [OFFICIAL[f"adaptive.{number}.grad_{name}"] for name in ("reconstruction", "adversarial")]
    weight = balance(gradients[0], gradients[1].requires_grad_(), ceiling=ceiling)
    assert float(weight) == pytest.approx(float(OFFICIAL[f"adaptive.{number}.weight"]), rel=1e-5)
    assert not weight.requires_grad
