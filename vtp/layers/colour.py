"""Colour transforms of image batches on any device: hue, blur, grey. They match torchvision's on single images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images [B, 3, H, W] in [0, 1] by `shift` [B, 1, 1, 1] in [-1/2, 1/2] turns.

    Value and saturation stay. Sixths of a turn are kept in units of the chroma, so that nothing is divided by it.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    turn = 6 * chroma
    hue = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    hue = hue.addcmul_(turn, shift[:, :, 0])
    hue += turn * (hue < 0)
    hue -= turn * (hue >= turn)
    result = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        # The value less the chroma times a trapezoid of the hue.
        k = torch.add(hue, chroma, alpha=offset)
        k -= turn * (k >= turn)
        fall = torch.minimum(k, torch.sub(4 * chroma, k))
        torch.sub(value, torch.minimum(fall.clamp_min_(0), chroma), out=result[:, channel])
    return result


def gaussian_blur(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Blur each image [B, C, H, W] with its own sigma [B], `reach` pixels each way, reflecting at the border."""
    reach = min(reach, min(x.shape[2:]) - 1)
    grid = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (grid / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None]  # [B * C, 1, taps]
    padded = F.pad(x, [reach] * 4, mode="reflect").flatten(0, 1)[None]  # [1, B * C, H', W']
    channels = padded.shape[1]
    rows = F.conv2d(padded, kernel[:, :, :, None], groups=channels)
    return F.conv2d(rows, kernel[:, :, None], groups=channels)[0].unflatten(0, x.shape[:2])


def grey(x: Tensor) -> Tensor:
    """Luma (Rec. 601) of images [B, 3, H, W], as [B, 1, H, W]."""
    red, green, blue = x.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def brighten(x: Tensor, factor: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] times a factor [B, 1, 1, 1] each."""
    return (x * factor).clamp_(0, 1)


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from, or towards, the mean luma of each."""
    return torch.lerp(grey(x).mean((2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturate(x: Tensor, factor: Tensor) -> Tensor:
    """Away from, or towards, the luma of each pixel."""
    return torch.lerp(grey(x).expand_as(x), x, factor).clamp_(0, 1)


# In the order of DINOv2 when it is fixed.
JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brighten, change_contrast, saturate, shift_hue)
