"""Samples of every type become 8 bits by what the type says; files of every format are read, or a message says why."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pillow_jxl
import pytest
from oddities import HEIGHT, PIXELS, WIDTH, chunk, encoded, exif, turned
from PIL import Image

from vtp.curation.ingest.encode import CentreCrop, Keep, store
from vtp.layers.decode import EXTENSIONS, DecodeError, decode_rgb, open_header, upright_size

pillow_heif.register_heif_opener()  # they write too
assert pillow_jxl.Encoder
RNG = np.random.default_rng(0)
UNIT = RNG.random((HEIGHT, WIDTH), dtype=np.float32)
WIDE = RNG.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
BYTES = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)


def raw_tiff(values, sample_format, order="<", more=None):
    """An uncompressed TIFF of these samples [H, W] or [H, W, C]."""
    height, width, channels = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1 if channels == 1 else 2,
        273: 8,
        277: channels,
        278: height,
    }
    tags |= {279: len(data), 339: sample_format} | (more or {})
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def grey(content):
    pixels = np.asarray(decode_rgb(content))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


FLOATS = {
    "unit": (UNIT, np.rint(UNIT * 255)),
    "black": (UNIT * 0, UNIT * 0),
    "one": (UNIT * 0 + 1, UNIT * 0 + 255),
    "bytes": (UNIT * 255, np.rint(UNIT * 255)),
    "just above one": (UNIT * 1.5, np.rint(UNIT * 1.5)),
}


@pytest.mark.parametrize(("values", "expected"), FLOATS.values(), ids=FLOATS)
def test_floats(values, expected):
    for order in "<>":
        assert np.array_equal(grey(raw_tiff(values, 3, order)), expected)
    assert np.array_equal(grey(encoded(Image.fromarray(values), "TIFF", compression="tiff_lzw")), expected)


INTEGERS = {
    "8 bits": (BYTES, 1, BYTES),
    "16 bits": (WIDE, 1, WIDE >> 8),
    "16 bits, dark": (WIDE >> 9, 1, (WIDE >> 9) >> 8),
    "32 bits of 16": (WIDE.astype(np.uint32), 1, WIDE >> 8),
    "32 bits of 8": (BYTES.astype(np.uint32), 1, BYTES),
    "32 bits, signed": (WIDE.astype(np.int32), 2, WIDE >> 8),
    "16 bits, signed": ((WIDE >> 1).astype(np.int16), 2, WIDE >> 9),
    "16 bits, signed, of 8": (BYTES.astype(np.int16), 2, BYTES),
}


@pytest.mark.parametrize(("values", "sample_format", "expected"), INTEGERS.values(), ids=INTEGERS)
def test_integers(values, sample_format, expected):
    for order in "<>" if values.dtype != np.uint32 else "<":
        assert np.array_equal(grey(raw_tiff(values, sample_format, order)), expected)


def test_white_may_be_nothing():
    for values, sample_format, expected in ((WIDE, 1, WIDE >> 8), (BYTES, 1, BYTES), (UNIT, 3, np.rint(UNIT * 255))):
        assert np.array_equal(grey(raw_tiff(values, sample_format, more={262: 0})), 255 - expected)


def test_samples_of_12_bits():
    packed = np.unpackbits((WIDE >> 4 << 4).astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=2)[..., :12]
    content = raw_tiff(np.packbits(packed.reshape(HEIGHT, -1), axis=1), 1, more={256: WIDTH, 258: 12})
    assert np.array_equal(grey(content), WIDE >> 8)


def test_samples_that_pillow_does_not_read_are_named():
    for values, sample_format, said in (
        (UNIT.astype(np.float64), 3, r"1 samples per pixel, their bits \(64,\), their format \(3,\)"),
        (UNIT.astype(np.float16), 3, r"1 samples per pixel, their bits \(16,\), their format \(3,\)"),
        (np.stack([UNIT] * 3, -1), 3, r"3 samples per pixel, their bits \(32,\), their format \(3,\)"),
    ):
        with pytest.raises(DecodeError, match=f"a TIFF that Pillow does not read: {said}"):
            decode_rgb(raw_tiff(values, sample_format))


def test_files_of_16_bits():
    for form in ("PNG", "TIFF"):
        assert np.array_equal(grey(encoded(Image.fromarray(WIDE), form)), WIDE >> 8)
    for mode in ("I;16", "I;16B", "I;16L"):
        picture = Image.frombytes(mode, (WIDTH, HEIGHT), WIDE.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        assert np.array_equal(grey(encoded(picture, "TIFF")), WIDE >> 8)
    stored = store(encoded(Image.fromarray(WIDE), "PNG"), Keep(name="keep"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored.image)))[..., 0], WIDE >> 8)


@pytest.mark.parametrize(
    ("values", "sample_format", "said"),
    [
        (UNIT * 65535, 3, r"\d+ of 384 samples are out of range: floats, which are 0 to 1 or 0 to 255; .* from [\d.]+ to 6"),
        (UNIT - 0.5, 3, r"\d+ of 384 samples .* from -0.49\d* to 0.49\d*"),
        (np.where(UNIT > 0.9, np.nan, UNIT).astype(np.float32), 3, r"\d+ of 384 samples .*from 0\.0\d* to 0\.8"),
        (np.where(UNIT > 0.9, np.inf, UNIT).astype(np.float32), 3, r"\d+ of 384 samples .*from 0\.0\d* to 0\.8"),
        (np.full((2, 2), np.nan, np.float32), 3, "4 of 4 samples .* here they go nowhere"),
        (WIDE.astype(np.uint32) * 2, 1, r"\d+ of 384 samples .*32-bit integers, which are .* 65535; .* to 1\d"),
        (WIDE.astype(np.int32) - 9000, 2, r"\d+ of 384 samples .*32-bit integers.* from -\d+ to \d+"),
    ],
    ids=range(7),
)  # fmt: skip
def test_other_ranges_are_refused_by_name(values, sample_format, said):
    content = raw_tiff(values, sample_format)
    with pytest.raises(DecodeError, match=said):
        decode_rgb(content)
    with pytest.raises(DecodeError, match=said):
        store(content, CentreCrop(name="centre_crop", size=8))


def raw_png(kind, bits, samples, *chunks):
    rows = samples.astype(">u2" if bits == 16 else np.uint8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def test_samples_of_png():
    """Depth, alpha and transparent colours of every kind lie on white."""
    colours = RNG.integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(np.uint16)
    assert np.array_equal(decode_rgb(raw_png(2, 16, colours[..., :3])), colours[..., :3] >> 8)
    for channels, kind in ((2, 4), (4, 6)):
        content = raw_png(kind, 16, colours[..., :channels])
        high = (colours[..., :channels] >> 8).astype(float)
        alpha = high[..., -1:] / 255
        expected = high[..., :-1] * alpha + 255 * (1 - alpha)
        assert np.abs(np.asarray(decode_rgb(content)).astype(float) - expected).max() <= 1
    bits = BYTES > 127
    assert np.array_equal(grey(encoded(Image.fromarray(bits), "PNG")), bits * 255)
    key = WIDE.copy()
    key[3, 4] = 1234
    found = grey(raw_png(0, 16, key, chunk(b"tRNS", struct.pack(">H", 1234))))
    assert np.array_equal(found, np.where(key == 1234, 255, key >> 8))
    for depth, key in ((8, (255, 0, 0)), (16, (65535, 0, 0))):
        pixels = PIXELS.astype(np.uint16) * (257 if depth == 16 else 1)
        found = np.asarray(decode_rgb(raw_png(2, depth, pixels, chunk(b"tRNS", struct.pack(">HHH", *key)))))
        assert np.array_equal(found, np.where(PIXELS[..., :1] == 255, 255, PIXELS))
    one = Image.fromarray(bits)
    found = grey(encoded(one, "PNG", transparency=0))
    assert (found == 255).all()
    palette = Image.fromarray(BYTES).convert("P")
    for transparency in (7, bytes(range(256))):
        expected = palette.copy()
        expected.info["transparency"] = transparency
        layer = np.asarray(expected.convert("RGBA")).astype(float)
        alpha = layer[..., 3:] / 255
        found = np.asarray(decode_rgb(encoded(palette, "PNG", transparency=transparency))).astype(float)
        assert np.abs(found - (layer[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_colours_of_print_and_of_lab():
    inks = {
        (0, 0, 0, 0): (255, 255, 255),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 255, 255, 0): (255, 0, 0),
    }
    for ink, colour in inks.items():
        for form in ("JPEG", "TIFF"):  # a JPEG holds them inverted, as Adobe writes it
            found = np.asarray(decode_rgb(encoded(Image.new("CMYK", (16, 16), ink), form)))
            assert np.abs(found.astype(int) - colour).max() <= 2
    for lab, colour in {
        (255, 128, 128): (255, 255, 255),
        (0, 128, 128): (0, 0, 0),
        (138, 209, 198): (255, 0, 0),
    }.items():
        found = np.asarray(decode_rgb(encoded(Image.new("LAB", (8, 8), lab), "TIFF")))
        assert np.abs(found.astype(int) - colour).max() <= 9


def test_ycck():
    """Four channels of which Adobe's segment says that three are turned into brightness and colour."""
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    place = content.index(b"Adobe") + 11
    assert content[place] == 0
    as_ycck = content[:place] + b"\2" + content[place + 1 :]
    expected = np.asarray(Image.open(io.BytesIO(as_ycck)).convert("RGB"))
    found = np.asarray(decode_rgb(as_ycck))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, np.asarray(decode_rgb(content)))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_of_several(form):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((0, 255, 0), (255, 0, 0))]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    stored = store(content, Keep(name="keep"))
    for found in (decode_rgb(content), Image.open(io.BytesIO(stored.image))):
        assert np.abs(np.asarray(found).astype(int) - (0, 255, 0)).max() <= 6
    assert stored.extension == "png"
    assert getattr(Image.open(io.BytesIO(stored.image)), "n_frames", 1) == 1


