"""Perceptual distances."""

import hashlib

import pytest
import torch

from vtp.artefact import ArtefactError
from vtp.losses.perceptual import LpipsConfig, RandomVggDistanceConfig, build_perceptual

RANDOM = RandomVggDistanceConfig(name="random_vgg16", seed=0, stages=2)


def images(seed):
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_is_a_distance(tmp_path):
    distance = build_perceptual(RANDOM, weights=tmp_path)
    a, b = images(0), images(1)
    assert distance(a, a).abs().max() == 0
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert (distance(a, b) > distance(a, a + 0.05 * (b - a))).all()
    assert distance.name == "random-vgg16"


def test_gradient_reaches_the_images_only(tmp_path):
    distance = build_perceptual(RANDOM, weights=tmp_path)
    a = images(0).requires_grad_()
    distance(a, images(1)).sum().backward()
    assert a.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_seed_and_stages_matter(tmp_path):
    values = [
        build_perceptual(RANDOM.model_copy(update=change), weights=tmp_path)(images(0), images(1))
        for change in ({}, {"seed": 1}, {"stages": 3})
    ]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_lpips_equals_the_package(tmp_path):
    from lpips import LPIPS

    network = LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    for parameter in network.lins.parameters():
        parameter.data.abs_()
    torch.save(network.state_dict(), tmp_path / "lpips.pt")
    sha256 = hashlib.sha256((tmp_path / "lpips.pt").read_bytes()).hexdigest()
    distance = build_perceptual(LpipsConfig(name="lpips", weights="lpips.pt", sha256=sha256), weights=tmp_path)
    a, b = images(0), images(1)
    torch.testing.assert_close(distance(a, b), network.eval()(a, b).flatten())
    with pytest.raises(ArtefactError, match=r"params\.yaml expects 00"):
        build_perceptual(LpipsConfig(name="lpips", weights="lpips.pt", sha256="00"), weights=tmp_path)


def test_missing_weights_are_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ArtefactError, match=r"no such weights; put .* there"):
        build_perceptual(LpipsConfig(name="lpips", weights="lpips.pt", sha256="00"), weights=tmp_path)
