"""The contrastive losses against open_clip's."""

import math

import torch
import torch.nn.functional as F

from vtp.losses.clip import clip_loss, siglip_loss


def test_equals_open_clip():
    from open_clip.loss import ClipLoss

    image, text = (F.normalize(torch.randn(9, 6), dim=-1) for _ in range(2))
    scale = torch.tensor(14.3)
    torch.testing.assert_close(clip_loss(image, text, scale), ClipLoss()(image, text, scale))


def test_uninformed_model_scores_ln_b():
    same = F.normalize(torch.ones(8, 4), dim=-1)
    torch.testing.assert_close(clip_loss(same, same, torch.tensor(10.0)), torch.tensor(math.log(8)))


def test_matched_pairs_score_zero():
    assert clip_loss(torch.eye(5), torch.eye(5), torch.tensor(100.0)) < 1e-6
    assert clip_loss(torch.eye(5), torch.eye(5).roll(1, 0), torch.tensor(100.0)) > 99


def test_sigmoid_equals_open_clip():
    from open_clip.loss import SigLipLoss

    image, text = (F.normalize(torch.randn(9, 6), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    torch.testing.assert_close(siglip_loss(image, text, scale, bias), SigLipLoss()(image, text, scale, bias))
