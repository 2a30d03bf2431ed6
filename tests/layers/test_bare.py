"""Pixels decide: whatever else a file holds can neither lose a picture nor change it, and turns it where it can be read."""

import io
import tracemalloc
import warnings
import zlib

import numpy as np
import oddities
import pillow_heif
import pillow_jxl
import pytest
from oddities import HEIGHT, ODD, PIXELS, TURNED, UNREADABLE, WIDTH, chunk, png, webp, with_exif, xmp
from PIL import Image, ImageOps

from vtp.curation.ingest.encode import Keep, store
from vtp.layers.bare import bare
from vtp.layers.decode import DecodeError, decode_rgb, finish, open_header, upright_size

pillow_heif.register_heif_opener()  # they write too
assert pillow_jxl.Encoder
KEEP = Keep(name="keep")
UPRIGHT = np.rot90(PIXELS, -1)


@pytest.fixture(autouse=True)
def no_warnings():
    """A decoder that is unsettled by metadata says so in every process that reads the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def same(picture, pixels):
    found = np.asarray(picture)
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels.astype(int)).max() <= 3  # of a JPEG


def plainly(content):
    """As a reader that knows nothing of this project sees it, Pillow's with its usual steps."""
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        assert picture.getexif().get(0x0112, 1) == 1
        return ImageOps.exif_transpose(picture).convert("RGB")


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_metadata_lose_no_picture(content):
    same(decode_rgb(content), PIXELS)
    stored = store(content, KEEP)
    assert (stored.width, stored.height) == (WIDTH, HEIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if stored.image != content else "ignore")
        same(plainly(stored.image), PIXELS)


@pytest.mark.parametrize("block", TURNED.values(), ids=TURNED)
def test_a_turn_is_applied_where_it_can_be_read(block):
    for content in with_exif(block).values():
        assert upright_size(open_header(content)) == (HEIGHT, WIDTH)
        same(decode_rgb(content), UPRIGHT)
        stored = store(content, KEEP)
        assert (stored.width, stored.height, stored.extension) == (HEIGHT, WIDTH, "png")
        same(plainly(stored.image), UPRIGHT)


@pytest.mark.parametrize("block", UNREADABLE.values(), ids=UNREADABLE)
def test_a_turn_that_cannot_be_read_is_none(block):
    for content in with_exif(block).values():
        assert upright_size(open_header(content)) == (WIDTH, HEIGHT)
        same(decode_rgb(content), PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(plainly(store(content, KEEP).image), PIXELS)


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation(value):
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(with_exif(oddities.exif(oddities.turned(value)))["png"])))
    for content in with_exif(oddities.exif(oddities.turned(value))).values():
        same(decode_rgb(content), np.asarray(expected))
        same(finish(Image.open(io.BytesIO(content))), np.asarray(expected))  # opened by the user
    grey = oddities.tiff(oddities.exif(oddities.turned(value)))
    same(decode_rgb(grey), np.asarray(expected)[..., :1].repeat(3, -1))
    assert upright_size(open_header(grey)) == expected.size


@pytest.mark.parametrize("block", TURNED.values(), ids=TURNED)
def test_tags_of_tiff_beside_those_of_pixels(block):
    if b"\x01\x12\x00\x03\x00\x00\x00\x03" in block:
        pytest.skip("its numbers lie elsewhere in this file")
    same(decode_rgb(oddities.tiff(block)), UPRIGHT[..., :1].repeat(3, -1))


@pytest.mark.parametrize("block", UNREADABLE.values(), ids=UNREADABLE)
def test_no_turn_of_tiff_that_cannot_be_read(block):
    if block[4:10] == b"\0\0\0\x08\0\1":
        same(decode_rgb(oddities.tiff(block)), PIXELS[..., :1].repeat(3, -1))


