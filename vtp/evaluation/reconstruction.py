"""How close reconstructions are to their images: PSNR, SSIM and a perceptual distance, per image (paper table 2).

Both images are what a file would hold: 8 bits a channel, the reconstruction clamped and rounded. A mean is one over
images. The official evaluation differs in three places: its PSNR is that of a reconstruction that was not rounded, it
encodes in bfloat16, and it averages the means of batches and devices without weights, padded samples included. Its SSIM,
that of torchmetrics, has the same window and cuts its padding off again.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
STABILISERS = (0.01**2, 0.03**2)  # C1, C2 for images in [0, 1]


class Quality(NamedTuple):
    """What is measured of every image."""

    psnr: Tensor  # [B] in dB
    ssim: Tensor  # [B]
    perceptual: Tensor  # [B]


@torch.no_grad()
def quality(originals: Tensor, written: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor]) -> Quality:
    """Compare uint8 images [B, 3, H, W]; `perceptual` maps pairs in [-1, 1] to distances [B].

    Raises TypeError for other images than uint8, whose range would be a guess, ValueError for two shapes.
    """
    if originals.dtype != torch.uint8 or written.dtype != torch.uint8:
        raise TypeError(f"images are compared as uint8, given {originals.dtype} and {written.dtype}")
    if originals.shape != written.shape:
        raise ValueError(f"originals are {list(originals.shape)}, reconstructions {list(written.shape)}")
    a, b = originals.float() / 255, written.float() / 255
    return Quality(psnr(a, b), ssim(a, b), perceptual(a * 2 - 1, b * 2 - 1))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of images [B, C, H, W] in [0, 1]; at most 100, where equal images stand."""
    error = (a.float() - b.float()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [B] of images [B, C, H, W] in [0, 1], H and W at least 11 (Wang et al. 2004).

    Gaussian window of 11 x 11, sigma 1.5, only where it lies inside the image; channels and positions are averaged.
    """
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, given {tuple(a.shape[2:])}")
    a, b = a.float(), b.float()
    mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    c1, c2 = STABILISERS
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    variances = aa - mean_a.square() + bb - mean_b.square()
    structure = (2 * (ab - mean_a * mean_b) + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian average over the last two axes. Sums of slices: a TF32 convolution would drown the small variances."""
    weights = [math.exp(-((offset - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for offset in range(WINDOW)]
    for axis in (-2, -1):
        length = x.shape[axis] - WINDOW + 1
        blurred = torch.zeros_like(x.narrow(axis, 0, length))
        for offset, weight in enumerate(weights):
            blurred.add_(x.narrow(axis, offset, length), alpha=weight / sum(weights))
        x = blurred
    return x
