"""Pictures from elsewhere to RGB pixels, with the traps of real collections taken out: the one conversion that there is.

A header that announces too many pixels is refused before anything is decoded, and whatever a decoder raises is one error:
files of strangers find every fault of it. What is no pixel cannot lose a picture (`vtp.layers.bare`). Orientation is applied
where it can be read, transparency lies on white, of an animation or of several pages the first is taken, colour profiles
are not applied, and a file that was cut off is an error, never a half-grey image.

Samples become 8 bits by what their type says:

- 12- and 16-bit integers: divided by 16 and 256.
- 32-bit integers: as they are where all lie within 0 to 255, divided by 256 where all lie within 0 to 65535.
- Floats: times 255 where all lie within 0 to 1, as they are where all lie within 0 to 255, rounded to the nearest.

A picture of another range, or with a NaN, is refused: what black and white are in it would be a guess.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtp.artefact import require_no_pipe
from vtp.layers.bare import JXL, ORIENTATION, TIFF, TURNS, bare, jxl_size
from vtp.texts import shown

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 200  # characters of a decoder's message
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in one: another in every process
MAX_PIXELS = 89_000_000  # a header that announces more is refused; Pillow warns a little above
ON_ITS_SIDE = range(5, 9)  # of the orientations
TILE_SIDES = (322, 323)  # tags of TIFF; libtiff makes room for a whole tile
BITS, PHOTOMETRIC, CHANNELS, SAMPLE_FORMAT = 258, 262, 277, 339  # others
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # brands
PLUGINS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}  # of the extra `formats`
EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
EXTENSIONS |= {".avif", ".heic", ".heif", ".hif", ".jxl"}
LONG_LINE = 32  # times its shorter side; of a longer picture, a centre crop sees no more than that


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
        formats = FORMATS + _plugins(content, max_pixels)
        try:
            picture = PIL.Image.open(io.BytesIO(bare(content)), formats=formats)
        except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
            raise DecodeError("too many pixels") from None
        except PIL.UnidentifiedImageError:
            if problem := _unknown(content):
                raise DecodeError(problem) from None
            raise
        if picture.width * picture.height > max_pixels:
            raise DecodeError(f"too many pixels: {picture.width} x {picture.height}")
        width, height = (getattr(picture, "tag_v2", {}).get(side, 0) for side in TILE_SIDES)
        if width * height > max_pixels:
            raise DecodeError(f"too many pixels: in tiles of {width} x {height}")
    return picture


def _plugins(content: bytes, max_pixels: int) -> tuple[str, ...]:
    """The formats of plugins that the file may be of. Raises DecodeError without the plugin, or for too many pixels."""
    if content[4:8] == b"ftyp" and content[8:12] in HEIF and b"avif" not in content[:64]:
        return _registered("HEIF")
    if not content.startswith(JXL):
        return ()
    width, height = jxl_size(content)  # the plugin decodes before it tells
    if width * height > max_pixels:
        raise DecodeError(f"too many pixels: {width} x {height}")
    return _registered("JXL")


@cache
def _registered(name: str) -> tuple[str, ...]:
    """A format with its plugin registered, which decodes in one thread, as the others do."""
    try:
        if name == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener(decode_threads=1)
        else:
            from pillow_jxl import JpegXLImagePlugin

            JpegXLImagePlugin.DECODE_THREADS = 0
    except ImportError:
        raise DecodeError(f"{name} needs {PLUGINS[name]}: pip install -c constraints.txt -e '.[formats]'") from None
    return (name,)


def _unknown(content: bytes) -> str | None:
    """What is wrong with a file that Pillow takes for none, where its head says more than that."""
    from PIL import TiffImagePlugin, features

    if content[4:12] == b"ftypavif" and not features.check("avif"):
        return "AVIF needs a Pillow that is built with it, as its wheels are"
    if content[:4] not in TIFF:
        return None
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
    file = io.BytesIO(content)
    file.seek(tags.next)
    tags.load(file)
    bits, kind, channels = (tags.get(tag, 1) for tag in (BITS, SAMPLE_FORMAT, CHANNELS))
    return f"a TIFF that Pillow does not read: {channels} samples per pixel, their bits {bits}, their format {kind}"


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
    from PIL.Image import Transpose

    with decoding("not a readable image"):
        if least is not None and picture.format == "JPEG":
            picture.draft("RGB", _turned(least, picture))
        picture.load()
        if 0 in picture.size:
            raise DecodeError(f"no pixels: {picture.width} x {picture.height}")
        methods = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }
        turn, rgb = _orientation(picture), _rgb(picture)
        if turn in TURNS:
            rgb = rgb.transpose(methods[turn])
            rgb.info.clear()  # it would be turned once more by whoever gets it
        return rgb


def upright_size(picture: "Image") -> tuple[int, int]:
    """Width and height of an opened picture as `finish` turns it, when it is decoded in full. Raises DecodeError."""
    with decoding("not a readable image"):
        return _turned(picture.size, picture)


def middle(picture: "Image") -> "Image":
    """`picture`, or of a long line the middle, which is all that a centre crop sees: whole, it would fill memory."""
    short, long = sorted(picture.size)
    # On either side whole squares, an even number of them: the crop lies at the same pixels, rounded the same way.
    cut = (long - LONG_LINE * short) // (4 * short) * 2 * short if short else 0
    if cut <= 0:
        return picture
    wide = picture.width == long
    left, top = (cut, 0) if wide else (0, cut)
    return picture.crop((left, top, picture.width - left, picture.height - top))


def _turned(size: tuple[int, int], picture: "Image") -> tuple[int, int]:
    """Width and height changed over for a picture that lies on its side."""
    width, height = size
    return (height, width) if _orientation(picture) in ON_ITS_SIDE else size


def _orientation(picture: "Image") -> int:
    """As the metadata tell; 1 where they cannot be read, or the decoder sees to it."""
    import PIL.Image

    if picture.format in ("TIFF", "HEIF", "JXL"):
        return 1
    try:
        turn = PIL.Image.Image.getexif(picture).get(ORIENTATION)  # that of PNG would decode the pixels
    except Exception:  # of a picture that was opened elsewhere
        return 1
    return turn if isinstance(turn, int) else 1


def _rgb(picture: "Image") -> "Image":
    import PIL.Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
        grey = _eight_bits(values << 4 if tags.get(BITS) == (12,) else values)
        if tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow sees to in 8 bits alone
            grey = 255 - grey
        if "transparency" in picture.info:
            grey[values == picture.info["transparency"]] = 255
        return PIL.Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBa", "La"):  # premultiplied
        picture = picture.convert(picture.mode.upper())
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey samples [H, W] as uint8, by the rules above. Raises DecodeError that names their range."""
    if values.dtype.kind != "f" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    floats = values.dtype.kind == "f"
    largest = 255 if floats else 65535
    outside = values.size - np.count_nonzero((values >= 0) & (values <= largest))  # NaN is outside too
    if outside:
        finite = values[np.isfinite(values)]
        span = f"from {finite.min():g} to {finite.max():g}" if finite.size else "nowhere"
        kind = "floats, which are 0 to 1 or 0 to 255" if floats else "32-bit integers, which are 0 to 255 or 0 to 65535"
        raise DecodeError(f"{outside} of {values.size} samples are out of range: {kind}; here they go {span}")
    if floats:
        return np.rint(values * 255 if values.max() <= 1 else values).astype(np.uint8)
    return (values >> 8 if values.max() > 255 else values).astype(np.uint8)
