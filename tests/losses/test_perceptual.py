"""Perceptual distances."""

import pytest
import torch
import torch.nn.functional as F
from foreign import GOLDEN, golden_perceptual
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from vtp.artefact import ArtefactError
from vtp.layers.efficientnet_lite import EfficientNetLite0
from vtp.layers.random_vgg import STAGES
from vtp.losses.perceptual import (
    EfficientNetDistanceConfig,
    LpipsConfig,
    RandomVggDistanceConfig,
    build_perceptual,
)
from vtp.objectives.cost import perceptual_flops

RANDOM = RandomVggDistanceConfig(name="random_vgg16", seed=0, stages=2)
LITE = EfficientNetDistanceConfig(name="efficientnet_lite0", side=64, stages=3)
NAMES = {RANDOM: "random-vgg16", LITE: "efficientnet-lite0-64"}


def images(seed):
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("config", [RANDOM, LITE])
def test_is_a_distance(tmp_path, config):
    distance = build_perceptual(config, weights=tmp_path)
    a, b = images(0), images(1)
    assert distance(a, a).abs().max() == 0
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert (distance(a, b) > distance(a, a + 0.05 * (b - a))).all()
    assert distance.name == NAMES[config]


@pytest.mark.parametrize("config", [RANDOM, LITE])
def test_gradient_reaches_the_images_only(tmp_path, config):
    distance = build_perceptual(config, weights=tmp_path)
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


def test_stages_of_efficientnet(tmp_path):
    """Activations before each halving and the last, their channels normalised at every place, averaged."""
    a, b = images(0), images(1)
    network = EfficientNetLite0(64)
    with torch.no_grad():
        halvings = [[network((x + 1) / 2)[number] for number in (0, 1, 2, 4, 6)] for x in (a, b)]
        apart = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
            for x, y in zip(*halvings, strict=True)
        ]
        assert [stage.shape[-1] for stage in halvings[0]] == [32, 16, 8, 4, 2]
        for stages in range(1, 6):
            distance = build_perceptual(LITE.model_copy(update={"stages": stages}), weights=tmp_path)
            torch.testing.assert_close(distance(a, b), torch.stack(apart[:stages]).mean(0))


def test_costs_are_those_of_a_forward_pass(tmp_path):
    """Of the real network, counted; of VGG16 by its formula."""
    image = torch.zeros(1, 3, 16, 16)
    for stages in range(1, 6):
        lite, vgg = LITE.model_copy(update={"stages": stages}), RANDOM.model_copy(update={"stages": stages})
        network = build_perceptual(lite, weights=tmp_path).network.features
        with FlopCounterMode(display=False) as counter:
            network(image)
        assert perceptual_flops(lite, 16) == counter.get_total_flops() > 0
        formula, side, before = 0, 16, 3
        for widths in STAGES[:stages]:
            for width in widths:
                formula, before = formula + 2 * 9 * before * width * side**2, width
            side //= 2
        assert perceptual_flops(vgg, 16) == formula


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
