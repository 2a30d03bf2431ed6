"""KoLeo."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vtp.losses.koleo import koleo_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2-losses"


def test_matches_official():
    io = load_file(GOLDEN / "io.safetensors")
    assert json.loads((GOLDEN / "config.json").read_text())["batch"] * 2 == len(io["student_global_cls_tokens"])
    total = sum(koleo_loss(view) for view in io["student_global_cls_tokens"].chunk(2))
    torch.testing.assert_close(total, io["koleo_sum_over_views"], atol=1e-5, rtol=0)


def test_closed_form():
    """Four corners of a square on the circle: every nearest neighbour is sqrt 2 away."""
    corners = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [0, -1]])
    assert float(koleo_loss(corners)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


def test_equal_features_stay_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"raise batch\.ssl"):
        koleo_loss(torch.ones(1, 3))
