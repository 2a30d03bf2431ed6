"""DiffAug, against RAE's (`golden/rae-decoder-losses`)."""

import pytest
import torch
from foreign import GOLDEN
from safetensors.torch import load_file
from tiny import ROOT

from stages.tune_decoder import TuneDecoder
from vtp.layers.augment import Augmentation, AugmentationConfig, augment, augmentation_of, draw_augmentation
from vtp.params import load

POLICY = AugmentationConfig(translation=0.125, brightness=0.5, saturation=0.5, contrast=0.5)


OFFICIAL = load_file(GOLDEN / "rae-decoder-losses" / "io.safetensors")
RAE = load(f"{ROOT / 'pipelines/overlays/presets/rae.yaml'}:tune_decoder", TuneDecoder).adversary.augmentation
COLOURS = RAE.model_dump(exclude={"translation"})
NO_COLOURS = dict.fromkeys(COLOURS, 0.0)


def close(ours, name):
    torch.testing.assert_close(ours, OFFICIAL[name], rtol=0, atol=1e-5 * float(OFFICIAL[name].abs().max()))


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("diffaug", RAE.model_dump()),
        ("diffaug_colour", {"translation": 0.0, **COLOURS}),
        ("diffaug_move", {"translation": 0.125, **NO_COLOURS}),
    ],
)
def test_equals_rae_for_its_draws(name, policy):
    """Their order, their sign, the order of the parts, and that zeros beyond the border take colours too."""
    images = OFFICIAL["diffaug.images"].detach().requires_grad_()
    draws = augmentation_of(OFFICIAL[f"{name}.draws"][:5], images.shape[2:], AugmentationConfig(**policy))
    out = augment(images, draws)
    close(out.detach(), f"{name}.output")
    if name == "diffaug":
        assert torch.equal(
            draws.shift.T, torch.stack([OFFICIAL["diffaug.moved_down"], OFFICIAL["diffaug.moved_right"]])
        )
        close(draws.brightness.flatten(), "diffaug.brightness")
        close(draws.saturation.flatten(), "diffaug.saturation")
        close(draws.contrast.flatten(), "diffaug.contrast")
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        (out * weights).sum().backward()
        close(images.grad, "diffaug.grad_images")


def test_all_shifts_are_as_likely():
    uniform = (torch.arange(900).repeat(5, 1) + 0.5) / 900
    policy = AugmentationConfig(translation=0.125, **NO_COLOURS)
    down, right = augmentation_of(uniform, (32, 16), policy).shift.T
    assert down.unique(return_counts=True)[1].tolist() == [100] * 9
    assert right.unique(return_counts=True)[1].tolist() == [180] * 5


def test_translation_moves_down_and_right():
    x = torch.zeros(2, 3, 4, 4)
    x[:, :, 1, 1] = 1
    one = torch.ones(2, 1, 1, 1)
    out = augment(x, Augmentation(0 * one, one, one, torch.tensor([[2, 1], [-1, 0]])))
    assert out[0, 0, 3, 2] == out[1, 0, 0, 1] == 1
    assert out.sum() == 6
    gone = augment(x, Augmentation(0 * one, one, one, torch.tensor([[4, 0], [0, -9]])))
    assert gone.sum() == 0


def draws(index):
    return torch.Generator().manual_seed(index)


def test_draws_belong_to_an_index_are_differentiable_and_bounded():
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    whole = draw_augmentation((16, 16), POLICY, range(4), draws)
    half = draw_augmentation((16, 16), POLICY, range(2, 4), draws)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, half, strict=True))
    assert whole.shift.abs().max() <= 2
    assert (whole.contrast - 1).abs().max() <= 0.5
    augment(x, whole).sum().backward()
    assert x.grad.abs().max() > 0
