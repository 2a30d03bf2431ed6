"""The bytes of a picture as shards keep them: checked by decoding once, in a format that every reader knows."""

import io
import warnings
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from vtp.config import Config
from vtp.layers.bare import ORIENTATION, text_first
from vtp.layers.decode import FORMATS, decoding, finish, open_header

if TYPE_CHECKING:
    from PIL.Image import Image

COMPRESSION = 6  # of the PNGs, fixed so that bytes are
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are kept as they are
# What Pillow's decoders ask for, which a text of a PNG may be called too.
MISLEADING = ("interlace", "transparency", "bbox", "default_image")


class Keep(Config):
    """Pictures at their own size; the bytes of JPEG, PNG and WebP files that any reader reads alike stay untouched."""

    name: Literal["keep"]


class CentreCrop(Config):
    """The centre square at a fixed size, cut and shrunk as ADM does for ImageNet, stored as PNG."""

    name: Literal["centre_crop"]
    size: int = Field(ge=1, description="side in pixels")


ImageConfig = Annotated[Keep | CentreCrop, Field(discriminator="name")]


class Stored(NamedTuple):
    """A picture as it is written."""

    image: bytes
    extension: str
    width: int
    height: int


def store(content: bytes, config: ImageConfig) -> Stored:
    """A file's bytes as they are stored. Raises DecodeError when the picture cannot be decoded in full."""
    picture = open_header(content)
    with decoding("not a readable image"):
        wide = any(
            ";16" in str(tile[3]) for tile in getattr(picture, "tile", ())
        )  # more than 8 bits; told before loading
        rgb = finish(picture)
        if config.name == "keep" and picture.format in KEPT and not wide and is_plain(content, picture):
            return Stored(content, KEPT[picture.format], rgb.width, rgb.height)
        return draw(rgb, config)


def draw(picture: "Image", config: ImageConfig) -> Stored:
    """An RGB picture as it is stored: PNG, with nothing but pixels."""
    if config.name == "centre_crop":
        from vtp.layers.images import centre_crop

        picture = centre_crop(picture, config.size)
    png = io.BytesIO()
    picture.save(png, format="PNG", compress_level=COMPRESSION, icc_profile=None)
    return Stored(png.getvalue(), "png", picture.width, picture.height)


def is_plain(content: bytes, picture: "Image") -> bool:
    """Whether any reader sees the same upright RGB or grey pixels in a file, of which `picture` was decoded.

    Not so for files that are turned by a tag, transparent or animated, nor for those with metadata at which a reader fails
    or by which it is misled, such as a text of a PNG that is called `interlace`.
    """
    import PIL.Image

    if picture.mode not in ("RGB", "L") or "transparency" in picture.info:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = PIL.Image.open(io.BytesIO(text_first(content)), formats=FORMATS)
            turned = any(PIL.Image.Image.getexif(each).get(ORIENTATION, 1) != 1 for each in (whole, picture))
    except Exception:  # whatever a reader may find
        return False
    several = whole.format != "MPO" and getattr(whole, "n_frames", 1) > 1
    misled = any(whole.info.get(name) != picture.info.get(name) for name in MISLEADING)
    alike = (whole.mode, whole.size) == (picture.mode, picture.size)
    return alike and not (turned or several or misled)
