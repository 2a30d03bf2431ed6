"""The contrastive loss between images and their captions (Radford et al. 2021; paper 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the cross-entropies image to text and text to image, for unit-norm embeddings [B, E], in float32.

    An uninformed model scores ln B.
    """
    logits = logit_scale.float() * image.float() @ text.float().T
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
