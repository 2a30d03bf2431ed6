"""Between pixels and the tensors that the models see: pictures of any kind, ADM's centre crop, ImageNet normalisation."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtp.device import constant
from vtp.finite import require_finite
from vtp.layers.decode import decode_rgb, finish, middle, read_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | Path | bytes | Image | np.ndarray | Tensor  # `PICTURE` in words

PICTURE = "the path of an image file, its bytes, a PIL image, or uint8 [height, width, 3] as a numpy array or tensor"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [0, 1], or uint8, to ImageNet-normalised float32."""
    if images.dtype == torch.uint8:
        scaled = images.float()  # our own copy: worked on in place, for memory is what takes the time
        mean, std = _statistics(scaled)
        return scaled.div_(255).sub_(mean).div_(std)
    mean, std = _statistics(images)
    return (images - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """ImageNet-normalised images to [0, 1], not clamped."""
    mean, std = _statistics(images)
    return images * std + mean


def to_uint8(images: Tensor, what: str = "images") -> Tensor:
    """ImageNet-normalised images [N, 3, H, W] to uint8, clamped and rounded.

    Raises NotFiniteError for NaN and infinity, which are no colours; `what` the images are, for its message.
    """
    require_finite(images, what, "see the latents and the decoder that made them")
    return denormalise(images.float()).mul(255).round().clamp(0, 255).to(torch.uint8)


def rgb(picture: "Picture") -> "Image":
    """Any picture as the upright 8-bit RGB that training sees of it (`vtp.layers.decode`).

    Raises DecodeError for what is no readable picture, OSError for a file that cannot be opened, TypeError for another
    kind of thing, ValueError for an array of another kind.
    """
    from PIL.Image import Image, fromarray

    if isinstance(picture, str | Path):
        return read_rgb(Path(picture))
    if isinstance(picture, bytes):
        return decode_rgb(picture)
    if isinstance(picture, Image):
        return finish(picture)
    if not isinstance(picture, np.ndarray | Tensor):
        raise TypeError(f"a picture is {PICTURE}; given is a {type(picture).__name__}")
    dtype = str(picture.dtype).removeprefix("torch.")
    if dtype != "uint8" or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        kind = f"{type(picture).__name__} of {dtype} {list(picture.shape)}"  # its range or channels would be a guess
        raise ValueError(f"a picture is {PICTURE}, several are a list; given is a {kind}")
    return fromarray(np.ascontiguousarray(picture.cpu().numpy() if isinstance(picture, Tensor) else picture))


def centre_crop(image: "Image", size: int) -> "Image":
    """ADM's evaluation crop of an RGB picture: halve by box averages, shrink the short side bicubically, cut the centre."""
    return cover_crop(image, size, size)


def cover_crop(image: "Image", height: int, width: int) -> "Image":
    """The same for a rectangle: the picture is scaled until it just covers that, and the centre is cut."""
    from PIL.Image import Resampling

    image = middle(image)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = cover_scale(image.size, height, width)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def cover_scale(whole: tuple[int, int], height: int, width: int) -> float:
    """What a picture of that width and height is multiplied by to cover a rectangle."""
    return max(width / whole[0], height / whole[1])


def from_pil(image: "Image", size: int) -> Tensor:
    """A PIL image of any mode, centre-cropped, as a normalised tensor [3, size, size]. Raises DecodeError."""
    pixels = torch.from_numpy(np.array(centre_crop(finish(image), size)))  # [H, W, 3]
    return normalise(pixels.permute(2, 0, 1))


def to_pil(images: Tensor) -> "list[Image]":
    """PIL images of a normalised batch [B, 3, H, W]."""
    from PIL.Image import fromarray

    return [fromarray(pixels.permute(1, 2, 0).cpu().numpy()) for pixels in to_uint8(images)]


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    return constant(IMAGENET_MEAN, images).view(3, 1, 1), constant(IMAGENET_STD, images).view(3, 1, 1)
