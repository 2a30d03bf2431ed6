"""Contrast between images and their captions: CLIP's softmax (Radford et al. 2021; paper 3.4) or SigLIP's sigmoid.

Every rank holds some rows of the global batch and computes its part of the loss, rows by all columns; the parts add up
to the loss of the whole batch, and so do the gradients.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.distributed import gather, ranks


class SoftmaxConfig(Config):
    """Cross-entropy over the batch, both ways."""

    name: Literal["softmax"]
    scale: float = Field(gt=0, description="initial inverse temperature; CLIP: 14.2857")


class SigmoidConfig(Config):
    """A yes or no for every pair (Zhai et al. 2023)."""

    name: Literal["sigmoid"]
    scale: float = Field(gt=0, description="initial inverse temperature; SigLIP: 10")
    bias: float = Field(description="initial bias; SigLIP: -10")


ContrastConfig = Annotated[SoftmaxConfig | SigmoidConfig, Field(discriminator="name")]


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """This rank's part of the mean of the cross-entropies image to text and text to image, in float32.

    `image` and `text` [B, E] are unit-norm rows of this rank. An uninformed model scores ln(ranks * B) in all.
    """
    rank, size = ranks()
    count = len(image)
    with _float32(image):
        image, text, scale = image.float(), text.float(), logit_scale.float()
        of_image = scale * image @ gather(text).T  # [B, ranks * B]
        of_text = of_image.T if size == 1 else scale * text @ gather(image).T
        truth = torch.arange(rank * count, (rank + 1) * count, device=image.device)
        both = F.cross_entropy(of_image, truth, reduction="sum") + F.cross_entropy(of_text, truth, reduction="sum")
        return both / (2 * size * count)


def siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """This rank's part of the mean over images of -sum_j log sigmoid(+-(scale x_i . y_j + bias)), in float32."""
    rank, size = ranks()
    count = len(image)
    with _float32(image):
        logits = logit_scale.float() * image.float() @ gather(text.float()).T + logit_bias.float()
        signs = -torch.ones_like(logits)
        signs.diagonal(rank * count).fill_(1)
        return -F.logsigmoid(signs * logits).sum() / (size * count)


def _float32(x: Tensor) -> torch.autocast:
    """Autocast would take the products in bfloat16, where logits of 32 to 64 lie 0.25 apart."""
    return torch.autocast(x.device.type, enabled=False)
