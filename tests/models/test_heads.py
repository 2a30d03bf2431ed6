"""The DINO head."""

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from vtp.layers.average import frozen_copy
from vtp.models.heads import DinoHead, DinoHeadConfig

CONFIG = DinoHeadConfig(hidden_dim=16, bottleneck_dim=8, prototypes=12, weight_norm=True, prototype_init="trunc_normal")


def test_last_layer_is_torch_weight_norm():
    head = DinoHead(6, CONFIG)
    head.scales.data.uniform_(0.5, 2)
    last = torch.nn.Linear(8, 12, bias=False)
    last.weight.data = head.directions.data.clone()
    last = weight_norm(last)
    last.parametrizations.weight.original0.data = head.scales.data[:, None].clone()
    x = torch.randn(5, 6)
    torch.testing.assert_close(head(x), last(torch.nn.functional.normalize(head.mlp(x), dim=-1)))


def test_logits_are_bounded_by_the_scales():
    head = DinoHead(6, CONFIG)
    assert head(1000 * torch.randn(50, 6)).abs().max() <= 1 + 1e-6


def test_plain_prototypes():
    head = DinoHead(6, CONFIG.model_copy(update={"weight_norm": False}))
    assert "scales" not in dict(head.named_parameters())
    x = torch.randn(5, 6)
    torch.testing.assert_close(head(x), head.embed(x) @ head.directions.T)


def test_first_prototypes_are_those_of_a_linear_layer():
    """DINOv2's, which has a norm of 1 / sqrt(3) on average; else the truncated normal of all other layers."""
    for init, expected in (("linear", 3**-0.5), ("trunc_normal", 0.02 * 64**0.5)):
        torch.manual_seed(0)
        head = DinoHead(6, CONFIG.model_copy(update={"bottleneck_dim": 64, "prototypes": 2000, "prototype_init": init}))
        norms = head.directions.detach().norm(dim=1)
        assert float(norms.square().mean().sqrt()) == pytest.approx(expected, rel=0.02)
    linear = DinoHead(6, CONFIG.model_copy(update={"prototype_init": "linear"})).directions
    assert linear.abs().max() <= 8**-0.5


def test_copy_is_equal_and_frozen():
    head = DinoHead(6, CONFIG)
    copy, x = frozen_copy(head), torch.randn(3, 6)
    assert torch.equal(head(x), copy(x))
    assert not copy(x).requires_grad
