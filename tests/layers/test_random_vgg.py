"""The random VGG16."""

import torch

from vtp.layers.random_vgg import random_vgg16


def test_is_vgg16():
    from torchvision.models import vgg16

    with torch.device("meta"):
        official = [parameter.shape for parameter in vgg16().features.parameters()]
    assert [parameter.shape for parameter in random_vgg16(0).parameters()] == official
    outputs = random_vgg16(0)(torch.zeros(1, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in outputs] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]


def test_seed_decides_and_the_global_state_does_not():
    torch.manual_seed(1)
    first = random_vgg16(7).state_dict()
    torch.manual_seed(2)
    second, other = random_vgg16(7).state_dict(), random_vgg16(8).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["stages.0.0.weight"], other["stages.0.0.weight"])


def test_keeps_the_scale_of_its_input():
    """He initialisation: activations neither vanish nor explode through thirteen layers."""
    last = random_vgg16(0)(torch.randn(4, 3, 32, 32))[-1]
    assert 0.05 < last.std() < 5
