"""A picture file cut down to what makes its pixels, so that nothing else in it can lose or change them.

Texts, profiles, thumbnails, EXIF and XMP are left out unread, in six kinds of container; a text that fills memory when it is
unpacked is not unpacked. Which side is up is the one thing that is taken from them, and is written back as an EXIF block
of that alone. A file that is not built as its kind is comes back as it is: the decoder says what is wrong with it.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

ORIENTATION = 0x0112  # tag of EXIF and TIFF: 1 is upright, 2 to 8 are mirrored or turned
TURNS = range(2, 9)
LONGEST_TEXT = 1 << 20  # bytes of an unpacked text of a PNG that may say which side is up
PNG = b"\x89PNG\r\n\x1a\n"
JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")  # a bare stream, and one in boxes
JXL_BOXES = (b"JXL ", b"ftyp", b"jxll", b"jxlc", b"jxlp")
LEAST_JXL = 12  # bytes of a stream, more than the longest size takes
TIFF = {b"II*\0": "<", b"MM\0*": ">"}
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([2-8])')
INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # types of a tag
# Tags of TIFF about pixels: sizes, samples, compressions and where the pieces lie.
PIXEL_TAGS = {*range(254, 260), 262, 266, ORIENTATION, *range(277, 280), 273, 284, 292, 293, 317, 318, 319, 320}
PIXEL_TAGS |= {*range(322, 326), 332, 338, 339, 340, 341, 347, *range(512, 522), *range(529, 533), 50674}
NO_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers of JPEG that stand alone
# Of WebP's extended header: bits that announce a profile, EXIF and XMP.
ANNOUNCED, WITH_EXIF = 0x20 | 0x08 | 0x04, 0x08
RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}  # width to height in JPEG XL


class _Broken(Exception):
    """A container that is not built as its kind is."""


def bare(content: bytes) -> bytes:
    """The file with its pixels and with its orientation alone, or as it is."""
    with suppress(_Broken, struct.error, IndexError):
        for head, cut in KINDS.items():
            if re.match(head, content, re.DOTALL):
                return cut(content)
    return content


def text_first(content: bytes) -> bytes:
    """A file whose header alone shows what its text does to a reader: a PNG may have some behind its pixels."""
    if not content.startswith(PNG):
        return content
    chunks = list(_chunks(content))
    rest = [chunk.whole for chunk in chunks if chunk.name not in (b"IDAT", b"IEND")]
    return PNG + b"".join([*rest, *(chunk.whole for chunk in chunks if chunk.name == b"IDAT")])


def jxl_size(content: bytes) -> tuple[int, int]:
    """Width and height that a JPEG XL file announces; its reader has decoded all when it tells. Raises ValueError."""
    try:
        if content.startswith(JXL[1]):
            starts = {b"jxlc": 0, b"jxlp": 4}  # of the stream within them; a header may lie in several
            content = b"".join(box.data[starts[box.name] :] for box in _boxes(content) if box.name in starts)
        if not content.startswith(JXL[0]) or len(content) < LEAST_JXL:
            raise _Broken
        bits = _Bits(int.from_bytes(content[2:32], "little"))
        small = bits.take(1)

        def side() -> int:
            return 8 * (bits.take(5) + 1) if small else bits.take((9, 13, 18, 30)[bits.take(2)]) + 1

        height = side()
        ratio = bits.take(3)
        return (height * RATIOS[ratio][0] // RATIOS[ratio][1] if ratio else side()), height
    except (_Broken, struct.error):
        raise ValueError("no size in its header") from None


class _Segment(NamedTuple):
    """A chunk, a segment or a box of a file."""

    name: bytes
    data: bytes
    whole: bytes  # with what stands around the data


class _Bits:
    """A number read from its lowest bits."""

    def __init__(self, value: int) -> None:
        self.value = value

    def take(self, count: int) -> int:
        taken = self.value & ((1 << count) - 1)
        self.value >>= count
        return taken


def _turn(exif: bytes, xmp: bytes) -> int:
    """The orientation that metadata tell; 1 where they tell none, or none that can be read."""
    with suppress(KeyError, struct.error):
        order = TIFF[exif[:4]]
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from(f"{order}H", exif, place)[0] == ORIENTATION:
                return _integer(exif, place, order)
    found = IN_XMP.search(xmp)
    return int(found[1]) if found else 1


def _integer(content: bytes, place: int, order: str) -> int:
    """The first number of the tag at `place`, or 1. Raises KeyError for a tag of another type."""
    kind, count = struct.unpack_from(f"{order}HI", content, place + 2)
    letter = INTEGERS[kind]
    at = place + 8
    if count * struct.calcsize(letter) > 4:
        (at,) = struct.unpack_from(f"{order}I", content, at)
    (value,) = struct.unpack_from(order + letter, content, at)
    return value if count and value in TURNS else 1


def _exif(turn: int) -> bytes:
    """A block of EXIF with the orientation alone."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, ORIENTATION, 3, 1, turn, 0, 0)


