"""Good pictures with metadata that are none: what cameras, editors and broken tools leave in files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 24, 16
# A red left half and a blue right half: whoever turns it can be seen.
PIXELS = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
PIXELS[:, : WIDTH // 2, 0] = PIXELS[:, WIDTH // 2 :, 2] = 255
BOMB = zlib.compress(bytes(100 << 20), 9)
SHORT, LONG, RATIONAL, ASCII, BYTE = 3, 4, 5, 2, 1


def encoded(picture, form, **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def exif(*tags, order=">", start=8, count=None, after=0, data=b""):
    """A block of EXIF; tags are (tag, type, count, value of 4 bytes)."""
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", start)
    entries = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    body = struct.pack(f"{order}H", len(tags) if count is None else count) + entries
    return head + body + struct.pack(f"{order}I", after) + data


def turned(value=6, kind=SHORT, count=1, order=">"):
    letters = {BYTE: "B3x", SHORT: "HH", LONG: "I"}[kind]
    numbers = (value, 1) if kind == SHORT else (value,)
    return 0x0112, kind, count, struct.pack(f"{order}{letters}", *numbers)


# Blocks that say the picture lies on its side, however odd what stands beside it is.
TURNED = {
    "plain": exif(turned()),
    "little endian": exif(turned(order="<"), order="<"),
    "description is a ratio": exif(
        (0x010E, RATIONAL, 1, struct.pack(">I", 40)), turned(), data=struct.pack(">II", 1, 2)
    ),
    "description is a ratio of nothing": exif((0x010E, RATIONAL, 1, struct.pack(">I", 1 << 30)), turned()),
    "resolution is a text": exif(turned(), (0x011A, ASCII, 4, b"72\0\0"), (0x0128, SHORT, 1, struct.pack(">HH", 2, 0))),
    "as a long": exif(turned(kind=LONG)),
    "as a byte": exif(turned(kind=BYTE)),
    "as two numbers": exif(turned(count=2)),
    "as three numbers": exif((0x0112, SHORT, 3, struct.pack(">I", 26)), data=struct.pack(">HHH", 6, 6, 6)),
    "a directory that loops": exif(turned(), after=8),
    "sub-directories that loop": exif(
        turned(), (0x8769, LONG, 1, struct.pack(">I", 8)), (0x8825, LONG, 1, b"\0\0\0\x08")
    ),
    "a sub-directory nowhere": exif(turned(), (0x8769, LONG, 1, b"\xff\xff\xff\xf0"), (0x8825, ASCII, 9, b"\0\0\0\1")),
    "more tags than there are": exif(turned(), count=999),
    "cut off behind it": exif(turned())[:-4],
    "types that are none": exif((0x0100, 77, 1, bytes(4)), turned(), (0x9999, 0, 1 << 31, bytes(4))),
}
# Blocks from which nobody can read which side is up.
UNREADABLE = {
    "empty": b"",
    "zeros": bytes(40),
    "text": b"no exif at all",
    "head alone": b"MM\0*\0\0\0\x08",
    "cut in the head": b"MM\0*\0",
    "starts beyond the end": exif(turned(), start=0x7FFFFFFF),
    "as a text": exif((0x0112, ASCII, 2, b"6\0\0\0")),
    "as a ratio nowhere": exif((0x0112, RATIONAL, 1, b"\xff\xff\xff\xf0")),
    "as no number": exif(turned(count=0)),
    "as a number that is none": exif(turned(99)),
    "far away": exif((0x0112, LONG, 7, b"\xff\xff\xff\xf0")),
}


def jpeg(*segments, **how):
    """With segments (marker, content) behind the first two bytes."""
    content = encoded(Image.fromarray(PIXELS), "JPEG", quality=95, subsampling=0, **how)
    added = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    return content[:2] + added + content[2:]


def chunk(name, data, checksum=None):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum or zlib.crc32(name + data))


def png(*before, behind=()):
    """With chunks before the pixels and behind them."""
    content = encoded(Image.fromarray(PIXELS), "PNG")
    return content[:33] + b"".join(before) + content[33:-12] + b"".join(behind) + content[-12:]


def webp(*chunks, flags=0x2C, **how):
    """With chunks behind the picture, and a header that announces profile, EXIF and XMP."""
    content = encoded(Image.fromarray(PIXELS), "WEBP", **({"lossless": True} | how))
    header = bytes([flags, 0, 0, 0]) + struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    parts = [(b"VP8X", header), (content[12:16], content[20:]), *chunks]
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(block):
    """With the tags of a block of EXIF among its own."""
    order = ">" if block.startswith(b"M") else "<"
    (count,) = struct.unpack_from(f"{order}H", block, 8)
    own = [(256, SHORT, 1, WIDTH), (257, SHORT, 1, HEIGHT), (258, SHORT, 1, 8), (259, SHORT, 1, 1), (262, SHORT, 1, 1)]
    own += [(273, LONG, 1, 8), (277, SHORT, 1, 1), (278, SHORT, 1, HEIGHT), (279, LONG, 1, WIDTH * HEIGHT)]
    entries = [
        struct.pack(
            f"{order}HHIHH" if kind == SHORT else f"{order}HHII", tag, kind, number, *([value, 0][: 3 - kind // 2])
        )
        for tag, kind, number, value in own
    ]
    entries += [block[place : place + 12] for place in range(10, min(len(block) - 11, 10 + 12 * count), 12)]
    entries.sort(key=lambda entry: struct.unpack_from(f"{order}H", entry))
    grey = PIXELS[:, :, 0].tobytes()
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return block[:4] + struct.pack(f"{order}I", 8 + len(grey)) + grey + directory


def xmp(value):
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % value


TEXT = zlib.compress(bytes(3 << 20))  # above what Pillow unpacks
GPS = exif((0x8825, LONG, 1, b"\xff\xff\xff\xf0"))
ODD = {
    # A JPEG
    "short JFIF": jpeg((0xE0, b"JFIF\0")),
    "short Adobe": jpeg((0xEE, b"Adobe")),
    "short profile": jpeg((0xE2, b"ICC_PROFILE\0")),
    "profile of other pieces": jpeg((0xE2, b"ICC_PROFILE\0\7\0junk"), (0xE2, b"ICC_PROFILE\0\1\2junk")),
    "pictures of an MPO that are none": jpeg((0xE2, b"MPF\0MM\0*\0\0\0\x08\0\2\xb0\1\0\4\0\0\0\1\0\0\0\3")),
    "an index of an MPO that is none": jpeg(
        (0xE2, b"MPF\0" + exif((0xB001, 2, 2, b"3\0\0\0"), (0xB002, 7, 4, b"abcd")))
    ),
    "resources of Photoshop that are none": jpeg((0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\2ab")),
    "XMP that is none": jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<<<")),
    "segments of every kind": jpeg(*((0xE0 + number, b"\xff\xd8\xff\xc0junk") for number in range(1, 14))),
    "an empty comment": jpeg((0xFE, b"")),
    "junk between segments": jpeg()[:2] + b"\0\1junk\xff\0\xff\xff" + jpeg()[2:],
    # A PNG
    "large text": png(chunk(b"zTXt", b"Comment\0\0" + TEXT)),
    "large text behind": png(behind=[chunk(b"zTXt", b"Comment\0\0" + TEXT)]),
    "large international text": png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + TEXT)),
    "large XMP": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TEXT)),
    "many texts": png(*[chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(1_000_000))) for n in range(70)]),
    "a bomb": png(
        chunk(b"zTXt", b"k\0\0" + BOMB), chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB), chunk(b"iCCP", b"k\0\0" + BOMB)
    ),
    "bombs that may turn": png(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB), chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)
    ),
    "unknown compression": png(chunk(b"zTXt", b"k\0\7abc"), chunk(b"iCCP", b"k\0\7abc")),
    "texts without an end": png(chunk(b"zTXt", b"k"), chunk(b"tEXt", b""), chunk(b"iTXt", b"XML:com.adobe.xmp\0")),
    "wrong checksum": png(chunk(b"tEXt", b"k\0v", checksum=1)),
    "wrong checksum behind": png(behind=[chunk(b"tEXt", b"k\0v", checksum=1)]),
    "short chunks": png(*(chunk(name, b"\0") for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"iCCP", b"tIME"))),
    "short animation": png(chunk(b"acTL", b""), chunk(b"fcTL", b"")),
    "text called interlace": png(chunk(b"tEXt", b"interlace\0001")),
    "text called transparency": png(chunk(b"tEXt", b"transparency\0none")),
    "text called exif": png(chunk(b"tEXt", b"exif\0nothing")),
    "text called bbox": png(chunk(b"tEXt", b"bbox\0nowhere")),
    "EXIF as digits that are none": png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzz")),
    "no end": png()[:-12],
    "cut in a text behind": png(behind=[chunk(b"tEXt", b"k" * 99)])[:-60],
    # A WebP
    "profile that is none": webp((b"ICCP", b"no profile"), flags=0x20),
    "WebP's XMP that is none": webp((b"XMP ", b"\xff\xfe<<"), flags=0x04),
    "announced and not there": webp(),
    "there and not announced": webp((b"EXIF", GPS), (b"XMP ", xmp(1)), flags=0),
    "chunks of no kind": webp((b"JUNK", b"abc"), (b"\xff\xff\xff\xff", b"")),
    "cut in the EXIF": webp((b"EXIF", exif(turned(1), data=bytes(99))))[:-50],
}


def with_exif(block):
    """The picture in every kind of file that can carry a block of EXIF, by its kind."""
    profile = b"\nexif\n%8d\n%s\n" % (len(block) + 6, (b"Exif\0\0" + block).hex().encode())
    return {
        "jpeg": jpeg((0xE1, b"Exif\0\0" + block)),
        "png": png(chunk(b"eXIf", block)),
        "png behind": png(behind=[chunk(b"eXIf", block)]),
        "png text": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        "webp": webp((b"EXIF", block), flags=0x08),
        "webp with head": webp((b"EXIF", b"Exif\0\0" + block), flags=0x08),
    }
