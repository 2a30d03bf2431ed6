"""Files that are meant to break decoders, or to fill memory: an error of one kind, that says why."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from PIL import Image

from vtp.curation.ingest.encode import Keep, store
from vtp.layers.decode import DecodeError, decode_rgb, finish, open_header

ERRORS = [
    OSError("a"), SyntaxError("a"), ValueError("a"), TypeError("a"), KeyError("a"), IndexError("a"), OverflowError("a"),
    ZeroDivisionError("a"), AttributeError("a"), struct.error("a"), zlib.error("a"), RuntimeError("a"), RecursionError("a"),
    EOFError("a"), AssertionError("a"), UnicodeDecodeError("utf-8", b"a", 0, 1, "a"), NotImplementedError("a"),
    MemoryError(), PIL.Image.DecompressionBombError("a"),
]  # fmt: skip


def png(*chunks, size=(4, 4)):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    content = (b"IDAT", zlib.compress(bytes(13 * 4)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (header, *chunks, content, (b"IEND", b"")))


def tiff(**changes):
    """A grey picture of 4 x 4; tags by their names."""
    tags = {"width": (256, 4, 1, 4), "height": (257, 4, 1, 4), "bits": (258, 3, 1, 8), "compression": (259, 3, 1, 1)}
    tags |= {"photometric": (262, 3, 1, 1), "offset": (273, 4, 1, 8), "samples": (277, 3, 1, 1), "rows": (278, 4, 1, 4)}
    tags |= {"count": (279, 4, 1, 16)}
    tags = {name: tag for name, tag in (tags | changes).items() if tag is not None}
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags.values()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 72) + bytes(64) + directory


def encoded(form, mode="RGB", size=(12, 10), **how):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_is_one_error(error, monkeypatch):
    def failing(*arguments, **more):
        raise error

    content = encoded("PNG")
    kind = "memory" if isinstance(error, MemoryError) else type(error).__name__
    with monkeypatch.context() as patch:
        patch.setattr(PIL.ImageFile.ImageFile, "load", failing)
        with pytest.raises(DecodeError, match=f"not a readable image .*{kind}"):
            decode_rgb(content)
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", failing)
        with pytest.raises(DecodeError, match=f"{kind}|too many pixels"):
            open_header(content)
    with monkeypatch.context() as patch:  # metadata, which lose no picture; but others would fail at the file
        patch.setattr(PIL.Image.Image, "getexif", failing)
        assert decode_rgb(content).size == (12, 10)
        assert store(encoded("JPEG"), Keep(name="keep")).extension == "png"


def test_an_interruption_is_no_fault_of_a_picture(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decode_rgb(encoded("PNG"))


@pytest.mark.parametrize(
    "changes",
    [
        {"width": (256, 2, 1, 65)},
        {"width": (256, 5, 1, 8)},
        {"bits": (258, 11, 1, 0x7FC00000)},
        {"bits": (258, 3, 1, 0)},
        {"compression": (259, 2, 1, 65)},
        {"compression": (259, 3, 1, 65535)},
        {"photometric": (262, 2, 1, 65)},
        {"offset": None},
        {"offset": (273, 4, 1, 1 << 31)},
        {"offset": (273, 2, 1, 65)},
        {"samples": (277, 3, 1, 0)},
        {"tile": (322, 2, 1, 65), "tiles": (323, 2, 1, 65)},
        {"tile": (322, 5, 1, 8), "tiles": (323, 5, 1, 8)},
    ],
)
def test_tags_of_other_types(changes):
    assert decode_rgb(tiff()).size == (4, 4)
    with warnings.catch_warnings(), pytest.raises(DecodeError):
        warnings.simplefilter("ignore")
        decode_rgb(tiff(**changes))


@pytest.mark.parametrize(
    "content",
    [
        png(size=(60_000, 60_000)),
        png(size=(0x7FFFFFFF, 1)),
        tiff(width=(256, 4, 1, 1 << 30), height=(257, 4, 1, 1 << 30)),
        tiff(tile=(322, 4, 1, 1 << 30), tiles=(323, 4, 1, 1 << 30), offset=(324, 4, 1, 8), count=(325, 4, 1, 16)),
        b"GIF89a" + struct.pack("<HHBBBcHHHHB", 65535, 65535, 0, 0, 0, b",", 0, 0, 65535, 65535, 0) + b";",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0),
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff\xff\xff" * 2,
    ],
    ids=["png", "line", "tiff", "tiles", "gif", "bmp", "webp"],
)  # fmt: skip
def test_bombs_are_refused_and_take_no_memory(content):
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="too many pixels|too large|too much memory|Too much memory|not an image"):
            decode_rgb(content)
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()


def test_messages_of_decoders_are_equal_in_every_process():
    with pytest.raises(DecodeError) as raised:
        decode_rgb(b"<html>")
    assert " at 0x" not in str(raised.value)


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("TIFF", "L"), ("WEBP", "RGB"), ("GIF", "P")]
)
def test_good_files_are_read(form, mode):
    assert finish(open_header(encoded(form, mode))).size == (12, 10)
