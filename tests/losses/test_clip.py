"""The contrastive losses against open_clip's: `golden/openclip-losses`; several ranks are in tests/test_distributed.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import CONTRASTS, OPEN_CLIP, contrast
from safetensors.torch import load_file

from vtp.losses.clip import clip_loss

GOLDEN = load_file(OPEN_CLIP / "io.safetensors")


def assert_golden(found, name, *, of_features, rest=1e-5):
    """`rest`: tolerance of the loss and the gradients of scale and bias."""
    for what, value in found.items():
        tolerance = of_features if what in ("grad_image", "grad_text") else rest
        torch.testing.assert_close(value.float(), GOLDEN[f"{name}.{what}"], atol=tolerance, rtol=tolerance, msg=what)


@pytest.mark.parametrize("name", CONTRASTS)
def test_equals_open_clip(name):
    assert_golden(contrast(name, torch.float32, autocast=False), f"world1.float32.{name}", of_features=1e-5)


def test_a_bias_changes_nothing_of_a_softmax():
    """So ours has none."""
    found = contrast("clip", torch.float32, autocast=False)
    torch.testing.assert_close(found["loss"], GOLDEN["world1.float32.clip_with_bias.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision_ends_before_the_loss(name, autocast):
    """Rows that were rounded give the loss and the gradients of float32, also under autocast."""
    found = contrast(name, torch.bfloat16, autocast=autocast)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_golden(found, f"world1.rounded.{name}", of_features=1e-5)
    assert_golden(found, f"world1.bfloat16.{name}", of_features=0.03, rest=0.03)  # what open_clip makes of them
    of_leaves = contrast(name, torch.bfloat16, autocast=autocast, leaves=torch.bfloat16)
    assert of_leaves["grad_image"].dtype == torch.bfloat16
    assert_golden(of_leaves, f"world1.rounded.{name}", of_features=2e-3)


def test_uninformed_model_scores_ln_b():
    same = F.normalize(torch.ones(8, 4), dim=-1)
    torch.testing.assert_close(clip_loss(same, same, torch.tensor(10.0)), torch.tensor(math.log(8)))


def test_matched_pairs_score_zero():
    assert clip_loss(torch.eye(5), torch.eye(5), torch.tensor(100.0)) < 1e-6
    assert clip_loss(torch.eye(5), torch.eye(5).roll(1, 0), torch.tensor(100.0)) > 99