def _png(content: bytes) -> bytes:
    exif, xmp, kept = b"", b"", []
    for chunk in _chunks(content):
        if chunk.name[:1].isupper() or chunk.name == b"tRNS":  # the others are not needed for pixels
            kept.append(chunk.whole)
        elif chunk.name == b"eXIf":
            exif = chunk.data
        elif chunk.name in (b"tEXt", b"zTXt", b"iTXt"):
            key, _, text = chunk.data.partition(b"\0")
            if key == b"XML:com.adobe.xmp":
                xmp = _text(chunk.name, text)
            elif key == b"Raw profile type exif" and not exif:
                with suppress(ValueError):  # a name, a length, and digits in lines
                    exif = bytes.fromhex("".join(_text(chunk.name, text).decode("latin-1").split("\n")[3:]))
    turn = _turn(exif.removeprefix(EXIF), xmp)
    if turn != 1 and kept:
        data = _exif(turn)
        checksum = zlib.crc32(b"eXIf" + data)
        kept.insert(1, struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", checksum))
    return PNG + b"".join(kept)


def _chunks(content: bytes) -> Iterator[_Segment]:
    """Of a PNG, to the end of the file if it has none."""
    place = len(PNG)
    while place + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + length]
        yield _Segment(name, data, content[place : place + 12 + length])
        place += 12 + length
        if name == b"IEND":
            return


def _text(kind: bytes, text: bytes) -> bytes:
    """What follows a key, unpacked as far as it may be long."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, text = text[:1] == b"\1", b"\0" + [*text[2:].split(b"\0", 2), b"", b""][2]
    if not packed:
        return text
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(text[1:], LONGEST_TEXT)
    return b""


def _jpeg(content: bytes) -> bytes:
    """Up to the first scan; what follows are pixels, or the further pictures of an MPO."""
    exif, xmp, kept, place = b"", b"", [], 2
    while True:
        if (place := content.find(b"\xff", place)) < 0:  # libjpeg skips what is no marker too
            raise _Broken
        marker = content[place + 1]
        if marker in (0x00, 0xFF):
            place += 1
            continue
        if marker in NO_LENGTH:
            place += 2
            continue
        (length,) = struct.unpack_from(">H", content, place + 2)
        end = place + 2 + length
        if marker == 0xDA:
            break
        data = content[place + 4 : end]
        if marker == 0xE1 and data.startswith(EXIF):
            exif += data.removeprefix(EXIF)
        elif marker == 0xE1 and data.startswith(XMP):
            xmp = data
        about_colours = (marker == 0xE0 and data.startswith(b"JFIF\0") and len(data) >= 14) or (
            marker == 0xEE and data.startswith(b"Adobe") and len(data) >= 12
        )
        if about_colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(content[place:end])
        place = end
    turn = _turn(exif.removeprefix(EXIF), xmp)
    if turn != 1:
        data = EXIF + _exif(turn)
        kept.insert(0, struct.pack(">HH", 0xFFE1, 2 + len(data)) + data)
    return b"".join([b"\xff\xd8", *kept, content[place:]])


def _webp(content: bytes) -> bytes:
    exif, xmp, kept, place = b"", b"", [], 12
    while place + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, place)
        data = content[place + 8 : place + 8 + length]
        if name == b"EXIF":
            exif = data.removeprefix(EXIF)
        elif name == b"XMP ":
            xmp = data
        elif name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            if len(data) < length:
                raise _Broken  # what is put behind it would pass for its end
            kept.append(content[place : place + 8] + data + bytes(length % 2))
        place += 8 + length + length % 2
    turn = _turn(exif, xmp)
    flags = kept[0][8] & ~ANNOUNCED
    if turn != 1:
        data = _exif(turn)
        kept.append(b"EXIF" + struct.pack("<I", len(data)) + data)
        flags |= WITH_EXIF
    kept[0] = kept[0][:8] + bytes([flags]) + kept[0][9:]
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(content: bytes) -> bytes:
    """With the directory of the first page written anew behind everything."""
    order = TIFF[content[:4]]
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = []
    for place in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from(f"{order}H", content, place)
        if tag == ORIENTATION:
            with suppress(KeyError, struct.error):
                turn = _integer(content, place, order)
                entries.append(struct.pack(f"{order}HHIHH", tag, 3, 1, turn, 0))
        elif tag in PIXEL_TAGS:
            entries.append(content[place : place + 12])
    padding = bytes(len(content) % 2)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    head = content[:4] + struct.pack(f"{order}I", len(content) + len(padding))
    return head + content[8:] + padding + directory


def _heif(content: bytes) -> bytes:
    """Of AVIF and HEIC, whose turns are properties of the picture: the list of items calls EXIF and XMP by other names."""
    pieces = []
    for box in _boxes(content):
        named = box.name == b"meta"
        pieces.append(box.whole.replace(b"Exif", b"none").replace(b"mime", b"none") if named else box.whole)
    return b"".join(pieces)


def _jxl(content: bytes) -> bytes:
    """In boxes; a bare stream holds nothing else."""
    return b"".join(box.whole for box in _boxes(content) if box.name in JXL_BOXES)


def _boxes(content: bytes) -> Iterator[_Segment]:
    place = 0
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, place + 8)
            head = 16
        end = place + length if length else len(content)
        if length and length < head:
            raise _Broken
        yield _Segment(name, content[place + head : end], content[place:end])
        place = end


KINDS = {
    rb"\x89PNG\r\n\x1a\n": _png,
    rb"\xff\xd8": _jpeg,
    rb"RIFF....WEBPVP8X": _webp,
    rb"II\*\0|MM\0\*": _tiff,
    rb"....ftyp": _heif,
    rb"\0\0\0\x0cJXL \r\n\x87\n": _jxl,
}  # by how they begin
