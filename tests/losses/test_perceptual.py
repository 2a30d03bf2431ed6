"""Perceptual distances."""

import pytest
import torch
from foreign import GOLDEN, golden_perceptual
from safetensors.torch import load_file

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


def test_lpips_is_that_of_the_package(tmp_path):
    """`golden/rae-decoder-losses`: per sample on [-1, 1], and the gradient of the mean at the reconstruction in [0, 1]."""
    official = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")
    distance = golden_perceptual(tmp_path)
    reconstruction = official["recon"].requires_grad_()
    found = distance(reconstruction * 2 - 1, official["images"] * 2 - 1)
    found.mean().backward()
    assert distance.name == "vgg16"
    torch.testing.assert_close(found.detach(), official["lpips.pm1"], rtol=1e-4, atol=0)
    expected = official["lpips.grad_recon"]
    torch.testing.assert_close(reconstruction.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_other_weights_are_an_error(tmp_path):
    (tmp_path / "lpips.pt").write_bytes(b"other")
    with pytest.raises(ArtefactError, match=r"params\.yaml expects 00"):
        build_perceptual(LpipsConfig(name="lpips", weights="lpips.pt", sha256="00"), weights=tmp_path)


def test_missing_weights_are_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ArtefactError, match=r"no such weights; put .* there"):
        build_perceptual(LpipsConfig(name="lpips", weights="lpips.pt", sha256="00"), weights=tmp_path)
