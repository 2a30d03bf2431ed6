"""Pictures from elsewhere to RGB pixels, with the traps of real collections taken out: the one conversion that there is.

A header that announces too many pixels is refused before anything is decoded. Orientation is applied, transparency
lies on white, 16-bit and CMYK files become 8-bit RGB, of an animation the first frame is taken, and a file that was cut off
is an error, never a half-grey image.
"""

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_000_000  # a header that announces more is refused; Pillow warns a little above
ORIENTATION = 0x0112
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class DecodeError(ValueError):
    """Not a readable image; the message says why, in few words."""


def open_header(content: bytes, *, max_pixels: int = MAX_PIXELS) -> "Image":
    """The picture with its header read and no pixel decoded. Raises DecodeError."""
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            picture = PIL.Image.open(io.BytesIO(content), formats=tuple(FORMATS))
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
        raise DecodeError("too many pixels") from None
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        raise DecodeError(f"not an image ({type(error).__name__})") from None
    if picture.width * picture.height > max_pixels:
        raise DecodeError(f"too many pixels: {picture.width} x {picture.height}")
    return picture


def decode_rgb(content: bytes, *, least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> "Image":
    """The picture as upright 8-bit RGB.

    Of a JPEG that is larger than `least` (width, height as stored), only so many coefficients are decoded as the
    smallest of 1/2, 1/4, 1/8 scale needs that is still at least as large. Raises DecodeError.
    """
    return finish(open_header(content, max_pixels=max_pixels), least=least)


def finish(picture: "Image", *, least: tuple[int, int] | None = None) -> "Image":
    """Any picture of PIL, opened or made, as upright 8-bit RGB, as `decode_rgb` gives it. Raises DecodeError."""
    from PIL import ImageOps
    from PIL.Image import DecompressionBombError

    try:
        if least is not None and picture.format == "JPEG":
            picture.draft("RGB", least)
        picture.load()
        if picture.getexif().get(ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        return _rgb(picture)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, DecompressionBombError) as error:
        raise DecodeError(f"not a readable image ({error})") from None


def _rgb(picture: "Image") -> "Image":
    import PIL.Image

    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return PIL.Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBa", "La"):  # premultiplied
        picture = picture.convert(picture.mode.upper())
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