def test_xmp_turns_where_exif_does_not():
    inside = b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))
    for content in (oddities.jpeg((0xE1, inside)), png(text), png(behind=[text]), webp((b"XMP ", xmp(6)), flags=4)):
        same(decode_rgb(content), UPRIGHT)
        assert store(content, KEEP).image != content
    upright = oddities.exif(oddities.turned(1))
    same(decode_rgb(oddities.jpeg((0xE1, b"Exif\0\0" + upright), (0xE1, inside))), PIXELS)  # EXIF comes first
    same(decode_rgb(oddities.jpeg((0xE1, b"Exif\0\0broken"), (0xE1, inside))), UPRIGHT)


@pytest.mark.parametrize(
    "name", ["short JFIF", "large text behind", "text called interlace", "wrong checksum", "a bomb"]
)
def test_files_at_which_other_readers_fail_are_stored_anew(name):
    stored = store(ODD[name], KEEP)
    assert stored.extension == "png"
    assert stored.image != ODD[name]


def test_good_files_stay_untouched():
    camera = oddities.exif((0x010F, 2, 4, b"abc\0"), oddities.turned(1))
    texts = [chunk(b"gAMA", b"\0\0\xb1\x8f"), chunk(b"tEXt", b"Software\0x"), chunk(b"pHYs", bytes(9))]
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"profile"))
    files = [*with_exif(camera).values(), png(*texts, behind=[chunk(b"tIME", bytes(7)), texts[1]]), png(profile)]
    files += [
        oddities.jpeg((0xFE, b"a comment"), (0xE2, b"ICC_PROFILE\0\1\1profile")),
        webp((b"XMP ", xmp(1)), flags=4),
    ]
    files += [oddities.encoded(Image.fromarray(PIXELS), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])]
    for content in files:
        assert store(content, KEEP).image == content


def test_texts_that_fill_memory_are_not_unpacked():
    tracemalloc.start()
    try:
        for name in ("a bomb", "bombs that may turn", "many texts"):
            same(decode_rgb(ODD[name]), PIXELS)
            store(ODD[name], KEEP)
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()


def test_pixels_that_are_broken_stay_an_error():
    """What is cut off is no picture, with or without something behind it."""
    whole = {"png": png(), "jpeg": oddities.jpeg(), "webp": webp(flags=0), "tiff": oddities.tiff(TURNED["plain"])}
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole |= {form: oddities.encoded(noise, form) for form in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF", "JXL")}
    for name, content in whole.items():
        with pytest.raises(DecodeError):
            decode_rgb(content[: len(content) // 2 if name != "tiff" else 60])
    with pytest.raises(DecodeError):
        decode_rgb(webp((b"EXIF", TURNED["plain"]))[:60])


def test_a_bare_file_is_one_still():
    """Twice is once, and bytes that are no picture come back."""
    for content in [*ODD.values(), *with_exif(TURNED["plain"]).values(), oddities.tiff(TURNED["plain"])]:
        assert bare(bare(content))[8:200] == bare(content)[8:200] or content[:2] == b"MM"
    rng = np.random.default_rng(0)
    heads = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\0\0\0\0WEBPVP8X", b"II*\0", b"MM\0*", b"\0\0\0\x18ftypheic"]
    for head in [*heads, b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a", b"GIF89a", b"BM"]:
        for length in (0, 1, 3, 7, 30, 300):
            with pytest.raises(DecodeError):
                decode_rgb(head + rng.bytes(length))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_stands_in_metadata(seed):
    """Bytes changed at random within EXIF: the picture stays, upright or on its side."""
    rng = np.random.default_rng(seed)
    for block in TURNED.values():
        broken = bytearray(block)
        for place in rng.integers(0, len(block), 6):
            broken[place] = rng.integers(0, 256)
        for content in with_exif(bytes(broken)).values():
            assert decode_rgb(content).size in {(WIDTH, HEIGHT), (HEIGHT, WIDTH)}


def test_a_large_profile_makes_no_file_that_nobody_opens():
    profile = bytes(range(256)) * 12_000  # Pillow unpacks less of a PNG
    content = oddities.encoded(Image.new("CMYK", (9, 9), (1, 2, 3, 99)), "TIFF", icc_profile=profile)
    assert len(store(content, KEEP).image) < 1000
    assert plainly(store(content, KEEP).image).size == (9, 9)
