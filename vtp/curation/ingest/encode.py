"""The bytes of a picture as shards keep them: checked by decoding once, in a format that every reader knows."""

import io
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from vtp.config import Config
from vtp.layers.decode import ORIENTATION, croppable, decoding, finish, open_header

if TYPE_CHECKING:
    from PIL.Image import Image

COMPRESSION = 6  # of the PNGs, fixed so that bytes are
# Formats that are kept as they are. MPO is a JPEG file with more pictures behind it, as telephones write them.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Keep(Config):
    """Pictures at their own size; the bytes of plain JPEG, PNG and WebP files stay untouched."""

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
        if config.name == "keep" and picture.format in KEPT and not wide and is_plain(picture):
            return Stored(content, KEPT[picture.format], rgb.width, rgb.height)
        return draw(rgb, config)


def draw(picture: "Image", config: ImageConfig) -> Stored:
    """An RGB picture as it is stored: PNG. Raises DecodeError for one that is too long to be cut to a square."""
    if config.name == "centre_crop":
        from vtp.layers.images import centre_crop

        picture = centre_crop(croppable(picture, config.size), config.size)
    png = io.BytesIO()
    picture.save(png, format="PNG", compress_level=COMPRESSION)
    return Stored(png.getvalue(), "png", picture.width, picture.height)


def is_plain(picture: "Image") -> bool:
    """Whether any reader sees the same upright RGB or grey pixels in the file of a decoded picture.

    Not so for files that are turned by a tag, transparent or animated.
    """
    if picture.mode not in ("RGB", "L") or "transparency" in picture.info:
        return False
    turned = picture.getexif().get(ORIENTATION, 1) != 1
    return not turned and (picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1)