MODERN = {"AVIF": {"quality": 100}, "HEIF": {"quality": -1}, "JXL": {"lossless": True}}


FAST = {"AVIF": {"speed": 10}, "HEIF": {"enc_params": {"preset": "ultrafast"}}, "JXL": {"effort": 1}}


@pytest.mark.parametrize("form", MODERN)
def test_modern_formats(form):
    """Pixels, transparency, turns, and what is stored: PNG, for not every reader knows the format."""
    content = encoded(Image.fromarray(PIXELS), form, **MODERN[form])
    assert upright_size(open_header(content)) == (WIDTH, HEIGHT)
    stored = store(content, Keep(name="keep"))
    assert (stored.extension, stored.width, stored.height) == ("png", WIDTH, HEIGHT)
    for found in (decode_rgb(content), Image.open(io.BytesIO(stored.image))):
        difference = np.abs(np.asarray(found).astype(int) - PIXELS)
        assert np.delete(difference, [11, 12], axis=1).max() <= 8  # colours are halved in width, but for JPEG XL
    clear = encoded(Image.new("RGBA", (WIDTH, HEIGHT), (200, 0, 0, 0)), form, **MODERN[form])
    assert np.asarray(decode_rgb(clear)).min() >= 253
    for broken in (b"MM\0*\0\0", b"garbage" * 4, exif((0x0112, 5, 1, b"\xff\xff\xff\xff"))):
        camera = b"Exif\0\0" + exif((0x010F, 2, 60, b"\0\0\0\x26"), turned(1), data=bytes(60))
        good = encoded(Image.fromarray(PIXELS), form, exif=camera, **MODERN[form])
        start = good.index(b"MM\0*")
        odd = good[:start] + broken + good[start + len(broken) :]
        assert np.abs(np.asarray(decode_rgb(odd)).astype(int) - np.asarray(decode_rgb(content))).max() <= 2
    with pytest.raises(DecodeError):
        decode_rgb(content[: len(content) * 3 // 4])


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_modern_formats_are_upright(form):
    """There a turn is a property of the picture, and EXIF is not asked."""
    content = encoded(Image.fromarray(PIXELS), form, exif=b"Exif\0\0" + exif(turned(6)), **MODERN[form])
    assert upright_size(open_header(content)) == (HEIGHT, WIDTH)
    found = np.asarray(decode_rgb(content)).astype(int)
    assert found.shape == (WIDTH, HEIGHT, 3)
    assert np.abs(found[:8] - (255, 0, 0)).max() <= 8
    assert np.abs(found[-8:] - (0, 0, 255)).max() <= 8


def test_jpeg_xl_is_as_its_stream_says():
    content = encoded(Image.fromarray(PIXELS), "JXL", lossless=True, exif=b"Exif\0\0" + exif(turned(6)))
    assert np.array_equal(np.asarray(decode_rgb(content)), PIXELS)
    wide = encoded(Image.fromarray(WIDE), "JXL", lossless=True)
    assert np.array_equal(grey(wide), WIDE >> 8)
    assert np.array_equal(grey(encoded(Image.fromarray(UNIT), "JXL", lossless=True)), np.rint(UNIT * 255))


@pytest.mark.parametrize("form", MODERN)
def test_limits_hold_for_modern_formats(form, monkeypatch):
    """Before the plugin decodes: that of JPEG XL would decode all to tell the size."""
    monkeypatch.setattr(pillow_jxl.JpegXLImagePlugin, "Decoder", lambda **_: pytest.fail("it was decoded"))
    sides = [(30, 20), (33, 33), (40, 30), (24, 20), (25, 20), (32, 18), (46, 23), (80, 40), (256, 96), (1, 9000)]
    for size in sides[: -1 if form == "HEIF" else None]:  # its encoder makes no lines
        content = encoded(Image.new("RGB", size, (1, 2, 3)), form, **FAST[form])
        with pytest.raises(DecodeError, match=f"too many pixels: {size[0]} x {size[1]}"):
            open_header(content, max_pixels=size[0] * size[1] - 1)


def test_a_size_that_jpeg_xl_takes_apart_is_seen():
    """The stream may be cut anywhere, also within its size."""
    stream = encoded(Image.fromarray(np.tile(PIXELS, (10, 10, 1))), "JXL")
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl "
    for cut in (0, 2, 3, 5, 30):
        pieces = ((0, stream[:cut]), (1 << 31 | 1, stream[cut:]))
        parts = [struct.pack(">I4sI", 12 + len(piece), b"jxlp", number) + piece for number, piece in pieces]
        content = boxes + b"".join(parts)
        assert decode_rgb(content).size == (10 * WIDTH, 10 * HEIGHT)
        with pytest.raises(DecodeError, match="too many pixels: 240 x 160"):
            open_header(content, max_pixels=38_399)


def test_a_size_that_heic_hides_is_refused():
    content = encoded(Image.new("RGB", (900, 700)), "HEIF")
    lying = content.replace(struct.pack(">II", 900, 700), struct.pack(">II", 16, 16))
    with pytest.raises(DecodeError, match="not a readable image"):
        decode_rgb(lying)


def test_without_its_plugin_a_format_is_named():
    heic, jxl = (encoded(Image.fromarray(PIXELS), form) for form in ("HEIF", "JXL"))
    program = f"""if True:
        import sys
        sys.modules["pillow_heif"] = sys.modules["pillow_jxl"] = None
        from vtp.layers.decode import DecodeError, decode_rgb
        for content in ({heic!r}, {jxl!r}):
            try:
                decode_rgb(content)
            except DecodeError as error:
                print(error)
    """
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [
        "HEIF needs pillow_heif: pip install -c constraints.txt -e '.[formats]'",
        "JXL needs pillow_jxl: pip install -c constraints.txt -e '.[formats]'",
    ]


def test_endings():
    assert {".avif", ".heic", ".heif", ".jxl", ".jpg", ".tiff"} <= EXTENSIONS
    assert all(ending == ending.lower() for ending in EXTENSIONS)
