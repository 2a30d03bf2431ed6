"""KoLeo."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp.losses.koleo import NEAR, koleo_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2-losses"


def test_matches_official():
    io = load_file(GOLDEN / "io.safetensors")
    assert json.loads((GOLDEN / "config.json").read_text())["batch"] * 2 == len(io["student_global_cls_tokens"])
    total = sum(koleo_loss(view).loss for view in io["student_global_cls_tokens"].chunk(2))
    torch.testing.assert_close(total, io["koleo_sum_over_views"], atol=1e-5, rtol=0)


def test_closed_form():
    """Four corners of a square on the circle: every nearest neighbour is sqrt 2 away."""
    corners = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [0, -1]])
    assert float(koleo_loss(corners).loss) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize("group", [2, 4, 16])
def test_groups_know_nothing_of_each_other(group):
    """The loss and its gradient are the means of those of groups by themselves; DINOv2's groups are a GPU's images."""
    features = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    together, apart = (features.clone().requires_grad_() for _ in range(2))
    of_groups = koleo_loss(together, group=group)
    by_themselves = [koleo_loss(rows) for rows in apart.split(group)]
    mean = sum(each.loss for each in by_themselves) / len(by_themselves)
    torch.testing.assert_close(of_groups.loss, mean)
    of_groups.loss.backward()
    mean.backward()
    torch.testing.assert_close(together.grad, apart.grad)
    assert torch.equal(of_groups.loss, koleo_loss(features).loss) is (group == 16)


def gradient_of(features):
    leaf = features.clone().requires_grad_()
    koleo = koleo_loss(leaf)
    koleo.loss.backward()
    return leaf.grad, koleo


def pair(distance):
    """Two unit vectors at that distance."""
    half = math.asin(distance / 2)
    return torch.tensor(
        [[math.cos(half), math.sin(half)], [math.cos(half), -math.sin(half)]], dtype=torch.float64
    ).float()


@pytest.mark.parametrize("distance", [1.9, 1.0, 0.3, 0.101, 0.099, 0.05, 0.01, 1e-3])
def test_the_push_is_bounded(distance):
    """(x - y) / max(d, NEAR)^2 along the sphere, from both rows, and a loss whose slope it is."""
    gradient, koleo = gradient_of(pair(distance))
    along = math.cos(math.asin(distance / 2))
    expected = 2 / 2 * distance / max(distance, NEAR) ** 2 * along
    assert gradient.norm(dim=1).tolist() == pytest.approx([expected] * 2, rel=1e-3)
    assert float((gradient * pair(distance).flip(0)).sum()) > 0  # a step against it leads apart
    if distance > NEAR:
        assert koleo.loss.item() == pytest.approx(-math.log(distance), abs=1e-6)
        assert koleo.duplicates == 0
    else:
        assert koleo.duplicates == 1
    slope = (koleo_loss(pair(distance * 1.01)).loss - koleo_loss(pair(distance * 0.99)).loss) / (0.02 * distance)
    assert float(slope) == pytest.approx(-distance / max(distance, NEAR) ** 2, rel=0.02, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [2, 3, 16, 64])
@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_copies_have_a_gradient_as_large_as_distinct_features(noise, copies, dtype):
    """Also such as differ by rounding, by little, or just enough to be distinct; the largest is that of the bound."""
    draws = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(64, 128, generator=draws)
    distinct = gradient_of(features.to(dtype))[0].norm()
    features[:copies] = features[0] + noise * torch.randn(copies, 128, generator=draws)
    gradient, koleo = gradient_of(features.to(dtype))
    assert gradient.norm() < (1.3 if noise <= 1e-2 else 8) * distinct
    if noise <= 1e-2:
        assert float(koleo.duplicates) == pytest.approx(copies / 64)
    assert torch.isfinite(koleo.loss)


def test_features_that_collapse_grow_apart():
    draws = torch.Generator().manual_seed(0)
    x = 1 + 1e-3 * torch.randn(16, 32, generator=draws)
    for _ in range(100):
        x = x - 0.3 * gradient_of(x)[0] * x.norm(dim=1, keepdim=True) ** 2
    koleo = koleo_loss(x)
    assert koleo.duplicates == 0
    assert float(koleo.loss) < -math.log(0.5)


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"raise batch\.ssl"):
        koleo_loss(torch.ones(1, 3))
    with pytest.raises(ValueError, match="the batch of 4 is no multiple of koleo_group 3"):
        koleo_loss(torch.ones(4, 3), group=3)
