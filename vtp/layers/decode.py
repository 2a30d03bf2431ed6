"""Pictures from elsewhere to RGB pixels, with the traps of real collections taken out: the one conversion that there is.

A header that announces too many pixels is refused before anything is decoded, and whatever a decoder raises is one error:
files of strangers find every fault of it. Orientation is applied, transparency
lies on white, 16-bit and CMYK files become 8-bit RGB, of an animation the first frame is taken, and a file that was cut off
is an error, never a half-grey image.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtp.artefact import require_no_pipe
from vtp.texts import shown

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 200  # characters of a decoder's message
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in one: another in every process
MAX_PIXELS = 89_000_000  # a header that announces more is refused; Pillow warns a little above
ORIENTATION = 0x0112
ON_ITS_SIDE = range(5, 9)  # of its values
TILE_SIDES = (322, 323)  # tags of TIFF; libtiff makes room for a whole tile
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class DecodeError(ValueError):
    """Not a readable image; the message says why, in few words."""


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Errors of any kind that a decoder of foreign bytes raises become DecodeErrors that begin with `what`.

    That memory ran out is one too: limits of pixels and bytes keep what a picture may need far below a machine's, so it
    is the picture that asks for too much.
    """
    try:
        yield
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError(f"{what} (it asks for more memory than there is)") from None
    except Exception as error:
        text = shown(ADDRESS.sub("", str(error)))[:LONGEST]
        raise DecodeError(f"{what} ({type(error).__name__}: {text})") from None


def open_header(content: bytes, *, max_pixels: int = MAX_PIXELS) -> "Image":
    """The picture with its header read and no pixel decoded. Raises DecodeError."""
    import PIL.Image

    with decoding("not an image"), warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            picture = PIL.Image.open(io.BytesIO(content), formats=tuple(FORMATS))
        except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
            raise DecodeError("too many pixels") from None
        if picture.width * picture.height > max_pixels:
            raise DecodeError(f"too many pixels: {picture.width} x {picture.height}")
        width, height = (getattr(picture, "tag_v2", {}).get(side, 0) for side in TILE_SIDES)
        if width * height > max_pixels:
            raise DecodeError(f"too many pixels: in tiles of {width} x {height}")
    return picture


def decode_rgb(content: bytes, *, least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> "Image":
    """The picture as upright 8-bit RGB.

    Of a JPEG that is larger than `least` (width, height, upright), only so many coefficients are decoded as the smallest
    of 1/2, 1/4, 1/8 scale needs that is still at least as large. Raises DecodeError.
    """
    return finish(open_header(content, max_pixels=max_pixels), least=least)


def read_rgb(path: Path) -> "Image":
    """The picture in a file, as `decode_rgb` gives it. Raises DecodeError that names it."""
    require_no_pipe(path)
    try:
        return decode_rgb(path.read_bytes())
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from None


def finish(picture: "Image", *, least: tuple[int, int] | None = None) -> "Image":
    """Any picture of PIL, opened or made, as upright 8-bit RGB, as `decode_rgb` gives it. Raises DecodeError."""
    from PIL import ImageOps

    with decoding("not a readable image"):
        if least is not None and picture.format == "JPEG":
            picture.draft("RGB", _turned(least, picture))
        picture.load()
        if picture.getexif().get(ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        return _rgb(picture)


def upright_size(picture: "Image") -> tuple[int, int]:
    """Width and height of an opened picture as `finish` turns it, when it is decoded in full. Raises DecodeError."""
    with decoding("not a readable image"):
        return _turned(picture.size, picture)


def croppable(picture: "Image", size: int) -> "Image":
    """`picture`, which a centre crop to `size` may enlarge. Raises DecodeError for a long line, which would fill memory."""
    short, long = sorted(picture.size)
    if long * size**2 > MAX_PIXELS * short:  # of a picture without pixels too
        raise DecodeError(f"too long for a centre crop of {size} pixels: {picture.width} x {picture.height}")
    return picture


def _turned(size: tuple[int, int], picture: "Image") -> tuple[int, int]:
    """Width and height changed over for a picture that lies on its side."""
    width, height = size
    return (height, width) if picture.getexif().get(ORIENTATION) in ON_ITS_SIDE else size


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
